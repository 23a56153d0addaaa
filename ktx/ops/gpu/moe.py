"""The mixture-of-experts block on a GPU, with its experts there, in the CPU's memory, or some here and some there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ktx.ops import experts, moe
from ktx.ops.base import Context
from ktx.ops.gpu import padding
from ktx.ops.gpu.experts import Experts
from ktx.ops.gpu.offload import ExpertOffload, Pending, install
from ktx.ops.guard import Inside

if TYPE_CHECKING:
    from ktx.ops.gpu.expert_streaming import Streamer


class PendingMoE(NamedTuple):
    """What the device makes of the chosen experts, and what the CPU is asked to."""

    here: torch.Tensor | None
    there: Pending | None


class MoE(moe.MoE):
    """As on the CPU. Experts that stayed there are computed while the device computes its own, and the shared ones."""

    handover: ExpertOffload | None
    streamer: Streamer | None  # see ktx.ops.gpu.expert_streaming
    streamed_from: int

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> moe.MoE:
        new = super().from_hf(old, ctx, **kwargs)
        new.handover = new.streamer = None
        return new

    def ready(self) -> None:
        self.inside = Inside.of(self)

    def listened(self) -> bool:
        return self.handover is None and super().listened()

    @property
    def apart(self) -> bool:
        """Whether the experts stayed with the CPU."""
        return isinstance(self.experts, experts.Experts) and not isinstance(self.experts, Experts)

    def begin(self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        if self.handover is None:
            return super().begin(flat, ids, weights)
        share, there, brought = self.experts.on_gpu, None, None
        if self.streams(flat):
            assert self.streamer is not None
            brought = self.streamer(self.experts, flat, ids, weights)
        elif self.experts.num_experts:
            there = self.handover.submit(self.experts, flat, ids, weights)
        here = None if share is None else share(flat, ids, weights)
        return PendingMoE(here if brought is None else brought if here is None else brought + here, there)

    def streams(self, flat: torch.Tensor) -> bool:
        """Whether the CPU's experts come here for these tokens. Not where somebody listens to them, and not in a step that becomes a graph, which could not tell what came before."""
        if self.streamer is None or len(flat) < self.streamed_from or padding.count() is not None:
            return False
        return not (self.experts._forward_hooks or self.experts._forward_pre_hooks)

    def end(self, under_way: Any) -> torch.Tensor:
        if self.handover is None:
            return super().end(under_way)
        here, there = under_way
        if there is None:
            return here
        out = self.handover.result(there)
        return out if here is None else out + here


def hand_over(model: Any) -> None:
    """Gives all blocks of a model whose experts stayed with the CPU a way to them. After everything is ready."""
    install(model, [module for module in model.modules() if isinstance(module, MoE) and module.apart])
