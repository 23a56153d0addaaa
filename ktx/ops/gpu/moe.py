"""The mixture-of-experts block on a GPU, with its experts there or in the CPU's memory."""

from __future__ import annotations

from typing import Any

import torch

from ktx.ops import experts, moe
from ktx.ops.base import Context
from ktx.ops.gpu.experts import Experts
from ktx.ops.gpu.handover import HandOver, hand_over_to


class MoE(moe.MoE):
    """As on the CPU. Experts that stayed there are computed while the device computes the shared ones."""

    handover: HandOver | None

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> moe.MoE:
        new = super().from_hf(old, ctx, **kwargs)
        new.handover = None
        return new

    def ready(self) -> None:
        self.block = None
        elsewhere = isinstance(self.experts, experts.Experts) and not isinstance(self.experts, Experts)
        self.handover = hand_over_to(self.home.torch) if elsewhere else None

    def begin(self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        if self.handover is None:
            return super().begin(flat, ids, weights)
        return self.handover.submit(self.experts, flat, ids, weights)

    def end(self, under_way: Any) -> torch.Tensor:
        return super().end(under_way) if self.handover is None else self.handover.result(under_way)
