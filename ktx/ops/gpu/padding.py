"""Rows of a forward that stand for nothing: a captured step is replayed for fewer requests than it was captured for.

Attention gives such a row a page that belongs to no one. Experts skip it: on a device its choices are of no expert, and to the CPU's memory only the rows before it are handed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

NO_EXPERT = -1  # the number of no expert


@dataclass(frozen=True)
class Padding:
    """Where a step says how many of its rows, the first ones, are tokens: `count` int64 [1] in the CPU's memory, `real` int64 [rows] on the device."""

    count: torch.Tensor
    real: torch.Tensor


_known: ContextVar[Padding | None] = ContextVar("padding", default=None)


@contextmanager
def padded(padding: Padding) -> Iterator[None]:
    """Inside, this thread's forwards may have rows that stand for nothing."""
    token = _known.set(padding)
    try:
        yield
    finally:
        _known.reset(token)


def count() -> torch.Tensor | None:
    """How many rows are tokens, as `Padding.count`; None where all are."""
    known = _known.get()
    return None if known is None else known.count


def chosen(ids: torch.Tensor) -> torch.Tensor:
    """Choices int64 [rows, K] of experts, without those of rows that stand for nothing."""
    known = _known.get()
    return ids if known is None else ids.masked_fill(known.real[:, None] == 0, NO_EXPERT)
