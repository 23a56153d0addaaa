"""The router of an MoE layer: a matrix product in f32, then one kernel that selects the top-k experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ktx.families import ROUTERS
from ktx.families.family import RoutingSpec
from ktx.kernels import cpu
from ktx.kernels.gradients import is_recorded
from ktx.ops import contract
from ktx.ops.base import Context, Operator, adopt, known_class
from ktx.ops.change_counter import edits
from ktx.ops.guard import ChildrenGuard, children_observed
from ktx.weights.base import QuantizedTensor


class Router(Operator):
    """Replaces the routers in ROUTERS, with the same parameters and the same return value (logits, weights, ids).

    Attributes:
        packed: The packed weight.
        inside: The guard of the router's children, if it has any (ERNIE).
        version: Identifies the weight values that were packed: object, address and number of edits.
    """

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Router:
        """Creates the operator that replaces a router; ROUTERS states how its class scores, groups and normalizes.

        Raises:
            UsageError: The class is unknown, or the module computes otherwise than ROUTERS states.
        """
        name = known_class(old, ROUTERS, ctx, "the router {} is not supported")
        new: Router = adopt(cls, old, ctx)
        new.style = ROUTERS[name]
        if name == "DeepseekV2TopkRouter" and old.topk_method == "greedy":  # without groups of experts
            new.style = RoutingSpec("softmax", scaled=True)
        new.packed, new.version, new.inside = None, (), None
        if cls is Router:
            contract.check_router(old, ctx.path, new)
        return new

    remade = ("packed", "version", "inside")
    reads = frozenset(
        {"weight", "bias", "e_score_correction_bias", "top_k", "num_group", "topk_group", "routed_scaling_factor"}
        | {style.renorm for style in ROUTERS.values() if isinstance(style.renorm, str)}
    )
    packed: cpu.Packed | None
    inside: ChildrenGuard | None
    version: tuple[int, ...]

    def packed_weight(self) -> cpu.Packed:
        """Returns the packed weight, and packs it again if it was modified or replaced."""
        version = id(self.weight), self.weight.data_ptr(), edits(self.weight)
        if self.packed is None or version != self.version:
            self.packed = cpu.pack(QuantizedTensor.from_float(self.weight.detach().float().contiguous()))
            self.version = version
        return self.packed

    def ready(self) -> None:
        """Packs the weight and builds the guard of the children, if there are any."""
        self.packed_weight()
        self.inside = ChildrenGuard.of(self) if self._modules else None

    @property
    def in_f32(self) -> torch.Tensor | None:
        """The bias of the logits in f32 [experts], or None."""
        bias = getattr(self, "bias", None)
        return None if bias is None else bias.detach().float().contiguous()

    def copied_tensors(self) -> list[torch.Tensor]:
        """Returns the tensors that a fast path copies."""
        bias, correction = getattr(self, "bias", None), self.correction_tensor(None)
        return [self.weight, *(t for t in (bias, correction) if t is not None)]

    def route_args(self) -> tuple[Any, ...]:
        """Returns arguments of the route kernels: top_k, scoring, group mode, n_group, topk_group, renorm, scale."""
        style, grouped = self.style, self.style.groups != "none"
        renorm = getattr(self, style.renorm) if isinstance(style.renorm, str) else style.renorm
        return (
            self.top_k,
            style.scoring,
            style.groups,
            (self.num_group or 1) if grouped else 1,
            (self.topk_group or 1) if grouped else 1,
            bool(renorm),
            float(self.routed_scaling_factor) if style.scaled else 1.0,
        )

    def correction(self, argument: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the bias f32 [experts] that affects only which experts are selected, or None.

        It is the forward's `argument` (MiniMax), a buffer of the router, or a buffer of a child (ERNIE).
        """
        tensor = self.correction_tensor(argument)
        return None if tensor is None else tensor.detach().float().reshape(-1).contiguous()

    def correction_tensor(self, argument: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the tensor of the model that `correction` converts."""
        tensor = argument
        if tensor is None:
            tensor = getattr(self, "e_score_correction_bias", None)
        if tensor is None and hasattr(self, "moe_statics"):
            tensor = self.moe_statics.e_score_correction_bias
        return tensor

    def forward(
        self, hidden: torch.Tensor, e_score_correction_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Computes hidden [..., D] -> (logits f32 [T, experts], weights [T, K], ids int64 [T, K]).

        Args:
            hidden: The hidden states of T tokens.
            e_score_correction_bias: A bias [experts] on the scores, for the selection only (MiniMax), or None.
        """
        if children_observed(self):
            result: tuple[torch.Tensor, ...] = super().forward(hidden)
            return result
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        bias = getattr(self, "bias", None)
        # A compiled graph contains the weight itself, not the packed copy.
        if torch.compiler.is_compiling() or is_recorded(self.weight, bias):
            logits = F.linear(flat, self.weight.float(), None if bias is None else bias.float())
        else:
            logits = cpu.linear(flat, self.packed_weight(), self.in_f32)
        top_k, scoring, group_mode, groups, topk_groups, renorm, scale = self.route_args()
        correction = self.correction(e_score_correction_bias)
        ids, weights = cpu.route(logits, top_k, scoring, correction, groups, topk_groups, group_mode, renorm, scale)
        return logits, weights.to(hidden.dtype) if self.style.own_dtype else weights, ids
