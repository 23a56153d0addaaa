"""What lets a module compute in one kernel call what its children would compute one by one.

The children stay modules of their own. A block's `Guard` says at every call whether they still are what it was made of, and whether nobody listens to them or trains them; else, and where autograd
records what it is given, the module goes the long way, child by child.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ktx.cache.kv import GrowingLayer, KVType, growing
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.fused_steps import FusedStepHandle, run
from ktx.kernels.gradients import recorded
from ktx.ops.base import is_ours
from ktx.ops.linear import Linear
from ktx.ops.masks import Intervals, edits_of, ranges_of

PreNorm = tuple[
    torch.Tensor | None, float, bool
]  # a norm that a block begins with: weight f32, epsilon, whether one is added to the weight
NO_NORM: PreNorm = (None, 0.0, False)
MAX_FUSED_TOKENS = 32  # tokens of a call up to which one call beats several: beyond, the work outweighs the way to it


class FusedStep:
    """The step of a block, made when it is first asked for; once more with the norm that a layer begins with."""

    def __init__(self, make: str, *args: Any):
        self.make, self.args = make, args
        self.steps: dict[bool, tuple[Any, FusedStepHandle]] = {}

    def step(self, before: PreNorm = NO_NORM) -> FusedStepHandle:
        weight, *rest = before
        norm = None if weight is None else (weight.data_ptr(), *rest)
        known = self.steps.get(weight is None)
        if known is None or known[0] != norm:  # the step holds the weight, whose address is nobody else's
            known = self.steps[weight is None] = norm, FusedStepHandle(self.make, *self.args, *before)
        return known[1]

    def __call__(self, x: torch.Tensor, before: PreNorm = NO_NORM) -> torch.Tensor:
        """x f32 [B, S, D] -> [B, S, D], with `before` plus x itself; for blocks that keep nothing."""
        x = x.contiguous()
        out = torch.empty_like(x)
        run(x, [self.step(before)], [out])
        return out


class WeightDescriptor:
    """Packed matrices as the block kernels take them: a list of tensors, and a list of counts, type codes and rows."""

    def __init__(self) -> None:
        self.packed: list[torch.Tensor] = []
        self.descriptor: list[int] = []
        self.hidden = 0  # columns of the first one

    def projection(self, parts: Iterable[cpu.Packed]) -> None:
        """Rows of one or several matrices; none for a projection that the module does not have."""
        known = list(parts)
        self.descriptor.append(len(known))
        for part in known:
            self.descriptor.append(part.qtype.code)
            self.descriptor.append(part.n)
            self._add(part)

    def experts(self, weights: cpu.Packed) -> None:
        self.descriptor.append(weights.qtype.code)
        self._add(weights)

    def _add(self, weights: cpu.Packed) -> None:
        self.hidden = self.hidden or weights.k
        self.packed.append(weights.data)


def plain_linear(child: Any) -> bool:
    """Whether a child is our Linear itself, not something that was put around it."""
    return is_ours(child, Linear) and bool(child.parts)


class FusedAttention(Protocol):
    """A block that attends: its module, the heads that it keeps, and the columns of what it keeps of each."""

    owner: Any
    heads: int
    columns: tuple[int, int]
    halved: bool  # whether its tables of cosines come without their second half
    made: FusedStep


@dataclass(frozen=True)
class KVTarget:
    """Where blocks write keys and values, two buffers each, after how many others, and what their tokens see of them."""

    buffers: list[torch.Tensor]
    past: int
    ranges: torch.Tensor | None
    mask: torch.Tensor | None
    ragged: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
    layers: Sequence[GrowingLayer] = ()  # of a cache that grows: what is written counts when `keep` says so
    numbers: Sequence[int] = ()  # of these layers in the cache
    edits: Any = 0  # of the mask that tokens see by

    def about(self, embeddings: Any, halved: bool) -> tuple[Any, ...]:
        """What `run` is told of it."""
        return (
            self.buffers,
            self.past,
            *rotary_tables(embeddings, halved),
            self.ranges,
            self.mask,
            *self.ragged,
        )

    def fits(self, index: int, cache: Any, mask: torch.Tensor | None) -> bool:
        """Whether nobody else has written to a block's layer or to the mask meanwhile, put another layer in its place, or was shown what it holds."""
        if edits_of(mask) != self.edits:
            return False
        if not self.layers:
            return True
        layer = self.layers[index]
        own = cache.layers[self.numbers[index]]
        return own is layer and layer.length == self.past and not layer.given and not layer.lent

    def store_converted(self, index: int, new: int) -> None:
        if self.layers:
            self.layers[index].length += new


