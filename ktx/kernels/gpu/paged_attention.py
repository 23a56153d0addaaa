"""Attention on pages by Triton: queries of many sequences at once, keys and values in pools, as `reference.attention` defines it.

One kernel serves keys and values apart (GQA, and MLA's expanded form with its shared rotated columns) and a latent that is both (MLA's
absorbed form, see ktx.kernels.gpu.mla_decode). It works through the line of units that ktx.kernels.gpu.split_kv shares out; a tile that several programs
share is left in scratch in parts, each with its own maximum, for ktx.kernels.gpu.reduce_splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.kernels.gpu.reduce_splits import merge
from ktx.kernels.gpu.split_kv import Plan, WorkRange
from ktx.kernels.gradients import none_on_gpu

LOG2E = 1.4426950408889634
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
STORED = (*FLOATS, torch.float8_e4m3fn)


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
    weight,
    sequences,
    pages,
    items,
    starts,
    programs,
    scale,
    value_scale,
    softcap,
    window,
    most_pages,
    q_strides,
    qr_strides,
    k_strides,
    kr_strides,
    v_strides,
    out_strides,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
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
    NUMBER: tl.constexpr,
):
    block, program, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(programs + 4 * program), tl.load(programs + 4 * program + 1)
    first_item, last_item = tl.load(programs + 4 * program + 2), tl.load(programs + 4 * program + 3)
    row, column, value_column = tl.arange(0, ROWS), tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    rope_column, key = tl.arange(0, ROPE_BLOCK), tl.arange(0, KEYS)
    k += kv_head * k_strides[1]
    k_rope += kv_head * kr_strides[1]
    v += kv_head * v_strides[1]
    for item in range(first_item, last_item + 1):
        sequence, first_row = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
        start, stop = tl.load(starts + item), tl.load(starts + item + 1)
        first = tl.load(sequences + 3 * sequence)
        count = tl.load(sequences + 3 * sequence + 1)
        past = tl.load(sequences + 3 * sequence + 2) - count
        token, in_group = (first_row + row) // WIDTH, block * WIDTH + (first_row + row) % WIDTH
        head = kv_head * GROUP + in_group
        real = (token < count) & (in_group < GROUP)
        at = (first + token).to(tl.int64)
        q_at = q + (at * q_strides[0] + head * q_strides[1])[:, None] + column[None, :]
        query = tl.load(q_at, mask=real[:, None] & (column < K_COLUMNS)[None, :], other=0.0).to(NUMBER)
        if ROPE:
            qr_at = q_rope + (at * qr_strides[0] + head * qr_strides[1])[:, None] + rope_column[None, :]
            query_rope = tl.load(qr_at, mask=real[:, None] & (rope_column < ROPE)[None, :], other=0.0).to(NUMBER)

        # Keys that some row sees, those that all rows see, and the piece of the former that is this program's.
        last_token = tl.minimum((first_row + ROWS - 1) // WIDTH, count - 1)
        highest, all_up_to = past + last_token + 1, past + first_row // WIDTH + 1
        lowest, all_from = 0, 0
        if WINDOW:
            lowest, all_from = tl.maximum(all_up_to - window, 0), tl.maximum(highest - window, 0)
        base = lowest // KEYS * KEYS
        low, high = tl.maximum(begin, start) - start, tl.minimum(end, stop) - start

        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.full([ROWS], 0.0, tl.float32)
        sums = tl.full([ROWS, V_BLOCK], 0.0, tl.float32)
        from_key, to_key = base + low * KEYS, tl.minimum(base + high * KEYS, highest)
        table = pages + sequence * most_pages
        if ONE_PAGE:
            ahead = tl.load(table + from_key // PAGE, mask=from_key < to_key, other=0)
        for first_key in range(from_key, to_key, KEYS):
            keys = first_key + key
            inside = (keys >= lowest) & (keys < highest)
            if ONE_PAGE:  # the next page's number is on its way while this one is used
                page, in_page = ahead.to(tl.int64), first_key % PAGE
                ahead = tl.load(table + (first_key + KEYS) // PAGE, mask=first_key + KEYS < to_key, other=0)
                k_rows = k + page * k_strides[0] + in_page * K_ROW + (key * K_ROW)[:, None]
                kr_rows = k_rope + page * kr_strides[0] + in_page * KR_ROW + (key * KR_ROW)[:, None]
                v_rows = v + page * v_strides[0] + in_page * V_ROW + (key * V_ROW)[:, None]
            else:
                page = tl.load(table + keys // PAGE, mask=inside, other=0).to(tl.int64)
                k_rows = k + (page * k_strides[0] + keys % PAGE * K_ROW)[:, None]
                kr_rows = k_rope + (page * kr_strides[0] + keys % PAGE * KR_ROW)[:, None]
                v_rows = v + (page * v_strides[0] + keys % PAGE * V_ROW)[:, None]
            k_mask = inside[:, None] & (column < K_COLUMNS)[None, :]
            keys_tile = tl.load(k_rows + column[None, :], mask=k_mask, other=0.0).to(NUMBER)
            scores = tl.dot(query, tl.trans(keys_tile), input_precision="ieee") * scale
            if ROPE:
                rope_mask = inside[:, None] & (rope_column < ROPE)[None, :]
                rope_tile = tl.load(kr_rows + rope_column[None, :], mask=rope_mask, other=0.0).to(NUMBER)
                scores += tl.dot(query_rope, tl.trans(rope_tile), input_precision="ieee") * scale
            if SOFTCAP:
                # c * tanh(s / c), by an exponential that cannot overflow to NaN
                scores = softcap * (2 / (1 + tl.exp2(scores * (-2 * 1.4426950408889634) / softcap)) - 1)
            # The branch also lets the compiler lay out this product for itself: it would otherwise give all warps the rows of the
            # next one, and with 64 rows half of the warps would compute what the others do.
            if (first_key < all_from) | (first_key + KEYS > all_up_to):
                up_to = past + token + 1
                seen = keys[None, :] < up_to[:, None]
                if WINDOW:
                    seen &= keys[None, :] >= (up_to - window)[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            new_most = tl.maximum(most, tl.max(scores, 1))
            level = tl.where(new_most == float("-inf"), 0.0, new_most)
            share = tl.exp2(scores - level[:, None])
            fade = tl.exp2(most - level)
            total = total * fade + tl.sum(share, 1)
            if LATENT:
                sums = tl.dot(share.to(NUMBER), keys_tile, sums * fade[:, None], input_precision="ieee")
            else:
                v_mask = inside[:, None] & (value_column < V_COLUMNS)[None, :]
                values = tl.load(v_rows + value_column[None, :], mask=v_mask, other=0.0).to(NUMBER)
                sums = tl.dot(share.to(NUMBER), values, sums * fade[:, None], input_precision="ieee")
            most = new_most

        if (low == 0) & (high == stop - start):
            if SINKS:
                sink = tl.load(sinks + head, mask=real, other=0.0) * 1.4426950408889634
                level = tl.maximum(most, sink)
                total = total * tl.exp2(most - level) + tl.exp2(sink - level)
                sums *= tl.exp2(most - level)[:, None]
            result = sums * (value_scale / tl.where(total == 0, 1.0, total))[:, None]
            out_at = out + (at * out_strides[0] + head * out_strides[1])[:, None] + value_column[None, :]
            out_mask = real[:, None] & (value_column < V_COLUMNS)[None, :]
            tl.store(out_at, result.to(out.dtype.element_ty), mask=out_mask)
        else:
            slot = 2 * program + tl.where(low == 0, 1, 0)
            place = ((slot * tl.num_programs(2) + kv_head) * tl.num_programs(0) + block) * ROWS + row
            divisor = tl.where(total == 0, 1.0, total)
            partial_at = partial + place[:, None] * V_COLUMNS + value_column[None, :]
            tl.store(partial_at, sums / divisor[:, None], mask=(value_column < V_COLUMNS)[None, :])
            tl.store(weight + place, tl.where(total == 0, float("-inf"), most + tl.log2(divisor)))


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
    """q [1, H, T, Dk] and pools k [pages, Hkv, PAGE, Dk], v [pages, Hkv, PAGE, Dv] -> [1, T, H, Dv] in q's dtype, or into `out`.

    As reference.attention with the plan's sequences, pages and window. Pools are f16, bf16, f32, or e4m3 times `k_scale` (keys, `k_rope` too)
    and `v_scale`. Queries in f32 need a plan with the tiles for it. Rows may have any strides, columns must be dense. ValueError names what does not fit.
    """
    none_on_gpu("attention", q, k, v, sinks, q_rope, k_rope)
    shape = plan.work.shape
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]) if out is None else out
    _check(q, k, v, q_rope, k_rope, out, plan)
    if not (q_rope is None or k_rope is None):
        k_rope = k_rope.expand(-1, shape.kv_heads, -1, -1)
    for line in plan.lines:
        _run(line, plan, q, k, v, q_rope, k_rope, out, sinks, scale * k_scale * LOG2E, v_scale, softcap)
    return out


def _run(
    line: WorkRange,
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
    part, shape = line.part, plan.work.shape
    tile, turned = part.tile, (q, k) if q_rope is None or k_rope is None else (q_rope, k_rope)
    wide = shape.value_columns
    rows = 2 * part.programs * shape.kv_heads * part.blocks * tile.rows
    partial, weight = plan.work.scratch[: rows * wide], plan.work.scratch[rows * wide : rows * (wide + 1)]
    rope = 0 if q_rope is None else q_rope.shape[3]
    _attend[part.blocks, part.programs, shape.kv_heads](
        q,
        turned[0],
        k,
        turned[1],
        v,
        out,
        q if sinks is None else sinks,
        partial,
        weight,
        plan.sequences,
        plan.pages,
        part.items,
        line.starts,
        line.programs,
        scale,
        value_scale,
        softcap * LOG2E,
        plan.window,
        plan.pages.stride(0),
        (q.stride(2), q.stride(1)),
        (turned[0].stride(2), turned[0].stride(1)),
        k.stride()[:2],
        turned[1].stride()[:2],
        v.stride()[:2],
        out.stride()[1:3],
        GROUP=shape.group,
        WIDTH=part.width,
        K_COLUMNS=shape.key_columns,
        K_BLOCK=_block(shape.key_columns),
        ROPE=rope,
        ROPE_BLOCK=_block(rope or 16),
        V_COLUMNS=wide,
        V_BLOCK=_block(wide),
        LATENT=shape.latent,
        SINKS=sinks is not None,
        SOFTCAP=softcap != 0,
        WINDOW=plan.window != 0,
        K_ROW=k.stride(2),
        KR_ROW=turned[1].stride(2),
        V_ROW=v.stride(2),
        PAGE=k.shape[2],
        ONE_PAGE=k.shape[2] % tile.keys == 0,
        ROWS=tile.rows,
        KEYS=tile.keys,
        NUMBER=_number(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    merge(line, plan, out, sinks, partial, weight, value_scale)


def _number(dtype: torch.dtype) -> tl.dtype:
    """What is multiplied: the queries' type. The interpreter would multiply the codes of bf16 as integers."""
    if dtype == torch.float32:
        return tl.float32
    if dtype == torch.bfloat16:
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return tl.float16


