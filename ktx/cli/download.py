"""ktx download: download a model from Hugging Face or ModelScope."""

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
from ktx.hub.file_selection import SPLIT, AmbiguousQuant, File, FileSelection, Quantization, select_files
from ktx.hub.listing import DownloadPlan, Hub

SUMMARY = "download a model from a hub"
EPILOG = (
    "Of a GGUF repository with several quantizations one must be chosen: REPO:Q4_K_M, or --include. The same command"
    " resumes an interrupted download. The environment variable HF_TOKEN (ModelScope: MODELSCOPE_API_TOKEN) is the"
    " access token, HF_ENDPOINT the URL of a mirror."
    " Example: ktx download unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M --to models/qwen3"
)
HUBS = ("hf", "modelscope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx download` to its parser."""
    parser.epilog = EPILOG
    parser.add_argument("repo", metavar="REPO", help="repository: OWNER/NAME, or OWNER/NAME:QUANTIZATION")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help='download only files whose path matches GLOB, such as "*Q4_K_M*"; may be repeated: any of them',
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="skip files whose path matches GLOB; may be repeated: any of them",
    )
    parser.add_argument(
        "--hub", choices=HUBS, default="hf", help="hf: Hugging Face, modelscope: ModelScope (default hf)"
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit (default: the newest of the default branch)"
    )
    parser.add_argument(
        "--to", metavar="FOLDER", help="target folder (default: the hub's own cache, shared with other programs)"
    )
    flag(parser, "--dry-run", help="list the files and sizes to download, then exit")


def run(args: argparse.Namespace) -> int:
    """Lists the files, downloads them and prints the command that uses them.

    Exit status 3 when the disk has too little free space.
    """
    repo, colon, tag = args.repo.strip().removesuffix("/").partition(":")
    if colon and not tag:
        raise UsageError(
            f"{args.repo}: give a quantization after the colon, such as {repo}:Q4_K_M, or leave the colon out"
        )
    if tag and args.include:
        raise UsageError(f"{repo}:{tag} and --include both select files; give one of them")
    hub = _create_hub(args.hub)
    target = Path(args.to).expanduser().resolve() if args.to else None
    listing = hub.list_repo(repo, args.revision)
    try:
        selection = select_files(repo, listing.files, tag, args.include, args.exclude)
    except AmbiguousQuant as error:
        print_quantizations(error.found)
        name = error.found[0].name
        raise UsageError(f'{error}, such as {repo}:{name} or --include "*{name}*"') from error
    plan = hub.plan(listing, selection.files, target)
    print_files(selection, plan)
    check_disk(plan)
    if args.dry_run:
        return 0
    with progress(plan) as advance:
        folder = hub.fetch(listing, selection.files, plan, target, advance)
    print(f"{repo}: downloaded to {folder}")
    if command := next_command(folder, selection):
        print(f"next: {shlex.join(command)}")
    return 0


def _create_hub(name: str) -> Hub:
    """Returns the client of a hub; imported late, because only one of the two need be installed."""
    if name == "modelscope":
        from ktx.hub.modelscope import ModelScope

        return ModelScope()
    from ktx.hub.huggingface import HuggingFace

    return HuggingFace()


def check_disk(plan: DownloadPlan) -> None:
    """Raises DoesNotFit when the disk has less free space than the bytes that remain to be downloaded."""
    existing_folder = next(folder for folder in (plan.target_folder, *plan.target_folder.parents) if folder.exists())
    need, free = plan.total_bytes - plan.downloaded_bytes, shutil.disk_usage(existing_folder).free
    if need > free:
        raise DoesNotFit(
            f"{format_bytes(need)} remain to be downloaded, but {format_bytes(free)} are free on the disk of"
            f" {existing_folder}; free some space, or give another folder with --to"
        )


def next_command(folder: Path, selection: FileSelection) -> list[str]:
    """Returns the arguments of the command that chats with the downloaded model; empty if it is no complete model."""
    ggufs = sorted(file.path for file in selection.weights if file.kind == ".gguf")
    config = any(file.path == "config.json" for file in selection.files)
    if not ggufs:
        tensors = any(file.kind == ".safetensors" for file in selection.weights)
        return ["ktx", "chat", "--model", str(folder)] if tensors and config else []
    model = ["--model", str(folder)] if config else []
    return ["ktx", "chat", *model, "--weights", str(folder / ggufs[0])]


