"""What lets a module compute in one kernel call what its children would compute one by one.

The children stay modules of their own. A block asks its `Watch` at every call whether they still are the ones it was made of and whether
nobody listens to them; else the module goes the long way, child by child.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ktx.cache.kv import Q8_0, GrowingLayer, KVType, growing
from ktx.kernels import cpu
from ktx.ops.linear import Linear

Before = tuple[
    torch.Tensor | None, float, bool
]  # a norm that a block begins with: weight f32, epsilon, whether one is added to the weight
NOTHING: Before = (None, 0.0, False)


class Watch:
    """Children of modules, and the hooks that would have to be called. A pair (parent, name) is a child, None if it has none of that name."""

    def __init__(self, children: Iterable[tuple[nn.Module, str]]):
        self.children = [(parent._modules, name, parent._modules.get(name)) for parent, name in children]
        found = [child for _, _, child in self.children if child is not None]
        self.hooks = [hooks for child in found for hooks in (child._forward_hooks, child._forward_pre_hooks)]

    def holds(self) -> bool:
        for modules, name, child in self.children:
            if modules.get(name) is not child:
                return False
        return not any(self.hooks)


class Matrices:
    """Packed matrices as the block kernels take them: a list of tensors, and a list of counts, type codes and rows."""

    def __init__(self) -> None:
        self.packed: list[torch.Tensor] = []
        self.about: list[int] = []

    def projection(self, parts: Iterable[cpu.Packed]) -> None:
        """Rows of one or several matrices; none for a projection that the module does not have."""
        known = list(parts)
        self.about.append(len(known))
        for part in known:
            self.about += [part.qtype.code, part.n]
            self.packed.append(part.data)

    def experts(self, weights: cpu.Packed) -> None:
        self.about.append(weights.qtype.code)
        self.packed.append(weights.data)


def plain_linear(child: Any) -> bool:
    """Whether a child is our Linear itself, not something that was put around it."""
    return type(child) is Linear and bool(child.parts)


def room_for(
    hidden: torch.Tensor, cache: Any, index: int, heads: int, columns: tuple[int, int], kv_dtype: KVType
) -> GrowingLayer | None:
    """The cache's layer, when a block can write the new positions of `hidden` f32 [B, S, D] on the CPU straight into it."""
    if hidden.dtype is not torch.float32 or hidden.device.type != "cpu" or hidden.requires_grad:
        return None
    layer = growing(cache, index, kv_dtype)
    if layer is None or not layer.fits(hidden.shape[0], heads, columns, float_type(kv_dtype, hidden.dtype)):
        return None
    return layer


def float_type(kv_dtype: KVType, own: torch.dtype) -> torch.dtype:
    """The type in which keys and values are handed to a cache; one that quantises gets them in f16."""
    return torch.float16 if kv_dtype == Q8_0 else own if kv_dtype is None else kv_dtype  # type: ignore[return-value]


def rotary_tables(embeddings: Any, halved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin f32 [B, S, turned] from transformers' pair, or from deepseek_v2's complex [B, S, turned / 2].

    `halved`: the pair comes without its second half, which is as the first.
    """
    whole = isinstance(embeddings, torch.Tensor)
    owner, parts = (embeddings, (embeddings.real, embeddings.imag)) if whole else (embeddings[0], embeddings)
    known = getattr(owner, "ktx_tables", None)  # one pair serves all layers of a forward
    if known is None:
        twice = whole or halved
        known = tuple((torch.cat([part, part], -1) if twice else part).float().contiguous() for part in parts)
        owner.ktx_tables = known
    return known
