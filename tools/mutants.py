"""How much of a change to the code its own tests notice: one-place changes (mutants) of a folder's functions.

For each folder, `-n` places are drawn with `--seed`: a comparison or an operator is turned, a constant is off by one, a
`not` or a call is gone. The tests of the mirror folder (`tests/FOLDER`) that call the changed function run on each
mutant, the fastest ones first, for at most `--seconds`. A mutant is caught if a test fails, or if the tests do not end.
One that changes nothing that can be seen is named in `tools/mutants_equivalent.txt`, with the reason, and is drawn no
more.

    python -m tools.mutants engine cache --seed 1 -n 60

The checkout is not touched: mutants are written to copies of it. A process that has imported torch and transformers
forks for each mutant, which saves the seconds of the imports.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
TESTS = {  # folder of ktx -> tests that belong to it, where these are not only tests/FOLDER
    "quant": ("tests/weights", "tests/kernels"),
    "families": ("tests/families",),
    "utils": ("tests/utils", "tests/top"),
    "injection": ("tests/injection", "tests/loader"),
}
TIMEOUT_FACTOR = 4  # tests that take this many times the seconds of the unchanged code do not end
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """A change of one place.

    Attributes:
        path: the file, relative to the checkout.
        line: its line.
        change: what was changed.
        code: the line's text.
        function: "path:line" of the innermost function around it; empty at the top of the module.
        source: the file's text with the change.
    """

    path: str
    line: int
    change: str
    code: str
    function: str
    source: str

    @property
    def key(self) -> str:
        """Identifies the mutant as long as its line does not change."""
        return f"{self.path} [{self.change}] {self.code}"

    @property
    def label(self) -> str:
        """What a line of the output says of the mutant."""
        return f"{self.path}:{self.line} [{self.change}] {self.code}"


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, str]]:
    """Yields (node, change, function) of all places that `mutate` can change; annotations and texts are none."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str, str]]:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = [item.lineno for item in node.decorator_list]
            function = str(min([node.lineno, *decorators]))
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, type(node.ops[0]).__name__, function
        elif isinstance(node, ast.BoolOp) or (isinstance(node, ast.BinOp) and _is_swappable(node)):
            yield node, type(node.op).__name__, function
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, "not", function
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
            yield node, f"not {node.value}" if isinstance(node.value, bool) else f"{node.value} + 1", function
        elif isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant):  # a docstring
                return
            if isinstance(node.value, ast.Call):
                yield node, "call gone", function
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, function)

    yield from visit(tree, "")


def _is_swappable(node: ast.BinOp) -> bool:
    """Whether an operator has a counterpart, and no operand is a text, whose change would only be seen in messages."""
    sides = (node.left, node.right)
    return type(node.op) in SWAPS and not any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def mutate(path: Path, index: int) -> Mutant:
    """Returns the mutant of the file's place number `index`."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    node, change, function = next(item for i, item in enumerate(places(tree)) if i == index)
    line = int(node.lineno)  # type: ignore[attr-defined]
    new = copy.copy(node)
    if isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1  # type: ignore[operator]
    elif isinstance(node, ast.UnaryOp):
        new = node.operand  # type: ignore[assignment]
    else:
        new = ast.copy_location(ast.Pass(), node)  # type: ignore[assignment]
    if isinstance(node, ast.UnaryOp | ast.Expr):
        tree = _Replace(node, new).visit(tree)
    name = str(path.relative_to(ROOT))
    code = text.splitlines()[line - 1].strip()
    source = ast.unparse(ast.fix_missing_locations(tree))
    return Mutant(name, line, change, code, f"{name}:{function}" if function else "", source)


class _Replace(ast.NodeTransformer):
    """Replaces one node of a tree."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        """Returns the new node for the old one."""
        return self.new if node is self.old else super().generic_visit(node)


def draw(folder: str, count: int, seed: int, skip: frozenset[str]) -> list[Mutant]:
    """Draws `count` mutants of the files of ktx/FOLDER (or of the file ktx/FOLDER.py), each place at most once."""
    base = ROOT / "ktx" / folder
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    if not files or not files[0].exists():
        raise SystemExit(f"mutants: ktx/{folder} is no folder and no module")
    pool = [(file, i) for file in files for i, _ in enumerate(places(ast.parse(file.read_text(encoding="utf-8"))))]
    random.Random(seed).shuffle(pool)
    found = []
    for file, index in pool:
        mutant = mutate(file, index)
        if mutant.key not in skip:
            found.append(mutant)
        if len(found) == count:
            break
    return found


# ---- which tests call a function


# For each Python process that a test starts (a command, a server): writes the functions that it calls to a file, with
# the test's name, which pytest puts into the environment.
IN_CHILDREN = """
import os
if folder := os.environ.get("KTX_MUTANTS_CALLS"):
    import atexit, json, sys, threading

    calls = set()

    def profile(frame, event, _):
        if event == "call":
            calls.add(frame.f_code)

    def write():
        sys.setprofile(None)
        names = [f"{code.co_filename}:{code.co_firstlineno}" for code in set(calls) if "/ktx/" in code.co_filename]
        with open(os.path.join(folder, str(os.getpid())), "w") as file:
            json.dump([os.environ.get("PYTEST_CURRENT_TEST", ""), names], file)

    atexit.register(write)
    threading.setprofile(profile)
    sys.setprofile(profile)
