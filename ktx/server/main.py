"""python -m ktx.server.main: `ktx serve` under the name that KTransformers users know."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ktx.__main__ import guarded
from ktx.commands import serve
from ktx.commands.arguments import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags of `ktx serve` and runs it."""
    parser = Parser(prog="python -m ktx.server.main", description=(serve.__doc__ or "").partition(": ")[2])
    serve.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.command = "serve"
    return guarded(args)


if __name__ == "__main__":
    raise SystemExit(main())
