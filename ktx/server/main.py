"""python -m ktx.server.main: the same command as `ktx serve`, under KTransformers' name."""

from __future__ import annotations

from collections.abc import Sequence

from ktx.__main__ import run_as


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags of `ktx serve` and runs it."""
    return run_as("python -m ktx.server.main", "serve", argv)


if __name__ == "__main__":
    raise SystemExit(main())
