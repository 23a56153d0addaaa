"""Keys and values of a forward's sequences as the attention kernels of a GPU read them: pools of pages, whichever cache they are in.

A cache that grows has a buffer [batch, heads, capacity, columns] a layer. A head's positions lie one after another there, so the buffer is
a pool of pages as it stands: those of a sequence follow each other, and the heads of a page are `capacity` positions apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ktx.cache.kv import growing
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import BatchMetadata, PageTables, paged
from ktx.kernels.gpu.attention_backend import Kernels
from ktx.kernels.gpu.split_kv import Shape, tiles_for
from ktx.ops.fusion.fused import float_type, window_of
from ktx.ops.masks import Intervals, ranges_of

Row = tuple[int, int, int]  # a sequence's first token in the forward, its tokens, its keys with these


@dataclass(frozen=True)
class PagedView:
    """Two pools [pages, heads, PAGE, columns] and whose tokens are where: `rows` on the host, `tables` on the device.

    `wholes`, of each sequence: after how many of its tokens whole pages of a prompt begin, and how many tokens these are.
    """

    pools: tuple[torch.Tensor, torch.Tensor]
    rows: Sequence[Row]
    tables: PageTables
    window: int = 0
    wholes: tuple[tuple[int, int], ...] = ()

    def plan(self, kernels: Kernels, shape: Shape, dtype: torch.dtype) -> Any:
        """Who attends to what, for queries of a type; made by the first layer of a kind, for all of them."""
        return planned(kernels, self.tables, [count for _, count, _ in self.rows], shape, dtype, self.window)


def planned(
    kernels: Kernels, tables: PageTables, counts: Sequence[int], shape: Shape, dtype: torch.dtype, window: int = 0
) -> Any:
    """The kernels' plan for the sequences of some tables, made once."""
    made, exact = tables.plans, dtype is torch.float32
    work, plan = (kernels.name, shape, exact), (kernels.name, shape, exact, window)
    if work not in tables.works:
        tiles, scratch = tiles_for(shape.key_columns, shape.latent, exact), tables.scratch.get(work)
        found = kernels.work(counts, shape, tables.sequences.device, tiles=tiles, scratch=scratch)
        tables.works[work], tables.scratch[work] = found, found.scratch
    if plan not in made:
        made[plan] = tables.works[work].plan(tables.sequences, tables.pages, window)
    return made[plan]


def room_for(
    owner: Any, cache: Any, hidden: torch.Tensor, heads: int, columns: tuple[int, int], mask: torch.Tensor | None
) -> PagedView | None:
    """Room for the tokens of hidden [B, S, D] in the cache's layer for `owner`, an attention module, that the caller fills.

    None where the layer is no such, or what the tokens see is nothing that the kernels know.
    """
    layer = settled(cache, owner.layer_idx)
    kept, device, (sequences, new) = float_type(owner.kv_dtype, hidden.dtype), hidden.device, hidden.shape[:2]
    pages = paged(cache, owner.layer_idx)
    if pages is not None:
        batch = pages.owner.batch
        if batch is None or not pages.fits(heads, columns, kept, device):
            return None
        pages.owner.check_cancelled()
        return of_batch(batch, (pages.buffers[0], pages.buffers[1]), window_of(owner))
    layer = growing(cache, owner.layer_idx)
    if layer is None or not layer.fits(sequences, heads, columns, kept, device):
        return None
    known = seen(mask, sequences, new, layer.length + new)
    if known is None or set(known.keys) != {layer.length + new}:
        return None
    layer.reserve(new)
    layer.length += new
    keys, values = layer.buffers
    return _grown(keys, values, new, known, mask)


def settled(cache: Any, index: int) -> Any:
    """A cache's layer, told before it is filled that there are no blocks of Q8_0 on a GPU; None if it has none."""
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if layer is not None and hasattr(layer, "keep_floats"):
        layer.keep_floats()
    return layer


def of_batch(batch: BatchMetadata, pools: tuple[torch.Tensor, torch.Tensor], window: int) -> PagedView:
    """The pools of a paged cache."""
    wholes = tuple((span.lead_tokens, span.full_page_tokens) for span in batch.spans)
    return PagedView(pools, batch.rows, batch.on(pools[0].device), window, wholes)


def of_states(keys: torch.Tensor, values: torch.Tensor, new: int, mask: torch.Tensor | None) -> PagedView | None:
    """Of keys and values [B, heads, T, columns] as any cache returned them, or none; copied where they are no whole pages."""
    known = seen(mask, len(keys), new, keys.shape[2])
    if known is None:
        return None
    capacity = _capacity(keys)
    if not capacity or capacity != _capacity(values):
        keys, values = (F.pad(x, (0, 0, 0, -x.shape[2] % PAGE_TOKENS)) for x in (keys, values))
        capacity = keys.shape[2]
    return _grown(_whole(keys, capacity), _whole(values, capacity), new, known, mask)


