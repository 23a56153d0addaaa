"""Fused decoder layers: attention with norm and residual, feed-forward with norm and residual, and groups of layers.

Consecutive layers form a fused group. The forward of the first layer computes the whole group in one kernel call and
attaches to each output tensor what the next layer computes from it. The forward of each following layer returns this
precomputed output if its inputs are the identical, unmodified tensors; otherwise it computes the layer itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ktx.families import PRE_NORM_LAYERS
from ktx.kernels.fused_steps import run_steps
from ktx.kernels.gradients import is_recorded
from ktx.ops import class_patches, contract
from ktx.ops.attention import Attention
from ktx.ops.base import Context, Operator, adopt, known_class, unpack
from ktx.ops.fusion.fused import MAX_FUSED_TOKENS, KVTarget, PreNorm, kv_target
from ktx.ops.guard import ChangeCounter, Guard, valid_fast_path
from ktx.ops.mla import MLA
from ktx.ops.mlp import MLP
from ktx.ops.moe import MoE
from ktx.ops.norm import RMSNorm

CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
# Layers of one kernel call. Few tokens may have more layers in a call, up to this product of tokens and layers; it is
# bounded because a forward can only be cancelled between calls.
GROUP_LAYERS, MAX_TOKEN_LAYERS = 8, 64
# After so many calls in a row whose precomputed outputs were not used, groups are disabled for the next calls.
MAX_MISSES, DISABLED_CALLS = 3, 100


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
    fused_group: FusedLayerGroup | None

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
        precomputed = hidden_states.__dict__.get("ktx_ahead")
        if precomputed is not None and precomputed.layer is self and precomputed.take_if_valid(hidden_states, inputs):
            return precomputed.out
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
        """Builds the block of `owner`; None if its norms or its attention are not operators of ktx."""
        children: dict[str, Any] = owner._modules
        norms: list[Any] = [children.get(CHILDREN[0]), children.get(CHILDREN[2])]
        if not all(map(RMSNorm.is_cpu_norm, norms)) or not isinstance(children.get("self_attn"), Attention | MLA):
            return None
        return None if children.get("mlp") is None else cls(owner, norms)

    def current_blocks(self) -> tuple[Any, Any]:
        """Returns the current fused blocks of attention and feed-forward; None for one that is missing or invalid."""
        children: dict[str, Any] = self.owner._modules
        mlp = children["mlp"]
        return valid_fast_path(children["self_attn"]), valid_fast_path(mlp) if isinstance(mlp, MoE | MLP) else None

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


class LayerInputs(NamedTuple):
    """The inputs of a layer, besides hidden states, that its attention depends on."""

    mask: torch.Tensor | None
    embeddings: Any
    cache: Any


@dataclass(slots=True)
class PrecomputedOutput:
    """The precomputed output of a layer, attached to its input tensor, which is the output of the layer before it.

    Attributes:
        layer: The layer that computes `out`.
        out: The precomputed output.
        version: The version counter of the input tensor; if it has increased, the input was modified.
        inputs: The other inputs that `out` was computed from.
        target: The KV cache that the group has written to.
        index: The index of the layer in the group.
        group: The group.
    """

    layer: Layer
    out: torch.Tensor
    version: int
    inputs: LayerInputs
    target: KVTarget
    index: int
    group: FusedLayerGroup

    def take_if_valid(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> bool:
        """Whether `out` is the output for these inputs; if so, consumes it.

        Consuming it adds the new keys and values to the cache layer and detaches `out` from the input tensor, so it can
        be called successfully only once.

        Args:
            hidden_states: The input tensor that carries this object.
            inputs: The other inputs of the layer.
        """
        mask, embeddings, cache = self.inputs
        if (
            hidden_states._version != self.version
            or is_recorded(hidden_states)
            or inputs.mask is not mask
            or inputs.cache is not cache
            or not _same_tables(inputs.embeddings, embeddings)
            or not self.target.is_unchanged(self.index, cache, mask)
        ):
            return False
        self.target.commit(self.index, hidden_states.shape[1])
        self.group.num_unused -= 1
        del hidden_states.ktx_ahead  # type: ignore[attr-defined]  # stored hidden states must not retain later ones
        return True


def _is_training(layers: list[LayerBlocks]) -> bool:
    """Whether any module of the layers is in training mode, in which it may apply dropout or add noise."""
    return any(module.training for blocks in layers for module in blocks.layer.modules())


def _same_tables(left: Any, right: Any) -> bool:
    """Whether rotary tables are the same tensors, possibly in a new tuple."""
    if left is right:
        return True
    return isinstance(left, tuple) and isinstance(right, tuple) and all(map(operator.is_, left, right))


class LayerBlocks(NamedTuple):
    """The fused blocks of a layer at the time its group was built, and a guard over all of them."""

    layer: Layer
    block: LayerBlock
    attention: Any
    mlp: Any
    guard: Guard

    @classmethod
    def of(cls, layer: Layer) -> LayerBlocks | None:
        """Returns the current blocks of a layer; None if one is missing or invalid."""
        block = valid_fast_path(layer)
        if block is None:
            return None
        attention, mlp = block.current_blocks()
        if attention is None or mlp is None:
            return None
        return cls(layer, block, attention, mlp, Guard.merge((block.guard, attention.guard, mlp.guard)))

    def are_valid(self) -> bool:
        """Whether these are still the valid blocks of the layer."""
        layer, block, attention, mlp, guard = self
        if layer.block is not block or not guard.holds():
            return False
        children: dict[str, Any] = layer._modules
        return children["self_attn"].block is attention and children["mlp"].block is mlp


class FusedLayerGroup:
    """Consecutive layers that the first one computes in one kernel call; the others return their precomputed outputs.

    Results and caches are the same as without groups. A layer whose hidden states are not the unmodified output of the
    layer before it (a hook or a script has changed them), or whose mask or cache differs, computes its output itself.
    A cache layer grows only by the tokens of outputs that are used. If outputs stay unused in several calls in a row,
    the group is disabled for a while.

    Attributes:
        num_unused: The number of precomputed outputs of the last call that have not been used yet.
        num_misses: The number of calls in a row that left outputs unused.
        disabled_calls_left: The number of calls for which the group stays disabled.
        layers: The blocks of the layers.
        has_dropout: Whether a layer applies dropout in training.
        steps: The kernel steps, two for each layer.
    """

    def __init__(self, layers: list[LayerBlocks]):
        self.num_unused, self.num_misses, self.disabled_calls_left = 0, 0, 0
        self._set_layers(layers)

    def _set_layers(self, layers: list[LayerBlocks]) -> None:
        """Stores the blocks of the layers, and derives the kernel steps from them: attention, then feed-forward."""
        self.layers, self.changes = layers, ChangeCounter.count
        self.blocks = [blocks.attention for blocks in layers]
        self.has_dropout = any(blocks.attention.has_dropout or blocks.mlp.has_dropout for blocks in layers)
        self.steps = [
            fused_step.step(norm)
            for _, block, attention, mlp, _ in layers
            for fused_step, norm in zip((attention.fused_step, mlp.fused_step), block.norms, strict=True)
        ]

    def _rebuild(self) -> bool:
        """Rebuilds the group from the current blocks of its layers, once per change of settings or weights.

        Returns:
            Whether it was rebuilt; False if nothing has changed or a layer has no valid blocks.
        """
        if self.changes == ChangeCounter.count:
            return False
        self.changes = ChangeCounter.count
        layers = [LayerBlocks.of(blocks.layer) for blocks in self.layers]
        valid = [blocks for blocks in layers if blocks is not None]
        if len(valid) < len(layers):
            return False
        self._set_layers(valid)
        return True

    def __call__(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor | None:
        """Computes the layers from hidden_states f32 [B, S, D] and attaches the outputs of all layers but the first.

        Returns:
            The output of the first layer; None if the layers have to be computed one by one.
        """
        first, tokens = self.blocks[0], hidden_states.shape[0] * hidden_states.shape[1]
        if not 0 < tokens <= MAX_FUSED_TOKENS or inputs.embeddings is None or not self._is_enabled():
            return None
        layers = self.layers[: max(1, MAX_TOKEN_LAYERS // GROUP_LAYERS // tokens) * GROUP_LAYERS]
        if not first.supports(hidden_states, inputs.cache) or self.has_dropout and _is_training(layers):
            return None
        if not all(blocks.are_valid() for blocks in layers):
            if not self._rebuild():
                return None
            first, layers = self.blocks[0], self.layers[: len(layers)]
        target = kv_target(hidden_states, inputs.cache, self.blocks[: len(layers)], inputs.mask)
        if target is None:
            return None
        with torch.inference_mode(False):  # inference tensors have no version counter
            outs = [torch.empty(hidden_states.shape, dtype=torch.float32, device="cpu") for _ in layers]
        run_steps(
            hidden_states.contiguous(),
            self.steps[: 2 * len(layers)],
            outs,
            *target.kernel_args(inputs.embeddings, first.half_rotary),
        )
        for i in range(1, len(outs)):
            precomputed = PrecomputedOutput(layers[i].layer, outs[i], outs[i - 1]._version, inputs, target, i, self)
            outs[i - 1].ktx_ahead = precomputed  # type: ignore[attr-defined]
        target.commit(0, hidden_states.shape[1])
        self.num_unused = len(outs) - 1
        return outs[0]

    def _is_enabled(self) -> bool:
        """Whether the group is enabled: the last calls did not leave precomputed outputs unused; counts this call."""
        self.num_misses = self.num_misses + 1 if self.num_unused else 0
        self.num_unused = 0
        if self.num_misses == MAX_MISSES:
            self.disabled_calls_left = DISABLED_CALLS
        self.disabled_calls_left -= self.disabled_calls_left > 0
        return not self.disabled_calls_left


class GroupedLayers(nn.ModuleList):
    """A ModuleList of layers that groups them again after a copy or an unpickling."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        group_layers(self)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As in torch; True also unpacks packed weights."""
        if requires_grad:
            unpack(self)
        return super().requires_grad_(requires_grad)

    def _get_name(self) -> str:
        return nn.ModuleList.__name__


