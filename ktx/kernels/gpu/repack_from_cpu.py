"""The CPU's packed order of weights taken to a GPU's planes, by strided copies on the device: exact, and no table of its own.

The CPU keeps groups of 16 rows (csrc/cpu/layout.h): a plane for each narrow field, then 32-bit words of 16 rows side by side. A field of planes.py is
either narrow there or whole words, in the same order, so both orders follow from FIELDS. What packing did to the bits of words is undone first, some of
the matrices at a time (rearrange.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktx.kernels.gpu.repack_bits import AT_ONCE, MORE, UNDO
from ktx.kernels.gpu.soa_layout import FIELDS, HALF, SoAWeight
from ktx.quant.types import FP8_BLOCK

LANES, LINE = 16, 64  # rows of a group, and bytes to which a plane of it is filled up
STREAMED = (
    512 << 20
)  # packed bytes of experts that come to a GPU at once (ktx.ops.gpu.expert_streaming), at least one expert
WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # of what is copied at once


def unpack(data: torch.Tensor, into: SoAWeight, first: int = 0) -> None:
    """Groups of rows of every matrix of `into`, from group `first` on: uint8 [matrices, groups, bytes of a group], on the device of `into`."""
    begin = first * LANES
    rows = min(into.n - begin, data.shape[1] * LANES)
    whole, rest = divmod(rows, LANES)
    for source, plane in _fields(data, into):  # [matrices, groups, 16, ...] and [matrices, n, ...]
        target = plane[:, begin : begin + rows]
        if whole:
            target[:, : whole * LANES].unflatten(1, (whole, LANES)).copy_(source[:, :whole])
        if rest:
            target[:, whole * LANES :].copy_(source[:, whole, :rest])
    if into.scale is not None:
        _scales(data, into, first)


def _fields(data: torch.Tensor, into: SoAWeight) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each field as the CPU keeps it, turned to rows of blocks, and its plane in the same words."""
    blocks, fields = into.row_blocks, FIELDS[into.qtype.name]
    planes = [plane.view(torch.uint8).view(into.matrices, into.n, blocks, -1) for plane in into.planes[: len(fields)]]
    if into.qtype.is_float:
        word = WIDTHS[into.qtype.nbytes]
        held = data[..., : into.k * LANES * into.qtype.nbytes].view(word).unflatten(-1, (into.k, LANES))
        yield held.transpose(-1, -2), planes[0].view(word)[..., 0]
        return
    at, words = 0, []
    for field, plane in zip(fields, planes, strict=True):
        if field.dtype is not HALF and field.nbytes >= 4:
            words.append(plane.view(torch.int32))
            continue
        width = min(2, field.nbytes)
        for part in range(field.nbytes // width):
            held = data[..., at : at + blocks * LANES * width].view(WIDTHS[width]).unflatten(-1, (blocks, LANES))
            yield held.transpose(-1, -2), plane.view(WIDTHS[width])[..., part]
            at += -(-blocks * LANES * width // LINE) * LINE
    count = sum(plane.shape[-1] for plane in words) + MORE.get(into.qtype.name, 0)
    held = data[..., at:].view(torch.int32).unflatten(-1, (blocks, count, LANES))
    undo = UNDO.get(into.qtype.name)
    each = into.matrices if undo is None else max(1, AT_ONCE * into.matrices // (held.numel() * 4))
    for some in range(0, into.matrices, each):
        taken = held[some : some + each]
        if undo is not None:
            taken = undo(taken)
        taken = taken.permute(0, 1, 4, 2, 3)  # [matrices, groups, 16, blocks, words of a block]
        begin = 0
        for plane in words:
            yield taken[..., begin : begin + plane.shape[-1]], plane[some : some + each]
            begin += plane.shape[-1]


def _scales(data: torch.Tensor, into: SoAWeight, first: int) -> None:
    """Of F8_E4M3: the CPU repeats a scale for every row, planes have one for 128 rows and columns."""
    assert into.scale is not None
    columns, each = into.scale.shape[-1], FP8_BLOCK // LANES
    at = -(-into.k * LANES // LINE) * LINE
    held = data[..., at : at + columns * LANES * 4].view(torch.float32).unflatten(-1, (columns, LANES))[..., 0]
    skipped = -first % each
    some = held[:, skipped::each]
    begin = (first + skipped) // each
    into.scale[:, begin : begin + some.shape[1]].copy_(some)