def kv_target(
    hidden: torch.Tensor, cache: Any, blocks: Sequence[FusedAttention], mask: torch.Tensor | None
) -> KVTarget | None:
    """Room in the cache's layers for the tokens of `hidden` f32 [B, S, D], made for blocks that fill them; None when they cannot."""
    if hidden.dtype is not torch.float32 or hidden.device.type != "cpu" or recorded(hidden, mask):
        return None
    first = blocks[0].owner
    kept = float_type(first.kv_dtype, hidden.dtype)
    buffers: list[torch.Tensor] = []
    if type(cache) is PagedCache:
        batch = cache.batch
        for block in blocks:
            pages: Any = cache.layers[block.owner.layer_idx]
            if batch is None or not pages.fits(block.heads, block.columns, kept):
                return None
            buffers += pages.buffers
        assert batch is not None
        cache.check_cancelled()
        ragged = batch.sequences, batch.pages, batch.slots
        return KVTarget(buffers, 0, batch.ranges(window_of(first)), None, ragged, edits=edits_of(mask))
    layers, numbers = [], [block.owner.layer_idx for block in blocks]
    for block, number in zip(blocks, numbers, strict=True):
        layer = growing(cache, number, first.kv_dtype)
        if layer is None or not layer.fits(hidden.shape[0], block.heads, block.columns, kept):
            return None
        layers.append(layer)
    past, new = layers[0].length, hidden.shape[1]
    if any(layer.length != past for layer in layers):
        return None
    for layer in layers:
        layer.reserve(new)
        buffers += layer.buffers
    seen = split_mask(mask, hidden.shape[0], new, past + new)
    return KVTarget(buffers, past, *seen, layers=layers, numbers=numbers, edits=edits_of(mask))


def run_attention(
    block: FusedAttention, hidden: torch.Tensor, embeddings: Any, mask: torch.Tensor | None, cache: Any, before: PreNorm
) -> torch.Tensor | None:
    """A block's result for hidden f32 [B, S, D] -> [B, S, D], with `before` plus hidden itself; None where the cache is none it can write to."""
    room = kv_target(hidden, cache, [block], mask)
    if room is None:
        return None
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    run(hidden, [block.made.step(before)], [out], *room.about(embeddings, block.halved))
    room.store_converted(0, hidden.shape[1])
    return out


def split_mask(
    mask: torch.Tensor | None, batch: int, queries: int, keys: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What transformers hands over as a mask -> (ranges, mask) as the kernels take them. UsageError for a mask of other keys than there are.

    Without one, several queries are those of the first keys, as transformers' SDPA has it: it leaves out the mask of a prompt in a static cache, whose other keys are not written yet.
    """
    if mask is None:
        return (first_keys(batch, queries) if 1 < queries < keys else None), None
    ranges = ranges_of(mask)
    if ranges is not None:
        if not isinstance(mask, Intervals) or mask.shape[3] == keys:
            return ranges, None
        _sees_all(ranges, mask.shape[3], keys)
        return None, None
    if mask.shape[-1] != keys:
        raise _other_length(mask.shape[-1], keys)
    return None, mask if mask.dtype == torch.bool else mask.float()


def first_keys(batch: int, queries: int) -> torch.Tensor:
    """Ranges int32 [B, S, 2] of queries that each see the keys up to their own, from the first one on."""
    ends = torch.arange(1, queries + 1, dtype=torch.int32, device="cpu")
    return torch.stack([torch.zeros_like(ends), ends], -1).expand(batch, -1, -1).contiguous()


def _sees_all(ranges: torch.Tensor, meant: int, keys: int) -> None:
    """UsageError unless ranges [B, 1, 2], made for `meant` keys, have a lone token see them all: then it sees all of a layer that has others."""
    if ranges.shape[1] != 1 or not bool((ranges[..., 0] == 0).all()) or not bool((ranges[..., 1] == meant).all()):
        raise _other_length(meant, keys)


def _other_length(meant: int, keys: int) -> UsageError:
    return UsageError(
        f"the mask is for {meant} keys, this layer's cache has {keys} with the new ones: its keys were replaced by some of another length than in other"
        " layers. transformers makes one mask for all layers of a kind; give all of them as many keys, feed tokens one by one, or pass a mask of your own"
    )


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
    compiling = torch.compiler.is_compiling()
    known = None if compiling else getattr(owner, "ktx_tables", None)  # one pair serves all layers of a forward
    if known is None:
        twice = whole or halved
        known = tuple((torch.cat([part, part], -1) if twice else part).float().contiguous() for part in parts)
        if not compiling:
            owner.ktx_tables = known
    return known
