"""python -m ktx.local_chat: `ktx chat` under the module name, and with the flags, of KTransformers."""

from __future__ import annotations

from collections.abc import Sequence

from ktx.__main__ import run_as


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `ktx chat` and returns its exit status."""
    return run_as("python -m ktx.local_chat", "chat", argv)


if __name__ == "__main__":
    raise SystemExit(main())
