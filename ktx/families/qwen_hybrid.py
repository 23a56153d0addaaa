"""Qwen3-Next and Qwen3.5 (the language model): full attention every fourth layer, a gated delta net in the others."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("qwen3_next",),
        rules="hybrid",
        rules_alias="qwen3-next",
        routers={"Qwen3NextTopKRouter": RoutingSpec("softmax", renorm="norm_topk_prob", own_dtype=True)},
        gguf=GGUF("qwen3next", norms_plus_one=True),
        chat="qwen3",
    ),
    Family(
        model_types=("qwen3_5_text",),
        rules="hybrid",
        rules_alias="qwen3_5",
        gguf=GGUF("qwen35", norms_plus_one=True, tiled_value_heads=True),
        chat="qwen3-coder",
        chat_model_types=("qwen3_5",),
    ),
    Family(
        model_types=("qwen3_5_moe_text",),
        rules="hybrid",
        rules_alias="qwen3_5-moe",
        routers={"Qwen3_5MoeTopKRouter": RoutingSpec("softmax", renorm=True, own_dtype=True)},
        gguf=GGUF("qwen35moe", norm_topk_prob=True, norms_plus_one=True, tiled_value_heads=True),
        chat="qwen3-coder",
        chat_model_types=("qwen3_5_moe",),
    ),
)
