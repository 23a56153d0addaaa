"""Packed weights taken back to the rows of blocks that a file has: exact, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gpu import soa_layout
from ktx.kernels.gpu.repack_from_cpu import unpack
from ktx.quant.types import FP8_BLOCK
from ktx.weights.base import QuantizedTensor

SPAN = 1 << 26  # weights that are taken back at once, from the CPU's memory


def rows_of(packed: cpu.Packed | soa_layout.SoAWeight) -> Iterator[QuantizedTensor]:
    """[rows, k] of one matrix, or of several of `pack_experts`, in order. UsageError for a type that is not taken back."""
    if packed.qtype.name not in soa_layout.FIELDS:
        raise UsageError(f"weights of {packed.qtype} are not taken back from the order that kernels read them in")
    if isinstance(packed, soa_layout.SoAWeight):
        yield from _from_planes(packed.to("cpu"))
    elif packed.matrices == 1:
        yield from _from_groups(packed)
    else:
        for number in range(packed.matrices):
            yield from _from_groups(packed.matrix(number))


def _from_groups(packed: cpu.Packed) -> Iterator[QuantizedTensor]:
    """One matrix in the CPU's order: groups of rows."""
    groups = packed.data.view(-(-packed.n // cpu.GROUP_ROWS), -1)
    step = max(1, SPAN // packed.k // FP8_BLOCK) * FP8_BLOCK  # rows that share a scale stay together
    for first in range(0, packed.n, step):
        rows = min(step, packed.n - first)
        begin, end = first // cpu.GROUP_ROWS, -(-(first + rows) // cpu.GROUP_ROWS)
        memory = torch.empty(rows * packed.qtype.row_bytes(packed.k), dtype=torch.uint8)
        into = soa_layout.empty(packed.qtype, rows, packed.k, 1, memory)
        unpack(groups[None, begin:end], into)
        yield from _from_planes(into)


def _from_planes(packed: soa_layout.SoAWeight) -> Iterator[QuantizedTensor]:
    blocks = packed.blocks()
    for number in range(packed.matrices):
        scale = None if packed.scale is None else packed.scale[number]
        yield QuantizedTensor(blocks[number], packed.qtype, (packed.n, packed.k), scale)
