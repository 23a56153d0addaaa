"""What lets a module compute in one kernel call what its children would compute one by one.

The children stay modules of their own. A block asks its `Watch` at every call whether they still are the ones it was made of and whether
nobody listens to them; else the module goes the long way, child by child.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktx.cache.kv import KVType, growing
from ktx.cache.paged import paged
from ktx.errors import UsageError
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


@dataclass(frozen=True)
class Room:
    """Where a block writes keys and values, after how many others, and what its tokens see of them."""

    buffers: list[torch.Tensor]
    past: int
    ranges: torch.Tensor | None
    mask: torch.Tensor | None
    ragged: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)


def room_for(
    hidden: torch.Tensor, cache: Any, owner: Any, heads: int, columns: tuple[int, int], mask: torch.Tensor | None
) -> Room | None:
    """Room in the cache's layer for the tokens of `hidden` f32 [B, S, D], made for a block that fills it; None when no block can.

    `owner` is the attention module.
    """
    if hidden.dtype is not torch.float32 or hidden.device.type != "cpu" or hidden.requires_grad:
        return None
    kept = float_type(owner.kv_dtype, hidden.dtype)
    pages = paged(cache, owner.layer_idx)
    if pages is not None:
        batch = pages.owner.batch
        if batch is None or not pages.fits(heads, columns, kept):
            return None
        pages.owner.look()
        return Room(pages.buffers, 0, batch.ranges(window_of(owner)), None, (batch.sequences, batch.pages, batch.slots))
    layer = growing(cache, owner.layer_idx, owner.kv_dtype)
    if layer is None or not layer.fits(hidden.shape[0], heads, columns, kept):
        return None
    past, new = layer.length, hidden.shape[1]
    ranges, matrix = split_mask(mask, past + new)
    layer.reserve(new)
    return Room(layer.buffers, past, ranges, matrix)


def split_mask(mask: torch.Tensor | None, keys: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What transformers hands over as a mask -> (ranges, mask) as the kernels take them."""
    if mask is None:
        return None, None
    if mask.dtype == torch.int32:
        ranges = getattr(mask, "ktx_ranges", None)  # one mask serves all layers of a forward
        if ranges is None:
            ranges = mask.ktx_ranges = mask[:, 0].contiguous()  # type: ignore[attr-defined]
        return ranges, None
    mask = mask[..., :keys]
    return None, mask if mask.dtype == torch.bool else mask.float()


def window_of(module: Any) -> int:
    """How many keys a layer's attention looks back at, 0 for all: by the kind of the layer, else by the configuration as a whole."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        kind = kinds[module.layer_idx]
        if kind not in ("full_attention", "sliding_attention"):
            raise UsageError(f"layer {module.layer_idx} has {kind}, which several requests cannot share yet")
        window = window if kind == "sliding_attention" else None
    return int(window or 0)


def float_type(kv_dtype: KVType, own: torch.dtype) -> torch.dtype:
    """The type in which keys and values are handed to a cache; one that quantises gets them in f16."""
    return torch.float16 if isinstance(kv_dtype, str) else own if kv_dtype is None else kv_dtype


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
