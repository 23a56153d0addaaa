"""OLMoE: norms on q and k over all heads, clipped if the configuration says so."""

from __future__ import annotations

from ktx.families.family import Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("olmoe",),
        rules="moe",
        rules_alias="olmoe",
        routers={"OlmoeTopKRouter": RoutingSpec("softmax", renorm="norm_topk_prob", own_dtype=True)},
    ),
)
