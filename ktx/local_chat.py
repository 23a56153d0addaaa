"""python -m ktx.local_chat: `ktx chat` under the name and with the flags that KTransformers users know."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ktx.__main__ import guarded
from ktx.commands import chat
from ktx.commands.arguments import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags of `ktx chat` and runs it."""
    parser = Parser(
        prog="python -m ktx.local_chat", description=chat.__doc__.partition(": ")[2] if chat.__doc__ else ""
    )
    chat.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.command = "chat"
    return guarded(args)


if __name__ == "__main__":
    raise SystemExit(main())
