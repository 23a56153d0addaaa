"""python -m ktx.local_chat: `ktx chat` under the name and with the flags that KTransformers users know."""

from __future__ import annotations

from collections.abc import Sequence

from ktx.__main__ import run_as


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags of `ktx chat` and runs it."""
    return run_as("python -m ktx.local_chat", "chat", argv)


if __name__ == "__main__":
    raise SystemExit(main())
