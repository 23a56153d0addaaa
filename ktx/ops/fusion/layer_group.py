"""Fused layer groups: consecutive decoder layers in one kernel call, switched off by KTX_FUSION=off.

`group_layers` is the only entry: it gives the first layer of each group a `FusedLayerGroup`. Without it, each layer
runs its own fused steps, with equal results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ktx.environment import environment
from ktx.kernels.fused_steps import run_steps
from ktx.ops import class_patches
from ktx.ops.base import unpack
from ktx.ops.fusion.fused import MAX_FUSED_TOKENS, kv_target
from ktx.ops.fusion.layer import Layer, LayerBlock
from ktx.ops.fusion.precomputed import LayerInputs, PrecomputedOutput, attach_output
from ktx.ops.guard import ChangeCounter, Guard, valid_fast_path

# Layers of one kernel call. Few tokens may have more layers in a call, up to this product of tokens and layers; it is
# bounded because a forward can only be cancelled between calls.
GROUP_LAYERS, MAX_TOKEN_LAYERS = 8, 64
# After so many calls in a row whose precomputed outputs were not used, groups are disabled for the next calls.
MAX_MISSES, DISABLED_CALLS = 3, 100


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


def _is_training(layers: list[LayerBlocks]) -> bool:
    """Whether any module of the layers is in training mode, in which it may apply dropout or add noise."""
    return any(module.training for blocks in layers for module in blocks.layer.modules())


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
        """Stores the blocks of the layers, and derives the kernel steps from them: attention, then feed-forward.

        `changes` is the count of changes for which these blocks are current; `_rebuild` compares it.
        """
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

        The forwards of these layers find their outputs attached to their inputs (`take_output`).

        Returns:
            The output of the first layer; None if the layers have to be computed one by one.
        """
        first, tokens = self.blocks[0], hidden_states.shape[0] * hidden_states.shape[1]
        if not 0 < tokens <= MAX_FUSED_TOKENS or inputs.embeddings is None or not self._count_call():
            return None
        # as many runs of GROUP_LAYERS as MAX_TOKEN_LAYERS allows for these tokens, at least one
        layers = self.layers[: max(1, MAX_TOKEN_LAYERS // GROUP_LAYERS // tokens) * GROUP_LAYERS]
        if not first.supports(hidden_states, inputs.cache) or (self.has_dropout and _is_training(layers)):
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
            attach_output(outs[i - 1], precomputed)
        target.commit(0, hidden_states.shape[1])
        self.num_unused = len(outs) - 1
        return outs[0]

    def _count_call(self) -> bool:
        """Counts a call and returns whether the group may compute it.

        After MAX_MISSES calls in a row that left precomputed outputs unused, it may not for DISABLED_CALLS calls.
        """
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

    A group has one kernel call, so its layers share the mask, the rotary tables and the number of cached tokens. With
    KTX_FUSION=off no group is built, and each layer is computed in its own calls.
    """
    if environment("KTX_FUSION") == "off":
        return
    class_patches.update()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        if type(module) is nn.ModuleList and any(isinstance(child, Layer) for child in module):
            module.__class__ = GroupedLayers
        run: list[LayerBlocks] = []
        for child in [*module, None]:  # None ends the last run
            blocks = LayerBlocks.of(child) if isinstance(child, Layer) else None
            if run and (blocks is None or _grouping_key(blocks) != _grouping_key(run[0])):
                for i in range(0, len(run) - 1, GROUP_LAYERS):
                    # A group extends to the end of the run; calls of many tokens use only its first layers.
                    run[i].layer.fused_group = FusedLayerGroup(run[i:])
                run = []
            if blocks is not None:
                run.append(blocks)


def _grouping_key(blocks: LayerBlocks) -> tuple[Any, ...]:
    """Returns what layers of a group must have in common: the same kind of attention, to the same keys.

    One call computes the group, with one mask and one pair of RoPE tables, and only the first layer decides whether the
    call is fused (`supports`).
    """
    attention = blocks.attention.owner
    layer_types = getattr(getattr(attention, "config", None), "layer_types", None)
    has_expanded_form = getattr(attention, "w_uk", None) is not None
    return (
        type(blocks.attention),
        layer_types and layer_types[attention.layer_idx],
        attention.kv_dtype,
        blocks.attention.half_rotary,
        has_expanded_form,
    )
