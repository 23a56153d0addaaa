"""What several programs made of one tile, added up: each part has its own maximum and sum, and its place in scratch.

The parts are taken in the order of their keys, so the bits are the same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.kernels.gpu.split_kv import Plan, WorkRange

FEW, MANY = (64, 32), (512, 8)  # columns and parts that a program takes at once: 8 and 16 KB


@triton.jit
def _merge(
    out,
    sinks,
    partial,
    weight,
    sequences,
    items,
    merges,
    value_scale,
    out_strides,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row's columns of a tile that several programs share: a program leaves the end of a tile in its even slot, the beginning in the odd one."""
    merge, row, rest = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slices: tl.constexpr = (V_COLUMNS + COLUMNS - 1) // COLUMNS
    beside = rest // slices
    kv_head, block = beside // BLOCKS, beside % BLOCKS
    item = tl.load(merges + 3 * merge)
    if item >= 0:
        first, last = tl.load(merges + 3 * merge + 1), tl.load(merges + 3 * merge + 2)
        sequence, first_row = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
        token, in_group = (first_row + row) // WIDTH, block * WIDTH + (first_row + row) % WIDTH
        if (token < tl.load(sequences + 3 * sequence + 1)) & (in_group < GROUP):
            column = rest % slices * COLUMNS + tl.arange(0, COLUMNS)
            most, total = float("-inf"), 0.0
            if SINKS:
                most, total = tl.load(sinks + kv_head * GROUP + in_group) * 1.4426950408889634, 1.0
            sums = tl.full([COLUMNS], 0.0, tl.float32)
            for part in range(first, last + 1, PARTS):
                program = part + tl.arange(0, PARTS)
                slot = 2 * program + tl.where(program == first, 1, 0)
                place = ((slot * (tl.num_programs(2) // slices // BLOCKS) + kv_head) * BLOCKS + block) * ROWS + row
                there = program <= last
                size = tl.load(weight + place, mask=there, other=float("-inf"))
                values_at = partial + place[:, None] * V_COLUMNS + column[None, :]
                values = tl.load(values_at, mask=there[:, None] & (column < V_COLUMNS)[None, :], other=0.0)
                new_most = tl.maximum(most, tl.max(size, 0))
                level = tl.where(new_most == float("-inf"), 0.0, new_most)
                share, fade = tl.exp2(size - level), tl.exp2(most - level)
                sums = sums * fade + tl.sum(share[:, None] * values, 0)
                total = total * fade + tl.sum(share, 0)
                most = new_most
            result = sums * (value_scale / tl.where(total == 0, 1.0, total))
            at = (tl.load(sequences + 3 * sequence) + token).to(tl.int64)
            out_at = out + at * out_strides[0] + (kv_head * GROUP + in_group) * out_strides[1] + column
            tl.store(out_at, result.to(out.dtype.element_ty), mask=column < V_COLUMNS)


def merge(
    line: WorkRange,
    plan: Plan,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    partial: torch.Tensor,
    weight: torch.Tensor,
    value_scale: float,
) -> None:
    """Writes the rows of out [1, T, H, Dv] whose tiles are shared; `partial` holds their parts, `weight` the logarithms of the parts' sums."""
    part, shape = line.part, plan.work.shape
    if not part.merges:
        return
    beside = shape.kv_heads * part.blocks
    columns, parts = MANY if part.merges * part.tile.rows * beside > 8 * plan.work.num_sms else FEW
    columns = min(columns, triton.next_power_of_2(shape.value_columns))
    _merge[part.merges, part.tile.rows, beside * triton.cdiv(shape.value_columns, columns)](
        out,
        out if sinks is None else sinks,
        partial,
        weight,
        plan.sequences,
        part.items,
        line.merges,
        value_scale,
        out.stride()[1:3],
        BLOCKS=part.blocks,
        GROUP=shape.group,
        WIDTH=part.width,
        V_COLUMNS=shape.value_columns,
        SINKS=sinks is not None,
        ROWS=part.tile.rows,
        COLUMNS=columns,
        PARTS=parts,
        num_warps=4,
    )
