"""The actor that replicas report their status to and learn of the shutdown from.

It runs in the server's node and dies with the server's process, which the replicas detect.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import ray

STALE_AFTER_S = 10.0  # a replica that has not reported for this long counts as dead


@dataclass(frozen=True)
class ReplicaStatus:
    """The status of one replica."""

    name: str
    node: str
    ready: bool = False
    error: str = ""
    total_bytes: int = 0  # weights to read
    loaded_bytes: int = 0  # weights read so far
    metrics: bytes = b""


@ray.remote(num_cpus=0, max_restarts=0)
class StatusActor:
    """Collects the statuses of a server's replicas and signals the shutdown to them."""

    def __init__(self) -> None:
        self.statuses: dict[str, tuple[float, ReplicaStatus]] = {}
        self.shutdown = asyncio.Event()

    async def report(self, status: ReplicaStatus) -> None:
        """Stores a replica's status."""
        self.statuses[status.name] = time.monotonic(), status

    async def read(self) -> list[ReplicaStatus]:
        """Returns the statuses that are not older than `STALE_AFTER_S`."""
        now = time.monotonic()
        self.statuses = {name: entry for name, entry in self.statuses.items() if now - entry[0] < STALE_AFTER_S}
        return [status for _, status in self.statuses.values()]

    async def end(self) -> None:
        """Signals the shutdown to the replicas."""
        self.shutdown.set()

    async def wait(self) -> None:
        """Returns when the server shuts down."""
        await self.shutdown.wait()


def report_status(actor: Any, status: ReplicaStatus) -> None:
    """Sends a status to the actor and waits until it is stored."""
    ray.get(actor.report.remote(status), timeout=STALE_AFTER_S)
