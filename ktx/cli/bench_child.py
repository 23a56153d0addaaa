"""A `ktx serve` of our own, in a process of its own: what `ktx bench serve` measures when it is given no --url."""

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
from ktx.cli.serve import running_options
from ktx.errors import KtxError

HELD = 20  # lines of its log that are kept for when it ends


def serve_words(args: argparse.Namespace) -> list[str]:
    """The options of the model and of the engine that differ from `ktx serve`'s own, as its command line."""
    known = argparse.ArgumentParser(add_help=False)
    model_options(known)
    running_options(known)
    words = list[str]()
    for action in known._actions:
        value = getattr(args, action.dest)
        if value != action.default and value is not None:
            words += [action.option_strings[0], str(value)]
    return words


class Child:
    """As a context manager its base address, once the model answers. KtxError with its last words, and its exit status, when it ends instead.

    `root` is the checkout that it runs, this one unless another is named.
    """

    def __init__(self, words: list[str], root: Path | None = None):
        self.words, self.root = words, root or Path(__file__).resolve().parents[2]
        self.process: subprocess.Popen[str] | None = None
        self.said: deque[str] = deque(maxlen=HELD)
        self.address: queue.SimpleQueue[str] = queue.SimpleQueue()  # empty when the log ended without one

    def __enter__(self) -> str:
        command = [sys.executable, "-P", "-m", "ktx", "serve", "--port", "0", "--log-format", "json", *self.words]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        }
        environment.pop("KTX_API_KEY", None)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            base = self.address.get()
            while not self._ready(base):
                time.sleep(0.1)
        except BaseException:  # an interruption too
            self.stop()
            raise
        return base

    def __exit__(self, *args: object) -> None:
        self.stop()

    def _ready(self, base: str) -> bool:
        assert self.process
        if base:
            try:
                return httpx.get(f"{base}/health", timeout=60).status_code == 200
            except httpx.TransportError:  # it is ending
                base = ""
        status = self.process.wait()
        error = KtxError("\n".join(self.said).removeprefix("ktx: ") or f"ktx serve ended with status {status}")
        error.exit_code = status if status > 0 else 1
        raise error

    def _listen(self) -> None:
        """Reads the log to its end, so that the child never waits for a reader; passes warnings on."""
        assert self.process and self.process.stderr
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                self.said.append(line.rstrip())
                continue
            where = str(entry["message"]).partition("listening on ")[2].partition(",")[0]
            if where:
                self.address.put(where)
            elif entry["level"] not in ("debug", "info"):
                print(line, end="", file=sys.stderr)
        self.address.put("")

    def stop(self) -> None:
        """Lets streams end; the server takes ten seconds at most."""
        if self.process:
            self.process.terminate()
            self.process.wait()
