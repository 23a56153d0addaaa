"""A transformers cache that grows by doubling and stores half precision.

A stock DynamicCache copies everything at each token; here a token is written in place. Layers that attend (also MLA's latent,
whose two halves transformers hands over as keys and values) are stored whole, sliding windows too, so that a chat can take tokens back;
recurrent layers (linear attention) stay transformers' own and cannot.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ktx.kernels import cpu

FIRST = 256  # positions of the first allocation
HUGE_PAGE = 2 << 20
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # their subclasses keep states of other kinds beside keys


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that is not initialised; a long context's lies on huge pages where the system has them."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return cpu.ops.empty_packed(nbytes).view(dtype).view(shape)


class GrowingLayer(DynamicLayer):
    """Keys and values [batch, heads, length, columns] as views of larger buffers."""

    is_sliding = False
    is_croppable = True

    def __init__(self, dtype: torch.dtype | None = torch.float16):
        self.store_dtype, self.length = dtype, 0
        self.buffers: list[torch.Tensor] = []
        super().__init__()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        values = key_states if value_states is None else value_states
        self.dtype, self.device = self.store_dtype or key_states.dtype, key_states.device
        self.buffers = [self._buffer(states, FIRST) for states in (key_states, values)]
        self.is_initialized = True

    def _buffer(self, like: torch.Tensor, length: int) -> torch.Tensor:
        return empty((*like.shape[:2], length, like.shape[3]), self.dtype, like.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, heads, new, columns] and returns everything stored so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, end = self.length, self.length + key_states.shape[2]
        self.reserve(key_states.shape[2])
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:end] = states
        return self.keys, self.values  # type: ignore[return-value]

    def reserve(self, new: int) -> None:
        """Makes the layer `new` positions longer; who asks for them writes them into `buffers`."""
        end = self.length + new
        if end > self.buffers[0].shape[2]:
            self._grow(end)
        self.length = end

    def fits(self, batch: int, heads: int, columns: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether keys and values of this shape can be appended; an empty layer is made for them."""
        if not self.is_initialized:
            self.dtype, self.device = self.store_dtype or dtype, torch.device("cpu")
            self.buffers = [empty((batch, heads, FIRST, width), self.dtype, self.device) for width in columns]
            self.is_initialized = True
        keys, values = self.buffers
        return keys.shape[:2] == values.shape[:2] == (batch, heads) and (keys.shape[3], values.shape[3]) == columns

    def _grow(self, need: int) -> None:
        size = max(FIRST, 1 << (need - 1).bit_length())
        for i, old in enumerate(self.buffers):
            self.buffers[i] = self._buffer(old, size)
            self.buffers[i][:, :, : self.length] = old[:, :, : self.length]

    def _stored(self, which: int) -> torch.Tensor | None:
        return self.buffers[which][:, :, : self.length] if self.is_initialized else None

    keys = property(lambda self: self._stored(0), lambda self, value: self._replace(0, value))  # type: ignore[assignment]
    values = property(lambda self: self._stored(1), lambda self, value: self._replace(1, value))  # type: ignore[assignment]

    def _replace(self, which: int, value: torch.Tensor | None) -> None:
        """What transformers' code does that moves a layer's tensors; it begins with None."""
        if value is not None:
            self.buffers[which] = value

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back: a negative number says how many, as transformers 5 counts."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.length = 0

    def _rearrange(self, index: torch.Tensor) -> None:
        if self.is_initialized:
            self.buffers = [buffer.index_select(0, index.to(buffer.device)) for buffer in self.buffers]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rearrange(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rearrange(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.buffers = [buffer.repeat_interleave(repeats, dim=0) for buffer in self.buffers]


def growing(cache: Any, index: int) -> GrowingLayer | None:
    """A cache's layer as one that grows in place; None for a cache that has none, or is no cache.

    In a stock DynamicCache, which copies the whole past for every token, the layer is exchanged for one with the same content.
    """
    layers: Any = getattr(cache, "layers", ())
    if index >= len(layers):
        return None
    layer = layers[index]
    if type(layer) is GrowingLayer:
        return layer
    if (
        type(cache) is not DynamicCache
        or type(layer) is not DynamicLayer
        or not layer.is_initialized
        or cache.offloading
    ):
        return None
    assert layer.keys is not None and layer.values is not None
    if layer.keys.dim() != 4 or layer.keys.device.type != "cpu":
        return None
    layers[index] = grown = GrowingLayer(None)
    grown.update(layer.keys, layer.values)
    return grown


class KVCache(Cache):
    """What chat, bench and engine pass as `past_key_values`; `dtype` None keeps the model's own."""

    def __init__(self, config: Any, dtype: torch.dtype | None = torch.float16):
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[GrowingLayer(dtype) if type(layer) in PLAIN else layer for layer in stock])

    @property
    def can_crop(self) -> bool:
        """False when a layer keeps a running state instead of positions."""
        return all(isinstance(layer, GrowingLayer) for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` positions."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.crop(min(0, length - layer.get_seq_length()))

    def nbytes(self) -> int:
        return sum(
            buffer.numel() * buffer.element_size()
            for layer in self.layers
            if isinstance(layer, GrowingLayer)
            for buffer in layer.buffers
        )
