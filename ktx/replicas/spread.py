"""Places replicas on the machines of a cluster. Does not import Ray."""

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
    free_bytes: int


@dataclass(frozen=True)
class ReplicaPlacement:
    """Placement of the replicas: `per_node` on each machine; `threads` and Ray's `cpus` are per replica."""

    replicas: int
    per_node: int
    threads: int
    cpus: float


def place_replicas(
    nodes: Sequence[Node], replicas: int | None, threads: int | None, replica_bytes: int
) -> ReplicaPlacement:
    """Divides every machine equally among its replicas.

    Args:
        nodes: the machines.
        replicas: number of replicas; None: one per machine.
        threads: threads per replica; None: the machine's cores divided among its replicas.
        replica_bytes: memory that one replica takes.

    Raises:
        DoesNotFit: a machine does not have enough free memory for its replicas.
    """
    replicas = replicas or len(nodes)
    per_node = math.ceil(replicas / len(nodes))
    for node in nodes:
        if per_node * replica_bytes > node.free_bytes:
            raise DoesNotFit(
                f"{replicas} replicas on {len(nodes)} machine{'s' if len(nodes) > 1 else ''}: {per_node}"
                f" cop{'ies' if per_node > 1 else 'y'} of the weights need {format_bytes(per_node * replica_bytes)} on"
                f" {node.address}, {format_bytes(node.free_bytes)} are free; use fewer replicas, a smaller quantization"
                " or more machines (a machine without CPUs in Ray gets no replica)"
            )
    cpus = min(node.cpus for node in nodes) / per_node
    return ReplicaPlacement(
        replicas,
        per_node,
        threads or max(1, min(node.cores for node in nodes) // per_node),
        int(cpus) if cpus >= 1 else cpus,
    )
