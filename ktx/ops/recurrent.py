"""Recurrent layers (linear attention): the module of transformers, with one state for each sequence of a batch."""

from __future__ import annotations

from typing import Any

import torch

from ktx.cache.forward_context import rows_part
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError
from ktx.ops import contract
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.forward_signature import ForwardSignature


class Recurrent(Operator):
    """Computes as the module it replaces, which reads its state from a cache.

    On a PagedCache it computes one sequence after another, each with its own state.
    """

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Recurrent:
        """Creates the operator that replaces a transformers recurrent layer.

        Raises:
            UsageError: `old` has no cache index, or its forward takes no cache.
        """
        if not hasattr(old, "layer_idx"):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, which has no cache index (layer_idx)")
        if not ForwardSignature.of(old).cache:
            raise contract.unsupported_module_error(
                old, ctx.path, "has no argument for a cache in its forward, so the operator would lose its state"
            )
        new: Recurrent = adopt(cls, old, ctx)
        return new

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes the layer; on a PagedCache sequence by sequence, and each sequence in pieces.

        The pieces (`span.piece_lengths`) do not depend on what else is in the batch, so results do not either. At
        `span.snapshot_lengths` the state after a piece is saved as a snapshot, so that a later request with the same
        prefix can continue from there.
        """
        arguments, cache = self.call.split(args, kwargs)
        if type(cache) is not PagedCache:
            return super().forward(**self.call.join(arguments, cache))
        cache.check_cancelled()
        assert cache.batch is not None
        hidden_states = arguments["hidden_states"]
        outputs, start = [], 0
        for span in cache.batch.spans:
            sequence_start, snapshot_lengths = start - span.past, span.snapshot_lengths
            for size in span.piece_lengths:
                with rows_part(start, size):
                    chunk = {"hidden_states": hidden_states[:, start : start + size], "attention_mask": None}
                    outputs.append(super().forward(**self.call.join(arguments | chunk, cache.state(span.owner))))
                start += size
                if start - sequence_start in snapshot_lengths:
                    cache.save_snapshot(span.owner, start - sequence_start, self.layer_idx)
        return torch.cat(outputs, 1)

    call_patched_class = forward  # already calls the forward of the replaced class, sequence by sequence
