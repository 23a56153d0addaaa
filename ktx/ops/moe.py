"""The whole mixture-of-experts block: router, experts, shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktx.errors import UsageError
from ktx.kernels.gradients import recorded
from ktx.ops import contract
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.experts import Experts
from ktx.ops.fused import MOST, NOTHING, Before, Made, Matrices, Watch, plain_linear
from ktx.ops.mlp import MLP
from ktx.ops.router import Router

if TYPE_CHECKING:
    from ktx.ops.deferral import Link

PARTS = ("gate", "router", "experts", "shared_experts", "shared_expert", "shared_expert_gate")
RETURNS_ROUTER = ("GptOssMLP",)  # blocks that return (hidden states, router scores)


class MoE(Operator):
    """One forward for every family's block: it looks for gate or router, experts, shared_expert(s) and shared_expert_gate."""

    block: Block | None
    link: Link | None = None  # where the layer puts experts off, see ktx.ops.deferral

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> MoE:
        if not hasattr(old, "experts") or not (hasattr(old, "gate") or hasattr(old, "router")):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}, MoE needs experts and a gate or router")
        new: MoE = adopt(cls, old, ctx)
        new.returns_router = type(old).__name__ in RETURNS_ROUTER
        new.block = None
        if cls is MoE:
            contract.moe(old, ctx.path, new)
        return new

    def ready(self) -> None:
        self.block = None if self.returns_router or self.link is not None else Block.of(self)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and getattr(self, "jitter_noise", 0.0) > 0:
            raise UsageError(
                f"{self.path}: router_jitter_noise is {self.jitter_noise}, and training would add noise: call model.eval(), or set it to 0"
            )
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        if self.block is not None and self.block.takes(flat):
            return self.block(flat).view(shape)
        router = self.gate if hasattr(self, "gate") else self.router
        bias = getattr(self, "e_score_correction_bias", None)
        _, weights, ids = router(flat) if bias is None else router(flat, bias)
        out = self.mixed(flat, ids, weights).reshape(shape)
        return (out, weights) if self.returns_router else out

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


class Block:
    """Router, experts and shared experts in one kernel call."""

    def __init__(
        self, router: Router, experts: Experts, width: int, watch: Watch, matrices: Matrices, bias: torch.Tensor | None
    ):
        self.watch = watch
        self.made = Made(
            "moe_step",
            matrices.packed,
            matrices.about,
            [matrices.hidden, experts.num_experts, experts.width, width],
            router.in_f32,
            router.correction(bias),
            *router.manner(),
            *experts.gate,
            experts.counts,
        )

    @classmethod
    def of(cls, owner: MoE) -> Block | None:
        """None where a part is something else than ours, or the shared experts are not one plain layer."""
        children = owner._modules
        router, experts = children.get("gate") or children.get("router"), children["experts"]
        if (
            not isinstance(router, Router)
            or router.home.gpu
            or type(experts) is not Experts
            or any(b is not None for b in experts.biases.values())
        ):
            return None
        matrices = Matrices()
        assert router.packed is not None  # it was made ready before
        matrices.projection([router.packed])
        for weights in experts.weights.values():
            matrices.experts(weights)
        watched: list[tuple[torch.nn.Module, str]] = [(owner, name) for name in PARTS]
        shared, gate, width = (
            children.get("shared_experts") or children.get("shared_expert"),
            children.get("shared_expert_gate"),
            0,
        )
        if shared is not None:
            fused = shared.fused if isinstance(shared, MLP) else None
            if fused is None or shared.act != experts.gate.act or any(b is not None for b in fused.biases):
                return None
            if gate is not None and not (plain_linear(gate) and gate.bias is None):
                return None
            for weights in fused.matrices:
                matrices.experts(weights)
            matrices.projection([] if gate is None else gate.parts)
            width = fused.matrices[0].n
            watched += [(shared, name) for name in shared._modules]
        bias = getattr(owner, "e_score_correction_bias", None)
        return cls(router, experts, width, Watch(watched), matrices, bias)

    def takes(self, flat: torch.Tensor) -> bool:
        plain = flat.dtype is torch.float32 and flat.device.type == "cpu" and not recorded(flat)
        return len(flat) <= MOST and plain and self.watch.holds()

    def __call__(self, flat: torch.Tensor, before: Before = NOTHING) -> torch.Tensor:
        """flat f32 [tokens, D] -> [tokens, D]; with `before` plus flat itself."""
        return self.made(flat[None], before)[0]
