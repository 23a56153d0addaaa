"""Fused steps, which compute in one kernel call what the children of a module would compute one by one.

The children remain ordinary modules. At every call the `Guard` of a fused block checks that they are unchanged since it
was built, and that no hooks observe them and no training updates them. If the check fails, or if autograd records the
input, the module calls its children one by one (the unfused forward).

Shapes: B sequences, S new tokens, D columns of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ktx.cache.kv import GrowingLayer, KVType, to_growing_layer
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.fused_steps import FusedStepHandle, run_steps
from ktx.kernels.gradients import is_recorded
from ktx.ops.base import is_ktx_operator
from ktx.ops.linear import Linear
from ktx.ops.masks import Intervals, mask_version, ranges_of
from ktx.utils.tensor_memo import TensorMemo

# The norm at the start of a fused block: weight f32 (None for no norm), epsilon, whether 1 is added to the weight.
PreNorm = tuple[torch.Tensor | None, float, bool]
NO_NORM: PreNorm = (None, 0.0, False)
# Up to so many tokens a fused call is faster than several calls; for more, the call overhead is small next to the work.
MAX_FUSED_TOKENS = 32


class FusedStep:
    """Creates the kernel step of a fused block on first use, with and without the norm of its input.

    Args:
        factory: The name of the kernel function that creates the step (ktx.kernels.fused_steps).
        *args: Its arguments: the weights and options of the block.
    """

    def __init__(self, factory: str, *args: Any):
        self.factory, self.args = factory, args
        self.steps: dict[bool, tuple[Any, FusedStepHandle]] = {}

    def step(self, before: PreNorm = NO_NORM) -> FusedStepHandle:
        """Returns the step that starts with the norm `before`, created on first use or when the norm has changed.

        One step with a norm is cached and one without, because a layer calls its block with the same norm each time.
        """
        weight, *rest = before
        norm_key = None if weight is None else (weight.data_ptr(), *rest)
        cached = self.steps.get(weight is None)
        if cached is None or cached[0] != norm_key:  # the step keeps the weight alive, so its address is unique
            cached = self.steps[weight is None] = norm_key, FusedStepHandle(self.factory, *self.args, *before)
        return cached[1]

    def __call__(self, x: torch.Tensor, before: PreNorm = NO_NORM) -> torch.Tensor:
        """Runs the step on x f32 [B, S, D] -> [B, S, D]; for blocks without a cache.

        If `before` is a norm, x is added to the result (residual).
        """
        x = x.contiguous()
        out = torch.empty_like(x)
        run_steps(x, [self.step(before)], [out])
        return out


class WeightDescriptor:
    """Describes packed matrices to the fused kernels.

    Attributes:
        packed: The packed tensors.
        descriptor: Counts of parts, type codes and numbers of rows, in the order in which the kernel parses them.
        hidden: The number of columns of the first matrix.
    """

    def __init__(self) -> None:
        self.packed: list[torch.Tensor] = []
        self.descriptor: list[int] = []
        self.hidden = 0

    def projection(self, parts: Iterable[cpu.Packed]) -> None:
        """Adds a projection of one or several row-wise parts; no parts for a projection that the module lacks."""
        part_list = list(parts)
        self.descriptor.append(len(part_list))
        for part in part_list:
            self.descriptor.append(part.qtype.code)
            self.descriptor.append(part.n)
            self._add(part)

    def experts(self, weights: cpu.Packed) -> None:
        """Adds one projection of all experts, or of all heads."""
        self.descriptor.append(weights.qtype.code)
        self._add(weights)

    def _add(self, weights: cpu.Packed) -> None:
        self.hidden = self.hidden or weights.k
        self.packed.append(weights.data)


def is_plain_linear(child: Any) -> bool:
    """Whether a child is a loaded Linear of ktx, and not a module that wraps or replaces it."""
    return is_ktx_operator(child, Linear) and bool(child.parts)


class FusedAttention(Protocol):
    """A fused attention block.

    Attributes:
        owner: The attention module.
        heads: The number of cached heads.
        head_dims: The cached columns of a head in the two KV buffers.
        half_rotary: Whether the rotary tables lack their second half, which equals the first.
        fused_step: The step of the block.
    """

    owner: Any
    heads: int
    head_dims: tuple[int, int]
    half_rotary: bool
    fused_step: FusedStep


@dataclass(frozen=True)
class KVTarget:
    """The KV cache buffers that fused attention blocks write to, and the keys that their tokens see.

    Attributes:
        buffers: Two buffers for each block.
        past: The number of tokens that are already cached.
        ranges: Intervals of visible keys int32 [B, S, 2], or None.
        mask: The dense mask, or None.
        ragged: The sequences, pages and slots of a batch on the paged KV cache.
        layers: The cache layers of the blocks, if the cache grows in place; the new tokens become part of a layer when
            `commit` is called.
        layer_indices: The indices of these layers in the cache.
        edits: The version of the mask (`mask_version`).
    """

    buffers: list[torch.Tensor]
    past: int
    ranges: torch.Tensor | None
    mask: torch.Tensor | None
    ragged: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
    layers: Sequence[GrowingLayer] = ()
    layer_indices: Sequence[int] = ()
    edits: Any = 0

    def kernel_args(self, embeddings: Any, halved: bool) -> tuple[Any, ...]:
        """Returns the attention arguments of `run_steps`: cache buffers, past length, rotary tables, masks, pages.

        `halved`: whether the rotary tables `embeddings` lack their second half, as in `rotary_tables`.
        """
        return (
            self.buffers,
            self.past,
            *rotary_tables(embeddings, halved),
            self.ranges,
            self.mask,
            *self.ragged,
        )

    def is_unchanged(self, index: int, cache: Any, mask: torch.Tensor | None) -> bool:
        """Whether the mask and the cache layer of a block are unchanged since this target was created.

        False if other code has written to the mask or the layer, replaced the layer, or read its tensors.

        Args:
            index: The index of the block.
            cache: The cache.
            mask: The mask.
        """
        if mask_version(mask) != self.edits:
            return False
        if not self.layers:
            return True
        layer = self.layers[index]
        current = cache.layers[self.layer_indices[index]]
        return current is layer and layer.length == self.past and not layer.assigned and not layer.exported

    def commit(self, index: int, new: int) -> None:
        """Adds the `new` tokens that a block has written to the length of its cache layer."""
        if self.layers:
            self.layers[index].length += new


def kv_target(
    hidden: torch.Tensor, cache: Any, blocks: Sequence[FusedAttention], mask: torch.Tensor | None
) -> KVTarget | None:
    """Reserves capacity in the KV cache for the tokens of `hidden`.

    Args:
        hidden: The hidden states f32 [B, S, D].
        cache: The cache.
        blocks: The fused attention blocks that will write to it, in the order of their layers.
        mask: The attention mask.

    Returns:
        The target of the blocks, or None if they cannot write to this cache or do not support the input.
    """
    if hidden.dtype is not torch.float32 or hidden.device.type != "cpu" or is_recorded(hidden, mask):
        return None
    first = blocks[0].owner
    dtype = kv_float_dtype(first.kv_dtype, hidden.dtype)
    buffers: list[torch.Tensor] = []
    if type(cache) is PagedCache:
        batch = cache.batch
        for block in blocks:
            pages: Any = cache.layers[block.owner.layer_idx]
            if batch is None or not pages.prepare_buffers(block.heads, block.head_dims, dtype):
                return None
            buffers += pages.buffers
        assert batch is not None
        cache.check_cancelled()
        ragged = batch.sequences, batch.pages, batch.slots
        return KVTarget(buffers, 0, batch.window_ranges(sliding_window(first)), None, ragged, edits=mask_version(mask))
    layers, indices = [], [block.owner.layer_idx for block in blocks]
    for block, index in zip(blocks, indices, strict=True):
        layer = to_growing_layer(cache, index, first.kv_dtype)
        if layer is None or not layer.prepare_buffers(hidden.shape[0], block.heads, block.head_dims, dtype):
            return None
        layers.append(layer)
    past, new = layers[0].length, hidden.shape[1]
    if any(layer.length != past for layer in layers):
        return None
    for layer in layers:
        layer.reserve(new)
        buffers += layer.buffers
    visible = split_mask(mask, hidden.shape[0], new, past + new)
    return KVTarget(buffers, past, *visible, layers=layers, layer_indices=indices, edits=mask_version(mask))


def run_attention(
    block: FusedAttention, hidden: torch.Tensor, embeddings: Any, mask: torch.Tensor | None, cache: Any, before: PreNorm
) -> torch.Tensor | None:
    """Runs a fused attention block (GQA or MLA) in one kernel call, and adds its tokens to the cache.

    Args:
        block: The block.
        hidden: The hidden states f32 [B, S, D].
        embeddings: The rotary tables.
        mask: The attention mask.
        cache: The cache.
        before: The norm of the input; if it has one, `hidden` is added to the result (residual).

    Returns:
        f32 [B, S, D], or None if the block cannot write to the cache or does not support the input.
    """
    target = kv_target(hidden, cache, [block], mask)
    if target is None:
        return None
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    run_steps(hidden, [block.fused_step.step(before)], [out], *target.kernel_args(embeddings, block.half_rotary))
    target.commit(0, hidden.shape[1])
    return out


def split_mask(
    mask: torch.Tensor | None, batch: int, queries: int, keys: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Converts a mask of transformers to the (ranges, mask) arguments of the kernels.

    Without a mask, several queries are taken to be those of the first keys, as in transformers' SDPA: transformers
    passes no mask for a prompt in a static cache, whose other keys are not written yet.

    Args:
        mask: Intervals or ranges int32 [B, 1, S, 2] (first and end of the keys that each query sees), a dense mask, or
            None.
        batch: The batch size.
        queries: The number of queries.
        keys: The number of keys.

    Returns:
        The ranges int32 [B, S, 2] or None, and the dense mask (bool, or f32 to add) or None.

    Raises:
        UsageError: The mask is for another number of keys.
    """
    if mask is None:
        return (first_keys(batch, queries) if 1 < queries < keys else None), None
    ranges = ranges_of(mask)
    if ranges is not None:
        if not isinstance(mask, Intervals) or mask.shape[3] == keys:
            return ranges, None
        # a single token that sees every key of the mask also sees every key of this layer: no mask
        _check_single_token_mask(ranges, mask.shape[3], keys)
        return None, None
    if mask.shape[-1] != keys:
        raise _mask_length_error(mask.shape[-1], keys)
    return None, mask if mask.dtype == torch.bool else mask.float()


