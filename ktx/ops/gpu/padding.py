"""Padding rows of a forward: a captured step is replayed for fewer requests than it was captured for.

Attention writes a padding row to a page that belongs to no request. Experts skip it: on a device its expert ids are
replaced by NO_EXPERT, and on the CPU only the rows before the padding are computed.
"""

from __future__ import annotations

import torch

from ktx.cache.forward_context import Padding, current

NO_EXPERT = -1  # an id that selects no expert


def num_tokens() -> torch.Tensor | None:
    """Returns `Padding.count`; None where all rows are tokens."""
    padding = _padding()
    return None if padding is None else padding.count


def mask_padding(ids: torch.Tensor) -> torch.Tensor:
    """Replaces the expert ids int64 [rows, K] of padding rows by NO_EXPERT."""
    padding = _padding()
    return ids if padding is None else ids.masked_fill(padding.is_token[:, None] == 0, NO_EXPERT)


def _padding() -> Padding | None:
    """Returns the padding of this thread's forward; None where all rows are tokens."""
    context = current()
    return None if context is None else context.padding
