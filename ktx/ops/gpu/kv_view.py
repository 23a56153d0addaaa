"""Views any KV cache as the pools of pages that the GPU attention kernels read.

A growing cache has a buffer [batch, heads, capacity, columns] per layer. The positions of a head are contiguous, so the
buffer is viewed as a pool of pages without a copy: a sequence's pages are consecutive, and the heads of a page are
`capacity` positions apart.

Shapes: B sequences, S new tokens, T keys, D columns of hidden states; columns: of a key or a value of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ktx.cache.batch import BatchMetadata, PageTables
from ktx.cache.kv import to_growing_layer
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import get_paged_layer
from ktx.kernels.gpu.attention_backend import AttentionKernels
from ktx.kernels.gpu.split_kv import AttentionShape, tiles_for
from ktx.ops.fusion.fused import kv_float_dtype, sliding_window
from ktx.ops.masks import Intervals, ranges_of
from ktx.utils.tensor_memo import TensorMemo

Row = tuple[int, int, int]  # per sequence: index of its first token in the forward, number of tokens, number of keys


class FullPages(NamedTuple):
    """The tokens of a prompt that are in full pages, which MLA attends to in the expanded form."""

    lead_tokens: int  # the sequence's tokens of this forward before them
    num_tokens: int


@dataclass(frozen=True)
class PagedView:
    """Keys and values of a forward's sequences in pages.

    Attributes:
        pools: keys and values [pages, heads, PAGE_TOKENS, columns].
        rows: the sequences' tokens and keys, on the host.
        tables: the same and the page tables, on the device.
        window: sliding window in tokens; 0: none.
        full_pages: per sequence, its tokens in full pages of a prompt.
    """

    pools: tuple[torch.Tensor, torch.Tensor]
    rows: Sequence[Row]
    tables: PageTables
    window: int = 0
    full_pages: tuple[FullPages, ...] = ()

    def plan(self, kernels: AttentionKernels, shape: AttentionShape, dtype: torch.dtype) -> Any:
        """Returns the kernels' plan for queries of `dtype`; the first layer of a kind builds it for all others."""
        return cached_plan(kernels, self.tables, [count for _, count, _ in self.rows], shape, dtype, self.window)


def cached_plan(
    kernels: AttentionKernels,
    tables: PageTables,
    counts: Sequence[int],
    shape: AttentionShape,
    dtype: torch.dtype,
    window: int = 0,
) -> Any:
    """Returns the kernels' plan, which divides the keys of the sequences in `tables` among the programs of a call.

    The tables cache the plan, because all layers of a kind use it.

    Args:
        kernels: the attention kernels.
        tables: the page tables, which cache schedule, scratch memory and plans.
        counts: number of tokens of each sequence.
        shape: heads and columns of the layer.
        dtype: of the queries; f32 uses exact tiles.
        window: sliding window in tokens; 0: none.
    """
    plans, exact = tables.plans, dtype is torch.float32
    # The schedule does not depend on the window; plans do.
    schedule_key, plan_key = (kernels.name, shape, exact), (kernels.name, shape, exact, window)
    if schedule_key not in tables.token_plans:
        tiles, scratch = tiles_for(shape.key_columns, shape.latent, exact), tables.scratch.get(schedule_key)
        schedule = kernels.schedule(counts, shape, tables.sequences.device, tiles=tiles, scratch=scratch)
        tables.token_plans[schedule_key], tables.scratch[schedule_key] = schedule, schedule.scratch
    if plan_key not in plans:
        plans[plan_key] = tables.token_plans[schedule_key].plan(tables.sequences, tables.pages, window)
    return plans[plan_key]


