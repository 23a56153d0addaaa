"""Attention with a running state (linear attention): transformers' own module, each sequence of a batch with its own state."""

from __future__ import annotations

from typing import Any

import torch

from ktx.cache.paged import PagedCache
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops import contract, lora
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.forward_signature import Call


class Recurrent(Operator):
    """Computes as the module it replaces, which takes its state from a cache; on a PagedCache one sequence after another."""

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Recurrent:
        if not hasattr(old, "layer_idx"):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, which has no place in a cache (layer_idx)")
        if not Call.of(old).cache:
            raise contract.differs(
                old, ctx.path, "has no argument for a cache in its forward, so its state would be lost"
            )
        new: Recurrent = adopt(cls, old, ctx)
        return new

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given, cache = self.call.split(args, kwargs)
        if type(cache) is not PagedCache:
            return super().forward(**self.call.joined(given, cache))
        cache.check_cancelled()
        assert cache.batch is not None
        hidden_states = given["hidden_states"]
        done, at = [], 0
        for span in cache.batch.spans:
            first, marks = at - span.past, span.marks
            for size in span.pieces:
                with cpu.wide_part(at, size), lora.part(at, size):
                    piece = {"hidden_states": hidden_states[:, at : at + size], "attention_mask": None}
                    done.append(super().forward(**self.call.joined(given | piece, cache.state(span.owner))))
                at += size
                if at - first in marks:
                    cache.mark(span.owner, at - first, self.layer_idx)
        return torch.cat(done, 1)

    by_class = forward  # calls it, sequence by sequence