def first_keys(batch: int, queries: int) -> torch.Tensor:
    """Returns causal ranges int32 [B, S, 2]: query i sees the keys 0 to i."""
    ends = torch.arange(1, queries + 1, dtype=torch.int32, device="cpu")
    return torch.stack([torch.zeros_like(ends), ends], -1).expand(batch, -1, -1).contiguous()


def _check_single_token_mask(ranges: torch.Tensor, mask_keys: int, keys: int) -> None:
    """Raises UsageError unless the ranges are those of a single token that sees all of `mask_keys` keys.

    Such a token sees all keys of a layer that has another number of keys, too.
    """
    if ranges.shape[1] != 1 or not bool((ranges[..., 0] == 0).all()) or not bool((ranges[..., 1] == mask_keys).all()):
        raise _mask_length_error(mask_keys, keys)


def _mask_length_error(mask_keys: int, keys: int) -> UsageError:
    """Returns the error for a mask of another number of keys than the cache of this layer."""
    return UsageError(
        f"the mask is for {mask_keys} keys, this layer's cache has {keys} with the new ones: its keys were replaced by"
        " keys of another length than those of other layers. transformers creates one mask for all layers of a type;"
        " use the same number of keys in all layers, feed tokens one by one, or pass your own mask"
    )


def sliding_window(module: Any) -> int:
    """Returns the sliding window of a layer in tokens, 0 for none, by its layer type or else by the configuration.

    On the paged KV cache no mask is built, so the window comes from here.

    Raises:
        UsageError: The layer type is neither full nor sliding attention.
    """
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        layer_type = layer_types[module.layer_idx]
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UsageError(
                f"layer {module.layer_idx} has {layer_type}, which is not supported in batches of several requests"
            )
        window = window if layer_type == "sliding_attention" else None
    return int(window or 0)


