"""A transformers cache that grows by doubling and stores half precision or eight bits.

A stock DynamicCache copies everything at each token; here a token is written in place. Attention layers (also MLA's
latent, whose two parts transformers passes as keys and values) store all positions, with a sliding window too, so that
a chat can remove tokens from the end. Recurrent layers (linear attention) stay transformers' own and cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ktx.errors import UsageError, did_you_mean
from ktx.kernels import cpu
from ktx.kernels.gradients import WITHOUT_CACHE, is_recorded, refuse_gradient
from ktx.quant.types import QTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CPU = torch.device("cpu")
MIN_CAPACITY = 256  # positions of the first allocation; it and the following ones are whole pages (ktx.cache.page_pool)
HUGE_PAGE_BYTES = 2 << 20
Q8_0 = "q8_0"  # blocks of 32 columns, an f16 scale before 32 int8: 1.06 bytes a column; stored as bytes
FP8 = "fp8"  # on a GPU e4m3 without a scale; on the CPU, which has no e4m3, Q8_0
Q8_0_TYPE = QTYPES["Q8_0"]
KVType = torch.dtype | str | None  # a float type, Q8_0 or FP8; None: the model's compute type
KV_TYPES: dict[str, KVType] = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "q8_0": Q8_0,
    "fp8": FP8,
}
E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
GPU_STORAGE: dict[KVType, torch.dtype] = {Q8_0: torch.float16, FP8: E4M3}  # GPU kernels do not read Q8_0 blocks
KV_NAMES = ("keys", "values")
STANDARD_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # their subclasses store other states next to keys


def kv_type(requested: KVType) -> KVType:
    """Returns the storage type for a user's `kv_dtype` (f16, bf16, f32, q8_0, fp8, auto, or a torch dtype); None for
    auto. UsageError for any other value.
    """
    if requested is None or requested == "auto":
        return None
    if isinstance(requested, torch.dtype) and requested in KV_TYPES.values():
        return requested
    if not isinstance(requested, str) or requested not in KV_TYPES:
        raise UsageError(
            f"kv_dtype {str(requested)!r} is not a storage type of the KV cache"
            f"{did_you_mean(str(requested), KV_TYPES)}; give auto or one of {' '.join(KV_TYPES)}"
        )
    return KV_TYPES[requested]


def allocate_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns uninitialized memory; large CPU buffers use huge pages where the system has them."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer: torch.Tensor = cpu.ops.empty_packed(nbytes)
    return buffer.view(dtype).view(shape)


def round_up_capacity(positions: int) -> int:
    """Returns the number of positions that a buffer for `positions` positions has."""
    return max(MIN_CAPACITY, 1 << (positions - 1).bit_length())


def stored_row_format(
    store: KVType, columns: int, model_dtype: torch.dtype, device: torch.device
) -> tuple[int, torch.dtype]:
    """Returns the number of elements and the type of a stored row; columns that do not fill whole Q8_0 blocks are
    stored as f16.
    """
    if not isinstance(store, str):
        return columns, store or model_dtype
    if device.type != "cpu":
        return columns, GPU_STORAGE[store]
    if columns % Q8_0_TYPE.block:
        return columns, torch.float16
    return Q8_0_TYPE.row_bytes(columns), torch.uint8


class GrowingLayer(DynamicLayer):
    """Keys and values [batch, heads, length, columns] as views of larger buffers.

    A script may edit `keys` and `values` in place, or assign others, of another length or batch too, as in
    transformers' own layer. Assigned tensors wait in `assigned` until the layer is used next. A buffer that a script
    has read (`exported`) is not written to again: the next token is written to a copy, as transformers copies at each
    token.

    It replaces transformers' DynamicLayer, which copies the whole past for every token; `buffers` are those of keys and
    values, of which the first `length` positions are stored, and `columns` are their widths before storage as blocks.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, dtype: KVType = torch.float16):
        self.store_dtype, self.length, self.columns = dtype, 0, (0, 0)
        self.buffers: list[torch.Tensor] = []
        self.assigned: dict[int, torch.Tensor] = {}
        self.exported = False
        super().__init__()

    @classmethod
    def replace(cls, layer: Any, dtype: KVType) -> None:
        """Turns transformers' layer into one that grows in place, with the same content; references to the layer stay
        valid.
        """
        assigned = {0: layer.keys, 1: layer.values}  # by index in KV_NAMES
        for name in KV_NAMES:
            del layer.__dict__[name]  # this class has properties of these names
        object.__setattr__(layer, "__class__", cls)
        cls.__init__(layer, dtype)
        layer.assigned = assigned
        layer.apply_assigned()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocates the buffers in the shapes of the first keys and values."""
        values = key_states if value_states is None else value_states
        self._allocate(key_states, (key_states.shape[3], values.shape[3]), key_states.dtype)

    def _allocate(self, like: torch.Tensor, columns: tuple[int, int], dtype: torch.dtype) -> None:
        """Allocates the buffers for keys and values with these columns."""
        self.device, batch, heads = like.device, like.shape[0], like.shape[1]
        rows = [stored_row_format(self.store_dtype, width, dtype, self.device) for width in columns]
        self.dtype, self.columns = rows[0][1], columns
        self.buffers = [allocate_buffer((batch, heads, MIN_CAPACITY, width), kind, self.device) for width, kind in rows]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, heads, new, columns] and returns everything stored so far. ValueError for another batch size,
        or another number or width of heads.
        """
        self.apply_assigned()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for states, buffer, columns in zip((key_states, value_states), self.buffers, self.columns, strict=True):
            if states.shape[:2] != buffer.shape[:2] or states.shape[3] != columns:
                raise ValueError(
                    f"a cache of [batch, heads, positions, columns] = {[*buffer.shape[:2], self.length, columns]} "
                    f"cannot be continued by {list(states.shape)}"
                )
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(key_states.shape[2])
        self.length = end
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            store_kv(states, buffer[:, :, start:end])
        return self._stored(0), self._stored(1)

    def reserve(self, new: int) -> None:
        """Ensures capacity for `new` more positions in `buffers`; the caller writes them and increments `length`."""
        if self.assigned:
            self.apply_assigned()
        if self.exported or self.length + new > self.buffers[0].shape[2]:
            self._grow(self.length + new)

    def apply_assigned(self) -> None:
        """Stores the tensors that were assigned to `keys` and `values`, in buffers of their size.

        Raises:
            UsageError: keys and values differ in batch, heads or positions.
        """
        if not self.assigned:
            return
        keys, values = (
            self.assigned[i] if i in self.assigned else self._stored(i) if self.buffers else None for i in (0, 1)
        )
        if keys is None or values is None or keys.shape[:3] != values.shape[:3]:
            shapes = [None if states is None else list(states.shape) for states in (keys, values)]
            raise UsageError(
                f"a cache layer's keys are {shapes[0]}, its values {shapes[1]}; "
                "assign both, with the same batch, heads and positions"
            )
        if not self.buffers:
            self._allocate(keys, (keys.shape[3], values.shape[3]), keys.dtype)
        model_dtype, self.length, columns = self.buffers[0].dtype, keys.shape[2], list(self.columns)
        for index, states in self.assigned.items():
            columns[index] = states.shape[3]
            width, kind = stored_row_format(self.store_dtype, states.shape[3], model_dtype, self.device)
            buffer = allocate_buffer((*states.shape[:2], round_up_capacity(self.length), width), kind, self.device)
            store_kv(states.to(self.device), buffer[:, :, : self.length])
            self.buffers[index] = buffer
        # a script may still hold one of the old buffers, unless both were replaced
        self.columns, self.exported = (columns[0], columns[1]), self.exported and len(self.assigned) < 2
        self.assigned = {}

    def prepare_buffers(
        self, batch: int, heads: int, columns: tuple[int, int], dtype: torch.dtype, device: torch.device = CPU
    ) -> bool:
        """Prepares `buffers` for a fused caller, which writes keys and values into them itself.

        First stores tensors that a script assigned to `keys` or `values`; an empty layer allocates its buffers on
        `device`.

        Returns:
            Whether batch, heads and `columns` (the widths of keys and values) are those of the stored ones; if not, the
            caller takes the unfused path.
        """
        if self.assigned:
            self.apply_assigned()
        if not self.is_initialized:
            self._allocate(torch.empty(batch, heads, device=device, dtype=torch.float32), columns, dtype)
        keys, values = self.buffers
        return keys.shape[:2] == values.shape[:2] == (batch, heads) and self.columns == columns

    def store_floats(self) -> None:
        """Stores floats instead of Q8_0 blocks if the layer is empty, because GPU kernels read no blocks."""
        if not self.is_initialized:
            self.store_dtype = GPU_STORAGE.get(self.store_dtype, self.store_dtype)

    def _grow(self, positions: int) -> None:
        """Copies the stored positions into buffers for `positions` positions."""
        for i, old in enumerate(self.buffers):
            self.buffers[i] = allocate_buffer(
                (*old.shape[:2], round_up_capacity(positions), old.shape[3]), old.dtype, old.device
            )
            self.buffers[i][:, :, : self.length] = old[:, :, : self.length]
        self.exported = False

    def _stored(self, which: int) -> torch.Tensor:
        """Returns the stored positions of the keys (0) or values (1)."""
        return self.buffers[which][:, :, : self.length]

    def _view(self, which: int) -> torch.Tensor | None:
        """Returns keys (`which` = 0) or values (1) for a script, [batch, heads, length, columns]; None in an empty
        layer. Sets `exported`, because the script may keep or edit the view. UsageError for Q8_0.
        """
        if which in self.assigned:
            return self.assigned[which]
        if not self.buffers:
            return None
        if self.buffers[which].dtype is torch.uint8:
            raise UsageError(
                f"the {KV_NAMES[which]} of this cache are blocks of eight bits (q8_0), "
                "which cannot be edited in place: read them with layer.copy_as_floats(), "
                f"replace them by assigning floats to layer.{KV_NAMES[which]}, or use a cache of another kv_dtype"
            )
        self.exported = True
        return self._stored(which)

    keys = property(lambda self: self._view(0), lambda self, new: self._assign(0, new))  # type: ignore[assignment]
    values = property(lambda self: self._view(1), lambda self, new: self._assign(1, new))  # type: ignore[assignment]

    def _assign(self, which: int, value: torch.Tensor | None) -> None:
        """Stores a tensor that replaces keys (`which` = 0) or values (1) when the layer is used next; None or an empty
        tensor empties the layer.
        """
        if value is None or (value.dim() == 1 and not value.numel()):
            self.reset()
        elif value.dim() != 4 or not value.is_floating_point():
            raise UsageError(
                f"a cache layer's {KV_NAMES[which]} are floats [batch, heads, positions, columns], "
                f"not {value.dtype} {list(value.shape)}"
            )
        else:
            self.assigned[which] = value

    def copy_as_floats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of keys and values [batch, heads, length, columns] in a float type, whatever their storage
        type. UsageError for an empty layer.
        """
        self.apply_assigned()
        if not self.buffers:
            raise UsageError("this cache layer is empty: it has no keys and values yet")
        keys, values = (to_floats(self._stored(i).contiguous()).clone() for i in (0, 1))
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        """Returns the number of cached tokens."""
        return self.assigned[0].shape[2] if 0 in self.assigned else self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end: a negative number says how many, as in transformers 5."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        self.apply_assigned()
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Empties the layer; its buffers stay allocated."""
        self.length, self.assigned = 0, {}

    def _rearrange(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces both buffers by changed ones."""
        self.apply_assigned()
        if self.buffers:
            self.buffers, self.exported = [change(buffer) for buffer in self.buffers], False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Takes the sequences of the batch that `beam_idx` [batch] selects, as beam search does."""
        self._rearrange(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Selects the sequences `indices` of the batch."""
        self._rearrange(lambda buffer: buffer[indices].contiguous())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence of the batch."""
        self._rearrange(lambda buffer: buffer.repeat_interleave(repeats, dim=0))


def store_kv(states: torch.Tensor, stored: torch.Tensor) -> None:
    """Writes keys or values [batch, heads, new, columns] of any float type into a part of a buffer."""
    refuse_gradient("a cache that grows in place", WITHOUT_CACHE, states)
    if stored.dtype != torch.uint8:
        stored.copy_(clamp_to(states, stored.dtype))
    else:
        cpu.ops.store_q8_0(states if states.stride(3) == 1 else states.contiguous(), stored)


def clamp_to(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Clamps values to a type's range; for E4M3 a cast of larger ones may give NaN, depending on torch's version."""
    return states.clamp(-E4M3_MAX, E4M3_MAX) if dtype is E4M3 else states


def to_floats(stored: torch.Tensor) -> torch.Tensor:
    """Returns keys or values, as a cache returned them, in a float type."""
    return cpu.ops.load_q8_0(stored) if stored.dtype == torch.uint8 else stored


def to_growing_layer(cache: Any, index: int, store: KVType = None) -> GrowingLayer | None:
    """Returns a cache's layer as one that grows in place; None where the cache has no such layer.

    A layer of a stock DynamicCache, which copies the whole past for every token, is converted with its content, which
    is quantized if `store` is Q8_0 or FP8.
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
    # no keys and values [batch, heads, length, columns], or ones that autograd records: stays transformers' layer
    if any(states is None or states.dim() != 4 or is_recorded(states) for states in (layer.keys, layer.values)):
        return None
    GrowingLayer.replace(layer, store if isinstance(store, str) else None)
    return layer  # type: ignore[return-value]  # converted in place


def restore_stock_layer(cache: Any, index: int) -> None:
    """Reverts `to_growing_layer` before autograd records appended tokens, which a growing layer refuses: the layer of a
    stock DynamicCache becomes transformers' own again, with the same content. A layer of Q8_0 blocks stays, because
    transformers cannot read them.
    """
    layers: Any = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if (
        type(cache) is DynamicCache
        and type(layer) is GrowingLayer
        and layer.is_initialized
        and layer.dtype != torch.uint8
    ):
        layer.apply_assigned()
        keys, values = layer._stored(0), layer._stored(1)
        layer.__dict__.clear()
        object.__setattr__(layer, "__class__", DynamicLayer)
        DynamicLayer.__init__(layer)
        layer.update(keys, values)


class KVCache(Cache):
    """The KV cache of a model for chat, benchmarks and the engine; `dtype` is one of KV_TYPES or its name, None uses
    the model's own.
    """

    def __init__(self, config: PreTrainedConfig, dtype: KVType = torch.float16):
        dtype = kv_type(dtype)
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[GrowingLayer(dtype) if type(layer) in STANDARD_LAYERS else layer for layer in stock])

    @property
    def can_crop(self) -> bool:
        """False when a layer has a recurrent state instead of positions."""
        return all(isinstance(layer, GrowingLayer) for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Removes all positions after the first `length`."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.crop(min(0, length - layer.get_seq_length()))

    def nbytes(self) -> int:
        """Returns the bytes of the allocated buffers, which have more positions than are stored."""
        return sum(
            buffer.numel() * buffer.element_size()
            for layer in self.layers
            if isinstance(layer, GrowingLayer)
            for buffer in layer.buffers
        )
