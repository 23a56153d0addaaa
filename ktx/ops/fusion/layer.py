"""Fused decoder layers: attention with norm and residual, then feed-forward with norm and residual.

Consecutive layers may also form a group, which the forward of the first one computes in one kernel call
(ktx.ops.fusion.layer_group).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ktx.families import PRE_NORM_LAYERS
from ktx.ops import contract
from ktx.ops.attention import Attention
from ktx.ops.base import Context, Operator, adopt, is_ktx_operator, known_class
from ktx.ops.fusion.fused import MAX_FUSED_TOKENS, PreNorm
from ktx.ops.fusion.precomputed import LayerInputs, take_output
from ktx.ops.guard import Guard, valid_fast_path
from ktx.ops.mla import MLA
from ktx.ops.mlp import MLP
from ktx.ops.moe import MoE
from ktx.ops.norm import RMSNorm

CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class LayerGroup(Protocol):
    """A group of layers that starts with a layer: computes all of them and returns the first one's output, or None."""

    def __call__(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor | None:
        """Computes hidden_states [B, S, D]; None if the layers have to be computed one by one."""


class Layer(Operator):
    """A decoder layer that computes its children in fused steps.

    The children remain ordinary modules. They are called one by one if a fused step does not support the call, or if a
    hook is registered on one of them.

    Attributes:
        block: The fused steps of this layer, if it supports them.
        fused_group: The fused group that starts with this layer, if there is one.
    """

    remade = ("block", "fused_group")
    block: LayerBlock | None
    fused_group: LayerGroup | None

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Layer:
        """Creates the operator that replaces a decoder layer.

        Raises:
            UsageError: The class is unknown, or combines attention and feed-forward in another way.
        """
        known_class(old, PRE_NORM_LAYERS, ctx, "ktx does not know how {} combines attention and feed-forward")
        contract.check_layer(old, ctx.path)
        new: Layer = adopt(cls, old, ctx)
        new.block, new.fused_group = None, None
        return new

    def ready(self) -> None:
        """Builds the fused step, if this layer can be one."""
        self.block = LayerBlock.of(self)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes the layer: hidden_states [B, S, D] -> [B, S, D].

        Tries, from the fastest on: the output that the group of an earlier layer has precomputed, the group that starts
        with this layer, the layer's own fused steps, and the children one by one.
        """
        arguments, cache = self.call.split((hidden_states, *args), kwargs)
        if torch.compiler.is_compiling():  # a graph contains the kernels of the children, but no attributes of tensors
            return super().forward(**self.call.join(arguments, cache))
        inputs = LayerInputs(arguments.get("attention_mask"), arguments.get("position_embeddings"), cache)
        if (precomputed := take_output(self, hidden_states, inputs)) is not None:
            return precomputed
        if (block := valid_fast_path(self)) is not None:
            out = None if self.fused_group is None else self.fused_group(hidden_states, inputs)
            out = block(hidden_states, inputs) if out is None else out
            if out is not None:
                return out
        return super().forward(**self.call.join(arguments, cache))


class LayerBlock:
    """The two fused steps of a layer: attention with its norm, and feed-forward with its norm."""

    def __init__(self, owner: Layer, norms: list[RMSNorm]):
        """Copies the norms of `owner`. The guard covers the layer and its children; their blocks have own guards."""
        self.owner = owner
        self.guard = Guard(
            [owner],
            [child for name in CHILDREN if (child := owner._modules[name]) is not None],
            [norm.copied_weight() for norm in norms],
        )
        self.norms: list[PreNorm] = [(norm.in_f32, norm.epsilon, norm.plus_one) for norm in norms]

    @classmethod
    def of(cls, owner: Layer) -> LayerBlock | None:
        """Builds the block of `owner`; None if its norms or attention are not operators of ktx, or it has no mlp."""
        children: dict[str, Any] = owner._modules
        norms: list[Any] = [children.get(CHILDREN[0]), children.get(CHILDREN[2])]
        if not all(map(RMSNorm.is_cpu_norm, norms)) or not is_ktx_operator(children.get("self_attn"), Attention, MLA):
            return None
        return None if children.get("mlp") is None else cls(owner, norms)

    def current_blocks(self) -> tuple[Any, Any]:
        """Returns the current fused blocks of attention and feed-forward; None for one that is missing or invalid."""
        children: dict[str, Any] = self.owner._modules
        mlp = children["mlp"]
        return valid_fast_path(children["self_attn"]), valid_fast_path(mlp) if is_ktx_operator(mlp, MoE, MLP) else None

    def __call__(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor | None:
        """Computes the layer: hidden_states f32 [B, S, D] -> [B, S, D]; None if the call needs the unfused forward.

        The feed-forward step is fused only for small batches; for large ones its call overhead does not matter.
        """
        attention, mlp = self.current_blocks()
        if attention is None:
            return None
        attention_norm, mlp_norm = self.norms
        x: torch.Tensor | None = attention(
            hidden_states, inputs.embeddings, inputs.mask, cache=inputs.cache, before=attention_norm
        )
        if x is None:
            return None
        if (
            mlp is not None
            and x.shape[0] * x.shape[1] <= MAX_FUSED_TOKENS
            and not (mlp.has_dropout and self.owner.training)
        ):
            return mlp.fused_step(x, mlp_norm)  # type: ignore[no-any-return]
        children: dict[str, Any] = self.owner._modules
        return x + children["mlp"](children["post_attention_layernorm"](x))  # type: ignore[no-any-return]
