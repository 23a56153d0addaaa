"""The cache of many sequences at once: a forward sees them one after another as one row of tokens, each with its own past.

Keys and values (MLA's latent and rotated part too) lie in pools [pages, heads, PAGE, columns]; a `Batch` says which tokens are whose and
where they go. Attention modules of ours read it; see ktx.ops.attention. Recurrent layers have a state for each sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ktx.cache.kv import CPU, E4M3, ON_GPU, PLAIN, KVType, empty, kv_type, stored_row, within
from ktx.cache.page_pool import PAGE_TOKENS, SNAPSHOTS
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gradients import WITHOUT_CACHE, refuse

SAVED = 4 * PAGE_TOKENS  # tokens of a prompt between two states that are copied


@dataclass(frozen=True)
class PageTables:
    """A batch as the kernels of a device read it: `sequences` int64 [n, 3] (first token, tokens, keys with these), `pages` int32 [n, most],
    `slots` int64 [tokens]. Tables of different sizes may have one `scratch`, if only one is in use at a time.
    """

    sequences: torch.Tensor
    pages: torch.Tensor
    slots: torch.Tensor
    plans: dict[Any, Any] = field(default_factory=dict)  # what layers have made of it for those that follow
    works: dict[Any, Any] = field(default_factory=dict)  # the same of the counts of tokens alone
    scratch: dict[Any, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> PageTables:
        return PageTables(self.sequences.to(device), self.pages.to(device), self.slots.to(device))


@dataclass(frozen=True)
class SequenceSpan:
    """The tokens of one sequence in a forward: `count` of them after `past` others, on `pages`; `owner` names the sequence.

    The first `prompt` of them are the prompt's. An operator with one form for prompts and one for answers (MLA), or whose sums depend
    on the piece they are made in (recurrent layers), goes by `whole` and `pieces`, which do not depend on what else is computed.
    `shared`: others may begin with the same prompt, so states that recurrent layers have on the way are copied, see `marks`.
    """

    owner: int
    past: int
    count: int
    pages: Sequence[int]
    prompt: int = 0
    shared: bool = False

    @property
    def marks(self) -> list[int]:
        """How many tokens of the sequence there are where a state is copied before the span's end: each SAVED, and at the end of the prompt's last page."""
        if not self.shared:
            return []
        end = self.past + self.prompt
        found = {*range(self.past // SAVED * SAVED + SAVED, end, SAVED), end // PAGE_TOKENS * PAGE_TOKENS}
        return sorted(at for at in found if self.past < at < self.past + self.count)[-SNAPSHOTS:]

    @property
    def lead_tokens(self) -> int:
        """How many of the tokens fill up a page that was begun before."""
        return min(self.count, -self.past % PAGE_TOKENS)

    @property
    def full_page_tokens(self) -> int:
        """How many of the tokens, behind the lead, are whole pages of the prompt."""
        return max(0, (self.past + self.prompt) // PAGE_TOKENS * PAGE_TOKENS - self.past - self.lead_tokens)

    @property
    def pieces(self) -> list[int]:
        """Counts of tokens: a prompt's lead, its pages, its last ones, then answers one by one."""
        lead = min(self.lead_tokens, self.prompt)
        rest = self.prompt - lead - self.full_page_tokens
        ends = [lead] * (lead > 0) + [PAGE_TOKENS] * (self.full_page_tokens // PAGE_TOKENS) + [rest] * (rest > 0)
        return ends + [1] * (self.count - self.prompt)


class BatchMetadata:
    """What attention has to know about a forward's tokens. `tables` are those of devices that have them already."""

    def __init__(
        self,
        spans: Sequence[SequenceSpan],
        check: Callable[[], None] | None = None,
        tables: Mapping[torch.device, PageTables] | None = None,
    ):
        self.spans, self.check = spans, check
        rows, at = [], 0
        for span in spans:
            rows.append((at, span.count, span.past + span.count))
            at += span.count
        self.tokens, self.rows = at, rows
        self.sequences = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.pages = torch.zeros(len(spans), max(len(span.pages) for span in spans), dtype=torch.int32, device="cpu")
        for own, span in zip(self.pages, spans, strict=True):
            own[: len(span.pages)] = torch.tensor(span.pages, dtype=torch.int32, device="cpu")
        self.positions = torch.cat([torch.arange(span.past, span.past + span.count, device="cpu") for span in spans])
        self.position_ids = self.positions[None]
        # For rotary code whose tables depend on a sequence's length. The counts alone: a ring would hold each forward's tensors until a collection of garbage.
        self.position_ids.ktx_counts = [span.count for span in spans]  # type: ignore[attr-defined]
        of = torch.repeat_interleave(
            torch.arange(len(spans), device="cpu"), torch.tensor([span.count for span in spans], device="cpu")
        )
        self.slots = self.pages[of, self.positions // PAGE_TOKENS].long() * PAGE_TOKENS + self.positions % PAGE_TOKENS
        self._ranges: dict[int, torch.Tensor] = {}
        self._tables = dict(tables or {})
        self.whole = any(span.full_page_tokens for span in spans)

    def on(self, device: torch.device) -> PageTables:
        """The tables on a device; they are moved once."""
        if device not in self._tables:
            self._tables[device] = PageTables(self.sequences, self.pages, self.slots).to(device)
        return self._tables[device]

    def wide(self, narrow: Sequence[int] = ()) -> list[int]:
        """First and count of the rows that are whole pages of a prompt, see cpu.wide_rows; without those of the spans `narrow`."""
        whole = [
            (first + span.lead_tokens, span.full_page_tokens)
            for i, (span, (first, _, _)) in enumerate(zip(self.spans, self.rows, strict=True))
            if i not in narrow
        ]
        return [number for first, count in whole if count for number in (first, count)]

    @cached_property
    def rest(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The tokens that are in no whole page: their places int64 [n], and `sequences` and `pages` of them alone; None if there are none."""
        places, rows, own, at = [], [], [], 0
        for i, (span, (first, _, _)) in enumerate(zip(self.spans, self.rows, strict=True)):
            for begin, end in ((0, span.lead_tokens), (span.lead_tokens + span.full_page_tokens, span.count)):
                if begin < end:
                    places.append(torch.arange(first + begin, first + end, device="cpu"))
                    rows.append((at, end - begin, span.past + end))
                    own.append(i)
                    at += end - begin
        return (torch.cat(places), torch.tensor(rows, device="cpu"), self.pages[own]) if rows else None

    def ranges(self, window: int = 0) -> torch.Tensor | None:
        """int32 [1, tokens, 2]: the keys that each token sees of its own sequence; None without a window: all up to itself."""
        if not window:
            return None
        if window not in self._ranges:
            last = self.positions + 1
            self._ranges[window] = torch.stack([(last - window).clamp(min=0), last], -1).int()[None]
        return self._ranges[window]


class PagedLayer(CacheLayerMixin):
    """One layer's pools. What `update` returns are the pools themselves; `ktx_batch` on them says so to whoever attends."""

    is_sliding = False
    is_croppable = False

    def __init__(self, owner: PagedCache):
        super().__init__()
        self.owner, self.buffers, self.columns = owner, list[torch.Tensor](), (0, 0)
        self.store_dtype = owner.dtype

    def keep_floats(self) -> None:
        """As GrowingLayer's."""
        if not self.buffers:
            self.store_dtype = ON_GPU.get(self.store_dtype, self.store_dtype)

    def fits(self, heads: int, columns: tuple[int, int], dtype: torch.dtype, device: torch.device = CPU) -> bool:
        """Whether keys and values of this shape can be kept; pools are made for the first ones, on `device`."""
        if not self.buffers:
            self.columns = columns
            for width in columns:
                row, kind = stored_row(self.store_dtype, width, dtype, device)
                self.buffers.append(empty((self.owner.pages, heads, PAGE_TOKENS, row), kind, device))
        return self.columns == columns and self.buffers[0].shape[1] == heads

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [1, heads, tokens, columns] where the batch says, and returns the pools."""
        batch = self.owner.batch
        if batch is None or key_states.shape[0] != 1 or key_states.shape[2] != batch.tokens:
            raise ValueError(f"keys of the shape {tuple(key_states.shape)} are no tokens of the present batch")
        columns = key_states.shape[3], value_states.shape[3]
        if not self.fits(key_states.shape[1], columns, key_states.dtype, key_states.device):
            raise ValueError(f"keys of the shape {tuple(key_states.shape)} do not fit pools for {self.columns}")
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            scatter_kv(states, buffer, batch.on(buffer.device).slots)
        self.owner.check_cancelled()
        keys, values = self.buffers
        keys.ktx_batch = batch  # type: ignore[attr-defined]
        return keys, values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Pools are made by `fits`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def scatter_kv(states: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes [1, heads, tokens, columns] to its slots of a pool [pages, heads, PAGE, columns]."""
    refuse("a cache of pages", WITHOUT_CACHE, states)
    if pool.device.type == "cpu" and pool.dtype is not E4M3:
        cpu.ops.store_slots(states if states.stride(3) == 1 else states.contiguous(), pool, slots)
    else:
        pool[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS] = within(states[0].transpose(0, 1), pool.dtype).to(
            pool.dtype
        )


class PagedCache(Cache):
    """The cache of a forward over several sequences, `pages` pages long, and of `more` layers than the model's. `batch` is set before each forward."""

    def __init__(self, config: Any, pages: int, dtype: KVType = torch.float16, more: int = 0):
        self.dtype, self.pages, self.config = kv_type(dtype), pages, config
        self.batch: BatchMetadata | None = None
        self.states: dict[int, DynamicCache] = {}  # of sequences, where the model has recurrent layers
        # Tokens that a sequence's states have seen, no entry while layers differ in that; and states on the way of the latest forward.
        self.known: dict[int, int] = {}
        self.marked: dict[tuple[int, int], DynamicCache] = {}
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[PagedLayer(self) if type(layer) in PLAIN else layer for layer in stock])
        self.layers += [PagedLayer(self) for _ in range(more)]
        kinds = {type(layer).__name__ for layer in self.layers if not isinstance(layer, PagedLayer)}
        if unknown := kinds - {"LinearAttentionLayer"}:
            raise UsageError(
                f"a layer of this model keeps a {', '.join(sorted(unknown))}, which several requests cannot share yet"
            )
        self.recurrent = bool(kinds)

    def check_cancelled(self) -> None:
        """Lets whoever runs the forward end it between two layers, by raising."""
        if self.batch is not None and self.batch.check is not None:
            self.batch.check()

    def begin(self, batch: BatchMetadata) -> None:
        """Before a forward, which overwrites states layer by layer. RuntimeError if a sequence's states are not those before its tokens."""
        self.batch = batch
        if not self.recurrent:
            return
        for span in batch.spans:
            if self.known.get(span.owner, 0 if span.owner not in self.states else -1) != span.past:
                raise RuntimeError(
                    f"sequence {span.owner} goes on after {span.past} tokens, its recurrent states are those after {self.known.get(span.owner)}"
                )
        self.marked.clear()
        for span in batch.spans:
            self.known.pop(span.owner, None)

    def end(self, batch: BatchMetadata) -> None:
        """After a forward that went through all layers; of any other the states stay unknown."""
        if self.recurrent:
            self.known |= {span.owner: span.past + span.count for span in batch.spans}

    def mark(self, owner: int, tokens: int, layer: int) -> None:
        """Copies what a layer knows of a sequence after so many tokens."""
        copied = self.marked.setdefault((owner, tokens), DynamicCache(config=self.config))
        copied.layers[layer] = copy.deepcopy(self.states[owner].layers[layer])

    def state(self, owner: int) -> DynamicCache:
        """The recurrent layers' states of a sequence."""
        if owner not in self.states:
            self.states[owner] = DynamicCache(config=self.config)
        return self.states[owner]

    def snapshot(self, owner: int, tokens: int) -> DynamicCache | None:
        """A copy of a sequence's states after `tokens` tokens, at the end of the latest forward or on its way; None if they are not known, as after one that came to no end."""
        if owner not in self.known:
            return None
        return copy.deepcopy(self.states[owner]) if self.known[owner] == tokens else self.marked.get((owner, tokens))

    def restore(self, owner: int, snapshot: DynamicCache, tokens: int) -> None:
        self.states[owner], self.known[owner] = copy.deepcopy(snapshot), tokens

    def forget(self, owner: int) -> None:
        self.states.pop(owner, None)
        self.known.pop(owner, None)

    def nbytes(self, host: bool = False) -> int:
        """Bytes of the pools that were made; `host`: of those in the CPU's memory."""
        layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        return sum(
            buffer.nbytes for layer in layers for buffer in layer.buffers if not host or buffer.device.type == "cpu"
        )


def paged(cache: Any, index: int) -> PagedLayer | None:
    """A layer of a PagedCache; None for any other cache."""
    return cache.layers[index] if type(cache) is PagedCache else None  # type: ignore[return-value]


def batch_of(cache: Any) -> BatchMetadata | None:
    """The batch of a forward on pages; None for any other cache."""
    return cache.batch if type(cache) is PagedCache else None


def gather_pages(pool: torch.Tensor, pages: torch.Tensor, count: int) -> torch.Tensor:
    """A sequence's first `count` rows, dense, of a pool with one head: [1, count, columns]."""
    need = -(-count // PAGE_TOKENS)
    return pool[:, 0].index_select(0, pages[:need]).flatten(0, 1)[None, :count]
