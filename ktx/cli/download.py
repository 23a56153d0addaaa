"""ktx download: fetch a model from a hub."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktx.cli.arguments import flag
from ktx.errors import DoesNotFit, UsageError
from ktx.hardware import format_bytes
from ktx.hub.file_selection import SPLIT, AmbiguousQuant, File, FileSelection, Quantization, choose
from ktx.hub.listing import Hub, Plan

SUMMARY = "fetch a model from a hub"
EPILOG = (
    "Of a GGUF repository one quantisation is fetched: REPO:Q4_K_M, or --include. A download that was broken goes on where it was"
    " when the same command is given again. HF_TOKEN signs in, HF_ENDPOINT names a mirror; MODELSCOPE_API_TOKEN is ModelScope's."
)
HUBS = ("hf", "modelscope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME, or OWNER/NAME:QUANTISATION")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help='fetch what fits, such as "*Q4_K_M*"; several times: any of them',
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="never fetch what fits; several times: any of them",
    )
    parser.add_argument("--hub", choices=HUBS, default="hf", help="hf: Hugging Face (default), modelscope: ModelScope")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the newest)")
    parser.add_argument(
        "--to", metavar="FOLDER", help="where files go (default: the hub's own cache, which other programs share)"
    )
    flag(parser, "--dry-run", help="show what would be fetched and leave")


def run(args: argparse.Namespace) -> int:
    """Shows what is to come, fetches it, and says how to use it. Exit status 3 when the disk is too small for it."""
    repo, colon, tag = args.repo.strip().removesuffix("/").partition(":")
    if colon and not tag:
        raise UsageError(
            f"{args.repo}: name a quantisation behind the colon, such as {repo}:Q4_K_M, or leave the colon out"
        )
    if tag and args.include:
        raise UsageError(f"{repo}:{tag} and --include both say what is wanted; give one of them")
    hub = _hub(args.hub)
    to = Path(args.to).expanduser().resolve() if args.to else None
    listing = hub.look(repo, args.revision)
    try:
        choice = choose(repo, listing.files, tag, args.include, args.exclude)
    except AmbiguousQuant as error:
        print_quantisations(error.found)
        name = error.found[0].name
        raise UsageError(f'{error}, such as {repo}:{name} or --include "*{name}*"') from error
    plan = hub.plan(listing, choice.files, to)
    print_files(choice, plan)
    check_disk(plan)
    if args.dry_run:
        return 0
    with progress(plan) as advance:
        folder = hub.fetch(listing, choice.files, plan, to, advance)
    print(f"{repo} is in {folder}")
    if words := following(folder, choice):
        print(f"next: {shlex.join(words)}")
    return 0


def _hub(name: str) -> Hub:
    if name == "modelscope":
        from ktx.hub.modelscope import ModelScope

        return ModelScope()
    from ktx.hub.huggingface import HuggingFace

    return HuggingFace()


def check_disk(plan: Plan) -> None:
    """DoesNotFit, with the numbers, when the disk has less room than what is still to come."""
    place = next(folder for folder in (plan.place, *plan.place.parents) if folder.exists())
    need, free = plan.total - plan.began, shutil.disk_usage(place).free
    if need > free:
        raise DoesNotFit(
            f"{format_bytes(need)} are still to come, {format_bytes(free)} are free on the disk of {place}; make room, or name another place with --to"
        )


def following(folder: Path, choice: FileSelection) -> list[str]:
    """The command that talks to what was fetched; no words when that is no model."""
    ggufs = sorted(file.path for file in choice.weights if file.kind == ".gguf")
    config = any(file.path == "config.json" for file in choice.files)
    if not ggufs:
        tensors = any(file.kind == ".safetensors" for file in choice.weights)
        return ["ktx", "chat", "--model", str(folder)] if tensors and config else []
    model = ["--model", str(folder)] if config else []
    return ["ktx", "chat", *model, "--weights", str(folder / ggufs[0])]


# ---- what is shown


def print_quantisations(found: Sequence[Quantization]) -> None:
    table = _table("quantisation", "size", "files")
    for one in found:
        table.add_row(one.name, format_bytes(one.size), str(len(one.files)))
    _console(sys.stderr).print(table)


def print_files(choice: FileSelection, plan: Plan) -> None:
    """Files and sizes, parts of one model in a row, then the sums."""
    missing = set(plan.files)
    table = _table("file", "size", "")
    for group in _folded(choice.files):
        there = sum(file not in missing for file in group)
        told = "is there" if there == len(group) else f"{there} of {len(group)} are there" if there else ""
        name = group[0].path if len(group) == 1 else f"{group[0].path} ... ({len(group)} files)"
        table.add_row(name, format_bytes(sum(file.size for file in group)), told)
    console = _console(sys.stdout)
    console.print(table)
    began = f", of which {format_bytes(plan.began)} came before" if plan.began else ""
    console.print(
        f"{format_bytes(sum(file.size for file in choice.files))} in all, {format_bytes(plan.total)} to fetch{began}"
    )
    if choice.pickles:
        names = ", ".join(file.path for file in choice.pickles[:3]) + (" ..." if len(choice.pickles) > 3 else "")
        console.print(
            f"left out: {len(choice.pickles)} pickle files ({names}), which run code when they are read;"
            f' --include "*{choice.pickles[0].kind}" asks for them'
        )


def _folded(files: Sequence[File]) -> list[list[File]]:
    groups: dict[str, list[File]] = {}
    for file in files:
        split = SPLIT.match(file.path.removesuffix(file.kind))
        groups.setdefault(split[1] + file.kind if split else file.path, []).append(file)
    return list(groups.values())


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("size", "files") else "left", overflow="fold")
    return table


def _console(stream: Any) -> Any:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else 160, highlight=False, markup=False)


@contextmanager
def progress(plan: Plan) -> Iterator[Callable[[int], None]]:
    """One bar in bytes with the speed and the time left on a terminal, a line at every tenth elsewhere. Ctrl-C is answered with how to go on."""
    try:
        with _bar(plan) if sys.stderr.isatty() else _lines(plan) as advance:
            yield advance
    except KeyboardInterrupt:
        print("ktx: stopped; the same command goes on from here", file=sys.stderr)
        raise


@contextmanager
def _bar(plan: Plan) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fetching", total=plan.total, completed=plan.began)
        yield lambda nbytes: bar.advance(task, nbytes)


@contextmanager
def _lines(plan: Plan) -> Iterator[Callable[[int], None]]:
    import threading
    import time

    start, lock, done = time.monotonic(), threading.Lock(), plan.began
    told = 10 * done // max(1, plan.total)

    def advance(nbytes: int) -> None:
        nonlocal done, told
        with lock:
            done += nbytes
            if (tenths := 10 * done // max(1, plan.total)) > told:
                told = tenths
                speed = (done - plan.began) / max(1e-9, time.monotonic() - start)
                left = (plan.total - done) / max(1.0, speed)
                print(
                    f"fetched {format_bytes(done)} of {format_bytes(plan.total)}, {speed / 1e9:.3f} GB/s, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

    yield advance
