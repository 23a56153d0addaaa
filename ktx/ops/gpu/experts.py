"""All experts of a layer on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ktx.kernels import gpu_linear, moe
from ktx.ops import experts
from ktx.ops.base import packed_as
from ktx.ops.experts import PROJECTIONS
from ktx.weights.source import WeightSource


class Experts(experts.Experts):
    """As on the CPU, with the weights on the device. What experts do there is not counted: nothing waits for the device."""

    weights: dict[str, Any]

    def load(self, source: WeightSource) -> None:
        for name in PROJECTIONS:
            full = f"{self.path}.{name}"
            self.weights[name] = self._pack(source, full)
            source.release([full])
            if self.has_bias:
                self.biases[name] = source.get(f"{full}_bias").dequantize().contiguous().to(self.home.torch)

    def _pack(self, source: WeightSource, full: str) -> Any:
        parts = source.parts(full)
        if len({part.qtype.name for part in parts}) > 1:
            parts = [source.get(full)]
        return packed_as(parts, self.target, partial(gpu_linear.pack_experts, device=self.home.torch))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.weights[name] for name in PROJECTIONS)
        gate_bias, up_bias, down_bias = (self.biases[name] for name in PROJECTIONS)
        ids, weights = ids.to(torch.int64), weights.to(torch.float32)
        act, alpha, limit = self.gate
        return moe.experts(hidden, ids, weights, gate, up, down, gate_bias, up_bias, down_bias, act, alpha, limit)