"""


class Recorder:
    """A pytest plugin that records the functions of ktx that each test calls, and how long it takes.

    A fixture's calls count for the test that sets it up and for each later test of the same module, because these see
    its values.
    """

    def __init__(self, root: Path):
        self.prefix = f"{root}/ktx/"
        self.tests: dict[str, tuple[float, set[str]]] = {}
        self.fixtures: dict[str, set[Any]] = {}  # test file -> calls of its fixtures so far
        self.calls: set[Any] = set()

    def profile(self, frame: Any, event: str, _: Any) -> None:
        """Profile function of Python: stores the code object of each call."""
        if event == "call":
            self.calls.add(frame.f_code)

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        """Starts the recording of a test."""
        self.calls, self.start = set(), time.monotonic()
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)

    def pytest_runtest_call(self, item: Any) -> None:
        """Separates the calls of fixtures from those of the test."""
        self.fixtures.setdefault(item.nodeid.partition("::")[0], set()).update(self.calls)

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        """Ends the recording of a test."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        called = {
            f"ktx/{code.co_filename.removeprefix(self.prefix)}:{code.co_firstlineno}"
            for code in self.calls | self.fixtures.get(nodeid.partition("::")[0], set())
            if code.co_filename.startswith(self.prefix)
        }
        self.tests[nodeid] = time.monotonic() - self.start, called

    def add_child(self, test: str, names: list[str]) -> None:
        """Adds the calls of a process that a test started; one of a fixture counts for all tests of the module."""
        nodeid, _, phase = test.rpartition(" ")
        called = {name.removeprefix(f"{self.prefix[:-4]}") for name in names if name.startswith(self.prefix)}
        module = nodeid.partition("::")[0]
        for name, (_, known) in self.tests.items():
            if name == nodeid or (phase == "(setup)" and name.partition("::")[0] == module):
                known.update(called)


def record(root: Path, tests: Sequence[str], file: Path) -> None:
    """Runs the tests in this process, and writes test -> [seconds, functions called] as JSON."""
    import pytest

    recorder = Recorder(root)
    with tempfile.TemporaryDirectory() as folder:
        (root / "sitecustomize.py").write_text(IN_CHILDREN)
        os.environ["KTX_MUTANTS_CALLS"] = folder
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--reruns", "0", *tests], plugins=[recorder])
        (root / "sitecustomize.py").unlink()
        for child in Path(folder).iterdir():
            recorder.add_child(*json.loads(child.read_text() or '["", []]'))
    file.write_text(json.dumps({name: [seconds, sorted(called)] for name, (seconds, called) in recorder.tests.items()}))


def select(mutant: Mutant, tests: dict[str, tuple[float, list[str]]], seconds: float) -> list[str]:
    """Returns the tests that call the mutant's function, the fastest first, of `seconds` together.

    Top-level code has no calls: then all tests that call a function of its file.
    """
    if mutant.function:
        callers = [name for name, (_, called) in tests.items() if mutant.function in called]
    else:
        callers = [name for name, (_, called) in tests.items() if any(f.startswith(f"{mutant.path}:") for f in called)]
    chosen: list[str] = []
    total = 0.0
    for name in sorted(callers, key=lambda name: tests[name][0]):
        total += tests[name][0]
        if chosen and total > seconds:
            break
        chosen.append(name)
    return chosen


# ---- running


def fork_server(root: Path) -> None:
    """Reads lists of tests from stdin, one JSON line each, runs each in a fork, and prints its exit status."""
    import pytest
    import transformers  # noqa: F401

    os.chdir(root)
    for line in sys.stdin:
        tests, seconds = json.loads(line)
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--reruns", "0", *tests])
            os._exit(int(status))
        print(_wait(child, seconds), flush=True)


