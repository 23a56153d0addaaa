"""What the modules of one forward share, besides the tensors that transformers passes to them.

transformers passes no cache to rotary embeddings, attention functions and linear modules. The engine therefore enters
a `ForwardContext` around each forward of a model, and these modules read the one of their thread with `current`, as in
vLLM's `forward_context.py`. A PagedCache holds the same object.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ktx.cache.batch import BatchMetadata
from ktx.kernels import cpu
from ktx.weights.lora import Spans


@dataclass(frozen=True, slots=True)
class AdapterStep:
    """The LoRA adapters of a forward's rows.

    Attributes:
        mapping: the AdapterMapping of the model that the forward belongs to, compared by identity.
        tokens: for runs of consecutive rows the number of rows and their adapters; together all tokens.
        logits: the same for the rows whose logits are computed, because the output layer computes only these.
    """

    mapping: object
    tokens: Spans
    logits: Spans


@dataclass(frozen=True, slots=True)
class Padding:
    """How many of a captured step's rows, the leading ones, are tokens; both tensors are updated before each replay.

    Attributes:
        count: int64 [1] in CPU memory.
        is_token: int64 [rows] on the device, nonzero for tokens.
    """

    count: torch.Tensor
    is_token: torch.Tensor


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What the modules of one forward share.

    Attributes:
        batch: the sequences of the rows, in a forward on a PagedCache.
        key_pools: ids of that cache's key pools, by which an attention function recognizes them.
        adapters: the LoRA adapters of the rows; None: those that are active outside of an engine.
        padding: which rows are tokens, in a captured step; None: all rows.
        part: first row and number of rows, while modules are called with only a part of the rows.
    """

    batch: BatchMetadata | None = None
    key_pools: Set[int] = frozenset()
    adapters: AdapterStep | None = None
    padding: Padding | None = None
    part: tuple[int, int] | None = None

    def row_counts(self, position_ids: torch.Tensor) -> list[int] | None:
        """Returns the sequences' numbers of rows if `position_ids` [1, rows] are those of the batch, else None."""
        if self.batch is None or position_ids.shape != self.batch.position_ids.shape:
            return None
        return [span.count for span in self.batch.spans]


# `context` is set only during a forward. torch.compile guards on such an attribute, and cannot trace a ContextVar.
_thread = threading.local()


def current() -> ForwardContext | None:
    """Returns the context of the forward that this thread computes for an engine; None in any other forward."""
    return getattr(_thread, "context", None)


def batch_of(keys: torch.Tensor) -> BatchMetadata | None:
    """Returns the batch if `keys` are a pool of the PagedCache of this thread's forward, else None."""
    context = current()
    return context.batch if context is not None and id(keys) in context.key_pools else None


@contextmanager
def enter(context: ForwardContext) -> Iterator[None]:
    """Makes `context` the one of this thread's forward."""
    outer = current()
    _thread.context = context
    try:
        yield
    finally:
        if outer is None:
            del _thread.context
        else:
            _thread.context = outer


@contextmanager
def rows_part(first: int, count: int) -> Iterator[None]:
    """Context in which modules are called with only `count` rows, from `first` on, of one sequence.

    Recurrent layers compute sequence by sequence. Each row is then computed with the adapters and in the number format
    that it has in the complete batch.
    """
    with cpu.bf16_rows_part(first, count), enter(replace(current() or ForwardContext(), part=(first, count))):
        yield
