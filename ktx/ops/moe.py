"""The complete MoE block: router, routed experts, shared experts.

Shapes: D columns of hidden states, K selected experts per token.
"""

from __future__ import annotations

from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels.gradients import is_recorded
from ktx.ops import contract
from ktx.ops.base import Context, Operator, adopt, is_ktx_operator
from ktx.ops.experts import Experts
from ktx.ops.fusion.fused import MAX_FUSED_TOKENS, NO_NORM, FusedStep, PreNorm, WeightDescriptor, is_plain_linear
from ktx.ops.guard import ChildrenGuard, Guard, children_observed, descendants, valid_fast_path
from ktx.ops.mlp import MLP, FusedMLP
from ktx.ops.protocols import ExpertDeferral
from ktx.ops.router import Router

RETURNS_ROUTER = ("GptOssMLP",)  # classes of blocks that return (hidden states, router scores)


class MoE(Operator):
    """One forward for the MoE blocks of all families.

    It uses the children gate or router, experts, shared_expert(s) and shared_expert_gate. If a module inside has a hook
    or was replaced, transformers' forward runs instead and calls the modules in its order and with its shapes.
    """

    remade = ("inside", "block")
    derived = frozenset({"deferral"})
    inside: ChildrenGuard | None
    reads = frozenset({"e_score_correction_bias"})
    block: MoEBlock | None
    deferral: ExpertDeferral | None = None  # set where the layer defers experts, see ktx.ops.expert_deferral

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> MoE:
        """Creates the operator that replaces a transformers MoE block, and keeps its children.

        Raises:
            UsageError: `old` has no experts, or neither gate nor router.
        """
        if not hasattr(old, "experts") or not (hasattr(old, "gate") or hasattr(old, "router")):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, MoE needs experts and a gate or router")
        new: MoE = adopt(cls, old, ctx)
        new.returns_router = type(old).__name__ in RETURNS_ROUTER
        new.inside = new.block = None
        if cls is MoE:
            contract.check_moe(old, ctx.path, new)
        return new

    def ready(self) -> None:
        """Builds the guard of the children, and the fused step if this block can be one."""
        self.inside = ChildrenGuard.of(self)
        self.block = None if self.returns_router or self.deferral is not None else MoEBlock.of(self)

    def children_observed(self) -> bool:
        """Whether a module inside has a hook or was replaced and transformers' forward can run.

        It cannot run with deferred experts.
        """
        return self.deferral is None and children_observed(self)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes hidden_states [..., D] -> [..., D]; for classes in RETURNS_ROUTER also the routing weights.

        Small batches use the fused step; router noise in training and observed children need transformers' forward.
        """
        if self.training and getattr(self, "jitter_noise", 0.0) > 0:
            if self.deferral is not None:
                raise UsageError(
                    f"{self.path}: router_jitter_noise is {self.jitter_noise}, which deferred experts do not support:"
                    " call model.eval(), or load the model without defer_experts"
                )
            return super().forward(hidden_states, *args, **kwargs)  # which adds the noise
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        if not torch.compiler.is_compiling() and is_fusable(flat) and (block := valid_fast_path(self)) is not None:
            return block(flat).view(shape)
        if self.children_observed():
            return super().forward(hidden_states, *args, **kwargs)
        router = self.gate if hasattr(self, "gate") else self.router
        bias = getattr(self, "e_score_correction_bias", None)
        _, weights, ids = router(flat) if bias is None else router(flat, bias)
        out = self.routed_and_shared(flat, ids, weights).reshape(shape)
        return (out, weights) if self.returns_router else out

    def call_patched_class(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the replaced class; UsageError with deferred experts, which it does not support."""
        if self.deferral is not None:
            raise UsageError(
                f"{self.path}: a method of a class of MoE blocks was patched, which deferred experts do not call;"
                " load the model without defer_experts"
            )
        return super().call_patched_class(*args, **kwargs)

    def routed_and_shared(self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Computes routed and shared experts: flat [tokens, D], ids and weights [tokens, K] -> [tokens, D]."""
        if self.deferral is not None:
            return self.deferral.routed_and_shared(self, flat, ids, weights)
        started, shared_out = self.start_experts(flat, ids, weights), self.shared_output(flat)
        out = self.finish_experts(started)
        return out if shared_out is None else out + shared_out

    def start_experts(self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        """Starts the routed experts, whose output `finish_experts` returns. On the CPU they run synchronously."""
        return self.experts(flat, ids, weights)

    def finish_experts(self, started: Any) -> torch.Tensor:
        """Waits for the experts that `start_experts` started and returns their output [tokens, D]."""
        out: torch.Tensor = started
        return out

    def shared_output(self, flat: torch.Tensor) -> torch.Tensor | None:
        """Computes the shared experts of flat [tokens, D], scaled by their gate if there is one; None without any."""
        shared = getattr(self, "shared_experts", None) or getattr(self, "shared_expert", None)
        if shared is None:
            return None
        out, gate = shared(flat), getattr(self, "shared_expert_gate", None)
        # The sigmoid is in f64, as in MoEBlock's kernel, so that both give the same result.
        return out if gate is None else torch.sigmoid(gate(flat).double()).to(out.dtype) * out


def is_fusable(flat: torch.Tensor) -> bool:
    """Whether the fused step takes flat [tokens, D]: f32 on the CPU, no gradient, few tokens (overhead counts)."""
    return (
        flat.shape[0] <= MAX_FUSED_TOKENS
        and flat.dtype is torch.float32
        and flat.device.type == "cpu"
        and not is_recorded(flat)
    )


class MoEBlock:
    """Router, routed experts and shared experts in one kernel call, for small batches, where call overhead counts."""

    def __init__(self, owner: MoE, router: Router, experts: Experts, shared_width: int, matrices: WeightDescriptor):
        """Builds the kernel step of the MoE block, and the guard of all modules that the step bypasses.

        Args:
            owner: the MoE operator.
            router: its router.
            experts: its experts.
            shared_width: columns between the projections of the shared experts; 0 without any.
            matrices: all weights, in the kernel's order: router, routed experts, shared experts, their gate.
        """
        bias = getattr(owner, "e_score_correction_bias", None)
        self.guard = Guard([owner], descendants(owner), [*router.copied_tensors(), bias])
        self.has_dropout = getattr(owner, "jitter_noise", 0.0) > 0
        self.fused_step = FusedStep(
            "moe_step",
            matrices.packed,
            matrices.descriptor,
            [matrices.hidden, experts.num_experts, experts.intermediate_size, shared_width],
            router.in_f32,
            router.correction(bias),
            *router.route_args(),
            *experts.gate,
            experts.counts,
        )

    @classmethod
    def of(cls, owner: MoE) -> MoEBlock | None:
        """Builds the step; None where its kernel does not support a child.

        The kernel needs operators of ktx without biases, and shared experts that are one layer with the same activation
        as the routed experts.
        """
        children: dict[str, Any] = owner._modules
        router: Any = children.get("gate") or children.get("router")
        experts = children["experts"]
        if (
            not is_ktx_operator(router, Router)
            or router.placement.gpu
            or not is_ktx_operator(experts, Experts)
            or any(b is not None for b in experts.biases.values())
        ):
            return None
        matrices = WeightDescriptor()
        matrices.projection([router.packed_weight()])
        for weights in experts.weights.values():
            matrices.experts(weights)
        shared, shared_gate, shared_width = (
            children.get("shared_experts") or children.get("shared_expert"),
            children.get("shared_expert_gate"),
            0,
        )
        if shared is not None:
            fused = FusedMLP.of(shared) if is_ktx_operator(shared, MLP) else None
            if fused is None or shared.act != experts.gate.act or any(b is not None for b in fused.biases):
                return None
            if shared_gate is not None and not (is_plain_linear(shared_gate) and shared_gate.bias is None):
                return None
            for weights in fused.matrices:
                matrices.experts(weights)
            matrices.projection([] if shared_gate is None else shared_gate.parts)
            shared_width = fused.matrices[0].n
        return cls(owner, router, experts, shared_width, matrices)

    def __call__(self, flat: torch.Tensor, before: PreNorm = NO_NORM) -> torch.Tensor:
        """Computes flat f32 [tokens, D] -> [tokens, D]; `before` normalizes the input and adds flat to the output."""
        return self.fused_step(flat[None], before)[0]
