"""DeepSeek-V2, V3 and R1, and Kimi-K2, which has V3's layers."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

# deepseek2 files differ in their router: a sigmoid means V3 (ktx/weights/gguf_config.py)
CONFIG_KEYS = {
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length?",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count?",
    "first_k_dense_replace": "leading_dense_block_count?",
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank?",
    "qk_rope_head_dim": "rope.dimension_count",
    "routed_scaling_factor": "expert_weights_scale?",
    "norm_topk_prob": "expert_weights_norm?",
    "n_group": "expert_group_count?",
    "topk_group": "expert_group_used_count?",
}

FAMILIES = (
    Family(
        model_types=("deepseek_v2",),
        rules="mla-moe",
        rules_alias="deepseek-v2",
        layers=("DeepseekV2DecoderLayer",),
        mla={"DeepseekV2Attention": "interleaved"},
        routers={"DeepseekV2TopkRouter": RoutingSpec("softmax", "max", scaled=True)},
        gguf=GGUF("deepseek2", CONFIG_KEYS, norm_topk_prob=False),
        chat="deepseek-v3",
    ),
    Family(
        model_types=("deepseek_v3",),
        rules="mla-moe",
        rules_alias="deepseek-v3",
        layers=("DeepseekV3DecoderLayer",),
        mla={"DeepseekV3Attention": "config"},
        routers={"DeepseekV3TopkRouter": RoutingSpec("sigmoid", "top2", "norm_topk_prob", scaled=True)},
        gguf=GGUF("deepseek2", CONFIG_KEYS, gating=(2,)),
        chat="deepseek-v3",
    ),
    Family(model_types=("deepseek_v32",), chat="deepseek-v3.2"),
    Family(model_types=("kimi_k2",), rules="mla-moe", chat="kimi-k2", chat_model_types=("kimi_k25", "kimi_linear")),
)
