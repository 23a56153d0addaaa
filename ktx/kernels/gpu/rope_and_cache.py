"""Rotary embedding fused with the write to the KV cache, in Triton.

It computes `reference.store_heads` and `reference.store_latent`. A program handles one token and some heads. Slots are
positions in a pool: page * PAGE + position in the page. A token with a negative slot is not stored, so that a CUDA
graph can be replayed with fewer tokens than it was captured for.

Letters in shapes: H query heads, Hkv key/value heads, T tokens, Dk and Dv columns of a head, R rotated columns in
`rope_and_cache_kv` and the rank of the latent in `rope_and_cache_mla`, P rotated columns there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.kernels.gradients import refuse_gpu_gradient

HEADS_PER_PROGRAM = 16


@triton.jit
def _to_pool_dtype(x, inverse_scale, pool):
    """Converts x to the pool's dtype; e4m3 stores x * inverse_scale, clamped to its range."""
    if pool.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32) * inverse_scale, -448.0), 448.0)  # largest value of e4m3
    return x.to(pool.dtype.element_ty)


@triton.jit
def _store_rotated(
    x,
    dst,
    x_head_stride,
    dst_head_stride,
    tables,
    inverse_scale,
    head,
    head_mask,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Stores a token's heads, of which x is the first, with their first ROPE_DIM columns rotated.

    With INTERLEAVED columns 2i and 2i + 1 of the input are paired, otherwise column i and i + ROPE_DIM / 2; the output
    is in the order of halves.
    """
    i = tl.arange(0, HALF)
    column_mask = i < ROPE_DIM // 2
    mask = head_mask[:, None] & column_mask[None, :]
    low_column, high_column = i, i + ROPE_DIM // 2
    if INTERLEAVED:
        low_column, high_column = 2 * i, 2 * i + 1
    low = tl.load(x + head[:, None] * x_head_stride + low_column[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + head[:, None] * x_head_stride + high_column[None, :], mask=mask, other=0.0).to(tl.float32)
    cos_low = tl.load(tables[0] + i, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(tables[1] + i, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(tables[0] + ROPE_DIM // 2 + i, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(tables[1] + ROPE_DIM // 2 + i, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    rotated_low = (low * cos_low - high * sin_low).to(x.dtype.element_ty)
    rotated_high = (high * cos_high + low * sin_high).to(x.dtype.element_ty)
    dst_ptrs = dst + head[:, None] * dst_head_stride + i[None, :]
    tl.store(dst_ptrs, _to_pool_dtype(rotated_low, inverse_scale, dst), mask=mask)
    tl.store(dst_ptrs + ROPE_DIM // 2, _to_pool_dtype(rotated_high, inverse_scale, dst), mask=mask)
    if COLUMNS > ROPE_DIM:
        column = tl.arange(0, BLOCK)
        mask = head_mask[:, None] & ((column >= ROPE_DIM) & (column < COLUMNS))[None, :]
        rest = tl.load(x + head[:, None] * x_head_stride + column[None, :], mask=mask, other=0.0)
        tl.store(
            dst + head[:, None] * dst_head_stride + column[None, :], _to_pool_dtype(rest, inverse_scale, dst), mask=mask
        )


@triton.jit
def _store_heads(
    q,
    k,
    v,
    out,
    k_pool,
    v_pool,
    cos,
    sin,
    slots,
    k_inverse_scale,
    v_inverse_scale,
    table_stride,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    k_pool_strides,
    v_pool_strides,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
):
    """Rotates a group of query heads, or rotates and stores a group of key heads and stores their values.

    The second program index selects one or the other, so that one launch does all of a layer's work before attention.
    """
    token, head_group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_groups: tl.constexpr = (HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    tables = (cos + token * table_stride, sin + token * table_stride)
    if head_group < query_groups:
        head = head_group * HEADS_PER_PROGRAM + tl.arange(0, HEADS_PER_PROGRAM)
        q_token, out_token = q + token * q_strides[0], out + token * out_strides[0]
        _store_rotated(
            q_token,
            out_token,
            q_strides[1],
            out_strides[1],
            tables,
            1.0,
            head,
            head < HEADS,
            COLUMNS,
            BLOCK,
            ROPE_DIM,
            HALF,
            INTERLEAVED,
        )
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head = (head_group - query_groups) * HEADS_PER_PROGRAM + tl.arange(0, HEADS_PER_PROGRAM)
        head_mask = head < tl.where(slot >= 0, KV_HEADS, 0)
        k_token = k + token * k_strides[0]
        k_slot = k_pool + slot // PAGE * k_pool_strides[0] + slot % PAGE * k_pool_strides[2]
        _store_rotated(
            k_token,
            k_slot,
            k_strides[1],
            k_pool_strides[1],
            tables,
            k_inverse_scale,
            head,
            head_mask,
            COLUMNS,
            BLOCK,
            ROPE_DIM,
            HALF,
            INTERLEAVED,
        )
        column = tl.arange(0, V_BLOCK)
        mask = head_mask[:, None] & (column < V_COLUMNS)[None, :]
        v_rows = v + token * v_strides[0] + head[:, None] * v_strides[1] + column[None, :]
        v_slot = v_pool + slot // PAGE * v_pool_strides[0] + slot % PAGE * v_pool_strides[2]
        values = _to_pool_dtype(tl.load(v_rows, mask=mask, other=0.0), v_inverse_scale, v_pool)
        tl.store(v_slot + head[:, None] * v_pool_strides[1] + column[None, :], values, mask=mask)


@triton.jit
def _store_latent(
    latent,
    k_rope,
    q_rope,
    norm,
    out,
    ckv,
    kpe,
    cos,
    sin,
    slots,
    eps,
    inverse_scale,
    table_stride,
    latent_stride,
    k_stride,
    q_strides,
    out_strides,
    ckv_strides,
    kpe_strides,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
):
    """Rotates a group of query heads, or normalizes and stores the latent and rotates and stores its key columns.

    The latter is done by the programs with head group 0, as one head, because all heads share the latent.
    """
    token, head_group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tables = (cos + token * table_stride, sin + token * table_stride)
    head = tl.arange(0, HEADS_PER_PROGRAM)
    if head_group > 0:
        head += (head_group - 1) * HEADS_PER_PROGRAM
        q_token, out_token = q_rope + token * q_strides[0], out + token * out_strides[0]
        _store_rotated(
            q_token,
            out_token,
            q_strides[1],
            out_strides[1],
            tables,
            1.0,
            head,
            head < HEADS,
            ROPE_DIM,
            16,
            ROPE_DIM,
            HALF,
            INTERLEAVED,
        )
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head_mask = head < tl.where(slot >= 0, 1, 0)
        kpe_slot = kpe + slot // PAGE * kpe_strides[0] + slot % PAGE * kpe_strides[1]
        _store_rotated(
            k_rope + token * k_stride,
            kpe_slot,
            0,
            0,
            tables,
            inverse_scale,
            head,
            head_mask,
            ROPE_DIM,
            16,
            ROPE_DIM,
            HALF,
            INTERLEAVED,
        )
        column = tl.arange(0, BLOCK)
        mask = column < tl.where(slot >= 0, RANK, 0)
        x = tl.load(latent + token * latent_stride + column, mask=mask, other=0.0)
        if NORM:
            x_f32 = x.to(tl.float32)
            x_f32 *= tl.rsqrt(tl.sum(x_f32 * x_f32, 0) / RANK + eps)
            gain = tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)
            x = (gain * x_f32.to(x.dtype).to(tl.float32)).to(x.dtype)
        ckv_slot = ckv + slot // PAGE * ckv_strides[0] + slot % PAGE * ckv_strides[1]
        tl.store(ckv_slot + column, _to_pool_dtype(x, inverse_scale, ckv), mask=mask)


def rope_and_cache_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k, and writes k and v to their slots of the KV cache, as reference.store_heads.

    Args:
        q: [1, H, T, Dk].
        k: [1, Hkv, T, Dk].
        v: [1, Hkv, T, Dv].
        cos, sin: [1, T, R].
        slots: int64 [T], positions in the pools; negative ones are skipped.
        k_pool, v_pool: [pages, Hkv, PAGE, columns].
        interleaved: whether columns 2i and 2i + 1 are paired.
        k_scale, v_scale: e4m3 pools store values / scale.
        out: receives q rotated; may be q itself unless `interleaved`. Allocated by default.

    Returns:
        q rotated, [1, H, T, Dk].

    Raises:
        ValueError: if shapes or strides do not fit.
        NoGradient: if autograd records an input.
    """
    refuse_gpu_gradient("attention", q, k, v)
    (_, heads, tokens, columns), kv_heads, rope_dim = q.shape, k.shape[1], cos.shape[2]
    _check(
        {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "k_pool": k_pool, "v_pool": v_pool}, tokens, rope_dim, columns
    )
    if interleaved and out is not None and out.data_ptr() == q.data_ptr():
        raise ValueError("interleaved pairs are returned as halves, in another order: `out` must not be q")
    out = torch.empty_like(q) if out is None else out
    head_groups = triton.cdiv(heads, HEADS_PER_PROGRAM) + triton.cdiv(kv_heads, HEADS_PER_PROGRAM)
    tensors = (q, k, v, out, k_pool, v_pool, cos, sin, slots)
    strides = [(x.stride(2), x.stride(1)) for x in (q, k, v, out)] + [x.stride()[:3] for x in (k_pool, v_pool)]
    _store_heads[tokens, head_groups](
        *tensors,
        1 / k_scale,
        1 / v_scale,
        cos.stride(1),
        *strides,
        HEADS=heads,
        KV_HEADS=kv_heads,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        V_COLUMNS=v.shape[3],
        V_BLOCK=triton.next_power_of_2(v.shape[3]),
        ROPE_DIM=rope_dim,
        HALF=triton.next_power_of_2(rope_dim // 2),
        INTERLEAVED=interleaved,
        PAGE=k_pool.shape[2],
        HEADS_PER_PROGRAM=HEADS_PER_PROGRAM,
    )
    return out


def rope_and_cache_mla(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    q_rope: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    kv_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes MLA's latent and rotated key columns to the KV cache and rotates q_rope, as reference.store_latent.

    Args:
        latent: [1, T, R], normalized by `norm` if given.
        k_rope: [1, T, P], to be rotated.
        q_rope: [1, H, T, P], to be rotated.
        cos, sin: [1, T, P].
        slots: int64 [T], positions in the pools; negative ones are skipped.
        ckv: pool [pages, PAGE, R].
        kpe: pool [pages, PAGE, P].
        norm: [R], weight of the RMSNorm.
        eps: of the RMSNorm.
        interleaved: whether columns 2i and 2i + 1 are paired.
        kv_scale: e4m3 pools store values / kv_scale.
        out: receives q_rope rotated; may be q_rope itself unless `interleaved`. Allocated by default.

    Returns:
        q_rope rotated, [1, H, T, P].

    Raises:
        ValueError: if shapes or strides do not fit.
        NoGradient: if autograd records an input.
    """
    refuse_gpu_gradient("MLA", latent, k_rope, q_rope)
    heads, tokens, rope_dim = q_rope.shape[1], q_rope.shape[2], q_rope.shape[3]
    named = {"latent": latent, "k_rope": k_rope, "q_rope": q_rope, "cos": cos, "sin": sin, "ckv": ckv, "kpe": kpe}
    _check(named, tokens, cos.shape[2], rope_dim)
    if cos.shape[2] != rope_dim:
        raise ValueError(f"cos has {cos.shape[2]} columns, q_rope {rope_dim}")
    if interleaved and out is not None and out.data_ptr() == q_rope.data_ptr():
        raise ValueError("interleaved pairs are returned as halves, in another order: `out` must not be q_rope")
    out = torch.empty_like(q_rope) if out is None else out
    tensors = (latent, k_rope, q_rope, latent if norm is None else norm, out, ckv, kpe, cos, sin, slots)
    strides = [(x.stride(2), x.stride(1)) for x in (q_rope, out)] + [x.stride()[:2] for x in (ckv, kpe)]
    _store_latent[tokens, 1 + triton.cdiv(heads, HEADS_PER_PROGRAM)](
        *tensors,
        eps,
        1 / kv_scale,
        cos.stride(1),
        latent.stride(1),
        k_rope.stride(1),
        *strides,
        HEADS=heads,
        RANK=latent.shape[2],
        BLOCK=triton.next_power_of_2(latent.shape[2]),
        ROPE_DIM=rope_dim,
        HALF=triton.next_power_of_2(rope_dim // 2),
        INTERLEAVED=interleaved,
        NORM=norm is not None,
        PAGE=ckv.shape[1],
        HEADS_PER_PROGRAM=HEADS_PER_PROGRAM,
    )
    return out


def _check(tensors: dict[str, torch.Tensor], tokens: int, rope_dim: int, columns: int) -> None:
    """Raises ValueError unless columns are dense and cos and sin have a row for each token, as the kernels assume."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: its columns must be dense")
        if name in ("cos", "sin") and (tensor.shape[1] != tokens or tensor.shape[2] != rope_dim):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, no row of {rope_dim} columns for each of {tokens} tokens"
            )
    if rope_dim % 2 or rope_dim > columns:
        raise ValueError(f"{rope_dim} of {columns} columns cannot be rotated: the number must be even and not larger")
