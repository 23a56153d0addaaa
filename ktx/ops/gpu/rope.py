"""Rotary tables on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from ktx.ops import rope


class RotaryEmbedding(rope.RotaryEmbedding):
    """transformers' own forward: to look positions up in a table one has to know the largest, and that waits for the device."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fixed:  # skips the table, which is the CPU form's
            return super(rope.RotaryEmbedding, self).forward(x, position_ids, *args, **kwargs)
        return super().forward(x, position_ids, *args, **kwargs)