def _block(columns: int) -> int:
    """Columns of a tile: a power of two, and no fewer than a matrix instruction takes."""
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
    """ValueError unless all of it is what the plan was made for."""
    shape, tokens = plan.work.shape, plan.work.tokens
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope and k_rope come together")
    wanted = {
        "q": (q, (1, shape.heads, tokens, shape.key_columns), FLOATS),
        "k": (k, (len(k), shape.kv_heads, k.shape[2], shape.key_columns), STORED),
        "v": (v, (len(k), shape.kv_heads, k.shape[2], shape.value_columns), (k.dtype,)),
        "out": (out, (1, tokens, shape.heads, shape.value_columns), (q.dtype,)),
    }
    if q_rope is not None and k_rope is not None:
        wide = k_rope.shape[3]
        heads = 1 if k_rope.shape[1] == 1 else shape.kv_heads
        wanted["q_rope"] = q_rope, (1, shape.heads, tokens, wide), (q.dtype,)
        wanted["k_rope"] = k_rope, (len(k), heads, k.shape[2], wide), (k.dtype,)
    for name, (tensor, size, dtypes) in wanted.items():
        if tuple(tensor.shape) != size or tensor.dtype not in dtypes or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}; the plan wants {size},"
                f" {' or '.join(str(dtype) for dtype in dtypes)}, with dense columns"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} lies on {tensor.device}, q on {q.device}")
