"""ERNIE 4.5 MoE: interleaved rotary attention, a correction bias of the experts."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("ernie4_5_moe",),
        rules="moe",
        rules_alias="ernie4_5-moe",
        layers=("Ernie4_5_MoeDecoderLayer",),
        routers={"Ernie4_5_MoeTopKRouter": RoutingSpec("softmax", renorm=True, own_dtype=True)},
        gguf=GGUF("ernie4_5-moe", norm_topk_prob=True),
    ),
)
