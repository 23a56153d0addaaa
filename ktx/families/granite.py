"""Granite's mixtures of experts: embeddings, residuals, attention and logits are multiplied by scales.

Routers stay transformers' own, because what they return changed between 5.17 and 5.24.
"""

from __future__ import annotations

from ktx.families.family import GGUF, Family

FAMILIES = (
    Family(
        model_types=("granitemoe",),
        rules="moe",
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
