"""A decoder layer in two kernel calls: norm, attention and sum; norm, experts and sum."""

from __future__ import annotations

from typing import Any

import torch

from ktx.ops.attention import Attention
from ktx.ops.base import Context, Operator, adopt, known_class
from ktx.ops.fused import Watch
from ktx.ops.mla import MLA
from ktx.ops.moe import MoE
from ktx.ops.norm import RMSNorm

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
USUAL = (  # layers that are: x = x + attention(norm(x)), then x = x + mlp(norm(x))
    "DeepseekV2DecoderLayer",
    "DeepseekV3DecoderLayer",
    "Dots1DecoderLayer",
    "Ernie4_5_MoeDecoderLayer",
    "Glm4MoeDecoderLayer",
    "Glm4MoeLiteDecoderLayer",
    "LlamaDecoderLayer",
    "MiniMaxM2DecoderLayer",
    "MistralDecoderLayer",
    "MixtralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2MoeDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
)


class Layer(Operator):
    """Its children stay modules of their own and are called one by one whenever a block of theirs cannot do it, or somebody listens to one."""

    watch: Watch | None

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Layer:
        known_class(old, USUAL, ctx, "it is not known whether {} adds up as others do")
        new: Layer = adopt(cls, old, ctx)
        new.watch = None
        return new

    def ready(self) -> None:
        children: dict[str, Any] = self._modules
        norms: list[Any] = [children.get(PARTS[0]), children.get(PARTS[2])]
        if all(RMSNorm.here(norm) for norm in norms) and isinstance(children.get("self_attn"), Attention | MLA):
            self.watch = Watch((self, name) for name in PARTS)
            self.before = [(norm.in_f32, norm.variance_epsilon, norm.plus_one) for norm in norms]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and self.watch is not None and self.watch.holds():
            done = self.together(hidden_states, **kwargs)
            if done is not None:
                return done
        return super().forward(hidden_states, *args, **kwargs)

    def together(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """hidden_states f32 [B, S, D] -> [B, S, D]; None when this call has to go the long way."""
        children: dict[str, Any] = self._modules
        block = children["self_attn"].block
        if block is None or not block.watch.holds():
            return None
        first, second = self.before
        x = block(hidden_states, position_embeddings, attention_mask, cache=past_key_values, before=first)
        if x is None:
            return None
        mlp = children["mlp"]
        if isinstance(mlp, MoE) and mlp.block is not None:
            flat = x.view(-1, x.shape[-1])
            if mlp.block.takes(flat):
                return mlp.block(flat, before=second).view(x.shape)
        return x + mlp(children["post_attention_layernorm"](x))
