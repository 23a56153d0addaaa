"""Attention with a running state (linear attention): transformers' own module, each sequence of a batch with its own state."""

from __future__ import annotations

from typing import Any

import torch

from ktx.cache.paged import PagedCache
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops.base import Context, Operator, adopt


class Recurrent(Operator):
    """Computes as the module it replaces, which takes its state from `cache_params`; on a PagedCache one sequence after another."""

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Recurrent:
        if not hasattr(old, "layer_idx"):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, which has no place in a cache (layer_idx)")
        new: Recurrent = adopt(cls, old, ctx)
        return new

    def forward(self, hidden_states: torch.Tensor, cache_params: Any = None, **kwargs: Any) -> torch.Tensor:
        if type(cache_params) is not PagedCache:
            return super().forward(hidden_states, cache_params=cache_params, **kwargs)
        cache_params.look()
        assert cache_params.batch is not None
        kwargs |= {"attention_mask": None}
        done, at = [], 0
        for span in cache_params.batch.spans:
            first, marks = at - span.past, span.marks
            for size in span.pieces:
                with cpu.wide_part(at, size):
                    piece = hidden_states[:, at : at + size]
                    done.append(super().forward(piece, cache_params=cache_params.state(span.owner), **kwargs))
                at += size
                if at - first in marks:
                    cache_params.mark(span.owner, at - first, self.layer_idx)
        return torch.cat(done, 1)
