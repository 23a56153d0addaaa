"""Padding rows of a forward: a captured step is replayed for fewer requests than it was captured for.

Attention writes a padding row to a page that belongs to no request. Experts skip it: on a device its expert ids are
replaced by NO_EXPERT, and on the CPU only the rows before the padding are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

NO_EXPERT = -1  # an id that selects no expert


@dataclass(frozen=True)
class Padding:
    """How many of a step's rows, the leading ones, are tokens; both tensors are updated before each replay.

    Attributes:
        count: int64 [1] in CPU memory.
        is_token: int64 [rows] on the device, nonzero for tokens.
    """

    count: torch.Tensor
    is_token: torch.Tensor


_padding: ContextVar[Padding | None] = ContextVar("padding", default=None)


@contextmanager
def with_padding(padding: Padding) -> Iterator[None]:
    """Context in which this thread's forwards may have padding rows."""
    token = _padding.set(padding)
    try:
        yield
    finally:
        _padding.reset(token)


def num_tokens() -> torch.Tensor | None:
    """Returns `Padding.count`; None where all rows are tokens."""
    current = _padding.get()
    return None if current is None else current.count


def mask_padding(ids: torch.Tensor) -> torch.Tensor:
    """Replaces the expert ids int64 [rows, K] of padding rows by NO_EXPERT."""
    current = _padding.get()
    return ids if current is None else ids.masked_fill(current.is_token[:, None] == 0, NO_EXPERT)
