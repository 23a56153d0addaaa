"""Unpacks packed weights to the rows of blocks that a weight file holds: exactly, some rows at a time.

Saving a model needs this: the packed weights are the only copy in memory, and all rows at once might not fit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gpu import soa_layout
from ktx.kernels.gpu.repack_from_cpu import unpack
from ktx.quant.types import FP8_BLOCK
from ktx.weights.base import QuantizedTensor

UNPACK_CHUNK_WEIGHTS = 1 << 26  # weights that are unpacked at once, in CPU memory


def unpack_rows(packed: cpu.Packed | soa_layout.SoAWeight) -> Iterator[QuantizedTensor]:
    """Yields the rows of packed weights as a weight file stores them, matrix by matrix.

    Args:
        packed: one matrix, or several that `pack_experts` packed, on the CPU or on a GPU.

    Yields:
        [rows, k], consecutive rows of a matrix.

    Raises:
        UsageError: if the type cannot be unpacked.
    """
    if packed.qtype.name not in soa_layout.FIELDS:
        raise UsageError(f"weights of {packed.qtype} cannot be unpacked from the order in which the kernels read them")
    if isinstance(packed, soa_layout.SoAWeight):
        yield from _unpack_planes(packed.to("cpu"))
    elif packed.matrices == 1:
        yield from _unpack_groups(packed)
    else:
        for number in range(packed.matrices):
            yield from _unpack_groups(packed.matrix(number))


def _unpack_groups(packed: cpu.Packed) -> Iterator[QuantizedTensor]:
    """Yields the rows of one matrix that is packed for the CPU, in chunks of UNPACK_CHUNK_WEIGHTS weights.

    A chunk consists of row groups, whose order is converted to planes first, because both orders come from one table.
    """
    groups = packed.data.view(-(-packed.n // cpu.GROUP_ROWS), -1)
    # Chunks are multiples of FP8_BLOCK rows, so that rows that share a scale stay together.
    chunk_rows = max(1, UNPACK_CHUNK_WEIGHTS // packed.k // FP8_BLOCK) * FP8_BLOCK
    for first_row in range(0, packed.n, chunk_rows):
        num_rows = min(chunk_rows, packed.n - first_row)
        first_group, end_group = first_row // cpu.GROUP_ROWS, -(-(first_row + num_rows) // cpu.GROUP_ROWS)
        buffer = torch.empty(num_rows * packed.qtype.row_bytes(packed.k), dtype=torch.uint8)
        planes = soa_layout.empty(packed.qtype, num_rows, packed.k, 1, buffer)
        unpack(groups[None, first_group:end_group], planes)
        yield from _unpack_planes(planes)


def _unpack_planes(packed: soa_layout.SoAWeight) -> Iterator[QuantizedTensor]:
    """Yields each matrix of planes as rows of blocks."""
    blocks = packed.blocks()
    for number in range(packed.matrices):
        scale = None if packed.scale is None else packed.scale[number]
        yield QuantizedTensor(blocks[number], packed.qtype, (packed.n, packed.k), scale)