@dataclass(frozen=True)
class CausalSpec:
    """A causal mask in numbers: the keys of each sequence, and how many of them a token sees (0: all up to itself)."""

    keys: tuple[int, ...]
    window: int = 0


def seen(mask: torch.Tensor | None, batch: int, new: int, keys: int) -> CausalSpec | None:
    """What transformers' mask for `new` tokens of each sequence says; None where that is no causal mask (padding, holes)."""
    if mask is None:
        return CausalSpec((keys,) * batch) if new in (1, keys) else None
    ranges = ranges_of(mask)
    if ranges is None or (isinstance(mask, Intervals) and mask.shape[3] != keys):
        return None
    if not hasattr(mask, "ktx_seen"):  # one mask serves many layers
        mask.ktx_seen = _read(ranges.cpu())  # type: ignore[attr-defined]
    known: CausalSpec | None = mask.ktx_seen  # type: ignore[attr-defined]
    return known if known is None or len(known.keys) == batch else CausalSpec(known.keys * batch, known.window)


def _read(ranges: torch.Tensor) -> CausalSpec | None:
    begin, end = ranges.unbind(-1)  # int32 [B, S]
    last, new = end[:, -1:], end.shape[1]
    if not torch.equal(end, last + torch.arange(1 - new, 1, dtype=end.dtype)) or int(end.min()) < 1:
        return None
    short = begin > 0
    window = int((end - begin)[short][0]) if bool(short.any()) else 0
    if window and not torch.equal(begin, (end - window).clamp(min=0)):
        return None
    return CausalSpec(tuple(last[:, 0].tolist()), window)


def _capacity(x: torch.Tensor) -> int:
    """Positions from one head of [B, heads, T, columns] to the next, if they are whole pages of one piece of memory; else 0."""
    batch, heads, length, columns = x.shape
    apart = (
        x.stride(1) if heads > 1 else x.stride(0) if batch > 1 else -(-length // PAGE_TOKENS) * PAGE_TOKENS * columns
    )
    dense = x.stride(3) == 1 and x.stride(2) == columns and (batch == 1 or x.stride(0) == heads * apart)
    held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return apart // columns if dense and apart % (PAGE_TOKENS * columns) == 0 and batch * heads * apart <= held else 0


def _whole(x: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, _, columns = x.shape
    each = capacity * columns
    return x.as_strided((batch, heads, capacity, columns), (heads * each, each, columns, 1))


def _grown(
    keys: torch.Tensor, values: torch.Tensor, new: int, known: CausalSpec, mask: torch.Tensor | None
) -> PagedView:
    """Of two buffers [B, heads, capacity, columns] that hold the sequences' keys, of which the last `new` are the tokens'."""
    batch, heads, capacity, _ = keys.shape
    rows = [(b * new, new, count) for b, count in enumerate(known.keys)]
    kind = keys.device, heads * capacity // PAGE_TOKENS
    made: dict[Any, PageTables] = {}
    if mask is not None:
        made = mask.__dict__.setdefault("ktx_tables", made)
    if kind not in made:
        made[kind] = _tables(known.keys, new, kind[1]).to(keys.device)
    wholes = tuple(_pages_of_prompt(count - new, new) for count in known.keys)
    return PagedView((_pool(keys), _pool(values)), rows, made[kind], known.window, wholes)


def _pages_of_prompt(past: int, new: int) -> tuple[int, int]:
    """Without an engine that knows what is a prompt: whole pages of a call's tokens, behind those that fill up a page."""
    lead = min(new, -past % PAGE_TOKENS)
    return lead, (new - lead) // PAGE_TOKENS * PAGE_TOKENS


def _pool(buffer: torch.Tensor) -> torch.Tensor:
    batch, heads, capacity, columns = buffer.shape
    pages = ((batch - 1) * heads + 1) * capacity // PAGE_TOKENS
    return buffer.as_strided(
        (pages, heads, PAGE_TOKENS, columns), (PAGE_TOKENS * columns, capacity * columns, columns, 1)
    )


def _tables(keys: Sequence[int], new: int, apart: int) -> PageTables:
    """`apart`: pages from one sequence's first to the next one's."""
    batch = len(keys)
    first, ends = torch.arange(batch)[:, None] * apart, torch.tensor(keys)
    pages = first + torch.arange(-(-max(keys) // PAGE_TOKENS))
    slots = first * PAGE_TOKENS + ends[:, None] + torch.arange(-new, 0)
    sequences = torch.stack([torch.arange(batch) * new, torch.full((batch,), new), ends], 1)
    return PageTables(sequences, pages.int(), slots.flatten())
