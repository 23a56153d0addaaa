"""Packed weights in the form of a checkpoint of packed weights, see ktx.weights.packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ktx.kernels.blocks import unpack_rows
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor


@dataclass(frozen=True)
class PackedState:
    """A matrix, or a stack of matrices, in the type that it has in memory.

    Attributes:
        shape: [rows, columns] or [matrices, rows, columns].
        qtype: the weight type.
        rows: yields all rows in order, in chunks.
    """

    shape: tuple[int, ...]
    qtype: QType
    rows: Callable[[], Iterator[QuantizedTensor]]


def matrix_state(packed: Any) -> PackedState:
    """The state of one matrix."""
    return PackedState((packed.n, packed.k), packed.qtype, lambda: unpack_rows(packed))


def stack_state(packed: Sequence[Any]) -> PackedState:
    """The state of matrices of one shape and type, or of several stacks of them, concatenated."""
    first, count = packed[0], sum(part.matrices for part in packed)
    return PackedState((count, first.n, first.k), first.qtype, lambda: chain.from_iterable(map(unpack_rows, packed)))
