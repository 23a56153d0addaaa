"""How replicas are spread over machines. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ktx.errors import DoesNotFit
from ktx.hardware import format_bytes


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: Ray's CPUs, physical cores, bytes of free memory."""

    id: str
    address: str
    cpus: float
    cores: int
    free: int


@dataclass(frozen=True)
class Layout:
    """How replicas are spread: `beside` on one machine, each with `threads` and a share of Ray's CPUs."""

    replicas: int
    beside: int
    threads: int
    cpus: float


def lay_out(nodes: Sequence[Node], replicas: int | None, threads: int | None, need: int) -> Layout:
    """Equal shares of every machine. DoesNotFit, with the numbers, when a machine cannot hold its copies."""
    replicas = replicas or len(nodes)
    beside = math.ceil(replicas / len(nodes))
    for node in nodes:
        if beside * need > node.free:
            raise DoesNotFit(
                f"{replicas} replicas on {len(nodes)} machine{'s' if len(nodes) > 1 else ''}: {beside} cop{'ies' if beside > 1 else 'y'} of the"
                f" weights need {format_bytes(beside * need)} on {node.address}, {format_bytes(node.free)} are free; take fewer replicas, a smaller"
                " quant, or add machines (one that Ray counts no CPUs of gets no replica)"
            )
    cpus = min(node.cpus for node in nodes) / beside
    return Layout(
        replicas,
        beside,
        threads or max(1, min(node.cores for node in nodes) // beside),
        int(cpus) if cpus >= 1 else cpus,
    )
