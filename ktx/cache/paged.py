"""The paged KV cache of many sequences: a forward computes their tokens as one row, each sequence with its own past.

Keys and values (MLA's latent and rotated part too) are in pools [pages, heads, PAGE_TOKENS, columns]. `BatchMetadata`
maps tokens to sequences and slots; ktx's attention modules read it, see ktx.ops.attention. Recurrent layers have a
state for each sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ktx.cache.kv import (
    CPU,
    E4M3,
    GPU_STORAGE,
    STANDARD_LAYERS,
    KVType,
    allocate_buffer,
    clamp_to,
    kv_type,
    stored_row_format,
)
from ktx.cache.page_pool import MAX_SNAPSHOTS, PAGE_TOKENS
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gradients import WITHOUT_CACHE, refuse_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SNAPSHOT_INTERVAL_TOKENS = 4 * PAGE_TOKENS  # prompt tokens between two snapshots of recurrent states


@dataclass(frozen=True)
class PageTables:
    """A batch in the form that the kernels of one device read.

    Args:
        sequences: int64 [n, 3]: first token, number of tokens, number of keys including these tokens.
        pages: int32 [n, max pages]: the pages of each sequence.
        slots: int64 [tokens]: the slot of each token.
        plans: attention schedules that the first layer computes for the following ones.
        token_plans: the same, for schedules that depend on the numbers of tokens alone.
        scratch: scratch buffers; tables of different sizes may share one, if only one is in use at a time.
    """

    sequences: torch.Tensor
    pages: torch.Tensor
    slots: torch.Tensor
    plans: dict[Any, Any] = field(default_factory=dict)
    token_plans: dict[Any, Any] = field(default_factory=dict)
    scratch: dict[Any, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> PageTables:
        """Returns a copy on another device, without schedules and scratch buffers."""
        return PageTables(self.sequences.to(device), self.pages.to(device), self.slots.to(device))


@dataclass(frozen=True)
class SequenceSpan:
    """The tokens of one sequence in a forward.

    An operator with one form for prompts and one for decoding (MLA), or whose sums depend on how tokens are split into
    chunks (recurrent layers), uses `full_page_tokens` and `piece_lengths`, which do not depend on what else is in the
    batch.

    Args:
        owner: identifies the sequence.
        past: number of tokens before these.
        count: number of tokens.
        pages: the pages of the sequence.
        prompt: how many of the tokens, the first ones, belong to the prompt.
        shared: other sequences may reuse the prompt, so snapshots of recurrent states are taken, see
            `snapshot_lengths`.
    """

    owner: int
    past: int
    count: int
    pages: Sequence[int]
    num_prompt_tokens: int = 0
    shared: bool = False

    @property
    def snapshot_lengths(self) -> list[int]:
        """Lengths of the sequence at which a recurrent state is copied before the span's end: every
        SNAPSHOT_INTERVAL_TOKENS, and at the end of the prompt's last page.
        """
        if not self.shared:
            return []
        end = self.past + self.num_prompt_tokens
        lengths = {
            *range(
                self.past // SNAPSHOT_INTERVAL_TOKENS * SNAPSHOT_INTERVAL_TOKENS + SNAPSHOT_INTERVAL_TOKENS,
                end,
                SNAPSHOT_INTERVAL_TOKENS,
            ),
            end // PAGE_TOKENS * PAGE_TOKENS,
        }
        return sorted(length for length in lengths if self.past < length < self.past + self.count)[-MAX_SNAPSHOTS:]

    @property
    def lead_tokens(self) -> int:
        """How many of the tokens fill up a page that an earlier forward began."""
        return min(self.count, -self.past % PAGE_TOKENS)

    @property
    def full_page_tokens(self) -> int:
        """How many of the tokens after the lead are full pages of the prompt."""
        return max(0, (self.past + self.num_prompt_tokens) // PAGE_TOKENS * PAGE_TOKENS - self.past - self.lead_tokens)

    @property
    def piece_lengths(self) -> list[int]:
        """Numbers of tokens in the pieces to compute: the prompt's lead, its pages, its remainder, then decode tokens
        one by one.
        """
        lead = min(self.lead_tokens, self.num_prompt_tokens)
        remainder = self.num_prompt_tokens - lead - self.full_page_tokens
        counts = (
            [lead] * (lead > 0) + [PAGE_TOKENS] * (self.full_page_tokens // PAGE_TOKENS) + [remainder] * (remainder > 0)
        )
        return counts + [1] * (self.count - self.num_prompt_tokens)


class BatchMetadata:
    """The metadata of a forward's tokens that attention needs.

    Args:
        spans: the sequences' tokens, in the order of the rows.
        check: called between layers; raises to cancel the forward.
        tables: page tables that are already on a device.
    """

    def __init__(
        self,
        spans: Sequence[SequenceSpan],
        check: Callable[[], None] | None = None,
        tables: Mapping[torch.device, PageTables] | None = None,
    ):
        self.spans, self.check_cancelled = spans, check
        # for each span: its first row, its number of rows, and its number of keys including these tokens
        rows, num_tokens = [], 0
        for span in spans:
            rows.append((num_tokens, span.count, span.past + span.count))
            num_tokens += span.count
        self.tokens, self.rows = num_tokens, rows
        self.sequences = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.pages = torch.zeros(len(spans), max(len(span.pages) for span in spans), dtype=torch.int32, device="cpu")
        for page_row, span in zip(self.pages, spans, strict=True):
            page_row[: len(span.pages)] = torch.tensor(span.pages, dtype=torch.int32, device="cpu")
        self.positions = torch.cat([torch.arange(span.past, span.past + span.count, device="cpu") for span in spans])
        self.position_ids = self.positions[None]
        # For rotary embeddings whose tables depend on a sequence's length. Only the counts, because a reference cycle
        # would retain each forward's tensors until a garbage collection.
        self.position_ids.ktx_counts = [span.count for span in spans]  # type: ignore[attr-defined]
        span_of_token = torch.repeat_interleave(
            torch.arange(len(spans), device="cpu"), torch.tensor([span.count for span in spans], device="cpu")
        )
        self.slots = (
            self.pages[span_of_token, self.positions // PAGE_TOKENS].long() * PAGE_TOKENS + self.positions % PAGE_TOKENS
        )
        self._ranges: dict[int, torch.Tensor] = {}
        self._tables = dict(tables or {})
        self.has_full_pages = any(span.full_page_tokens for span in spans)

    def tables_on(self, device: torch.device) -> PageTables:
        """Returns the page tables on a device; they are transferred once."""
        if device not in self._tables:
            self._tables[device] = PageTables(self.sequences, self.pages, self.slots).to(device)
        return self._tables[device]

    def full_page_rows(self, excluded: Sequence[int] = ()) -> list[int]:
        """Returns first row and number of rows of each range that holds full pages of a prompt, see cpu.bf16_rows;
        without those of the spans `excluded`.
        """
        ranges = [
            (first + span.lead_tokens, span.full_page_tokens)
            for i, (span, (first, _, _)) in enumerate(zip(self.spans, self.rows, strict=True))
            if i not in excluded
        ]
        return [value for first, count in ranges if count for value in (first, count)]

    @cached_property
    def remainder(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The tokens outside of full pages: their rows int64 [n], and `sequences` and `pages` for them alone; None if
        there are none.
        """
        token_rows, rows, span_indices, num_tokens = [], [], [], 0
        for i, (span, (first, _, _)) in enumerate(zip(self.spans, self.rows, strict=True)):
            for begin, end in ((0, span.lead_tokens), (span.lead_tokens + span.full_page_tokens, span.count)):
                if begin < end:
                    token_rows.append(torch.arange(first + begin, first + end, device="cpu"))
                    rows.append((num_tokens, end - begin, span.past + end))
                    span_indices.append(i)
                    num_tokens += end - begin
        return (torch.cat(token_rows), torch.tensor(rows, device="cpu"), self.pages[span_indices]) if rows else None

    def window_ranges(self, window: int = 0) -> torch.Tensor | None:
        """Returns int32 [1, tokens, 2]: the range of keys that each token attends to in its own sequence; None without
        a window, where it is all keys up to its own.
        """
        if not window:
            return None
        if window not in self._ranges:
            last = self.positions + 1
            self._ranges[window] = torch.stack([(last - window).clamp(min=0), last], -1).int()[None]
        return self._ranges[window]


