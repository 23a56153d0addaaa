"""A gated feed-forward layer on a GPU."""

from __future__ import annotations

import torch

from ktx.kernels import reference
from ktx.ops import mlp
from ktx.ops.guard import ChildrenGuard


class MLP(mlp.MLP):
    """GPU version of ktx.ops.mlp.MLP: one kernel per projection."""

    def ready(self) -> None:
        """Builds the guard of the children, and no fused step: those are for the CPU."""
        self.inside = ChildrenGuard.of(self)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the layer by calling the projections; the activation runs in torch."""
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(reference.activate(gate, up, self.act))
