"""A transformers cache that grows by doubling and stores half precision, or eight bits.

A stock DynamicCache copies everything at each token; here a token is written in place. Layers that attend (also MLA's latent,
whose two halves transformers hands over as keys and values) are stored whole, sliding windows too, so that a chat can take tokens back;
recurrent layers (linear attention) stay transformers' own and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ktx.errors import UsageError, did_you_mean
from ktx.kernels import cpu
from ktx.kernels.gradients import WITHOUT_CACHE, recorded, refuse
from ktx.quant.types import QTYPES

CPU = torch.device("cpu")
FIRST = 256  # positions of the first allocation: as those that follow, whole pages (ktx.cache.page_pool)
HUGE_PAGE = 2 << 20
Q8_0 = "q8_0"  # blocks of 32 columns, an f16 scale before 32 int8: 1.06 bytes a column; torch sees bytes
FP8 = "fp8"  # on a GPU e4m3 as it is, without a scale; on the CPU, which knows none, Q8_0
BLOCKS = QTYPES["Q8_0"]
KVType = torch.dtype | str | None  # a float type, Q8_0 or FP8, or None: whatever the model computes in
KV_TYPES: dict[str, KVType] = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "q8_0": Q8_0,
    "fp8": FP8,
}
E4M3 = torch.float8_e4m3fn
E4M3_MOST = torch.finfo(E4M3).max
ON_GPU: dict[KVType, torch.dtype] = {Q8_0: torch.float16, FP8: E4M3}  # no kernel there knows blocks
NAMES = ("keys", "values")
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # their subclasses keep states of other kinds beside keys


def kv_type(wish: KVType) -> KVType:
    """What a user asked for (f16, bf16, f32, q8_0, fp8, auto, or a torch type) as one of KV_TYPES; None for auto. UsageError otherwise."""
    if wish is None or wish == "auto":
        return None
    if isinstance(wish, torch.dtype) and wish in KV_TYPES.values():
        return wish
    if not isinstance(wish, str) or wish not in KV_TYPES:
        raise UsageError(
            f"kv_dtype {str(wish)!r} is no type that keys and values are kept in{did_you_mean(str(wish), KV_TYPES)}; give auto or one of {' '.join(KV_TYPES)}"
        )
    return KV_TYPES[wish]


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that is not initialised; a long context's lies on huge pages where the system has them."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return cpu.ops.empty_packed(nbytes).view(dtype).view(shape)


def capacity(positions: int) -> int:
    """Positions that a buffer for so many has."""
    return max(FIRST, 1 << (positions - 1).bit_length())


def stored_row(store: KVType, columns: int, own: torch.dtype, device: torch.device) -> tuple[int, torch.dtype]:
    """Elements and type of a stored row; columns that are no whole blocks of Q8_0 are kept in f16."""
    if not isinstance(store, str):
        return columns, store or own
    if device.type != "cpu":
        return columns, ON_GPU[store]
    if columns % BLOCKS.block:
        return columns, torch.float16
    return BLOCKS.row_bytes(columns), torch.uint8


class GrowingLayer(DynamicLayer):
    """Keys and values [batch, heads, length, columns] as views of larger buffers.

    A script may edit `keys` and `values` in place, or assign others, of another length or batch too, as it may in transformers' own layer. What is assigned waits
    in `given` until the layer is used next. A buffer that was handed out (`lent`) is not written to again: the next token goes to a copy, as
    transformers copies at each token.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, dtype: KVType = torch.float16):
        self.store_dtype, self.length, self.columns = dtype, 0, (0, 0)
        self.buffers: list[torch.Tensor] = []
        self.given: dict[int, torch.Tensor] = {}
        self.lent = False
        super().__init__()

    @classmethod
    def replace(cls, layer: Any, dtype: KVType) -> None:
        """Makes transformers' layer with keys and values one that grows in place; who holds the layer holds this one."""
        given = {0: layer.keys, 1: layer.values}
        for name in NAMES:
            del layer.__dict__[name]
        object.__setattr__(layer, "__class__", cls)
        cls.__init__(layer, dtype)
        layer.given = given
        layer.settle()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        values = key_states if value_states is None else value_states
        self._make(key_states, (key_states.shape[3], values.shape[3]), key_states.dtype)

    def _make(self, like: torch.Tensor, columns: tuple[int, int], dtype: torch.dtype) -> None:
        self.device, batch, heads = like.device, like.shape[0], like.shape[1]
        wide = [stored_row(self.store_dtype, width, dtype, self.device) for width in columns]
        self.dtype, self.columns = wide[0][1], columns
        self.buffers = [empty((batch, heads, FIRST, width), kind, self.device) for width, kind in wide]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, heads, new, columns] and returns everything stored so far. ValueError for another batch, or heads of another number or width."""
        self.settle()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for states, buffer, columns in zip((key_states, value_states), self.buffers, self.columns, strict=True):
            if states.shape[:2] != buffer.shape[:2] or states.shape[3] != columns:
                raise ValueError(
                    f"a cache of [batch, heads, positions, columns] = {[*buffer.shape[:2], self.length, columns]} cannot be continued by {list(states.shape)}"
                )
        before, end = self.length, self.length + key_states.shape[2]
        self.reserve(key_states.shape[2])
        self.length = end
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            put(states, buffer[:, :, before:end])
        return self._stored(0), self._stored(1)

    def reserve(self, new: int) -> None:
        """For `new` positions more in `buffers`; who writes them makes `length` longer."""
        if self.given:
            self.settle()
        if self.lent or self.length + new > self.buffers[0].shape[2]:
            self._grow(self.length + new)

    def settle(self) -> None:
        """Takes over what was assigned to `keys` and `values`. UsageError when only one of them has another shape than the other."""
        if not self.given:
            return
        keys, values = (self.given[i] if i in self.given else self._stored(i) if self.buffers else None for i in (0, 1))
        if keys is None or values is None or keys.shape[:3] != values.shape[:3]:
            shapes = [None if states is None else list(states.shape) for states in (keys, values)]
            raise UsageError(
                f"a cache layer's keys are {shapes[0]}, its values {shapes[1]}; assign both, of the same batch, heads and positions"
            )
        if not self.buffers:
            self._make(keys, (keys.shape[3], values.shape[3]), keys.dtype)
        own, self.length, columns = self.buffers[0].dtype, keys.shape[2], list(self.columns)
        for which, states in self.given.items():
            columns[which] = states.shape[3]
            width, kind = stored_row(self.store_dtype, states.shape[3], own, self.device)
            buffer = empty((*states.shape[:2], capacity(self.length), width), kind, self.device)
            put(states.to(self.device), buffer[:, :, : self.length])
            self.buffers[which] = buffer
        self.columns, self.lent = (columns[0], columns[1]), self.lent and len(self.given) < 2
        self.given = {}

    def fits(
        self, batch: int, heads: int, columns: tuple[int, int], dtype: torch.dtype, device: torch.device = CPU
    ) -> bool:
        """Whether keys and values of this shape can be appended; an empty layer is made for them on `device`."""
        if self.given:
            self.settle()
        if not self.is_initialized:
            self._make(torch.empty(batch, heads, device=device, dtype=torch.float32), columns, dtype)
        keys, values = self.buffers
        return keys.shape[:2] == values.shape[:2] == (batch, heads) and self.columns == columns

    def keep_floats(self) -> None:
        """Says, while the layer is empty, that its reader is on a GPU and knows no blocks."""
        if not self.is_initialized:
            self.store_dtype = ON_GPU.get(self.store_dtype, self.store_dtype)

    def _grow(self, need: int) -> None:
        for i, old in enumerate(self.buffers):
            self.buffers[i] = empty((*old.shape[:2], capacity(need), old.shape[3]), old.dtype, old.device)
            self.buffers[i][:, :, : self.length] = old[:, :, : self.length]
        self.lent = False

    def _stored(self, which: int) -> torch.Tensor:
        return self.buffers[which][:, :, : self.length]

    def _shown(self, which: int) -> torch.Tensor | None:
        """Keys or values as scripts see them, [batch, heads, length, columns]; None in a layer that has none yet. UsageError for blocks of eight bits."""
        if which in self.given:
            return self.given[which]
        if not self.buffers:
            return None
        if self.buffers[which].dtype is torch.uint8:
            raise UsageError(
                f"the {NAMES[which]} of this cache are blocks of eight bits (q8_0), which nobody can edit in place: read them by layer.floats(),"
                f" replace them by assigning floats to layer.{NAMES[which]}, or take a cache of another kv_dtype"
            )
        self.lent = True
        return self._stored(which)

    keys = property(lambda self: self._shown(0), lambda self, value: self._assign(0, value))  # type: ignore[assignment]
    values = property(lambda self: self._shown(1), lambda self, value: self._assign(1, value))  # type: ignore[assignment]

    def _assign(self, which: int, value: torch.Tensor | None) -> None:
        """Notes what takes the place of keys or values when the layer is used next; None, or no numbers at all, empties the layer."""
        if value is None or (value.dim() == 1 and not value.numel()):
            self.reset()
        elif value.dim() != 4 or not value.is_floating_point():
            raise UsageError(
                f"a cache layer's {NAMES[which]} are floats [batch, heads, positions, columns], not {value.dtype} {list(value.shape)}"
            )
        else:
            self.given[which] = value

    def floats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of keys and values [batch, heads, length, columns] in a float type, whatever they are stored in. UsageError for an empty layer."""
        self.settle()
        if not self.buffers:
            raise UsageError("a cache layer without keys and values has no numbers yet")
        keys, values = (values_of(self._stored(i).contiguous()).clone() for i in (0, 1))
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.given[0].shape[2] if 0 in self.given else self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back: a negative number says how many, as transformers 5 counts."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        self.settle()
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.length, self.given = 0, {}

    def _rearrange(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces both buffers by new ones."""
        self.settle()
        if self.buffers:
            self.buffers, self.lent = [change(buffer) for buffer in self.buffers], False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rearrange(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rearrange(lambda buffer: buffer[indices].contiguous())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rearrange(lambda buffer: buffer.repeat_interleave(repeats, dim=0))


def put(states: torch.Tensor, stored: torch.Tensor) -> None:
    """Writes keys or values [batch, heads, new, columns] of any float type into a buffer's part."""
    refuse("a cache that grows in place", WITHOUT_CACHE, states)
    if stored.dtype != torch.uint8:
        stored.copy_(within(states, stored.dtype))
    else:
        cpu.ops.store_q8_0(states if states.stride(3) == 1 else states.contiguous(), stored)


def within(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that a type can hold; a cast to E4M3 may make NaN of larger ones, depending on torch's version."""
    return states.clamp(-E4M3_MOST, E4M3_MOST) if dtype is E4M3 else states


def values_of(stored: torch.Tensor) -> torch.Tensor:
    """Keys or values as a cache returned them, in a float type."""
    return cpu.ops.load_q8_0(stored) if stored.dtype == torch.uint8 else stored


def growing(cache: Any, index: int, store: KVType = None) -> GrowingLayer | None:
    """A cache's layer as one that grows in place; None for a cache that has none, or is no cache.

    A layer of a stock DynamicCache, which copies the whole past for every token, becomes one with the same content,
    which is quantised when `store` says so.
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
    if any(states is None or states.dim() != 4 or recorded(states) for states in (layer.keys, layer.values)):
        return None
    GrowingLayer.replace(layer, store if isinstance(store, str) else None)
    return layer  # type: ignore[return-value]  # it has become one


def as_stock(cache: Any, index: int) -> None:
    """Takes `growing` back before autograd records what is appended: the layer of a stock DynamicCache is transformers' own again, with the same content."""
    layers: Any = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if (
        type(cache) is DynamicCache
        and type(layer) is GrowingLayer
        and layer.is_initialized
        and layer.dtype != torch.uint8
    ):
        layer.settle()
        keys, values = layer._stored(0), layer._stored(1)
        layer.__dict__.clear()
        object.__setattr__(layer, "__class__", DynamicLayer)
        DynamicLayer.__init__(layer)
        layer.update(keys, values)


class KVCache(Cache):
    """What chat, bench and engine pass as a model's cache; `dtype` is one of KV_TYPES or its name, None keeps the model's own."""

    def __init__(self, config: Any, dtype: KVType = torch.float16):
        dtype = kv_type(dtype)
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
