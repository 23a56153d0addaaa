"""Qwen2, Qwen3 and their mixtures of experts."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

ROUTING = RoutingSpec("softmax", renorm="norm_topk_prob", own_dtype=True)
MOE_KEYS = {
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length?",
    "num_experts": "expert_count",
}

FAMILIES = (
    Family(
        model_types=("qwen2",),
        rules="dense",
        rules_alias="qwen2",
        layers=("Qwen2DecoderLayer",),
        attention=("Qwen2Attention",),
        gguf=GGUF("qwen2", config_keys={}),
        chat="qwen3",
    ),
    Family(
        model_types=("qwen3",),
        rules="dense",
        rules_alias="qwen3",
        layers=("Qwen3DecoderLayer",),
        attention=("Qwen3Attention",),
        gguf=GGUF("qwen3", config_keys={}),
        chat="qwen3",
    ),
    Family(
        model_types=("qwen2_moe",),
        rules="moe",
        rules_alias="qwen2-moe",
        layers=("Qwen2MoeDecoderLayer",),
        attention=("Qwen2MoeAttention",),
        routers={"Qwen2MoeTopKRouter": ROUTING},
        gguf=GGUF(
            "qwen2moe",
            config_keys=MOE_KEYS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length?"},
            fixed={"norm_topk_prob": False},
        ),
        chat="qwen3",
    ),
    Family(
        model_types=("qwen3_moe",),
        rules="moe",
        rules_alias="qwen3-moe",
        layers=("Qwen3MoeDecoderLayer",),
        attention=("Qwen3MoeAttention",),
        routers={"Qwen3MoeTopKRouter": ROUTING},
        gguf=GGUF("qwen3moe", config_keys=MOE_KEYS, fixed={"norm_topk_prob": True}),
        chat="qwen3",
    ),
)
