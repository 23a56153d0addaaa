"""dots.llm1: norms on q and k, experts routed as in DeepSeek-V3."""

from __future__ import annotations

from ktx.families.family import Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("dots1",),
        rules="moe",
        rules_alias="dots1",
        layers=("Dots1DecoderLayer",),
        attention=("Dots1Attention",),
        routers={"Dots1TopkRouter": RoutingSpec("sigmoid", "top2", "norm_topk_prob", scaled=True)},
    ),
)
