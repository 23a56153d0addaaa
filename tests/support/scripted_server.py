"""`ktx serve` with answers from a script in place of a model: `python -m tests.support.scripted_server`.

It has the options of `ktx serve`; the tokenizer is that of --model, or the demo model's.
"""

from __future__ import annotations

from ktx.cli import serve
from ktx.cli.arguments import Parser
from tests.support.scripted_engine import make_engine


def main() -> int:
    """Serves until a signal arrives, then returns exit status 0."""
    parser = Parser(prog="python -m tests.support.scripted_server", description=__doc__)
    serve.add_arguments(parser)
    parser.add_argument("--script", metavar="FILE", help="JSON list of {match, text} (default: the prompt is echoed)")
    parser.add_argument("--pace", type=float, default=0.0, metavar="SECONDS", help="seconds per token (default 0)")
    return serve.run(parser.parse_args(), make_engine)


if __name__ == "__main__":
    raise SystemExit(main())
