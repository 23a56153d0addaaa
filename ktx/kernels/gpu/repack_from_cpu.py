"""Conversion of weights packed for the CPU to the planes of a GPU, by exact strided copies on the device.

There is no table per type: the CPU's order has row groups of 16 rows (csrc/cpu/quant/layout.h). A row group has a plane
for each narrow field (bytes, 16-bit words and f16 numbers), then the 32-bit words of its 16 rows next to each other. A
field of soa_layout.py is either narrow or consists of complete words in the same order, so both orders follow from
FIELDS. First the bits of words are restored (repack_bits.py), some matrices at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktx.kernels.gpu.repack_bits import CHUNK_BYTES, EXTRA_WORDS, RESTORE
from ktx.kernels.gpu.soa_layout import FIELDS, HALF, SoAWeight
from ktx.quant.types import FP8_BLOCK

GROUP_ROWS, PLANE_ALIGNMENT = 16, 64  # rows of a group, and bytes to which a plane of a group is padded
# Packed bytes of experts that are streamed to a GPU at once (ktx.ops.gpu.expert_streaming), at least one expert.
STREAM_CHUNK_BYTES = 512 << 20
WORD_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by the bytes of an element of a copy


def unpack(data: torch.Tensor, into: SoAWeight, first: int = 0) -> None:
    """Unpacks row groups of every matrix into planes, for the GPU kernels or for a file.

    Args:
        data: uint8 [matrices, groups, bytes of a row group], on the device of `into`.
        into: the planes.
        first: index of the first group.
    """
    first_row = first * GROUP_ROWS
    num_rows = min(into.n - first_row, data.shape[1] * GROUP_ROWS)
    num_groups, remainder = divmod(num_rows, GROUP_ROWS)
    for src, plane in _pair_fields(data, into):  # [matrices, groups, 16, ...] and [matrices, n, ...]
        dst = plane[:, first_row : first_row + num_rows]
        if num_groups:
            dst[:, : num_groups * GROUP_ROWS].unflatten(1, (num_groups, GROUP_ROWS)).copy_(src[:, :num_groups])
        if remainder:
            dst[:, num_groups * GROUP_ROWS :].copy_(src[:, num_groups, :remainder])
    if into.scale is not None:
        _copy_scales(data, into, first)


def _pair_fields(data: torch.Tensor, into: SoAWeight) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields pairs of views that a strided copy converts: a field in the CPU's order, and its plane.

    Both have the same shape and dtype, [matrices, groups, 16, ...] and [matrices, n, ...]. A narrow field yields one
    pair per element (byte or 16-bit word) of a block. 32-bit words come last; those of types in RESTORE are restored
    for as many matrices at a time as CHUNK_BYTES allows.
    """
    blocks, fields = into.row_blocks, FIELDS[into.qtype.name]
    planes = [plane.view(torch.uint8).view(into.matrices, into.n, blocks, -1) for plane in into.planes[: len(fields)]]
    if into.qtype.is_float:
        dtype = WORD_DTYPES[into.qtype.nbytes]
        field_data = (
            data[..., : into.k * GROUP_ROWS * into.qtype.nbytes].view(dtype).unflatten(-1, (into.k, GROUP_ROWS))
        )
        yield field_data.transpose(-1, -2), planes[0].view(dtype)[..., 0]
        return
    offset, words = 0, []
    for field, plane in zip(fields, planes, strict=True):
        if field.dtype is not HALF and field.nbytes >= 4:
            words.append(plane.view(torch.int32))
            continue
        element_bytes = min(2, field.nbytes)
        for element in range(field.nbytes // element_bytes):
            field_data = (
                data[..., offset : offset + blocks * GROUP_ROWS * element_bytes]
                .view(WORD_DTYPES[element_bytes])
                .unflatten(-1, (blocks, GROUP_ROWS))
            )
            yield field_data.transpose(-1, -2), plane.view(WORD_DTYPES[element_bytes])[..., element]
            offset += -(-blocks * GROUP_ROWS * element_bytes // PLANE_ALIGNMENT) * PLANE_ALIGNMENT
    count = sum(plane.shape[-1] for plane in words) + EXTRA_WORDS.get(into.qtype.name, 0)
    field_data = data[..., offset:].view(torch.int32).unflatten(-1, (blocks, count, GROUP_ROWS))
    undo = RESTORE.get(into.qtype.name)
    num_at_once = into.matrices if undo is None else max(1, CHUNK_BYTES * into.matrices // (field_data.numel() * 4))
    for first_matrix in range(0, into.matrices, num_at_once):
        restored = field_data[first_matrix : first_matrix + num_at_once]
        if undo is not None:
            restored = undo(restored)
        restored = restored.permute(0, 1, 4, 2, 3)  # [matrices, groups, 16, blocks, words of a block]
        first_word = 0
        for plane in words:
            yield (
                restored[..., first_word : first_word + plane.shape[-1]],
                plane[first_matrix : first_matrix + num_at_once],
            )
            first_word += plane.shape[-1]


def _copy_scales(data: torch.Tensor, into: SoAWeight, first: int) -> None:
    """Copies the scales of F8_E4M3.

    The CPU's order repeats a scale for every row; planes have one for 128 rows and columns, so one row group of eight
    gives it.
    """
    assert into.scale is not None
    columns, groups_per_scale = into.scale.shape[-1], FP8_BLOCK // GROUP_ROWS
    offset = -(-into.k * GROUP_ROWS // PLANE_ALIGNMENT) * PLANE_ALIGNMENT
    scales = (
        data[..., offset : offset + columns * GROUP_ROWS * 4]
        .view(torch.float32)
        .unflatten(-1, (columns, GROUP_ROWS))[..., 0]
    )
    skipped = -first % groups_per_scale  # row groups before the first one that begins 128 rows
    selected = scales[:, skipped::groups_per_scale]
    first_row = (first + skipped) // groups_per_scale
    into.scale[:, first_row : first_row + selected.shape[1]].copy_(selected)