def reserve_kv(
    owner: Any, cache: Any, hidden: torch.Tensor, heads: int, columns: tuple[int, int], mask: torch.Tensor | None
) -> PagedView | None:
    """Reserves slots in the cache for the keys and values of hidden [B, S, D]; the caller writes them.

    Args:
        owner: the attention module; its `layer_idx` selects the cache's layer.
        cache: a paged or growing cache, or any other.
        hidden: the tokens' hidden states.
        heads: number of KV heads.
        columns: columns of a key and of a value.
        mask: transformers' attention mask.

    Returns:
        The layer's keys and values, with the slots where the caller writes the new ones. None if the caller has to
        store them in another way, because the cache's layer is of another kind or shape, or the kernels do not support
        the mask.
    """
    layer = prepare_float_layer(cache, owner.layer_idx)
    stored_dtype, device, (sequences, num_new) = (
        kv_float_dtype(owner.kv_dtype, hidden.dtype),
        hidden.device,
        hidden.shape[:2],
    )
    pages = get_paged_layer(cache, owner.layer_idx)
    if pages is not None:
        batch = pages.owner.batch
        if batch is None or not pages.prepare_buffers(heads, columns, stored_dtype, device):
            return None  # no batch has begun, or the pools have another shape
        pages.owner.check_cancelled()
        # the mask is not read: the batch's rows and the window determine which keys a token sees
        return view_of_batch(batch, (pages.buffers[0], pages.buffers[1]), sliding_window(owner))
    layer = to_growing_layer(cache, owner.layer_idx)
    if layer is None or not layer.prepare_buffers(sequences, heads, columns, stored_dtype, device):
        return None  # another kind of cache (static, sliding), or other shapes
    spec = causal_spec(mask, sequences, num_new, layer.length + num_new)
    if spec is None or set(spec.keys) != {layer.length + num_new}:  # not causal, or the last token does not see all
        return None
    layer.reserve(num_new)
    layer.length += num_new
    keys, values = layer.buffers
    return _view_of_buffers(keys, values, num_new, spec, mask)


def prepare_float_layer(cache: Any, index: int) -> Any:
    """Makes a cache's layer store floats, because GPU kernels read no Q8_0 blocks; call it before the layer is filled.

    Returns:
        The layer; None if the cache has no such layer.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if layer is not None and hasattr(layer, "store_floats"):
        layer.store_floats()
    return layer


def view_of_batch(batch: BatchMetadata, pools: tuple[torch.Tensor, torch.Tensor], window: int) -> PagedView:
    """Views the pools of a paged cache, with the rows and page tables of the engine's batch."""
    full_pages = tuple(FullPages(span.lead_tokens, span.full_page_tokens) for span in batch.spans)
    return PagedView(pools, batch.rows, batch.tables_on(pools[0].device), window, full_pages)


def view_of_states(
    keys: torch.Tensor, values: torch.Tensor, num_new: int, mask: torch.Tensor | None
) -> PagedView | None:
    """Views keys and values [B, heads, T, columns], from any cache or from none, as the pages that the kernels read.

    They are copied where their memory is not made of full pages. None for a mask that the kernels do not support: the
    caller attends in torch.
    """
    spec = causal_spec(mask, len(keys), num_new, keys.shape[2])
    if spec is None:
        return None
    capacity = _page_capacity(keys)
    if not capacity or capacity != _page_capacity(values):
        keys, values = (F.pad(x, (0, 0, 0, -x.shape[2] % PAGE_TOKENS)) for x in (keys, values))
        capacity = keys.shape[2]
    return _view_of_buffers(_extend_to_buffer(keys, capacity), _extend_to_buffer(values, capacity), num_new, spec, mask)


@dataclass(frozen=True)
class CausalSpec:
    """A causal mask as integers: the number of keys of each sequence, and the sliding window in tokens (0: none)."""

    keys: tuple[int, ...]
    window: int = 0


_specs_of_masks = TensorMemo[CausalSpec | None]()
_tables_of_masks = TensorMemo[dict[Any, PageTables]]()


def causal_spec(mask: torch.Tensor | None, batch: int, num_new: int, num_keys: int) -> CausalSpec | None:
    """Parses transformers' mask into the integers that the GPU kernels take in place of a mask, once per mask.

    Args:
        mask: the mask, or None.
        batch: number of sequences.
        num_new: number of new tokens of each sequence.
        num_keys: number of keys of each sequence.

    Returns:
        None if the mask is not causal (padding, holes), so that no kernel of the GPU supports it.
    """
    if mask is None:  # causal if the new token is the last one, or all tokens are new; else see fused.split_mask
        return CausalSpec((num_keys,) * batch) if num_new in (1, num_keys) else None
    ranges = ranges_of(mask)
    if ranges is None or (isinstance(mask, Intervals) and mask.shape[3] != num_keys):
        return None
    spec = _specs_of_masks.get_or_compute(mask, lambda: _spec_of_ranges(ranges.cpu()))  # one mask serves many layers
    # A mask of one sequence applies to all.
    return spec if spec is None or len(spec.keys) == batch else CausalSpec(spec.keys * batch, spec.window)


