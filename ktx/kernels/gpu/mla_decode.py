"""Absorbed multi-head latent attention (MLA) in Triton, in which every head attends to the same latent.

It computes `reference.mla_attention`. A block of the latent is loaded once and is keys and values, for all heads that
fit in a program. 128 heads are two programs next to each other, of which the second finds the block in the L2 cache.
Prompts can be computed in expanded form instead: ktx.kernels.gpu.paged_attention.attention with `q_rope` and `k_rope`,
on keys and values that are expanded from the latent, see `as_pages`.

Letters in shapes: H heads, T tokens, R columns of the latent, P rotated columns.
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
    """Absorbed MLA, as reference.mla_attention with the plan's sequences and pages.

    Args:
        q_nope: [1, H, T, R], already multiplied by W_UK.
        q_rope: [1, H, T, P].
        ckv: pool [pages, PAGE, R], the latent.
        kpe: pool [pages, PAGE, P], the rotated key columns.
        plan: the sequences and pages, of a shape with latent=True.
        scale: factor of the scores.
        kv_scale: e4m3 pools store values / kv_scale.
        out: [1, T, H, R], receives the result; allocated by default.

    Returns:
        [1, T, H, R] in q_nope's dtype.

    Raises:
        ValueError: if the plan is for separate keys and values, or a tensor does not fit.
    """
    if not plan.schedule.shape.latent:
        raise ValueError("the plan is for separate keys and values: create its Shape with latent=True")
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
    """Views a dense matrix [positions, heads * columns] as a pool [pages, heads, page, columns].

    Prompts in expanded form have their keys and values in such a matrix, and the paged kernel computes them without a
    copy. The pages are in order.

    Raises:
        ValueError: if the positions are not a multiple of `page`, or the columns not of `heads`.
    """
    if len(rows) % page or rows.shape[1] % heads:
        raise ValueError(
            f"{tuple(rows.shape)} is not a multiple of pages of {page} positions with {heads} heads: pad the rows"
        )
    return rows.unflatten(1, (heads, -1)).unflatten(0, (-1, page)).transpose(1, 2)
