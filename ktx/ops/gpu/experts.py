"""All experts of a layer on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels.gpu import linear, moe
from ktx.kernels.gpu.soa_layout import SoAWeight
from ktx.ops import experts
from ktx.ops.activation_probe import Activation
from ktx.ops.base import pack_as
from ktx.ops.experts import PROJECTIONS
from ktx.weights.base import WeightSource


class Experts(experts.Experts):
    """GPU version of ktx.ops.experts.Experts, with the weights on the device."""

    weights: dict[str, Any]

    def load(self, source: WeightSource) -> None:
        """Reads and packs the projections on the device one by one, and releases each in the source."""
        for name in self.projections if self.num_experts else ():
            path = f"{self.path}.{name}"
            self.weights[name] = self._pack(source, path)
            source.release([path])
            if self.has_bias:
                self.biases[name] = self._read_bias(source, path).to(self.placement.torch)
        self._share_up_as_gate()

    def _pack(self, source: WeightSource, path: str) -> Any:
        pack = partial(linear.pack_experts, device=self.placement.torch)
        return pack_as(self._select(source.get_parts(path)), self.quant_target, pack)

    def ready(self) -> None:
        """Allocates the counters of chosen experts on the GPU."""
        self.gpu_counts = torch.zeros(self.total_experts, dtype=torch.int64, device=self.placement.torch)

    def dequantized_matrix(self, name: str, expert: int | None) -> torch.Tensor:
        """Raises UsageError: experts on a GPU cannot be edited."""
        raise UsageError(f"{self.path}: experts on a GPU cannot be edited; load the model with moe_device='cpu'")

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Computes hidden [T, D] with ids and weights [T, K], all on the device; returns [T, D]."""
        self.check_class()
        ids, weights = ids.to(torch.int64), weights.to(torch.float32)
        matrices = [self.weights[name] for name in PROJECTIONS]
        biases = [self.biases[name] for name in PROJECTIONS]
        return run_experts(self.gate, (hidden, ids, weights), matrices, biases, self.first_expert, self.gpu_counts)


def run_experts(
    gate: Activation,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    matrices: Sequence[SoAWeight],
    biases: Sequence[torch.Tensor | None],
    first: int,
    token_counts: torch.Tensor | None,
) -> torch.Tensor:
    """Runs the fused experts kernel of the GPU, on experts that are there or were streamed there.

    Args:
        gate: the activation between the projections.
        inputs: hidden states [tokens, D], expert ids int64 [tokens, K] and routing weights f32 [tokens, K].
        matrices: packed weights of gate, up and down projection.
        biases: their biases, or None.
        first: id of the expert at index 0 of the matrices; tokens of other experts are skipped.
        token_counts: int64 counts of tokens per expert of the layer, incremented by the kernel; None: not counted.

    Returns:
        [tokens, D].
    """
    (w_gate, w_up, w_down), (b_gate, b_up, b_down) = matrices, biases
    return moe.experts(*inputs, w_gate, w_up, w_down, b_gate, b_up, b_down, *gate, first, token_counts)