def _spec_of_ranges(ranges: torch.Tensor) -> CausalSpec | None:
    """Parses visible key ranges int32 [B, S, 2]; None if they are not those of a causal mask with at most one window.

    Causal: the end grows by one key per token. Window: where a range does not begin at key 0, all have the same length.
    """
    begin, end = ranges.unbind(-1)  # int32 [B, S]
    last, num_new = end[:, -1:], end.shape[1]
    if not torch.equal(end, last + torch.arange(1 - num_new, 1, dtype=end.dtype)) or int(end.min()) < 1:
        return None
    limited = begin > 0
    window = int((end - begin)[limited][0]) if bool(limited.any()) else 0
    if window and not torch.equal(begin, (end - window).clamp(min=0)):
        return None
    return CausalSpec(tuple(last[:, 0].tolist()), window)


def _page_capacity(x: torch.Tensor) -> int:
    """Returns the positions from one head of [B, heads, T, columns] to the next, if they are full pages; else 0.

    Then x is a slice of a growing cache's buffer, which is viewed as pages without a copy. The buffer must end inside
    the tensor's storage.
    """
    batch, heads, length, columns = x.shape
    head_stride = (
        x.stride(1) if heads > 1 else x.stride(0) if batch > 1 else -(-length // PAGE_TOKENS) * PAGE_TOKENS * columns
    )
    has_buffer_layout = (
        x.stride(3) == 1 and x.stride(2) == columns and (batch == 1 or x.stride(0) == heads * head_stride)
    )
    available = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return (
        head_stride // columns
        if has_buffer_layout and head_stride % (PAGE_TOKENS * columns) == 0 and batch * heads * head_stride <= available
        else 0
    )


def _extend_to_buffer(x: torch.Tensor, capacity: int) -> torch.Tensor:
    """Extends a tensor to its buffer [B, heads, capacity, columns], without a copy."""
    batch, heads, _, columns = x.shape
    head_size = capacity * columns
    return x.as_strided((batch, heads, capacity, columns), (heads * head_size, head_size, columns, 1))


def _view_of_buffers(
    keys: torch.Tensor, values: torch.Tensor, num_new: int, spec: CausalSpec, mask: torch.Tensor | None
) -> PagedView:
    """Views two buffers [B, heads, capacity, columns] as pages; the last `num_new` keys of a sequence are the new ones.

    All layers share a mask, so it caches the page tables.
    """
    _, heads, capacity, _ = keys.shape
    rows = [(b * num_new, num_new, count) for b, count in enumerate(spec.keys)]
    key = keys.device, heads * capacity // PAGE_TOKENS
    cached: dict[Any, PageTables] = {}
    if mask is not None:
        cached = _tables_of_masks.get_or_compute(mask, dict)
    if key not in cached:
        cached[key] = _build_tables(spec.keys, num_new, key[1]).to(keys.device)
    full_pages = tuple(_split_full_pages(count - num_new, num_new) for count in spec.keys)
    return PagedView((_as_pages(keys), _as_pages(values)), rows, cached[key], spec.window, full_pages)


def _split_full_pages(past: int, num_new: int) -> FullPages:
    """Returns which of the `num_new` tokens after `past` tokens are in full pages, for a call without an engine.

    Only an engine knows which tokens are a prompt; here all tokens of a call count as one.
    """
    lead_tokens = min(num_new, -past % PAGE_TOKENS)
    return FullPages(lead_tokens, (num_new - lead_tokens) // PAGE_TOKENS * PAGE_TOKENS)


def _as_pages(buffer: torch.Tensor) -> torch.Tensor:
    """Views a buffer [B, heads, capacity, columns] as pages [pages, heads, PAGE_TOKENS, columns]."""
    batch, heads, capacity, columns = buffer.shape
    pages = ((batch - 1) * heads + 1) * capacity // PAGE_TOKENS
    return buffer.as_strided(
        (pages, heads, PAGE_TOKENS, columns), (PAGE_TOKENS * columns, capacity * columns, columns, 1)
    )


def _build_tables(num_keys: Sequence[int], num_new: int, stride_pages: int) -> PageTables:
    """Builds the page tables of a growing cache on the CPU: a sequence's pages are consecutive.

    Args:
        num_keys: per sequence, the number of keys including the new ones.
        num_new: number of new tokens of each sequence.
        stride_pages: the distance of two sequences' first pages.
    """
    batch = len(num_keys)
    first, ends = torch.arange(batch)[:, None] * stride_pages, torch.tensor(num_keys)
    pages = first + torch.arange(-(-max(num_keys) // PAGE_TOKENS))
    slots = first * PAGE_TOKENS + ends[:, None] + torch.arange(-num_new, 0)  # where new keys and values are written
    sequences = torch.stack([torch.arange(batch) * num_new, torch.full((batch,), num_new), ends], 1)
    return PageTables(sequences, pages.int(), slots.flatten())
