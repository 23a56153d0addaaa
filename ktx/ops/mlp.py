"""A gated feed-forward layer: its activation in one call."""

from __future__ import annotations

from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.experts import activation


class MLP(Operator):
    """down(act(gate(x)) * up(x)), also with gate and up in one matrix (phi3). The projections stay modules of their own."""

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> MLP:
        if not hasattr(old, "down_proj") or not (hasattr(old, "gate_proj") or hasattr(old, "gate_up_proj")):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, MLP needs gate_proj and up_proj (or gate_up_proj), and down_proj"
            )
        new: MLP = adopt(cls, old, ctx)
        new.act = activation(ctx.config, ctx.path)
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "gate_up_proj"):
            gate, up = (half.contiguous() for half in self.gate_up_proj(x).chunk(2, -1))
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(cpu.gated(gate, up, self.act))
