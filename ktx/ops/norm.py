"""RMSNorm as one kernel call."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu, reference
from ktx.kernels.gradients import is_recorded, refuse_forward_mode
from ktx.ops import contract
from ktx.ops.activation_probe import probe_copy, probe_error
from ktx.ops.base import Context, Operator, adopt, is_ktx_operator
from ktx.ops.change_counter import as_f32, if_copied


class RMSNorm(Operator):
    """x / rms(x) * weight, computed in f32; times 1 + weight for families that store the weight minus one."""

    remade = ("converted",)
    reads = frozenset({"weight", "variance_epsilon", "eps"})

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> RMSNorm:
        """Creates the operator that replaces an RMSNorm; its formula is probed, because classes named alike differ.

        Raises:
            UsageError: `old` has no weight or epsilon, or computes something else.
        """
        name = next((name for name in ("variance_epsilon", "eps") if name in old.__dict__), "")
        eps = getattr(old, name) if name else None
        if eps is None or not isinstance(getattr(old, "weight", None), torch.Tensor):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}: RMSNorm needs a weight and an epsilon")
        contract.check_arguments(old, ctx.path, contract.FEED_FORWARD_ARGS)
        new: RMSNorm = adopt(cls, old, ctx)
        new.epsilon_name = name
        new.plus_one = _adds_one_to_weight(old, float(eps), ctx.path)
        return new

    @property
    def epsilon(self) -> float:
        """The value of the attribute that the replaced module has for it, which scripts may change."""
        return float(getattr(self, self.epsilon_name))

    @property
    def in_f32(self) -> torch.Tensor:
        """The weight in f32 [hidden]."""
        return as_f32(self, self.weight)

    @staticmethod
    def is_cpu_norm(child: Any) -> TypeGuard[RMSNorm]:
        """Whether a child is an RMSNorm that the fused CPU steps can compute."""
        return is_ktx_operator(child, RMSNorm) and not child.placement.gpu

    def copied_weight(self) -> torch.Tensor | None:
        """Returns the weight if `in_f32` is a copy of it, else None."""
        return if_copied(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes x [..., D]."""
        if x.device.type != "cpu":
            return reference.rms_norm(x, self.weight, self.epsilon, self.plus_one)
        refuse_forward_mode(x)
        weight = self.weight.float() if is_recorded(self.weight) else self.in_f32
        return cpu.rms_norm(x.contiguous(), weight, self.epsilon, self.plus_one)

    def extra_repr(self) -> str:
        """Describes size and epsilon in the module's repr."""
        return f"{tuple(self.weight.shape)}, eps={self.epsilon}"


def _adds_one_to_weight(old: Any, eps: float, where: str) -> bool:
    """Whether the module multiplies by 1 + weight, detected by running it on random values.

    Raises:
        UsageError: It computes neither that nor plain RMSNorm, or its forward fails.
    """
    generator = torch.Generator().manual_seed(1)
    x, weight = (  # [3, D] and [D]
        torch.randn(*shape, old.weight.shape[-1], generator=generator, dtype=torch.float32) for shape in ((3,), ())
    )
    probe = probe_copy(old, parameters={"weight": weight})
    try:
        with torch.no_grad(), torch.device("cpu"):
            output = probe(x)
    except Exception as error:  # code of a model family, with inputs that it may not expect
        raise probe_error(old, where, "its formula", error) from error
    for plus_one in (False, True):
        expected = reference.rms_norm(x, weight, eps, plus_one)
        if isinstance(output, torch.Tensor) and torch.allclose(output.float(), expected, rtol=1e-5, atol=1e-6):
            return plus_one
    raise UsageError(f"{where}: {type(old).__name__} does not compute RMSNorm; leave the module as it is")
