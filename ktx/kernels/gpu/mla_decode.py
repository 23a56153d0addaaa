"""Multi-head latent attention by Triton, absorbed: every head attends to the same latent, as `reference.mla_attention` defines it.

A block of the latent is fetched once and is keys and values, for all heads that fit a program; 128 heads are two programs side by side,
of which the second finds the block in the second-level cache. Prompts may be expanded instead: that is ktx.kernels.gpu.paged_attention.attention with
`q_rope` and `k_rope` on keys and values made of the latent, see `as_pages`.
"""

from __future__ import annotations

import torch

from ktx.kernels.gpu.paged_attention import attention
from ktx.kernels.gpu.split_kv import Plan


def mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    plan: Plan,
    scale: float,
    kv_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q_nope [1, H, T, R] already times W_UK, q_rope [1, H, T, P], pools ckv [pages, PAGE, R], kpe [pages, PAGE, P] -> [1, T, H, R].

    As reference.mla_attention with the plan's sequences and pages; e4m3 pools hold the latent over `kv_scale`.
    """
    if not plan.work.shape.latent:
        raise ValueError("the plan is for keys and values apart: make its shape with latent=True")
    latent = ckv[:, None]
    return attention(
        q_nope,
        latent,
        latent,
        plan,
        scale,
        q_rope=q_rope,
        k_rope=kpe[:, None],
        k_scale=kv_scale,
        v_scale=kv_scale,
        out=out,
    )


def as_pages(rows: torch.Tensor, heads: int, page: int = 64) -> torch.Tensor:
    """A dense matrix [positions, heads * columns] as a pool [pages, heads, page, columns] in order; positions are whole pages."""
    if len(rows) % page or rows.shape[1] % heads:
        raise ValueError(
            f"{tuple(rows.shape)} is no whole number of pages of {page} positions with {heads} heads: pad the rows"
        )
    return rows.unflatten(1, (heads, -1)).unflatten(0, (-1, page)).transpose(1, 2)
