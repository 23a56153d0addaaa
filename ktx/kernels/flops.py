"""How many operations the CPU kernels stand for, for torch.utils.flop_counter: those of the same products in torch, whatever weights are packed as."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

Shape = tuple[int, ...]


def _linear(x: Shape, packed: Shape, code: int, n: int, k: int, *rest: Any, **more: Any) -> int:
    return 2 * prod(x[:-1]) * n * k


def _linear_backward(grad: Shape, *rest: Any, **more: Any) -> int:
    return _linear(grad, *rest, **more)


def _of_experts(ids: Shape, hidden: int, ff: int) -> int:
    return 2 * 3 * prod(ids) * hidden * ff


def _experts(x: Shape, ids: Shape, weights: Shape, *rest: Any, **more: Any) -> int:
    return _of_experts(ids, x[-1], rest[7])


def _experts_backward(grad: Shape, x: Shape, ids: Shape, weights: Shape, *rest: Any, **more: Any) -> int:
    return _of_experts(ids, x[-1], rest[7])


def _scores(q: Shape, keys: int, columns: int) -> int:
    """Of queries [B, H, S, D] with so many keys, products over so many columns in all."""
    return 2 * prod(q[:3]) * keys * columns


def _attention(q: Shape, k: Shape, v: Shape, *rest: Any, **more: Any) -> int:
    ropes = [given[-1] for given in rest[5:6] if given is not None] or [0]
    return _scores(q, k[2], q[3] + v[3] + ropes[0])


def _mla_attention(q_nope: Shape, q_rope: Shape, latent: Shape, *rest: Any, **more: Any) -> int:
    return _scores(q_nope, latent[-2], 2 * q_nope[3] + q_rope[3])


def _again(forward: Callable[..., int]) -> Callable[..., int]:
    """Of a backward that makes the scores again, as torch counts its own: five products for two."""
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
    "attention_backward": _again(_attention),
    "mla_attention_backward": _again(_mla_attention),
}


def register() -> None:
    """Makes the formulas known to torch; once, after the kernels are loaded."""
    from torch.utils.flop_counter import register_flop_formula

    for kernel, formula in FORMULAS.items():
        register_flop_formula(getattr(torch.ops.ktx, kernel))(formula)
