"""RMSNorm on a GPU."""

from __future__ import annotations

import torch

from ktx.kernels.gpu import norm as gpu_norm
from ktx.kernels.gradients import refuse_gpu_gradient
from ktx.ops import norm


class RMSNorm(norm.RMSNorm):
    """GPU version of ktx.ops.norm.RMSNorm, one launch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes x [..., D] with the Triton kernel."""
        refuse_gpu_gradient("RMSNorm", self.weight)
        return gpu_norm.rms_norm(x, self.in_f32, self.epsilon, self.plus_one)
