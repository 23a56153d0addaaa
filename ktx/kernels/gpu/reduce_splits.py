"""Merge of the partial results of several programs for one tile in split-KV attention.

Each partial result has its own maximum and sum, and a slot in scratch memory. They are merged in the order of their
keys, so that the bits are equal in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.kernels.gpu.split_kv import Plan, WorkRange

SMALL_TILE, LARGE_TILE = (64, 32), (512, 8)  # columns and splits that a program loads at once: 8 and 16 KB
# The large tile is used where it still leaves more programs per multiprocessor than this, before dividing the columns.
LARGE_TILE_PROGRAMS_PER_SM = 8


@triton.jit
def _merge(
    out,
    sinks,
    partial,
    log_weights,
    sequences,
    items,
    merges,
    value_scale,
    out_strides,
    HEAD_CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_PER_CHUNK: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merges one row and some columns of a tile that several programs share.

    A program stores the end of a tile in its even slot, the beginning of a tile in its odd slot. The partial results
    are weighted by exp2 of their log weights, relative to a running maximum as in online softmax; a sink is one more
    log weight without a value.
    """
    merge, row, remainder = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column_blocks: tl.constexpr = (V_COLUMNS + COLUMNS - 1) // COLUMNS
    head_chunk_index = remainder // column_blocks
    kv_head, head_chunk = head_chunk_index // HEAD_CHUNKS, head_chunk_index % HEAD_CHUNKS
    item = tl.load(merges + 3 * merge)
    if item >= 0:
        first_program, last_program = tl.load(merges + 3 * merge + 1), tl.load(merges + 3 * merge + 2)
        sequence, first_row = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
        token = (first_row + row) // HEADS_PER_CHUNK
        # Index of the query head among those of its key/value head.
        in_group = head_chunk * HEADS_PER_CHUNK + (first_row + row) % HEADS_PER_CHUNK
        if (token < tl.load(sequences + 3 * sequence + 1)) & (in_group < GROUP):
            column = remainder % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
            row_max, total = float("-inf"), 0.0
            if SINKS:  # a logit to base e, times log2 e because partial results are to base 2
                row_max, total = tl.load(sinks + kv_head * GROUP + in_group) * 1.4426950408889634, 1.0
            sums = tl.full([COLUMNS], 0.0, tl.float32)
            for split in range(first_program, last_program + 1, SPLITS):
                program = split + tl.arange(0, SPLITS)
                slot = 2 * program + tl.where(program == first_program, 1, 0)
                offset = (
                    (slot * (tl.num_programs(2) // column_blocks // HEAD_CHUNKS) + kv_head) * HEAD_CHUNKS + head_chunk
                ) * ROWS + row
                split_mask = program <= last_program
                log_sums = tl.load(log_weights + offset, mask=split_mask, other=float("-inf"))
                value_ptrs = partial + offset[:, None] * V_COLUMNS + column[None, :]
                values = tl.load(value_ptrs, mask=split_mask[:, None] & (column < V_COLUMNS)[None, :], other=0.0)
                new_max = tl.maximum(row_max, tl.max(log_sums, 0))
                safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
                factor, rescale = tl.exp2(log_sums - safe_max), tl.exp2(row_max - safe_max)
                sums = sums * rescale + tl.sum(factor[:, None] * values, 0)
                total = total * rescale + tl.sum(factor, 0)
                row_max = new_max
            result = sums * (value_scale / tl.where(total == 0, 1.0, total))
            out_row = (tl.load(sequences + 3 * sequence) + token).to(tl.int64)
            out_ptrs = out + out_row * out_strides[0] + (kv_head * GROUP + in_group) * out_strides[1] + column
            tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=column < V_COLUMNS)


def merge(
    work_range: WorkRange,
    plan: Plan,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    partial: torch.Tensor,
    log_weights: torch.Tensor,
    value_scale: float,
) -> None:
    """Merges the tiles that several programs share, and writes their rows of `out`.

    Args:
        work_range: the group of tiles and its division among programs.
        plan: the plan of the call.
        out: [1, T, H, Dv].
        sinks: f32 [H] or None.
        partial: the partial results in scratch memory.
        log_weights: the base-2 logarithms of the sums of the partial results.
        value_scale: factor of the result.
    """
    group, shape = work_range.group, plan.schedule.shape
    if not group.max_merges:
        return
    num_head_chunks = shape.kv_heads * group.head_chunks
    columns, splits = (
        LARGE_TILE
        if group.max_merges * group.tile.rows * num_head_chunks > LARGE_TILE_PROGRAMS_PER_SM * plan.schedule.num_sms
        else SMALL_TILE
    )
    columns = min(columns, triton.next_power_of_2(shape.value_columns))
    _merge[group.max_merges, group.tile.rows, num_head_chunks * triton.cdiv(shape.value_columns, columns)](
        out,
        out if sinks is None else sinks,
        partial,
        log_weights,
        plan.sequences,
        group.tile_starts,
        work_range.merges,
        value_scale,
        out.stride()[1:3],
        HEAD_CHUNKS=group.head_chunks,
        GROUP=shape.heads_per_kv_head,
        HEADS_PER_CHUNK=group.heads_per_chunk,
        V_COLUMNS=shape.value_columns,
        SINKS=sinks is not None,
        ROWS=group.tile.rows,
        COLUMNS=columns,
        SPLITS=splits,
        num_warps=4,
    )
