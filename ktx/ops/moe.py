"""The whole mixture-of-experts block: router, experts, shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktx.errors import UsageError
from ktx.kernels.gradients import recorded
from ktx.ops import contract
from ktx.ops.base import Context, Operator, adopt, is_ours
from ktx.ops.experts import Experts
from ktx.ops.fusion.fused import MAX_FUSED_TOKENS, NO_NORM, FusedStep, PreNorm, WeightDescriptor, plain_linear
from ktx.ops.guard import Guard, Inside, below, current, listened
from ktx.ops.mlp import MLP, Fused
from ktx.ops.router import Router

if TYPE_CHECKING:
    from ktx.ops.expert_deferral import DeferredExperts

RETURNS_ROUTER = ("GptOssMLP",)  # blocks that return (hidden states, router scores)


class MoE(Operator):
    """One forward for every family's block: it looks for gate or router, experts, shared_expert(s) and shared_expert_gate.

    Where somebody listens to a module inside, or has exchanged one, it is transformers' own forward that calls them, in its order and with its shapes.
    """

    remade = ("inside", "block")
    derived = frozenset({"link"})
    inside: Inside | None
    reads = frozenset({"e_score_correction_bias"})
    block: MoEBlock | None
    link: DeferredExperts | None = None  # where the layer puts experts off, see ktx.ops.expert_deferral

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> MoE:
        if not hasattr(old, "experts") or not (hasattr(old, "gate") or hasattr(old, "router")):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, MoE needs experts and a gate or router")
        new: MoE = adopt(cls, old, ctx)
        new.returns_router = type(old).__name__ in RETURNS_ROUTER
        new.inside = new.block = None
        if cls is MoE:
            contract.moe(old, ctx.path, new)
        return new

    def ready(self) -> None:
        self.inside = Inside.of(self)
        self.block = None if self.returns_router or self.link is not None else MoEBlock.of(self)

    def listened(self) -> bool:
        """Whether a module inside is listened to or exchanged, and transformers' own forward can compute with what is there; experts that are put off it cannot."""
        return self.link is None and listened(self)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and getattr(self, "jitter_noise", 0.0) > 0:
            if self.link is not None:
                raise UsageError(
                    f"{self.path}: router_jitter_noise is {self.jitter_noise}, and experts that are put off get none of it: call model.eval(), or load the model without defer_experts"
                )
            return super().forward(hidden_states, *args, **kwargs)  # which adds it
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        if not torch.compiler.is_compiling() and takes(flat) and (block := current(self)) is not None:
            return block(flat).view(shape)
        if self.listened():
            return super().forward(hidden_states, *args, **kwargs)
        router = self.gate if hasattr(self, "gate") else self.router
        bias = getattr(self, "e_score_correction_bias", None)
        _, weights, ids = router(flat) if bias is None else router(flat, bias)
        out = self.mixed(flat, ids, weights).reshape(shape)
        return (out, weights) if self.returns_router else out

    def by_class(self, *args: Any, **kwargs: Any) -> Any:
        if self.link is not None:
            raise UsageError(
                f"{self.path}: a method was put on a class of MoE blocks, which are not called where experts are put off; load the model without defer_experts"
            )
        return super().by_class(*args, **kwargs)

    def mixed(self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the chosen experts and the shared ones make of flat [tokens, D]."""
        if self.link is not None:
            return self.link.mixed(self, flat, ids, weights)
        under_way, extra = self.begin(flat, ids, weights), self.shared(flat)
        out = self.end(under_way)
        return out if extra is None else out + extra

    def begin(self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        """Sets the chosen experts to work; `end` gives what they make, [tokens, D]. Here they are done at once."""
        return self.experts(flat, ids, weights)

    def end(self, under_way: Any) -> torch.Tensor:
        """What `begin` began."""
        made: torch.Tensor = under_way
        return made

    def shared(self, flat: torch.Tensor) -> torch.Tensor | None:
        """The part of the experts that every token passes, by its gate if it has one."""
        shared = getattr(self, "shared_experts", None) or getattr(self, "shared_expert", None)
        if shared is None:
            return None
        extra, gate = shared(flat), getattr(self, "shared_expert_gate", None)
        return extra if gate is None else torch.sigmoid(gate(flat).double()).to(extra.dtype) * extra  # as the block's


def takes(flat: torch.Tensor) -> bool:
    """Whether one call computes tokens f32 [tokens, D] of the CPU's: so few that the way to it counts."""
    return (
        flat.shape[0] <= MAX_FUSED_TOKENS
        and flat.dtype is torch.float32
        and flat.device.type == "cpu"
        and not recorded(flat)
    )


class MoEBlock:
    """Router, experts and shared experts in one kernel call."""

    def __init__(self, owner: MoE, router: Router, experts: Experts, width: int, matrices: WeightDescriptor):
        bias = getattr(owner, "e_score_correction_bias", None)
        self.guard = Guard([owner], below(owner), [*router.copied(), bias])
        self.drops = getattr(owner, "jitter_noise", 0.0) > 0
        self.made = FusedStep(
            "moe_step",
            matrices.packed,
            matrices.descriptor,
            [matrices.hidden, experts.num_experts, experts.width, width],
            router.in_f32,
            router.correction(bias),
            *router.route_args(),
            *experts.gate,
            experts.counts,
        )

    @classmethod
    def of(cls, owner: MoE) -> MoEBlock | None:
        """None where a part is something else than ours, or the shared experts are not one plain layer."""
        children: dict[str, Any] = owner._modules
        router: Any = children.get("gate") or children.get("router")
        experts = children["experts"]
        if (
            not is_ours(router, Router)
            or router.placement.gpu
            or not is_ours(experts, Experts)
            or any(b is not None for b in experts.biases.values())
        ):
            return None
        matrices = WeightDescriptor()
        matrices.projection([router.matrix()])
        for weights in experts.weights.values():
            matrices.experts(weights)
        shared, gate, width = (
            children.get("shared_experts") or children.get("shared_expert"),
            children.get("shared_expert_gate"),
            0,
        )
        if shared is not None:
            fused = Fused.of(shared) if is_ours(shared, MLP) else None
            if fused is None or shared.act != experts.gate.act or any(b is not None for b in fused.biases):
                return None
            if gate is not None and not (plain_linear(gate) and gate.bias is None):
                return None
            for weights in fused.matrices:
                matrices.experts(weights)
            matrices.projection([] if gate is None else gate.parts)
            width = fused.matrices[0].n
        return cls(owner, router, experts, width, matrices)

    def __call__(self, flat: torch.Tensor, before: PreNorm = NO_NORM) -> torch.Tensor:
        """flat f32 [tokens, D] -> [tokens, D]; with `before` plus flat itself."""
        return self.made(flat[None], before)[0]
