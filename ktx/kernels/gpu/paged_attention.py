"""Paged attention in Triton, for queries of many sequences at once, as `reference.attention` defines it.

One kernel computes separate keys and values (GQA, and MLA's expanded form with its shared rotated columns) and a
latent that is both (MLA's absorbed form, see ktx.kernels.gpu.mla_decode). A program computes its range of the work
units that ktx.kernels.gpu.split_kv divides. A tile that several programs share is stored in scratch memory as partial
results, each with its own maximum, which ktx.kernels.gpu.reduce_splits merges.

Letters in shapes: H query heads, Hkv key/value heads, T new tokens of all sequences, Dk and Dv columns of a key and of
a value, P separately stored rotated columns (`q_rope`, `k_rope`). A row is one query head of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.kernels.gpu.reduce_splits import merge
from ktx.kernels.gpu.split_kv import Plan, WorkRange
from ktx.kernels.gradients import refuse_gpu_gradient

LOG2E = 1.4426950408889634
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CACHE_DTYPES = (*QUERY_DTYPES, torch.float8_e4m3fn)


@triton.jit
def _attend(
    q,
    q_rope,
    k,
    k_rope,
    v,
    out,
    sinks,
    partial,
    log_weights,
    sequences,
    pages,
    items,
    starts,
    programs,
    scale,
    value_scale,
    softcap,
    window,
    max_pages,
    q_strides,
    qr_strides,
    k_strides,
    kr_strides,
    v_strides,
    out_strides,
    GROUP: tl.constexpr,
    HEADS_PER_CHUNK: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    V_BLOCK: tl.constexpr,
    LATENT: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    K_ROW: tl.constexpr,
    KR_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    PAGE: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Computes a program's range of work units, tile by tile, by online softmax over the key blocks of each tile.

    Scores are in base 2 (`scale` includes log2 e) because exp2 is one instruction. For each row the loop carries the
    maximum `row_max`, and relative to it the sum of probabilities `total` and the weighted values `sums`. A tile that
    one program computes completely is written to `out`; the partial results of a shared tile are written to `partial`.
    """
    head_chunk, program, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program_begin, program_end = tl.load(programs + 4 * program), tl.load(programs + 4 * program + 1)
    first_item, last_item = tl.load(programs + 4 * program + 2), tl.load(programs + 4 * program + 3)
    row, column, value_column = tl.arange(0, ROWS), tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    rope_column, key = tl.arange(0, ROPE_BLOCK), tl.arange(0, KEYS)
    k += kv_head * k_strides[1]
    k_rope += kv_head * kr_strides[1]
    v += kv_head * v_strides[1]
    for item in range(first_item, last_item + 1):
        # The rows of the tile: which token and head each is, and its query.
        sequence, first_row = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
        tile_begin, tile_end = tl.load(starts + item), tl.load(starts + item + 1)
        first_query = tl.load(sequences + 3 * sequence)
        num_tokens = tl.load(sequences + 3 * sequence + 1)
        num_past = tl.load(sequences + 3 * sequence + 2) - num_tokens
        token = (first_row + row) // HEADS_PER_CHUNK
        # Index of the query head among those of its key/value head.
        in_group = head_chunk * HEADS_PER_CHUNK + (first_row + row) % HEADS_PER_CHUNK
        head = kv_head * GROUP + in_group
        row_mask = (token < num_tokens) & (in_group < GROUP)
        q_row = (first_query + token).to(tl.int64)
        q_ptrs = q + (q_row * q_strides[0] + head * q_strides[1])[:, None] + column[None, :]
        query = tl.load(q_ptrs, mask=row_mask[:, None] & (column < K_COLUMNS)[None, :], other=0.0).to(COMPUTE_DTYPE)
        if ROPE:
            q_rope_ptrs = q_rope + (q_row * qr_strides[0] + head * qr_strides[1])[:, None] + rope_column[None, :]
            query_rope = tl.load(q_rope_ptrs, mask=row_mask[:, None] & (rope_column < ROPE)[None, :], other=0.0).to(
                COMPUTE_DTYPE
            )

        # start_key to end_key are visible to some row, common_start to common_end to all rows; this program computes
        # the key blocks first_unit to end_unit of the former.
        last_token = tl.minimum((first_row + ROWS - 1) // HEADS_PER_CHUNK, num_tokens - 1)
        end_key, common_end = num_past + last_token + 1, num_past + first_row // HEADS_PER_CHUNK + 1
        start_key, common_start = 0, 0
        if WINDOW:
            start_key, common_start = tl.maximum(common_end - window, 0), tl.maximum(end_key - window, 0)
        first_block_key = start_key // KEYS * KEYS
        first_unit = tl.maximum(program_begin, tile_begin) - tile_begin
        end_unit = tl.minimum(program_end, tile_end) - tile_begin

        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.full([ROWS], 0.0, tl.float32)
        sums = tl.full([ROWS, V_BLOCK], 0.0, tl.float32)
        program_first_key = first_block_key + first_unit * KEYS
        program_end_key = tl.minimum(first_block_key + end_unit * KEYS, end_key)
        # If a block of keys never crosses a page (ONE_PAGE), one page index is loaded per block, else one per key.
        page_table = pages + sequence * max_pages
        if ONE_PAGE:
            next_page = tl.load(
                page_table + program_first_key // PAGE, mask=program_first_key < program_end_key, other=0
            )
        for first_key in range(program_first_key, program_end_key, KEYS):
            keys = first_key + key
            key_mask = (keys >= start_key) & (keys < end_key)
            if ONE_PAGE:  # prefetch the next page index while this page is used
                page_index, page_offset = next_page.to(tl.int64), first_key % PAGE
                next_page = tl.load(
                    page_table + (first_key + KEYS) // PAGE, mask=first_key + KEYS < program_end_key, other=0
                )
                k_rows = k + page_index * k_strides[0] + page_offset * K_ROW + (key * K_ROW)[:, None]
                kr_rows = k_rope + page_index * kr_strides[0] + page_offset * KR_ROW + (key * KR_ROW)[:, None]
                v_rows = v + page_index * v_strides[0] + page_offset * V_ROW + (key * V_ROW)[:, None]
            else:
                page_index = tl.load(page_table + keys // PAGE, mask=key_mask, other=0).to(tl.int64)
                k_rows = k + (page_index * k_strides[0] + keys % PAGE * K_ROW)[:, None]
                kr_rows = k_rope + (page_index * kr_strides[0] + keys % PAGE * KR_ROW)[:, None]
                v_rows = v + (page_index * v_strides[0] + keys % PAGE * V_ROW)[:, None]
            k_mask = key_mask[:, None] & (column < K_COLUMNS)[None, :]
            keys_tile = tl.load(k_rows + column[None, :], mask=k_mask, other=0.0).to(COMPUTE_DTYPE)
            scores = tl.dot(query, tl.trans(keys_tile), input_precision="ieee") * scale
            if ROPE:
                rope_mask = key_mask[:, None] & (rope_column < ROPE)[None, :]
                rope_tile = tl.load(kr_rows + rope_column[None, :], mask=rope_mask, other=0.0).to(COMPUTE_DTYPE)
                scores += tl.dot(query_rope, tl.trans(rope_tile), input_precision="ieee") * scale
            if SOFTCAP:
                # c * tanh(s / c), by an exponential that cannot overflow to NaN
                scores = softcap * (2 / (1 + tl.exp2(scores * (-2 * 1.4426950408889634) / softcap)) - 1)
            # The branch also lets the compiler choose a layout for this product alone. Otherwise it would distribute
            # rows to warps as in the next product, and with 64 rows half of the warps would compute the same as the
            # others.
            if (first_key < common_start) | (first_key + KEYS > common_end):
                causal_end = num_past + token + 1
                visible = keys[None, :] < causal_end[:, None]
                if WINDOW:
                    visible &= keys[None, :] >= (causal_end - window)[:, None]
                scores = tl.where(visible, scores, float("-inf"))
            # Online softmax: earlier sums are rescaled to the new maximum. It is -inf where a row sees no keys yet.
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            probs = tl.exp2(scores - safe_max[:, None])
            rescale = tl.exp2(row_max - safe_max)
            total = total * rescale + tl.sum(probs, 1)
            if LATENT:
                sums = tl.dot(probs.to(COMPUTE_DTYPE), keys_tile, sums * rescale[:, None], input_precision="ieee")
            else:
                v_mask = key_mask[:, None] & (value_column < V_COLUMNS)[None, :]
                values = tl.load(v_rows + value_column[None, :], mask=v_mask, other=0.0).to(COMPUTE_DTYPE)
                sums = tl.dot(probs.to(COMPUTE_DTYPE), values, sums * rescale[:, None], input_precision="ieee")
            row_max = new_max

        if (first_unit == 0) & (end_unit == tile_end - tile_begin):  # the complete tile
            if SINKS:  # a logit to base e, times log2 e because scores are to base 2
                sink = tl.load(sinks + head, mask=row_mask, other=0.0) * 1.4426950408889634
                safe_max = tl.maximum(row_max, sink)
                total = total * tl.exp2(row_max - safe_max) + tl.exp2(sink - safe_max)
                sums *= tl.exp2(row_max - safe_max)[:, None]
            result = sums * (value_scale / tl.where(total == 0, 1.0, total))[:, None]
            out_ptrs = out + (q_row * out_strides[0] + head * out_strides[1])[:, None] + value_column[None, :]
            out_mask = row_mask[:, None] & (value_column < V_COLUMNS)[None, :]
            tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=out_mask)
        else:
            # The even slot is for the end of a tile, the odd one for the beginning of a tile, as in reduce_splits.
            slot = 2 * program + tl.where(first_unit == 0, 1, 0)
            partial_offset = ((slot * tl.num_programs(2) + kv_head) * tl.num_programs(0) + head_chunk) * ROWS + row
            divisor = tl.where(total == 0, 1.0, total)
            partial_ptrs = partial + partial_offset[:, None] * V_COLUMNS + value_column[None, :]
            tl.store(partial_ptrs, sums / divisor[:, None], mask=(value_column < V_COLUMNS)[None, :])
            tl.store(log_weights + partial_offset, tl.where(total == 0, float("-inf"), row_max + tl.log2(divisor)))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Paged attention, as reference.attention with the plan's sequences, pages and window.

    Rows may have any strides, but columns must be dense.

    Args:
        q: [1, H, T, Dk], f16, bf16 or f32; f32 needs a plan with the tiles for it.
        k: pool [pages, Hkv, PAGE, Dk], f16, bf16, f32 or e4m3.
        v: pool [pages, Hkv, PAGE, Dv], of the same dtype.
        plan: the sequences and pages.
        scale: factor of the scores.
        sinks: f32 [H].
        softcap: as in reference.attention.
        q_rope: [1, H, T, P], more columns of q.
        k_rope: pool [pages, 1 or Hkv, PAGE, P], more columns of k.
        k_scale: e4m3 pools of keys (and k_rope) store values / k_scale.
        v_scale: e4m3 pools of values store values / v_scale.
        out: [1, T, H, Dv], receives the result; allocated by default.

    Returns:
        [1, T, H, Dv] in q's dtype.

    Raises:
        ValueError: if a tensor does not fit the plan.
        NoGradient: if autograd records an input.
    """
    refuse_gpu_gradient("attention", q, k, v, sinks, q_rope, k_rope)
    shape = plan.schedule.shape
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]) if out is None else out
    _check(q, k, v, q_rope, k_rope, out, plan)
    if not (q_rope is None or k_rope is None):
        k_rope = k_rope.expand(-1, shape.kv_heads, -1, -1)
    for work_range in plan.ranges:
        _run(work_range, plan, q, k, v, q_rope, k_rope, out, sinks, scale * k_scale * LOG2E, v_scale, softcap)
    return out


def _run(
    work_range: WorkRange,
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rope: torch.Tensor | None,
    k_rope: torch.Tensor | None,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    value_scale: float,
    softcap: float,
) -> None:
    """Launches the kernel and the merge for one group of tiles.

    The scratch memory holds two slots per program, for the tiles at the ends of its range that other programs share:
    first the partial results of all slots, then their log weights.
    """
    group, shape = work_range.group, plan.schedule.shape
    tile = group.tile
    # Without rotated columns (ROPE is 0) the kernel does not read these tensors, but needs some for the arguments.
    rope_pair = (q, k) if q_rope is None or k_rope is None else (q_rope, k_rope)
    value_columns = shape.value_columns
    rows = 2 * group.programs * shape.kv_heads * group.head_chunks * tile.rows
    partial = plan.schedule.scratch[: rows * value_columns]
    log_weights = plan.schedule.scratch[rows * value_columns : rows * (value_columns + 1)]
    rope = 0 if q_rope is None else q_rope.shape[3]
    _attend[group.head_chunks, group.programs, shape.kv_heads](
        q,
        rope_pair[0],
        k,
        rope_pair[1],
        v,
        out,
        q if sinks is None else sinks,
        partial,
        log_weights,
        plan.sequences,
        plan.pages,
        group.tile_starts,
        work_range.starts,
        work_range.programs,
        scale,
        value_scale,
        softcap * LOG2E,
        plan.window,
        plan.pages.stride(0),
        (q.stride(2), q.stride(1)),
        (rope_pair[0].stride(2), rope_pair[0].stride(1)),
        k.stride()[:2],
        rope_pair[1].stride()[:2],
        v.stride()[:2],
        out.stride()[1:3],
        GROUP=shape.heads_per_kv_head,
        HEADS_PER_CHUNK=group.heads_per_chunk,
        K_COLUMNS=shape.key_columns,
        K_BLOCK=_block(shape.key_columns),
        ROPE=rope,
        ROPE_BLOCK=_block(rope or 16),
        V_COLUMNS=value_columns,
        V_BLOCK=_block(value_columns),
        LATENT=shape.latent,
        SINKS=sinks is not None,
        SOFTCAP=softcap != 0,
        WINDOW=plan.window != 0,
        K_ROW=k.stride(2),
        KR_ROW=rope_pair[1].stride(2),
        V_ROW=v.stride(2),
        PAGE=k.shape[2],
        ONE_PAGE=k.shape[2] % tile.keys == 0,
        ROWS=tile.rows,
        KEYS=tile.keys,
        COMPUTE_DTYPE=_compute_dtype(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    merge(work_range, plan, out, sinks, partial, log_weights, value_scale)


def _compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Returns the dtype of the products, which is that of the queries.

    For bf16 it is f32 in Triton's interpreter, because the interpreter would multiply the bits of bf16 as integers.
    """
    if dtype == torch.float32:
        return tl.float32
    if dtype == torch.bfloat16:
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return tl.float16


def _block(columns: int) -> int:
    """Returns the columns of a tile: a power of two, and at least as many as an MMA instruction needs."""
    return max(16, triton.next_power_of_2(columns))


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rope: torch.Tensor | None,
    k_rope: torch.Tensor | None,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Raises ValueError unless all tensors fit the plan; a kernel would read out of bounds otherwise."""
    shape, tokens = plan.schedule.shape, plan.schedule.num_tokens
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope and k_rope must come together")
    expected = {
        "q": (q, (1, shape.heads, tokens, shape.key_columns), QUERY_DTYPES),
        "k": (k, (len(k), shape.kv_heads, k.shape[2], shape.key_columns), CACHE_DTYPES),
        "v": (v, (len(k), shape.kv_heads, k.shape[2], shape.value_columns), (k.dtype,)),
        "out": (out, (1, tokens, shape.heads, shape.value_columns), (q.dtype,)),
    }
    if q_rope is not None and k_rope is not None:
        rope_columns = k_rope.shape[3]
        heads = 1 if k_rope.shape[1] == 1 else shape.kv_heads
        expected["q_rope"] = q_rope, (1, shape.heads, tokens, rope_columns), (q.dtype,)
        expected["k_rope"] = k_rope, (len(k), heads, k.shape[2], rope_columns), (k.dtype,)
    for name, (tensor, expected_shape, dtypes) in expected.items():
        if tuple(tensor.shape) != expected_shape or tensor.dtype not in dtypes or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}; the plan expects"
                f" {expected_shape}, {' or '.join(str(dtype) for dtype in dtypes)}, with dense columns"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