# ---- output


def print_quantizations(quantizations: Sequence[Quantization]) -> None:
    """Prints a table of a repository's quantizations to standard error."""
    table = _create_table("quantization", "size", "files")
    for quantization in quantizations:
        table.add_row(quantization.name, format_bytes(quantization.size), str(len(quantization.files)))
    _create_console(sys.stderr).print(table)


def print_files(selection: FileSelection, plan: DownloadPlan) -> None:
    """Prints the selected files with sizes, the parts of a split file in one row, totals, and the skipped pickles."""
    missing = set(plan.files)
    table = _create_table("file", "size", "")
    for group in _group_parts(selection.files):
        num_present = sum(file not in missing for file in group)
        status = (
            "present" if num_present == len(group) else f"{num_present} of {len(group)} present" if num_present else ""
        )
        name = group[0].path if len(group) == 1 else f"{group[0].path} ... ({len(group)} files)"
        table.add_row(name, format_bytes(sum(file.size for file in group)), status)
    console = _create_console(sys.stdout)
    console.print(table)
    resumed = (
        f", of which {format_bytes(plan.downloaded_bytes)} are already downloaded" if plan.downloaded_bytes else ""
    )
    console.print(
        f"{format_bytes(sum(file.size for file in selection.files))} in total,"
        f" {format_bytes(plan.total_bytes)} to download{resumed}"
    )
    if selection.pickles:
        names = ", ".join(file.path for file in selection.pickles[:3]) + (" ..." if len(selection.pickles) > 3 else "")
        console.print(
            f"skipped: {len(selection.pickles)} pickle files ({names}), because reading them runs code;"
            f' --include "*{selection.pickles[0].kind}" downloads them'
        )


def _group_parts(files: Sequence[File]) -> list[list[File]]:
    """Groups the parts of split files; any other file is a group of its own."""
    groups: dict[str, list[File]] = {}
    for file in files:
        split = SPLIT.match(file.path.removesuffix(file.kind))
        groups.setdefault(split[1] + file.kind if split else file.path, []).append(file)
    return list(groups.values())


def _create_table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("size", "files") else "left", overflow="fold")
    return table


def _create_console(stream: Any) -> Any:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else 160, highlight=False, markup=False)


@contextmanager
def progress(plan: DownloadPlan) -> Iterator[Callable[[int], None]]:
    """Shows the download's progress: a bar on a terminal, else a line at every 10 %.

    Yields a function that takes the number of bytes that have arrived. On Ctrl-C it prints how to resume.
    """
    try:
        with _show_bar(plan) if sys.stderr.isatty() else _print_lines(plan) as advance:
            yield advance
    except KeyboardInterrupt:
        print("ktx: stopped; the same command resumes the download", file=sys.stderr)
        raise


@contextmanager
def _show_bar(plan: DownloadPlan) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar, which starts at the bytes that an earlier download left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("downloading", total=plan.total_bytes, completed=plan.downloaded_bytes)
        yield lambda nbytes: bar.advance(task, nbytes)


@contextmanager
def _print_lines(plan: DownloadPlan) -> Iterator[Callable[[int], None]]:
    """Prints a line per tenth of the download, for logs, in which a bar would be unreadable."""
    import threading
    import time

    start_s, lock, done_bytes = time.monotonic(), threading.Lock(), plan.downloaded_bytes
    printed_tenths = 10 * done_bytes // max(1, plan.total_bytes)

    def advance(nbytes: int) -> None:
        """Adds downloaded bytes, from any of the download's threads; prints a line at each new tenth."""
        nonlocal done_bytes, printed_tenths
        with lock:
            done_bytes += nbytes
            if (tenths := 10 * done_bytes // max(1, plan.total_bytes)) > printed_tenths:
                printed_tenths = tenths
                bytes_per_s = (done_bytes - plan.downloaded_bytes) / max(1e-9, time.monotonic() - start_s)
                left_s = (plan.total_bytes - done_bytes) / max(1.0, bytes_per_s)
                print(
                    f"downloaded {format_bytes(done_bytes)} of {format_bytes(plan.total_bytes)},"
                    f" {bytes_per_s / 1e9:.3f} GB/s, {left_s:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

    yield advance