class PagedLayer(CacheLayerMixin):
    """One layer's pools: keys and values [pages, heads, PAGE_TOKENS, columns] of all sequences.

    `update` returns the pools themselves, because their pages belong to several sequences; the attribute `ktx_batch`
    tells the attention module which ones to read.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, owner: PagedCache):
        super().__init__()
        self.owner, self.buffers, self.columns = owner, list[torch.Tensor](), (0, 0)
        self.store_dtype = owner.dtype

    def store_floats(self) -> None:
        """Stores floats instead of Q8_0 blocks if the pools are not allocated, as GrowingLayer.store_floats."""
        if not self.buffers:
            self.store_dtype = GPU_STORAGE.get(self.store_dtype, self.store_dtype)

    def prepare_buffers(
        self, heads: int, columns: tuple[int, int], dtype: torch.dtype, device: torch.device = CPU
    ) -> bool:
        """Allocates the pools on `device` if they are not; `update` and fused callers then write into them.

        Returns:
            Whether heads and `columns` (the widths of keys and values) are those of the pools.
        """
        if not self.buffers:
            self.columns = columns
            for width in columns:
                row, kind = stored_row_format(self.store_dtype, width, dtype, device)
                self.buffers.append(allocate_buffer((self.owner.pages, heads, PAGE_TOKENS, row), kind, device))
        return self.columns == columns and self.buffers[0].shape[1] == heads

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [1, heads, tokens, columns] in the batch's slots and returns the pools. ValueError for a shape that
        does not match the batch or the pools.
        """
        batch = self.owner.batch
        if batch is None or key_states.shape[0] != 1 or key_states.shape[2] != batch.tokens:
            raise ValueError(f"keys of shape {tuple(key_states.shape)} do not match the current batch")
        columns = key_states.shape[3], value_states.shape[3]
        if not self.prepare_buffers(key_states.shape[1], columns, key_states.dtype, key_states.device):
            raise ValueError(f"keys of shape {tuple(key_states.shape)} do not fit pools with columns {self.columns}")
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            scatter_kv(states, buffer, batch.tables_on(buffer.device).slots)
        self.owner.check_cancelled()
        keys, values = self.buffers
        keys.ktx_batch = batch  # type: ignore[attr-defined]
        return keys, values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: `prepare_buffers` allocates the pools."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the sizes of a mask over the step's own tokens: the pages need none."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Returns 0: each sequence of a step has its own length, in the batch's metadata."""
        return 0

    def get_max_length(self) -> int:
        """Returns -1: the layer has no limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Returns -1: the layer has no limit of its own."""
        return -1


