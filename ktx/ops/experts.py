"""All experts of a layer in one kernel call, on packed weights in CPU memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.kept import kept
from ktx.ops.base import Context, Operator, packed_as
from ktx.ops.gates import Gate, gate_of_experts
from ktx.weights.source import WeightSource

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Experts(Operator):
    """The contract of transformers' experts modules: (hidden [T, D], ids [T, K], weights [T, K]) -> [T, D].

    Weights stay on the CPU whatever `.to()` says: that is what they are here for. `counts` is what kernels count of them, see cpu.Counted;
    `waited` are the seconds spent on hidden states that came from another device.
    """

    def __init__(self, path: str, experts: int, gate: Gate, bias: bool):
        super().__init__()
        self.path, self.num_experts, self.gate, self.has_bias = path, experts, gate, bias
        self.hidden, self.width, self.top = 0, 0, 1
        self.weights: dict[str, cpu.Packed] = {}
        self.target: str | None = None
        self.biases: dict[str, torch.Tensor | None] = dict.fromkeys(PROJECTIONS)
        self.counts, self.waited = cpu.new_counts(experts), 0.0

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Experts:
        count = next((int(getattr(old, name)) for name in COUNTS if hasattr(old, name)), 0)
        if not count:
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, which is no experts module of transformers 5")
        gate = gate_of_experts(old, ctx.path)
        bias = hasattr(old, "gate_up_proj_bias") or hasattr(old, "down_proj_bias")
        new = cls(ctx.path, count, gate, bias)
        rows, columns = old.down_proj.shape[1:]
        new.hidden, new.width = (columns, rows) if getattr(old, "is_transposed", False) else (rows, columns)
        new.top = int(getattr(ctx.config, "num_experts_per_tok", 1) or 1)
        return new

    def tensors(self) -> list[str]:
        names = [f"{self.path}.{name}" for name in PROJECTIONS]
        return names + [f"{name}_bias" for name in names] if self.has_bias else names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        wide, narrow = (self.num_experts, self.width, self.hidden), (self.num_experts, self.hidden, self.width)
        return {f"{self.path}.{name}": narrow if name == "down_proj" else wide for name in PROJECTIONS}

    def load(self, source: WeightSource) -> None:
        for name in PROJECTIONS:
            full = f"{self.path}.{name}"
            (self.weights[name],) = kept(lambda full=full: [self._pack(source, full)])  # type: ignore[misc]
            source.release([full])
            if self.has_bias:
                self.biases[name] = source.get(f"{full}_bias").dequantize().contiguous()

    def _pack(self, source: WeightSource, full: str) -> cpu.Packed:
        parts = source.parts(full)
        if len({part.qtype.name for part in parts}) > 1:
            parts = [source.get(full)]
        return packed_as(parts, self.target, cpu.pack_experts)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        device = hidden.device
        if device.type != "cpu":
            start = time.perf_counter()
            hidden, ids, weights = hidden.to("cpu"), ids.to("cpu"), weights.to("cpu")
            self.waited += time.perf_counter() - start
        w, b = self.weights, self.biases
        out = cpu.experts(
            hidden.contiguous(),
            ids.to(torch.int64).contiguous(),
            weights.to(torch.float32).contiguous(),
            w["gate_proj"],
            w["up_proj"],
            w["down_proj"],
            b["gate_proj"],
            b["up_proj"],
            b["down_proj"],
            *self.gate,
            self.counts,
        )
        return out.to(device)

    def weight_bytes(self) -> tuple[int, int]:
        held = sum(w.nbytes for w in self.weights.values())
        return held, held * min(self.top, self.num_experts) // self.num_experts

    def extra_repr(self) -> str:
        types = "/".join(w.qtype.name for w in self.weights.values()) or "not loaded"
        return f"{self.num_experts} experts, {types}, {self.gate.act}"
