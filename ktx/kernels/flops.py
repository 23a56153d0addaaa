"""FLOP formulas of the CPU kernels for torch.utils.flop_counter.

A kernel counts as many operations as the same products in torch, whatever type the weights are packed as.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

Shape = tuple[int, ...]


# A formula gets the arguments of its kernel with tensors replaced by their shapes, and returns FLOPs; a multiplication
# and an addition count as two. In those of experts, rest[7] is `ff`, the rows of gate and up.


def _linear(x: Shape, packed: Shape, code: int, n: int, k: int, *rest: Any, **more: Any) -> int:
    return 2 * prod(x[:-1]) * n * k


def _linear_backward(grad: Shape, *rest: Any, **more: Any) -> int:
    return _linear(grad, *rest, **more)


def _expert_flops(ids: Shape, hidden: int, ff: int) -> int:
    """FLOPs of gate, up and down products of routed experts: `ids` is [tokens, top]."""
    return 2 * 3 * prod(ids) * hidden * ff


def _experts(x: Shape, ids: Shape, weights: Shape, *rest: Any, **more: Any) -> int:
    return _expert_flops(ids, x[-1], rest[7])


def _experts_backward(grad: Shape, x: Shape, ids: Shape, weights: Shape, *rest: Any, **more: Any) -> int:
    return _expert_flops(ids, x[-1], rest[7])


def _attention_flops(q: Shape, keys: int, columns: int) -> int:
    """FLOPs of attention for queries [B, H, S, D] and `keys` keys, with products over `columns` columns in all."""
    return 2 * prod(q[:3]) * keys * columns


def _attention(q: Shape, k: Shape, v: Shape, *rest: Any, **more: Any) -> int:
    rope_columns = [shape[-1] for shape in rest[5:6] if shape is not None] or [0]
    return _attention_flops(q, k[2], q[3] + v[3] + rope_columns[0])


def _mla_attention(q_nope: Shape, q_rope: Shape, latent: Shape, *rest: Any, **more: Any) -> int:
    return _attention_flops(q_nope, latent[-2], 2 * q_nope[3] + q_rope[3])


def _backward_flops(forward: Callable[..., int]) -> Callable[..., int]:
    """Returns the formula of a backward that recomputes the scores: five products for two, as torch counts its own."""
    return lambda grad, *rest, **more: forward(*rest, **more) * 5 // 2


FORMULAS: dict[str, Callable[..., int]] = {
    "linear": _linear,
    "linear_batched": _linear,
    "experts": _experts,
    "attention": _attention,
    "mla_attention": _mla_attention,
    "linear_backward": _linear_backward,
    "linear_batched_backward": _linear_backward,
    "experts_backward": _experts_backward,
    "attention_backward": _backward_flops(_attention),
    "mla_attention_backward": _backward_flops(_mla_attention),
}


def register() -> None:
    """Registers the formulas with torch; called once, after the kernels are loaded."""
    from torch.utils.flop_counter import register_flop_formula

    for kernel, formula in FORMULAS.items():
        register_flop_formula(getattr(torch.ops.ktx, kernel))(formula)