def group_layers(model: nn.Module) -> None:
    """Groups consecutive layers of a loaded model that attend in the same way (`_grouping_key`).

    A group has one kernel call, so its layers share the mask, the rotary tables and the number of cached tokens.
    """
    class_patches.update()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        if type(module) is nn.ModuleList and any(isinstance(child, Layer) for child in module):
            module.__class__ = GroupedLayers
        run: list[LayerBlocks] = []
        for child in [*module, None]:
            blocks = LayerBlocks.of(child) if isinstance(child, Layer) else None
            if run and (blocks is None or _grouping_key(blocks) != _grouping_key(run[0])):
                for i in range(0, len(run) - 1, GROUP_LAYERS):
                    # A group extends to the end of the run; calls of many tokens use only its first layers.
                    run[i].layer.fused_group = FusedLayerGroup(run[i:])
                run = []
            if blocks is not None:
                run.append(blocks)


def _grouping_key(blocks: LayerBlocks) -> tuple[Any, ...]:
    """Returns what layers of a group must have in common: the same kind of attention, to the same keys."""
    attention = blocks.attention.owner
    layer_types = getattr(getattr(attention, "config", None), "layer_types", None)
    expands = getattr(attention, "w_uk", None) is not None
    return (
        type(blocks.attention),
        layer_types and layer_types[attention.layer_idx],
        attention.kv_dtype,
        blocks.attention.half_rotary,
        expands,
    )
