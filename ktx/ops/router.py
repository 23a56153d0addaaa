"""The router of a mixture of experts: a matrix product in f32, then one call that scores, groups, chooses and weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ktx.kernels import cpu
from ktx.kernels.gradients import recorded
from ktx.ops import contract
from ktx.ops.base import Context, Operator, adopt, known_class
from ktx.ops.change_counter import edits
from ktx.ops.guard import Inside, listened
from ktx.weights.base import QuantizedTensor


@dataclass(frozen=True)
class RoutingSpec:
    """How a family routes; True means: as the module's own attribute says."""

    scoring: str
    groups: str = "none"
    renorm: bool | str = False  # or the attribute that tells
    scaled: bool = False
    own_dtype: bool = False  # weights come back in the hidden states' dtype


STYLES: dict[str, RoutingSpec] = {
    "DeepseekV2TopkRouter": RoutingSpec("softmax", "max", scaled=True),
    "DeepseekV3TopkRouter": RoutingSpec("sigmoid", "top2", "norm_topk_prob", scaled=True),
    "Dots1TopkRouter": RoutingSpec("sigmoid", "top2", "norm_topk_prob", scaled=True),
    "Glm4MoeTopkRouter": RoutingSpec("sigmoid", "top2", "norm_topk_prob", scaled=True),
    "Glm4MoeLiteTopkRouter": RoutingSpec("sigmoid", "top2", "norm_topk_prob", scaled=True),
    "OlmoeTopKRouter": RoutingSpec("softmax", renorm="norm_topk_prob", own_dtype=True),
    "Qwen2MoeTopKRouter": RoutingSpec("softmax", renorm="norm_topk_prob", own_dtype=True),
    "Qwen3MoeTopKRouter": RoutingSpec("softmax", renorm="norm_topk_prob", own_dtype=True),
    "Qwen3_5MoeTopKRouter": RoutingSpec("softmax", renorm=True, own_dtype=True),
    "Qwen3NextTopKRouter": RoutingSpec("softmax", renorm="norm_topk_prob", own_dtype=True),
    "MixtralTopKRouter": RoutingSpec("softmax", renorm=True),
    "MiniMaxM2TopKRouter": RoutingSpec("sigmoid", renorm=True),
    "Ernie4_5_MoeTopKRouter": RoutingSpec("softmax", renorm=True, own_dtype=True),
    "GptOssTopKRouter": RoutingSpec("softmax_topk", own_dtype=True),
}


class Router(Operator):
    """Stands in for the routers of STYLES; same weights, same return (logits, weights, ids)."""

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Router:
        name = known_class(old, STYLES, ctx, "no routing style is known for {}")
        new: Router = adopt(cls, old, ctx)
        new.style = STYLES[name]
        if name == "DeepseekV2TopkRouter" and old.topk_method == "greedy":
            new.style = RoutingSpec("softmax", scaled=True)
        new.packed, new.version, new.inside = None, (), None
        if cls is Router:
            contract.router(old, ctx.path, new)
        return new

    remade = ("packed", "version", "inside")
    reads = frozenset(
        {"weight", "bias", "e_score_correction_bias", "top_k", "num_group", "topk_group", "routed_scaling_factor"}
        | {style.renorm for style in STYLES.values() if isinstance(style.renorm, str)}
    )
    packed: cpu.Packed | None
    inside: Inside | None  # of the router's children, where it has any (ERNIE)
    version: tuple[int, ...]  # of the weight that was packed

    def matrix(self) -> cpu.Packed:
        """The weight packed, once more when it has been written to or exchanged."""
        now = id(self.weight), self.weight.data_ptr(), edits(self.weight)
        if self.packed is None or now != self.version:
            self.packed = cpu.pack(QuantizedTensor.of(self.weight.detach().float().contiguous()))
            self.version = now
        return self.packed

    def ready(self) -> None:
        self.matrix()
        self.inside = Inside.of(self) if self._modules else None

    @property
    def in_f32(self) -> torch.Tensor | None:
        """Its bias f32 [experts], if it has one."""
        bias = getattr(self, "bias", None)
        return None if bias is None else bias.detach().float().contiguous()

    def copied(self) -> list[torch.Tensor]:
        """What a shortcut that takes it has copies of."""
        bias, correction = getattr(self, "bias", None), self.correction_of(None)
        return [self.weight, *(t for t in (bias, correction) if t is not None)]

    def route_args(self) -> tuple[Any, ...]:
        """top_k, scoring, group mode, groups, chosen groups, renormalise, scale: what the route kernels take."""
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

    def correction(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """The bias that counts for the choice only: an argument (MiniMax), a buffer of its own, or of a child (ERNIE)."""
        given = self.correction_of(given)
        return None if given is None else given.detach().float().reshape(-1).contiguous()

    def correction_of(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """The same as the model holds it."""
        if given is None:
            given = getattr(self, "e_score_correction_bias", None)
        if given is None and hasattr(self, "moe_statics"):
            given = self.moe_statics.e_score_correction_bias
        return given

    def forward(
        self, hidden: torch.Tensor, e_score_correction_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        if listened(self):
            found: tuple[torch.Tensor, ...] = super().forward(hidden)
            return found
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        bias = getattr(self, "bias", None)
        if torch.compiler.is_compiling() or recorded(
            self.weight, bias
        ):  # a graph holds the weight, not what was made of it
            logits = F.linear(flat, self.weight.float(), None if bias is None else bias.float())
        else:
            logits = cpu.linear(flat, self.matrix(), self.in_f32)
        top, scoring, mode, groups, chosen, renorm, scale = self.route_args()
        correction = self.correction(e_score_correction_bias)
        ids, weights = cpu.route(logits, top, scoring, correction, groups, chosen, mode, renorm, scale)
        return logits, weights.to(hidden.dtype) if self.style.own_dtype else weights, ids
