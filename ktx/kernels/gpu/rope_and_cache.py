"""Rotary embedding and the write to the cache in one Triton kernel: `reference.store_heads` and
`reference.store_latent`.

A program takes one token and some heads. Slots are positions in a pool, page times PAGE plus the place in it; a token
whose slot is negative is not stored, so that a CUDA graph may be replayed with fewer tokens than it was made for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.kernels.gradients import none_on_gpu

AT_ONCE = 16  # heads of a program


@triton.jit
def _as_stored(x, inverse, target):
    """x in the pool's type; e4m3 holds x / scale, within its range."""
    if target.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32) * inverse, -448.0), 448.0)  # its largest numbers
    return x.to(target.dtype.element_ty)


@triton.jit
def _put_rotated(
    x,
    target,
    x_head,
    target_head,
    tables,
    inverse,
    head,
    there,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A token's heads, of which x is the first, rotated in their first TURNED columns: pairs (2i, 2i + 1) or halves
    come in, halves go out.
    """
    i = tl.arange(0, HALF)
    inside = i < TURNED // 2
    mask = there[:, None] & inside[None, :]
    low_column, high_column = i, i + TURNED // 2
    if PAIRS:
        low_column, high_column = 2 * i, 2 * i + 1
    low = tl.load(x + head[:, None] * x_head + low_column[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + head[:, None] * x_head + high_column[None, :], mask=mask, other=0.0).to(tl.float32)
    cos_low = tl.load(tables[0] + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(tables[1] + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(tables[0] + TURNED // 2 + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(tables[1] + TURNED // 2 + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    turned_low = (low * cos_low - high * sin_low).to(x.dtype.element_ty)
    turned_high = (high * cos_high + low * sin_high).to(x.dtype.element_ty)
    to = target + head[:, None] * target_head + i[None, :]
    tl.store(to, _as_stored(turned_low, inverse, target), mask=mask)
    tl.store(to + TURNED // 2, _as_stored(turned_high, inverse, target), mask=mask)
    if COLUMNS > TURNED:
        column = tl.arange(0, BLOCK)
        mask = there[:, None] & ((column >= TURNED) & (column < COLUMNS))[None, :]
        rest = tl.load(x + head[:, None] * x_head + column[None, :], mask=mask, other=0.0)
        tl.store(target + head[:, None] * target_head + column[None, :], _as_stored(rest, inverse, target), mask=mask)


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
    k_inverse,
    v_inverse,
    table,
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
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    PAGE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    token, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_queries: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    tables = (cos + token * table, sin + token * table)
    if job < of_queries:
        head = job * AT_ONCE + tl.arange(0, AT_ONCE)
        own, to = q + token * q_strides[0], out + token * out_strides[0]
        _put_rotated(
            own, to, q_strides[1], out_strides[1], tables, 1.0, head, head < HEADS, COLUMNS, BLOCK, TURNED, HALF, PAIRS
        )
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head = (job - of_queries) * AT_ONCE + tl.arange(0, AT_ONCE)
        there = head < tl.where(slot >= 0, KV_HEADS, 0)
        own_k = k + token * k_strides[0]
        k_to = k_pool + slot // PAGE * k_pool_strides[0] + slot % PAGE * k_pool_strides[2]
        _put_rotated(
            own_k,
            k_to,
            k_strides[1],
            k_pool_strides[1],
            tables,
            k_inverse,
            head,
            there,
            COLUMNS,
            BLOCK,
            TURNED,
            HALF,
            PAIRS,
        )
        column = tl.arange(0, V_BLOCK)
        mask = there[:, None] & (column < V_COLUMNS)[None, :]
        v_at = v + token * v_strides[0] + head[:, None] * v_strides[1] + column[None, :]
        v_to = v_pool + slot // PAGE * v_pool_strides[0] + slot % PAGE * v_pool_strides[2]
        values = _as_stored(tl.load(v_at, mask=mask, other=0.0), v_inverse, v_pool)
        tl.store(v_to + head[:, None] * v_pool_strides[1] + column[None, :], values, mask=mask)


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
    inverse,
    table,
    latent_token,
    k_token,
    q_strides,
    out_strides,
    ckv_strides,
    kpe_strides,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    PAGE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    token, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tables = (cos + token * table, sin + token * table)
    head = tl.arange(0, AT_ONCE)
    if job > 0:
        head += (job - 1) * AT_ONCE
        own, to = q_rope + token * q_strides[0], out + token * out_strides[0]
        _put_rotated(
            own, to, q_strides[1], out_strides[1], tables, 1.0, head, head < HEADS, TURNED, 16, TURNED, HALF, PAIRS
        )
    else:
        slot = tl.load(slots + token).to(tl.int64)
        there = head < tl.where(slot >= 0, 1, 0)
        kpe_to = kpe + slot // PAGE * kpe_strides[0] + slot % PAGE * kpe_strides[1]
        _put_rotated(
            k_rope + token * k_token, kpe_to, 0, 0, tables, inverse, head, there, TURNED, 16, TURNED, HALF, PAIRS
        )
        column = tl.arange(0, BLOCK)
        mask = column < tl.where(slot >= 0, RANK, 0)
        x = tl.load(latent + token * latent_token + column, mask=mask, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            wide *= tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
            gain = tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)
            x = (gain * wide.to(x.dtype).to(tl.float32)).to(x.dtype)
        ckv_to = ckv + slot // PAGE * ckv_strides[0] + slot % PAGE * ckv_strides[1]
        tl.store(ckv_to + column, _as_stored(x, inverse, ckv), mask=mask)


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
    """q [1, H, T, Dk] rotated (into `out`, which may be q); k [1, Hkv, T, Dk] rotated and v [1, Hkv, T, Dv] to their
    `slots` int64 [T] of the pools [pages, Hkv, PAGE, columns]. As reference.store_heads.
    """
    none_on_gpu("attention", q, k, v)
    (_, heads, tokens, wide), kv_heads, turned = q.shape, k.shape[1], cos.shape[2]
    _fits({"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "k_pool": k_pool, "v_pool": v_pool}, tokens, turned, wide)
    if interleaved and out is not None and out.data_ptr() == q.data_ptr():
        raise ValueError("pairs come out as halves, in another order: give another `out` than q")
    out = torch.empty_like(q) if out is None else out
    jobs = triton.cdiv(heads, AT_ONCE) + triton.cdiv(kv_heads, AT_ONCE)
    tensors = (q, k, v, out, k_pool, v_pool, cos, sin, slots)
    strides = [(x.stride(2), x.stride(1)) for x in (q, k, v, out)] + [x.stride()[:3] for x in (k_pool, v_pool)]
    _store_heads[tokens, jobs](
        *tensors,
        1 / k_scale,
        1 / v_scale,
        cos.stride(1),
        *strides,
        HEADS=heads,
        KV_HEADS=kv_heads,
        COLUMNS=wide,
        BLOCK=triton.next_power_of_2(wide),
        V_COLUMNS=v.shape[3],
        V_BLOCK=triton.next_power_of_2(v.shape[3]),
        TURNED=turned,
        HALF=triton.next_power_of_2(turned // 2),
        PAIRS=interleaved,
        PAGE=k_pool.shape[2],
        AT_ONCE=AT_ONCE,
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
    """latent [1, T, R], by `norm` [R] normalised if given, and k_rope [1, T, P] rotated, to their `slots` of the pools
    ckv [pages, PAGE, R] and kpe [pages, PAGE, P]; q_rope [1, H, T, P] rotated is returned (or in `out`). As
    reference.store_latent.
    """
    none_on_gpu("MLA", latent, k_rope, q_rope)
    heads, tokens, turned = q_rope.shape[1], q_rope.shape[2], q_rope.shape[3]
    named = {"latent": latent, "k_rope": k_rope, "q_rope": q_rope, "cos": cos, "sin": sin, "ckv": ckv, "kpe": kpe}
    _fits(named, tokens, cos.shape[2], turned)
    if cos.shape[2] != turned:
        raise ValueError(f"cos has {cos.shape[2]} columns, q_rope {turned}")
    if interleaved and out is not None and out.data_ptr() == q_rope.data_ptr():
        raise ValueError("pairs come out as halves, in another order: give another `out` than q_rope")
    out = torch.empty_like(q_rope) if out is None else out
    tensors = (latent, k_rope, q_rope, latent if norm is None else norm, out, ckv, kpe, cos, sin, slots)
    strides = [(x.stride(2), x.stride(1)) for x in (q_rope, out)] + [x.stride()[:2] for x in (ckv, kpe)]
    _store_latent[tokens, 1 + triton.cdiv(heads, AT_ONCE)](
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
        TURNED=turned,
        HALF=triton.next_power_of_2(turned // 2),
        PAIRS=interleaved,
        NORM=norm is not None,
        PAGE=ckv.shape[1],
        AT_ONCE=AT_ONCE,
    )
    return out


def _fits(tensors: dict[str, torch.Tensor], tokens: int, turned: int, columns: int) -> None:
    """ValueError unless columns are dense and tables have a row for each token."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} with strides {tensor.stride()} has columns that are not dense")
        if name in ("cos", "sin") and (tensor.shape[1] != tokens or tensor.shape[2] != turned):
            raise ValueError(
                f"{name} of the shape {tuple(tensor.shape)} has no row of {turned} for each of {tokens} tokens"
            )
    if turned % 2 or turned > columns:
        raise ValueError(f"{turned} columns cannot be rotated of {columns}")
