"""The whole mixture-of-experts block: router, experts, shared experts."""

from __future__ import annotations

from typing import Any

import torch

from ktx.errors import UsageError
from ktx.ops.base import Context, Operator, adopt

RETURNS_ROUTER = ("GptOssMLP",)  # blocks that return (hidden states, router scores)


class MoE(Operator):
    """One forward for every family's block: it looks for gate or router, experts, shared_expert(s) and shared_expert_gate."""

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> MoE:
        if not hasattr(old, "experts") or not (hasattr(old, "gate") or hasattr(old, "router")):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, MoE needs experts and a gate or router")
        new: MoE = adopt(cls, old, ctx)
        new.returns_router = type(old).__name__ in RETURNS_ROUTER
        return new

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        router = self.gate if hasattr(self, "gate") else self.router
        bias = getattr(self, "e_score_correction_bias", None)
        _, weights, ids = router(flat) if bias is None else router(flat, bias)
        out = self.experts(flat, ids, weights)
        shared = getattr(self, "shared_experts", None) or getattr(self, "shared_expert", None)
        if shared is not None:
            extra = shared(flat)
            gate = getattr(self, "shared_expert_gate", None)
            out = out + (extra if gate is None else torch.sigmoid(gate(flat)) * extra)
        out = out.reshape(shape)
        return (out, weights) if self.returns_router else out
