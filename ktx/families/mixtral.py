"""Mixtral: grouped-query attention, eight experts."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("mixtral",),
        rules="moe",
        rules_alias="mixtral",
        layers=("MixtralDecoderLayer",),
        attention=("MixtralAttention",),
        routers={"MixtralTopKRouter": RoutingSpec("softmax", renorm=True)},
        gguf=GGUF(
            "llama",
            config_keys={"num_experts_per_tok": "expert_used_count", "num_local_experts": "expert_count"},
            norm_topk_prob=True,
            interleaved_qk=True,
        ),
        chat="mistral",
    ),
)
