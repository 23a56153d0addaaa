"""The `ktx` command: parses the arguments and runs a subcommand."""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ktx.cli.arguments import Parser, debug_option
from ktx.environment import check_environment
from ktx.errors import KtxError

COMMANDS = ("chat", "serve", "download", "plan", "doctor", "verify", "bench")


def build_parser(wanted: Sequence[str] = COMMANDS) -> Parser:
    """Returns the parser of `ktx` with the subcommands in `wanted`, whose modules it imports."""
    import ktx

    parser = Parser(prog="ktx", description=ktx.__doc__)
    parser.add_argument("--version", action="version", version=f"ktx {ktx.__version__}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        metavar="SHELL",
        help="print a completion script for bash, zsh or tcsh and exit",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name in wanted:
        module = importlib.import_module(f"ktx.cli.{name}")
        sub = commands.add_parser(name, help=module.SUMMARY, description=(module.__doc__ or "").partition(": ")[2])
        module.add_arguments(sub)
        debug_option(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0 success, 1 failure, 2 usage error, 3 does not fit in memory, 4 bad file, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.print_completion:
        import shtab

        print(shtab.complete(parser, shell=args.print_completion))
        return 0
    if not args.command:
        parser.print_help()
        return 2
    return run_guarded(args)


def run_as(prog: str, command: str, argv: Sequence[str] | None = None) -> int:
    """Runs one command under another program name, such as `python -m MODULE`."""
    module = importlib.import_module(f"ktx.cli.{command}")
    parser = Parser(prog=prog, description=(module.__doc__ or "").partition(": ")[2])
    module.add_arguments(parser)
    debug_option(parser)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.command = command
    return run_guarded(args)


def run_guarded(args: object) -> int:
    """Runs a parsed command and returns its exit status.

    An error that the user can fix (KtxError) is printed as one line, not as a traceback, unless --debug is given.
    """
    module = importlib.import_module(f"ktx.cli.{args.command}")  # type: ignore[attr-defined]
    debug = getattr(args, "debug", False)
    _fix_streams()
    if not debug:
        _shorten_warnings()
    # Importing torch and transformers creates a million permanent objects: with the default thresholds the garbage
    # collector takes 0.6 s.
    gc.set_threshold(100_000, 20, 100)
    try:
        check_environment()
        return module.run(args)
    except KtxError as error:
        if debug:
            raise
        print(f"ktx: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has closed the pipe: discard the output that Python still buffers
        devnull = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(devnull, stream.fileno())
        return 0
    except MemoryError:
        print(
            "ktx: out of memory; use a smaller quantization, a shorter --max-context, or close other programs",
            file=sys.stderr,
        )
        return 3


def _fix_streams() -> None:
    """Makes the standard streams usable: opens closed ones on /dev/null; stdout prints ? for unsupported characters."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _shorten_warnings() -> None:
    """Prints each warning as one line, because a command's user has no use for a line of ktx's source."""
    import warnings

    def show(message: object, category: type, *rest: object) -> None:
        print(f"ktx: warning: {message}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    raise SystemExit(main())
