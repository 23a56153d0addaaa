"""MiniMax-M2: norms on q and k over all heads, sigmoid routing with a correction bias on the block."""

from __future__ import annotations

from ktx.families.family import GGUF, Family, RoutingSpec

FAMILIES = (
    Family(
        model_types=("minimax_m2",),
        rules="moe",
        rules_alias="minimax-m2",
        layers=("MiniMaxM2DecoderLayer",),
        attention=("MiniMaxM2Attention",),
        routers={"MiniMaxM2TopKRouter": RoutingSpec("sigmoid", renorm=True)},
        gguf=GGUF("minimax-m2", gating=(2,), norm_topk_prob=True),
        chat="minimax-m2",
        chat_model_types=("minimax",),
    ),
)
