"""A gated feed-forward layer in one kernel call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops import contract
from ktx.ops.activation_probe import PLAIN, as_usual, gate_of_mlp
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.fusion.fused import FusedStep, WeightDescriptor, plain_linear
from ktx.ops.guard import Guard, Inside, below, current, listened

PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Fused:
    """The three matrices of a layer, for the experts kernel with one expert."""

    act: str
    guard: Guard
    matrices: tuple[cpu.Packed, cpu.Packed, cpu.Packed]
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

    @classmethod
    def of(cls, owner: MLP) -> Fused | None:
        """None where a projection is no plain Linear, its rows lie in several tensors, or another activation was put there."""
        modules: dict[str, Any] = {name: child for name, child in owner._modules.items() if name in PROJECTIONS}
        if any(not plain_linear(child) or len(child.parts) != 1 for child in modules.values()):
            return None
        rows = {name: (child.parts[0], child.bias_in_f32) for name, child in modules.items()}
        copied = [child.copied_bias() for child in modules.values()]
        if "gate_up_proj" in rows:
            (both, bias), half = rows["gate_up_proj"], rows["gate_up_proj"][0].n // 2
            if half % cpu.GROUP_ROWS:
                return None  # rows are packed in groups, of which one is half gate and half up
            cut = both.nbytes // 2
            for i, name in enumerate(("gate_proj", "up_proj")):
                part = None if bias is None else bias[i * half : (i + 1) * half]
                rows[name] = cpu.Packed(both.data[i * cut : (i + 1) * cut], both.qtype, half, both.k), part
        (gate, a), (up, b), (down, c) = (rows[name] for name in ("gate_proj", "up_proj", "down_proj"))
        return cls(owner.act, Guard([owner], below(owner), copied), (gate, up, down), (a, b, c))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        only, one = (
            torch.zeros(flat.shape[0], 1, dtype=torch.int64, device="cpu"),
            torch.ones(flat.shape[0], 1, dtype=torch.float32, device="cpu"),
        )
        return cpu.experts(flat, only, one, *self.matrices, *self.biases, self.act).view(x.shape)


class MLPBlock:
    """A layer without biases as a step of several, see ktx.ops.fusion.layer."""

    drops = False

    def __init__(self, fused: Fused):
        self.guard, matrices = fused.guard, WeightDescriptor()
        for weights in fused.matrices:
            matrices.experts(weights)
        matrices.projection([])  # no gate of its own
        sizes = [matrices.hidden, 0, 0, fused.matrices[0].n]  # no experts
        router = None, None, 1, "softmax", "none", 1, 1, False, 1.0
        self.made = FusedStep(
            "moe_step", matrices.packed, matrices.descriptor, sizes, *router, fused.act, 0.0, 0.0, None
        )

    @classmethod
    def of(cls, owner: MLP) -> MLPBlock | None:
        fused = Fused.of(owner)
        return None if fused is None or any(bias is not None for bias in fused.biases) else cls(fused)


class MLP(Operator):
    """down(act(gate(x)) * up(x)), also with gate and up in one matrix (phi3). The projections stay modules of their own.

    Where somebody listens to one of its children, or has exchanged one, they are called one by one as transformers does, the activation too. A listener changes no bit of the result.
    """

    remade = ("inside", "fused", "block")
    inside: Inside | None
    fused: Fused | None
    block: MLPBlock | None

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> MLP:
        if not hasattr(old, "down_proj") or not (hasattr(old, "gate_proj") or hasattr(old, "gate_up_proj")):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, MLP needs gate_proj and up_proj (or gate_up_proj), and down_proj"
            )
        contract.parameters(old, ctx.path, contract.ONE)
        new: MLP = adopt(cls, old, ctx)
        new.act, new.inside, new.fused, new.block = gate_of_mlp(old, ctx.path).act, None, None, None
        if new.act not in PLAIN:
            raise UsageError(f"{ctx.path}: {type(old).__name__} clamps its gate, which only the experts kernel does")
        return new

    def ready(self) -> None:
        self.inside, self.fused, self.block = Inside.of(self), Fused.of(self), MLPBlock.of(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (fused := current(self, "fused")) is not None:
            return fused(x)
        return self.by_children(x) if listened(self) else self.computed(x)

    def by_children(self, x: torch.Tensor) -> torch.Tensor:
        """The same with every child called as a module."""
        others = [child for name, child in self._modules.items() if name not in PROJECTIONS]
        if len(others) != 1:
            found: torch.Tensor = super().forward(x)
            return found
        (activation,) = others
        if hasattr(self, "gate_up_proj"):
            gate, up = (half.contiguous() for half in self.gate_up_proj(x).chunk(2, -1))
            seen = activation(gate)  # type: ignore[misc]
        else:
            gate = self.gate_proj(x)
            seen, up = activation(gate), self.up_proj(x)  # type: ignore[misc]
        return self.down_proj(cpu.gated(gate, up, self.act) if as_usual(seen, gate, self.act) else seen * up)

    def computed(self, x: torch.Tensor) -> torch.Tensor:
        """The same child by child, while nobody listens to one."""
        if hasattr(self, "gate_up_proj"):
            gate, up = (half.contiguous() for half in self.gate_up_proj(x).chunk(2, -1))
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(cpu.gated(gate, up, self.act))
