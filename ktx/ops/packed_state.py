"""Packed weights as a checkpoint of packed weights has them: see ktx.weights.packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ktx.kernels.blocks import rows_of
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor


@dataclass(frozen=True)
class PackedState:
    """A matrix [rows, columns], or several [matrices, rows, columns], in the type that it has in memory. `rows` gives all rows in order, some at a time."""

    shape: tuple[int, ...]
    qtype: QType
    rows: Callable[[], Iterator[QuantizedTensor]]


def matrix(packed: Any) -> PackedState:
    """One matrix."""
    return PackedState((packed.n, packed.k), packed.qtype, lambda: rows_of(packed))


def stack(packed: Sequence[Any]) -> PackedState:
    """Matrices of one shape and type, or several such stacks, one after another."""
    first, count = packed[0], sum(each.matrices for each in packed)
    return PackedState((count, first.n, first.k), first.qtype, lambda: chain.from_iterable(map(rows_of, packed)))
