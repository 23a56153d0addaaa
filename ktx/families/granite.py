"""Granite's mixtures of experts: embeddings, residuals, attention and logits are multiplied by scales."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("granitemoe",),
        rules="moe",
        routers={"GraniteMoeTopKRouter": RoutingSpec("softmax_topk", own_dtype=True)},
        gguf=GGUF(
            "granitemoe",
            config_keys={
                "attention_multiplier": "attention.scale",
                "embedding_multiplier": "embedding_scale",
                "logits_scaling": "logit_scale",
                "num_experts_per_tok": "expert_used_count",
                "num_local_experts": "expert_count",
                "residual_multiplier": "residual_scale",
            },
            interleaved_qk=True,
        ),
    ),
)
