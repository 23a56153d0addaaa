"""GLM-4.5 to 4.7: partial rotary attention, experts routed as in DeepSeek-V3; GLM-4.7-Flash with MLA."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

ROUTING = RoutingSpec("sigmoid", "top2", "norm_topk_prob", scaled=True)

FAMILIES = (
    Family(
        model_types=("glm4_moe",),
        rules="moe",
        rules_alias="glm4-moe",
        layers=("Glm4MoeDecoderLayer",),
        attention=("Glm4MoeAttention",),
        routers={"Glm4MoeTopkRouter": ROUTING},
        gguf=GGUF("glm4moe", gating=(2,)),
        chat="glm-4.5",
        chat_model_types=("glm4v_moe", "glm_moe_dsa"),
    ),
    Family(
        model_types=("glm4_moe_lite",),
        rules="mla-moe",
        rules_alias="glm4-moe-lite",
        layers=("Glm4MoeLiteDecoderLayer",),
        mla={"Glm4MoeLiteAttention": "config"},
        routers={"Glm4MoeLiteTopkRouter": ROUTING},
    ),
)