def kv_float_dtype(kv_dtype: KVType, model_dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which keys and values are passed to a cache; f16 for a cache that quantizes them."""
    return torch.float16 if isinstance(kv_dtype, str) else model_dtype if kv_dtype is None else kv_dtype


_tables_of_embeddings = TensorMemo[tuple[torch.Tensor, torch.Tensor]]()


def rotary_tables(embeddings: Any, halved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts the rotary tables that a layer gets to those that the kernels read: cos, sin f32 [B, S, rotary columns].

    Args:
        embeddings: The pair (cos, sin) of transformers, or deepseek_v2's complex tensor [B, S, rotary columns / 2].
        halved: Whether the pair lacks its second half, which equals the first.
    """
    is_complex = isinstance(embeddings, torch.Tensor)
    owner, parts = (embeddings, (embeddings.real, embeddings.imag)) if is_complex else (embeddings[0], embeddings)

    def convert() -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin in f32, with both halves."""
        cos, sin = ((torch.cat([x, x], -1) if is_complex or halved else x).float().contiguous() for x in parts)
        return cos, sin

    is_converted = not (is_complex or halved) and owner.dtype is torch.float32 and owner.is_contiguous()
    if is_converted or torch.compiler.is_compiling():
        return convert()
    return _tables_of_embeddings.get_or_compute(owner, convert)  # all layers of a forward share the tables