def _wait(child: int, seconds: float) -> int:
    """Waits for a child's status; after `seconds` kills it with its children, then -1."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


class Worker:
    """A copy of the checkout with a fork server in it."""

    def __init__(self, folder: Path):
        self.root = folder
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in [*names.split("\0")[:-1], *(str(p.relative_to(ROOT)) for p in (ROOT / "ktx").glob("_C*.so"))]:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        environ = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tools.mutants", "--fork-server", str(folder)],
            cwd=folder,
            env=environ,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, mutant: Mutant, tests: Sequence[str], seconds: float) -> int:
        """Returns pytest's exit status of the tests on a mutant: 0 if all pass; -1 if they did not end."""
        assert self.server.stdin is not None and self.server.stdout is not None
        file = self.root / mutant.path
        text = file.read_text(encoding="utf-8")
        file.write_text(mutant.source, encoding="utf-8")
        try:
            self.server.stdin.write(json.dumps([list(tests), seconds]) + "\n")
            self.server.stdin.flush()
            return int(self.server.stdout.readline())
        finally:
            file.write_text(text, encoding="utf-8")

    def record(self, tests: Sequence[str]) -> dict[str, tuple[float, list[str]]]:
        """Runs the unchanged code's tests, and returns for each its seconds and the functions that it calls."""
        file = self.root / "calls.json"
        command = [sys.executable, "-m", "tools.mutants", "--record", str(file), *tests]
        environ = os.environ | {"PYTHONPATH": str(self.root)}
        subprocess.run(command, cwd=self.root, env=environ, stdout=subprocess.DEVNULL, check=True)
        found: dict[str, tuple[float, list[str]]] = json.loads(file.read_text())
        return found

    def close(self) -> None:
        """Ends the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


def equivalent() -> frozenset[str]:
    """Keys of the mutants that change nothing; each is followed by a line with the reason, which begins with spaces."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.exists() else []
    return frozenset(line for line in lines if line and not line.startswith((" ", "#")))


def examine(folder: str, args: argparse.Namespace, workers: Sequence[Worker]) -> tuple[int, int]:
    """Runs the mutants of a folder, prints a line for each, and returns (caught, all)."""
    tests = [name for name in TESTS.get(folder, (f"tests/{folder}",)) if (ROOT / name).exists()]
    mutants = draw(folder, args.n, args.seed, equivalent())
    if args.again:
        lines = args.again.read_text(encoding="utf-8").splitlines()
        uncaught = {line.partition(" tests  ")[2] for line in lines if line.startswith(("ALIVE", "NO TEST"))}
        mutants = [mutant for mutant in mutants if mutant.label in uncaught]
    calls = workers[0].record(tests)
    free = list(workers)
    caught = 0

    def one(mutant: Mutant) -> tuple[Mutant, str, int, float]:
        chosen = select(mutant, calls, args.seconds)
        if not chosen:
            return mutant, "NO TEST", 0, 0.0
        worker = free.pop()
        try:
            start = time.monotonic()
            status = worker.run(mutant, chosen, TIMEOUT_FACTOR * args.seconds)
        finally:
            free.append(worker)
        return (
            mutant,
            "timeout" if status < 0 else "caught" if status else "ALIVE",
            len(chosen),
            time.monotonic() - start,
        )

    with ThreadPoolExecutor(len(workers)) as pool:
        for mutant, verdict, count, seconds in pool.map(one, mutants):
            caught += verdict in ("caught", "timeout")
            print(f"{verdict:7} {seconds:5.1f} s {count:4} tests  {mutant.label}", flush=True)
    return caught, len(mutants)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="folders or modules of ktx, for example engine")
    parser.add_argument("-n", type=int, default=60, help="mutants per folder (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    parser.add_argument(
        "--seconds", type=float, default=30, help="tests per mutant, in seconds of the unchanged code (default: 30)"
    )
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="only the mutants that are not caught in this output of an earlier run",
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: 2)")
    parser.add_argument("--fork-server", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fork_server or args.record:
        fork_server(args.fork_server) if args.fork_server else record(Path.cwd(), args.folders, args.record)
        return 0
    if not args.folders:
        parser.error("name at least one folder of ktx, for example engine")
    scores = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        workers = []
        for number in range(args.jobs):
            (folder := Path(temporary) / str(number)).mkdir()
            workers.append(Worker(folder))
        try:
            for name in args.folders:
                scores[name] = examine(name, args, workers)
        finally:
            for worker in workers:
                worker.close()
    width = max(map(len, scores))
    for name, (caught, total) in scores.items():
        print(f"{name:{width}}  {caught:3} of {total:3} caught  {caught / max(1, total):4.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
