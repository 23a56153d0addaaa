"""Rotary tables on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from ktx.ops import rope


class RotaryEmbedding(rope.RotaryEmbedding):
    """Runs transformers' forward, because a table lookup needs the largest position and that is a device sync."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns cos and sin for position_ids [batch, tokens]."""
        if self.fixed:  # skips the CPU operator's forward, which looks positions up in a table
            return super(rope.RotaryEmbedding, self).forward(x, position_ids, *args, **kwargs)
        return super().forward(x, position_ids, *args, **kwargs)
