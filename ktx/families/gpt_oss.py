"""gpt-oss: attention sinks, sliding windows on every other layer, experts with biases and a clamped gate."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("gpt_oss",),
        rules="moe",
        rules_alias="gpt-oss",
        attention=("GptOssAttention",),
        half_tables=True,
        routers={"GptOssTopKRouter": RoutingSpec("softmax_topk", own_dtype=True)},
        gguf=GGUF("gpt-oss", gating=(1, 3), norm_topk_prob=True),
        chat="gpt-oss",
    ),
)
