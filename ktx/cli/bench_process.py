"""A process that runs one engine of a benchmark, and what all engines share: tests, token ids, metadata of a run."""

from __future__ import annotations

import datetime
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ktx.errors import KtxError

PAUSE_S = 0.3  # before a measurement, until the other engine's threads sleep


class BenchProcess:
    """An engine in a child process, which is started when it is first needed.

    Its protocol is JSON lines: a test on its standard input, the measurement on its standard output.

    Args:
        program: the Python module, or the path of a script (.py), that the process runs.
        arguments: its arguments.
        more_than: the engine is only used for prompts of more tokens than this.
    """

    def __init__(self, name: str, program: str, arguments: list[str], more_than: int = 0):
        command = [program] if program.endswith(".py") else ["-m", program]
        self.name, self.command, self.more_than = name, [sys.executable, *command, *arguments], more_than
        self.process: subprocess.Popen[str] | None = None
        self.startup_report: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """Starts the process, which loads the model, and returns what it reports: versions, sizes, loading speed."""
        if self.process is None:
            root = str(Path(__file__).resolve().parents[2])
            path = [root, os.environ.get("PYTHONPATH"), os.environ.get("KTX_PEER_PATH")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self.startup_report = self._read_result()
        return self.startup_report

    def measure(self, test: str | dict[str, Any]) -> dict[str, Any]:
        """Runs one test and returns its measurement."""
        self.start()
        time.sleep(PAUSE_S)
        assert self.process and self.process.stdin
        self.process.stdin.write(json.dumps({"test": test}) + "\n")
        self.process.stdin.flush()
        return self._read_result()

    def stop(self) -> None:
        """Ends the process, which frees its memory."""
        if self.process:
            self.process.communicate()
        self.process = None

    def _read_result(self) -> dict[str, Any]:
        """Reads a result of the child. Raises KtxError with the child's error and exit status, or if it ended."""
        assert self.process and self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.process = None
            raise KtxError(f"{self.name} ended without a result (exit status {status}); was there enough memory?")
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            error = KtxError(result["error"])
            error.exit_code = result["exit"]
            raise error
        return result


def parse_test(test: str) -> tuple[str, int, int]:
    """Parses a test into kind, tokens and depth: "tg32@d8192" is ("tg", 32, 8192)."""
    kind, _, depth = test.partition("@d")
    return kind[:2], int(kind[2:]), int(depth or 0)


def token_ids(count: int, vocabulary: int) -> list[int]:
    """Returns random token ids, the same for every engine, so that its routers choose the same experts."""
    rng = random.Random(1)
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def run_metadata() -> dict[str, str]:
    """Returns date, commit and machine of a measurement."""
    from ktx.hardware import machine

    m = machine()
    return {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": f"{m.cpu}, {m.cores} cores"}


def commit() -> str:
    """Returns the checkout's commit, with -dirty if files are modified, or the version of an installed wheel."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    import ktx

    return result.stdout.strip() or ktx.__version__
