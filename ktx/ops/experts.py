"""All experts of a layer in one kernel call, on packed weights in CPU memory."""

from __future__ import annotations

from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops.base import Context, Operator
from ktx.weights.source import WeightSource

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def activation(config: Any, where: str) -> str:
    """The kernel's name of config.hidden_act; UsageError for one that no kernel has."""
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu"
    if name not in ACTIVATIONS:
        raise UsageError(f"{where}: the activation {name!r} has no kernel; ktx has {' '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Experts(Operator):
    """The contract of transformers' experts modules: (hidden [T, D], ids [T, K], weights [T, K]) -> [T, D].

    Weights stay on the CPU whatever `.to()` says: that is what they are here for.
    """

    def __init__(self, path: str, experts: int, act: str, alpha: float, limit: float, bias: bool):
        super().__init__()
        self.path, self.num_experts, self.act, self.alpha, self.limit, self.has_bias = (
            path,
            experts,
            act,
            alpha,
            limit,
            bias,
        )
        self.weights: dict[str, cpu.Packed] = {}
        self.biases: dict[str, torch.Tensor | None] = dict.fromkeys(PROJECTIONS)
        self.top = 1

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Experts:
        count = next((int(getattr(old, name)) for name in COUNTS if hasattr(old, name)), 0)
        if not count:
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, which is no experts module of transformers 5")
        bias = hasattr(old, "gate_up_proj_bias") or hasattr(old, "down_proj_bias")
        if hasattr(old, "alpha") and hasattr(old, "limit"):  # gpt-oss: clamped gate with its own slope
            new = cls(ctx.path, count, "swiglu_oai", float(old.alpha), float(old.limit), bias)
        else:
            new = cls(ctx.path, count, activation(ctx.config, ctx.path), 0.0, 0.0, bias)
        new.top = int(getattr(ctx.config, "num_experts_per_tok", 1) or 1)
        return new

    def tensors(self) -> list[str]:
        names = [f"{self.path}.{name}" for name in PROJECTIONS]
        return names + [f"{name}_bias" for name in names] if self.has_bias else names

    def load(self, source: WeightSource) -> None:
        for name in PROJECTIONS:
            full = f"{self.path}.{name}"
            parts = source.parts(full)
            if len({part.qtype.name for part in parts}) > 1:
                parts = [source.get(full)]
            self.weights[name] = cpu.pack(parts)
            source.release([full])
            if self.has_bias:
                self.biases[name] = source.get(f"{full}_bias").dequantize().contiguous()

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        w, b = self.weights, self.biases
        out = cpu.experts(
            hidden.to("cpu").contiguous(),
            ids.to("cpu", torch.int64).contiguous(),
            weights.to("cpu", torch.float32).contiguous(),
            w["gate_proj"],
            w["up_proj"],
            w["down_proj"],
            b["gate_proj"],
            b["up_proj"],
            b["down_proj"],
            self.act,
            self.alpha,
            self.limit,
        )
        return out.to(hidden.device)

    def weight_bytes(self) -> tuple[int, int]:
        held = sum(w.nbytes for w in self.weights.values())
        return held, held * min(self.top, self.num_experts) // self.num_experts

    def extra_repr(self) -> str:
        types = "/".join(w.qtype.name for w in self.weights.values()) or "not loaded"
        return f"{self.num_experts} experts, {types}, {self.act}"
