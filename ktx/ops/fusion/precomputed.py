"""Outputs that a fused layer group computes ahead: attached to a tensor, and taken by the layer that they belong to.

The first layer of a group computes all its layers in one kernel call and attaches to each output tensor what the next
layer computes from it. The forward of that layer returns this precomputed output if its inputs are the identical,
unmodified tensors; otherwise it computes the layer itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ktx.kernels.gradients import is_recorded
from ktx.ops.fusion.fused import KVTarget
from ktx.utils.tensor_memo import TensorMemo


class LayerInputs(NamedTuple):
    """The inputs of a layer, besides hidden states, that its attention depends on."""

    mask: torch.Tensor | None
    embeddings: Any
    cache: Any


class OutputCounter(Protocol):
    """A layer group. `num_unused` counts the precomputed outputs of its last call that no layer has taken yet."""

    num_unused: int


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
        group: The group, which counts unused outputs.
    """

    layer: nn.Module
    out: torch.Tensor
    version: int
    inputs: LayerInputs
    target: KVTarget
    index: int
    group: OutputCounter

    def take_if_valid(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> bool:
        """Consumes `out` if it is the output for these inputs; returns whether it is.

        Consuming it adds the new keys and values to the cache layer and detaches `out` from the input tensor, so only
        one call returns True.

        Args:
            hidden_states: The input tensor that this object is attached to.
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
        _outputs.pop(hidden_states)  # stored hidden states must not retain later ones
        return True


_outputs = TensorMemo[PrecomputedOutput]()


def attach_output(tensor: torch.Tensor, precomputed: PrecomputedOutput) -> None:
    """Attaches to a layer's output tensor what the next layer computes from it."""
    _outputs.set(tensor, precomputed)


def take_output(layer: nn.Module, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor | None:
    """Returns the precomputed output of a layer for these inputs, and consumes it; None if there is no valid one.

    Args:
        layer: The layer whose forward is called.
        hidden_states: [B, S, D], its input; the output of the layer before it carries the precomputed output.
        inputs: The other inputs.
    """
    precomputed = _outputs.get(hidden_states)
    if precomputed is None or precomputed.layer is not layer or not precomputed.take_if_valid(hidden_states, inputs):
        return None
    return precomputed.out


def _same_tables(left: Any, right: Any) -> bool:
    """Whether rotary tables are the same tensors, possibly in a new tuple."""
    if left is right:
        return True
    return isinstance(left, tuple) and isinstance(right, tuple) and all(map(operator.is_, left, right))
