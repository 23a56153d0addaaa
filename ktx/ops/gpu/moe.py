"""The mixture-of-experts block on a GPU, with its experts there, in the CPU's memory, or some here and some there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ktx.ops import experts, moe
from ktx.ops.base import Context
from ktx.ops.gpu.experts import Experts
from ktx.ops.gpu.handover import HandOver, UnderWay, hand_over_to


class Begun(NamedTuple):
    """What the device makes of the chosen experts, and what the CPU is asked to."""

    here: torch.Tensor | None
    there: UnderWay | None


class MoE(moe.MoE):
    """As on the CPU. Experts that stayed there are computed while the device computes its own, and the shared ones."""

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
        share = self.experts.on_gpu
        there = self.handover.submit(self.experts, flat, ids, weights) if self.experts.num_experts else None
        return Begun(None if share is None else share(flat, ids, weights), there)

    def end(self, under_way: Any) -> torch.Tensor:
        if self.handover is None:
            return super().end(under_way)
        here, there = under_way
        if there is None:
            return here
        out = self.handover.result(there)
        return out if here is None else out + here
