"""Gated feed-forward layers as one kernel call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops import contract
from ktx.ops.activation_probe import ACTIVATIONS, Activation, is_unmodified, probe_mlp
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.fusion.fused import FusedStep, WeightDescriptor, is_plain_linear
from ktx.ops.guard import ChildrenGuard, Guard, children_observed, descendants, valid_fast_path

PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FusedMLP:
    """The three matrices of a feed-forward layer, for the experts kernel with a single expert.

    Attributes:
        act: The activation.
        guard: The validity check of this fast path.
        matrices: gate, up and down.
        biases: The biases f32 of gate, up and down, or None.
    """

    act: str
    guard: Guard
    matrices: tuple[cpu.Packed, cpu.Packed, cpu.Packed]
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

    @classmethod
    def of(cls, owner: MLP) -> FusedMLP | None:
        """Builds the fused layer of `owner`, splitting a joint gate_up_proj into two matrices that share its memory.

        None if a projection is not a plain Linear or has several parts, or if the split is inside a group of rows.
        """
        modules: dict[str, Any] = {name: child for name, child in owner._modules.items() if name in PROJECTIONS}
        if any(not is_plain_linear(child) or len(child.parts) != 1 for child in modules.values()):
            return None
        projections = {name: (child.parts[0], child.bias_in_f32) for name, child in modules.items()}
        copied_biases = [child.copied_bias() for child in modules.values()]
        if "gate_up_proj" in projections:
            (packed, bias), half_rows = projections["gate_up_proj"], projections["gate_up_proj"][0].n // 2
            if half_rows % cpu.GROUP_ROWS:
                return None  # because one packed group of rows would be half gate and half up
            half_bytes = packed.nbytes // 2
            for i, name in enumerate(("gate_proj", "up_proj")):
                half_bias = None if bias is None else bias[i * half_rows : (i + 1) * half_rows]
                projections[name] = (
                    cpu.Packed(packed.data[i * half_bytes : (i + 1) * half_bytes], packed.qtype, half_rows, packed.k),
                    half_bias,
                )
        (gate, gate_bias), (up, up_bias), (down, down_bias) = (
            projections[name] for name in ("gate_proj", "up_proj", "down_proj")
        )
        return cls(
            owner.act,
            Guard([owner], descendants(owner), copied_biases),
            (gate, up, down),
            (gate_bias, up_bias, down_bias),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x [..., D] -> [..., D]."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        # Every token selects the only expert, id 0, with weight 1.
        expert_ids, expert_weights = (
            torch.zeros(flat.shape[0], 1, dtype=torch.int64, device="cpu"),
            torch.ones(flat.shape[0], 1, dtype=torch.float32, device="cpu"),
        )
        return cpu.experts(flat, expert_ids, expert_weights, *self.matrices, *self.biases, self.act).view(x.shape)


class MLPBlock:
    """A feed-forward layer without biases as a fused step of a decoder layer, see ktx.ops.fusion.layer.

    The step is that of an MoE block with shared experts only, because such a step has the norm and the residual too.
    """

    has_dropout = False

    def __init__(self, fused: FusedMLP):
        """Builds the kernel step from the matrices of `fused`."""
        self.guard, matrices = fused.guard, WeightDescriptor()
        for weights in fused.matrices:
            matrices.experts(weights)
        matrices.projection([])  # no shared_expert_gate
        num_experts, expert_width = 0, 0  # no routed experts; the layer takes the place of the shared ones
        sizes = [matrices.hidden, num_experts, expert_width, fused.matrices[0].n]
        biases = None, None  # of the logits and of the expert selection
        # The arguments of Router.route_args; without routed experts they have no effect.
        top_k, num_groups, topk_groups = 1, 1, 1
        route_args = top_k, "softmax", "none", num_groups, topk_groups, False, 1.0
        self.fused_step = FusedStep(
            "moe_step",
            matrices.packed,
            matrices.descriptor,
            sizes,
            *biases,
            *route_args,
            *Activation(fused.act),
            None,  # no expert statistics
        )

    @classmethod
    def of(cls, owner: MLP) -> MLPBlock | None:
        """Builds the block of `owner`; None if FusedMLP does not support it, or a projection has a bias."""
        fused = FusedMLP.of(owner)
        return None if fused is None or any(bias is not None for bias in fused.biases) else cls(fused)


class MLP(Operator):
    """down(act(gate(x)) * up(x)), also with gate and up in one matrix (phi3). The projections remain modules.

    If a child has a hook or was replaced, the children are called one by one as in transformers, including the
    activation. A hook that does not modify anything leaves the result bit for bit the same.

    Attributes:
        inside: The guard of the children.
        fused: The whole layer as one kernel call, if that is supported.
        block: The layer as a fused step of a decoder layer, if that is supported.
    """

    remade = ("inside", "fused", "block")
    inside: ChildrenGuard | None
    fused: FusedMLP | None
    block: MLPBlock | None

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> MLP:
        """Creates the operator that replaces a gated feed-forward layer, and keeps its projections as children.

        Raises:
            UsageError: `old` lacks a projection, its forward has other arguments, or no kernel computes its activation.
        """
        if not hasattr(old, "down_proj") or not (hasattr(old, "gate_proj") or hasattr(old, "gate_up_proj")):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}: MLP needs gate_proj and up_proj (or gate_up_proj), and"
                " down_proj"
            )
        contract.check_arguments(old, ctx.path, contract.FEED_FORWARD_ARGS)
        new: MLP = adopt(cls, old, ctx)
        new.act, new.inside, new.fused, new.block = probe_mlp(old, ctx.path).act, None, None, None
        if new.act not in ACTIVATIONS:
            raise UsageError(
                f"{ctx.path}: {type(old).__name__} clamps its gate, which only the experts kernel supports"
            )
        return new

    def ready(self) -> None:
        """Builds the guard of the children and the fused steps, if this MLP can be one."""
        self.inside, self.fused, self.block = ChildrenGuard.of(self), FusedMLP.of(self), MLPBlock.of(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x [..., D] -> [..., D] in the fused call, or child by child if one of them is observed."""
        if (fused := valid_fast_path(self, "fused")) is not None:
            return fused(x)
        return self.call_children(x) if children_observed(self) else self.compute(x)

    def call_children(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the layer by calling every child as a module, including the activation, so that all hooks run.

        If the activation module returned exactly act(gate), a kernel computes act(gate) * up, so that a hook that only
        reads changes no bit of the result.
        """
        activations = [child for name, child in self._modules.items() if name not in PROJECTIONS]
        # another child than one activation module (none, or several): transformers' forward, which calls all of them
        if len(activations) != 1:
            result: torch.Tensor = super().forward(x)
            return result
        (activation,) = activations
        if hasattr(self, "gate_up_proj"):
            gate, up = (half.contiguous() for half in self.gate_up_proj(x).chunk(2, -1))
            activated = activation(gate)  # type: ignore[misc]
        else:
            gate = self.gate_proj(x)
            activated, up = activation(gate), self.up_proj(x)  # type: ignore[misc]
        return self.down_proj(
            cpu.gated(gate, up, self.act) if is_unmodified(activated, gate, self.act) else activated * up
        )

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the layer by calling the projections, with the activation as a kernel."""
        if hasattr(self, "gate_up_proj"):
            gate, up = (half.contiguous() for half in self.gate_up_proj(x).chunk(2, -1))
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(cpu.gated(gate, up, self.act))
