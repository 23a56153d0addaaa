"""RMSNorm in one call."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu, reference
from ktx.kernels.gradients import backward_only, recorded
from ktx.ops import contract
from ktx.ops.activation_probe import probe_copy, refused
from ktx.ops.base import Context, Operator, adopt, is_ours
from ktx.ops.change_counter import copied, in_f32


class RMSNorm(Operator):
    """x / rms(x) * weight (or 1 + weight for the families that store it so), in f32."""

    remade = ("converted",)
    reads = frozenset({"weight", "variance_epsilon", "eps"})

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> RMSNorm:
        name = next((name for name in ("variance_epsilon", "eps") if name in old.__dict__), "")
        eps = getattr(old, name) if name else None
        if eps is None or not isinstance(getattr(old, "weight", None), torch.Tensor):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, RMSNorm needs a weight and an epsilon")
        contract.parameters(old, ctx.path, contract.ONE)
        new: RMSNorm = adopt(cls, old, ctx)
        new.epsilon_name = name
        new.plus_one = _multiplies_by_one_more(old, float(eps), ctx.path)
        return new

    @property
    def epsilon(self) -> float:
        """As the attribute of the replaced module says, which scripts change."""
        return float(getattr(self, self.epsilon_name))

    @property
    def in_f32(self) -> torch.Tensor:
        """The weight f32 [D]."""
        return in_f32(self, self.weight)

    @staticmethod
    def is_cpu_norm(child: Any) -> TypeGuard[RMSNorm]:
        """Whether a child is one that the CPU's blocks can do the work of."""
        return is_ours(child, RMSNorm) and not child.placement.gpu

    def copied(self) -> torch.Tensor | None:
        """The weight, if `in_f32` is a copy of it."""
        return copied(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return reference.rms_norm(x, self.weight, self.epsilon, self.plus_one)
        backward_only(x)
        weight = self.weight.float() if recorded(self.weight) else self.in_f32
        return cpu.rms_norm(x.contiguous(), weight, self.epsilon, self.plus_one)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.epsilon}"


def _multiplies_by_one_more(old: Any, eps: float, where: str) -> bool:
    """Whether the module multiplies by 1 + weight, found by asking it; UsageError when it does neither that nor plain RMSNorm."""
    source = torch.Generator().manual_seed(1)
    x, weight = (
        torch.randn(*shape, old.weight.shape[-1], generator=source, dtype=torch.float32) for shape in ((3,), ())
    )
    probe = probe_copy(old, parameters={"weight": weight})
    try:
        with torch.no_grad(), torch.device("cpu"):
            answer = probe(x)
    except Exception as error:  # a family's own code, fed with numbers it may not expect
        raise refused(old, where, "its formula", error) from error
    for plus_one in (False, True):
        expected = reference.rms_norm(x, weight, eps, plus_one)
        if isinstance(answer, torch.Tensor) and torch.allclose(answer.float(), expected, rtol=1e-5, atol=1e-6):
            return plus_one
    raise UsageError(f"{where}: what {type(old).__name__} computes is no RMSNorm; leave it as it is")
