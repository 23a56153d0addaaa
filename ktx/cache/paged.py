"""The paged KV cache of many sequences: a forward computes their tokens as one row, each sequence with its own past.

Keys and values (MLA's latent and rotated part too) are in pools [pages, heads, PAGE_TOKENS, columns]; the batch of a
forward (ktx.cache.batch) maps its tokens to their slots. Recurrent layers have a state for each sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ktx.cache.batch import BatchMetadata
from ktx.cache.forward_context import AdapterStep, ForwardContext, Padding, enter
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
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gradients import WITHOUT_CACHE, refuse_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class PagedLayer(CacheLayerMixin):
    """One layer's pools: keys and values [pages, heads, PAGE_TOKENS, columns] of all sequences.

    `update` returns the pools themselves, because their pages belong to several sequences; attention modules read
    from the batch of the forward which ones, see `forward_context.batch_of`.
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
            self.owner.key_pools.add(id(self.buffers[0]))
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

    `forward` sets the batch, which maps each token of a forward to its sequence. Recurrent layers have no pages:
    `states` holds theirs by sequence.

    Args:
        config: the model's config.
        pages: number of pages in each pool.
        dtype: the storage type, see kv_type.
        extra_layers: number of attention layers in addition to the model's, such as those for MTP.
    """

    def __init__(self, config: PreTrainedConfig, pages: int, dtype: KVType = torch.float16, extra_layers: int = 0):
        """Gives each attention layer pages. Recurrent layers have one state per sequence; other kinds are refused."""
        self.dtype, self.pages, self.config = kv_type(dtype), pages, config
        self.context: ForwardContext | None = None  # of the running forward
        self.key_pools: set[int] = set()  # ids of the layers' pools of keys, which live as long as the cache
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

    @property
    def batch(self) -> BatchMetadata | None:
        """The batch of the running forward, else None."""
        return None if self.context is None else self.context.batch

    @contextmanager
    def forward(
        self,
        batch: BatchMetadata,
        bf16_ranges: Sequence[int] = (),
        adapters: AdapterStep | None = None,
        padding: Padding | None = None,
    ) -> Iterator[None]:
        """Context in which this thread runs one forward on the cache, which the forward's modules read as
        `forward_context.current`.

        Args:
            batch: the tokens of the forward.
            bf16_ranges: the rows that the CPU kernels multiply in bf16, see cpu.bf16_rows.
            adapters: the LoRA adapters of the rows.
            padding: which rows are tokens, in a captured step.
        """
        self.context = ForwardContext(batch, self.key_pools, adapters, padding)
        try:
            with enter(self.context), cpu.bf16_rows(batch.tokens, bf16_ranges):
                yield
        finally:
            self.context = None

    def check_cancelled(self) -> None:
        """Calls the batch's `check`, which may raise to cancel the forward between two layers."""
        if self.batch is not None and self.batch.check_cancelled is not None:
            self.batch.check_cancelled()

    def begin(self, batch: BatchMetadata) -> None:
        """Prepares recurrent states for a forward, which overwrites them layer by layer. RuntimeError if a sequence's
        states are not those before its tokens.
        """
        if not self.recurrent:
            return
        for span in batch.spans:
            # without an entry: 0 before the first forward, -1 (unknown) after one that did not finish
            if self.state_lengths.get(span.owner, 0 if span.owner not in self.states else -1) != span.past:
                raise RuntimeError(
                    f"sequence {span.owner} continues after {span.past} tokens, "
                    f"its recurrent states are those after {self.state_lengths.get(span.owner)}"
                )
        self.snapshots.clear()
        for span in batch.spans:
            self.state_lengths.pop(span.owner, None)  # unknown until `end`

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
        """Returns a sequence's recurrent states after its first `tokens` tokens, for the prefix cache: a copy of the
        present ones, or those that `save_snapshot` took within the latest forward. None if there are none, as after a
        forward that did not finish.
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