def scatter_kv(states: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes [1, heads, tokens, columns] into slots of a pool [pages, heads, PAGE_TOKENS, columns]."""
    refuse_gradient("a cache of pages", WITHOUT_CACHE, states)
    if pool.device.type == "cpu" and pool.dtype is not E4M3:
        cpu.ops.store_slots(states if states.stride(3) == 1 else states.contiguous(), pool, slots)
    else:
        pool[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS] = clamp_to(states[0].transpose(0, 1), pool.dtype).to(
            pool.dtype
        )


class PagedCache(Cache):
    """The cache of a forward over several sequences: transformers' Cache, whose attention layers are pools of pages.

    `begin` sets `batch`, which says where each token of the forward belongs. Recurrent layers have no pages: `states`
    holds theirs by sequence.

    Args:
        config: the model's config.
        pages: number of pages in each pool.
        dtype: the storage type, see kv_type.
        extra_layers: number of attention layers in addition to the model's, such as those for MTP.
    """

    def __init__(self, config: PreTrainedConfig, pages: int, dtype: KVType = torch.float16, extra_layers: int = 0):
        self.dtype, self.pages, self.config = kv_type(dtype), pages, config
        self.batch: BatchMetadata | None = None
        self.states: dict[int, DynamicCache] = {}  # recurrent states by sequence
        # Numbers of tokens that the sequences' states include, without an entry while layers differ; and snapshots
        # within the latest forward.
        self.state_lengths: dict[int, int] = {}
        self.snapshots: dict[tuple[int, int], DynamicCache] = {}
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[PagedLayer(self) if type(layer) in STANDARD_LAYERS else layer for layer in stock])
        self.layers += [PagedLayer(self) for _ in range(extra_layers)]
        kinds = {type(layer).__name__ for layer in self.layers if not isinstance(layer, PagedLayer)}
        if unknown := kinds - {"LinearAttentionLayer"}:
            raise UsageError(
                f"a layer of this model has a cache of type {', '.join(sorted(unknown))}, which cannot be batched yet"
            )
        self.recurrent = bool(kinds)

    def check_cancelled(self) -> None:
        """Calls the batch's `check`, which may raise to cancel the forward between two layers."""
        if self.batch is not None and self.batch.check_cancelled is not None:
            self.batch.check_cancelled()

    def begin(self, batch: BatchMetadata) -> None:
        """Starts a forward, which overwrites recurrent states layer by layer. RuntimeError if a sequence's states are
        not those before its tokens.
        """
        self.batch = batch
        if not self.recurrent:
            return
        for span in batch.spans:
            if self.state_lengths.get(span.owner, 0 if span.owner not in self.states else -1) != span.past:
                raise RuntimeError(
                    f"sequence {span.owner} continues after {span.past} tokens, "
                    f"its recurrent states are those after {self.state_lengths.get(span.owner)}"
                )
        self.snapshots.clear()
        for span in batch.spans:
            self.state_lengths.pop(span.owner, None)

    def end(self, batch: BatchMetadata) -> None:
        """Ends a forward that computed all layers; after any other the states stay unknown."""
        if self.recurrent:
            self.state_lengths |= {span.owner: span.past + span.count for span in batch.spans}

    def save_snapshot(self, owner: int, tokens: int, layer: int) -> None:
        """Takes a snapshot of one layer's state of a sequence after `tokens` tokens."""
        snapshot = self.snapshots.setdefault((owner, tokens), DynamicCache(config=self.config))
        snapshot.layers[layer] = copy.deepcopy(self.states[owner].layers[layer])

    def state(self, owner: int) -> DynamicCache:
        """Returns a sequence's recurrent states, empty ones for a new sequence."""
        if owner not in self.states:
            self.states[owner] = DynamicCache(config=self.config)
        return self.states[owner]

    def snapshot(self, owner: int, tokens: int) -> DynamicCache | None:
        """Returns a copy of a sequence's states after `tokens` tokens, at the end of the latest forward or within it;
        None if they are unknown, as after a forward that did not finish.
        """
        if owner not in self.state_lengths:
            return None
        return (
            copy.deepcopy(self.states[owner])
            if self.state_lengths[owner] == tokens
            else self.snapshots.get((owner, tokens))
        )

    def restore(self, owner: int, snapshot: DynamicCache, tokens: int) -> None:
        """Sets a sequence's states to a snapshot after `tokens` tokens."""
        self.states[owner], self.state_lengths[owner] = copy.deepcopy(snapshot), tokens

    def free(self, owner: int) -> None:
        """Frees a sequence's states."""
        self.states.pop(owner, None)
        self.state_lengths.pop(owner, None)

    def nbytes(self, host: bool = False) -> int:
        """Returns the bytes of the allocated pools; `host`: of those in CPU memory."""
        layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        return sum(
            buffer.nbytes for layer in layers for buffer in layer.buffers if not host or buffer.device.type == "cpu"
        )


def get_paged_layer(cache: Any, index: int) -> PagedLayer | None:
    """Returns a layer of a PagedCache; None for any other cache."""
    return cache.layers[index] if type(cache) is PagedCache else None  # type: ignore[return-value]


def get_batch(cache: Any) -> BatchMetadata | None:
    """Returns the batch of a forward on pages; None for any other cache."""
    return cache.batch if type(cache) is PagedCache else None


def gather_pages(pool: torch.Tensor, pages: torch.Tensor, count: int) -> torch.Tensor:
    """Copies a sequence's first `count` rows from a pool with one head: [1, count, columns]."""
    num_pages = -(-count // PAGE_TOKENS)
    return pool[:, 0].index_select(0, pages[:num_pages]).flatten(0, 1)[None, :count]
