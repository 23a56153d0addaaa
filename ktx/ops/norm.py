"""RMSNorm in one call."""

from __future__ import annotations

from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops.base import Context, Operator, adopt

PLUS_ONE = ("Qwen3NextRMSNorm", "Gemma")  # classes that multiply by 1 + weight


class RMSNorm(Operator):
    """x / rms(x) * weight (or 1 + weight for the families that store it so), in f32."""

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> RMSNorm:
        eps = getattr(old, "variance_epsilon", getattr(old, "eps", None))
        if eps is None or not isinstance(getattr(old, "weight", None), torch.Tensor):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, RMSNorm needs a weight and an epsilon")
        new: RMSNorm = adopt(cls, old, ctx)
        new.variance_epsilon = float(eps)
        new.plus_one = type(old).__name__.startswith(PLUS_ONE)
        new.in_f32 = None
        return new

    def ready(self) -> None:
        self.in_f32 = self.weight.detach().float().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            from ktx.kernels import reference

            return reference.rms_norm(x, self.weight, self.variance_epsilon, self.plus_one)
        return cpu.rms_norm(x.contiguous(), self.in_f32, self.variance_epsilon, self.plus_one)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
