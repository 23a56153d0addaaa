"""The MoE router on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ktx.kernels import reference
from ktx.kernels.gradients import refuse_gpu_gradient
from ktx.ops import router
from ktx.ops.gpu import padding


class Router(router.Router):
    """GPU version of ktx.ops.router.Router, in torch and f32, without a device sync."""

    weight_f32: torch.Tensor
    correction_f32: torch.Tensor | None

    def ready(self) -> None:
        """Converts weight and correction bias to f32, which the kernel reads."""
        self.weight_f32 = self.weight.detach().float().contiguous()
        self.correction_f32 = self.correction(None)

    def forward(
        self, hidden: torch.Tensor, e_score_correction_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Routes hidden [..., D]; returns logits f32 [tokens, E], weights [tokens, K] and ids int64 [tokens, K]."""
        refuse_gpu_gradient("Router", self.weight, getattr(self, "bias", None))
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        logits = F.linear(flat, self.weight_f32, self.in_f32)
        correction = (
            self.correction(e_score_correction_bias) if e_score_correction_bias is not None else self.correction_f32
        )
        top_k, scoring, mode, groups, topk_group, renormalize, scale = self.route_args()
        ids, weights = reference.route(logits, top_k, scoring, correction, groups, topk_group, mode, renormalize, scale)
        return logits, weights.to(hidden.dtype) if self.style.own_dtype else weights, padding.mask_padding(ids)
