"""A `ktx serve` in a child process, which `ktx bench serve` measures when no --url is given."""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import httpx

from ktx.cli.arguments import model_options
from ktx.cli.serve import engine_options
from ktx.errors import KtxError

MAX_LOG_LINES = 20  # last lines of the child's log, for the error when it ends


def serve_arguments(args: argparse.Namespace) -> list[str]:
    """Returns the arguments that pass the model and engine options of the benchmark on to the child's `ktx serve`.

    Options at their default are left out.
    """
    parser = argparse.ArgumentParser(add_help=False)
    model_options(parser)
    engine_options(parser)
    arguments = list[str]()
    for action in parser._actions:
        value = getattr(args, action.dest)
        if value != action.default and value is not None:
            arguments += [action.option_strings[0], str(value)]
    return arguments


class ServerProcess:
    """A `ktx serve` process; as a context manager it returns the server's base URL once the model is loaded.

    Entering raises KtxError with the last lines of the log, and the exit status, if the process ends instead.

    Args:
        arguments: arguments of `ktx serve`.
        root: the checkout to run (default: this one).
    """

    def __init__(self, arguments: list[str], root: Path | None = None):
        self.arguments, self.root = arguments, root or Path(__file__).resolve().parents[2]
        self.process: subprocess.Popen[str] | None = None
        self.log_tail: deque[str] = deque(maxlen=MAX_LOG_LINES)
        self.address: queue.SimpleQueue[str] = queue.SimpleQueue()  # gets "" when the log ends without one

    def __enter__(self) -> str:
        """Starts the server on a free port and waits until it has loaded; returns its base URL.

        The API key of the caller's environment is removed, because the benchmark sends requests without one.
        """
        command = [sys.executable, "-P", "-m", "ktx", "serve", "--port", "0", "--log-format", "json", *self.arguments]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        }
        environment.pop("KTX_API_KEY", None)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        threading.Thread(target=self._read_log, daemon=True).start()
        try:
            base = self.address.get()
            while not self._is_ready(base):
                time.sleep(0.1)
        except BaseException:  # KeyboardInterrupt too
            self.stop()
            raise
        return base

    def __exit__(self, *args: object) -> None:
        self.stop()

    def _is_ready(self, base: str) -> bool:
        """Whether the server has loaded its model. Raises KtxError with the end of its log if the process ended."""
        assert self.process
        if base:  # else the log ended before the server listened
            try:
                return httpx.get(f"{base}/health", timeout=60).status_code == 200
            except httpx.TransportError:  # the process is ending
                base = ""
        status = self.process.wait()
        error = KtxError("\n".join(self.log_tail).removeprefix("ktx: ") or f"ktx serve ended with status {status}")
        error.exit_code = status if status > 0 else 1
        raise error

    def _read_log(self) -> None:
        """Reads the child's log to its end, so that the child never blocks on a full pipe; prints warnings and errors.

        `address` gets the server's address, and "" at the end, so that `__enter__` does not wait forever.
        """
        assert self.process and self.process.stderr
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                self.log_tail.append(line.rstrip())
                continue
            address = str(entry["message"]).partition("listening on ")[2].partition(",")[0]
            if address:
                self.address.put(address)
            elif entry["level"] not in ("debug", "info"):
                print(line, end="", file=sys.stderr)
        self.address.put("")

    def stop(self) -> None:
        """Stops the server, which takes at most ten seconds to end its streams."""
        if self.process:
            self.process.terminate()
            self.process.wait()
