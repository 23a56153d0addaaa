"""Where replicas say how they are, and hear of the end. It dies with the server, which replicas notice."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import ray

STALE_AFTER_S = 10.0  # seconds after which a replica that says nothing counts as gone


@dataclass(frozen=True)
class ReplicaStatus:
    """What one replica says of itself."""

    name: str
    node: str
    ready: bool = False
    error: str = ""
    total: int = 0  # bytes of weights, and how many are read
    done: int = 0
    metrics: bytes = b""


@ray.remote(num_cpus=0, max_restarts=0)
class StatusActor:
    """One for a server, beside it."""

    def __init__(self) -> None:
        self.words: dict[str, tuple[float, ReplicaStatus]] = {}
        self.over = asyncio.Event()

    async def report(self, word: ReplicaStatus) -> None:
        self.words[word.name] = time.monotonic(), word

    async def read(self) -> list[ReplicaStatus]:
        """Of the replicas that still speak."""
        now = time.monotonic()
        self.words = {name: said for name, said in self.words.items() if now - said[0] < STALE_AFTER_S}
        return [word for _, word in self.words.values()]

    async def end(self) -> None:
        self.over.set()

    async def wait(self) -> None:
        """Returns when the server ends."""
        await self.over.wait()


def say(board: Any, word: ReplicaStatus) -> None:
    """Waits until it is heard."""
    ray.get(board.report.remote(word), timeout=STALE_AFTER_S)
