"""The layer for multi-token prediction that some checkpoints hold behind their last one (DeepSeek-V3, arXiv 2412.19437, section 2.2).

It guesses token t + 2 from the model's state at t and token t + 1. Embedding and output layer are the model's. For rules and files it is
`model.layers.N`, N being how many layers the model has; once loaded it is `model.mtp`, where a forward of the model does not meet it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.weights.base import WeightSource

COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")
KINDS = ("layer_types", "mlp_layer_types")  # lists by layer, of which a layer behind the last is like the last


def mtp_layers(config: Any) -> int:
    """How many such layers a configuration speaks of."""
    return int(next((getattr(config, name) for name in COUNTS if getattr(config, name, None)), 0))


class SharedHead(nn.Module):
    """What comes before the output layer, under DeepSeek's name."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm


class MTP(nn.Module):
    """The layer with its two norms and the matrix that joins a state and an embedding."""

    def __init__(self, index: int, layer: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer})  # by its number in the checkpoint

    @property
    def layer(self) -> Any:
        return next(iter(self.layers.values()))

    def forward(self, embeds: torch.Tensor, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Embeddings of the tokens that follow and states, both [B, S, D] -> [B, S, D], ready for the output layer and for another step."""
        layer = self.layer
        out = layer(layer.eh_proj(torch.cat([layer.enorm(embeds), layer.hnorm(hidden)], -1)), **kwargs)
        return layer.shared_head.norm(out[0] if isinstance(out, tuple) else out)


def append(model: Any, source: WeightSource) -> None:
    """Puts the layer behind a skeleton's last one, where rules and weights find it. UsageError when there is none to be had."""
    layers, config = model.get_decoder().layers, copy.deepcopy(model.config)
    if not mtp_layers(config):
        raise UsageError(
            f"speculative mtp: a {config.model_type} of this configuration has no MTP layer ({COUNTS[0]}); take prompt_lookup"
        )
    index = len(layers)
    if source.spec(f"model.layers.{index}.eh_proj.weight") is None:
        raise UsageError(
            f"speculative mtp: {source.path} holds no MTP layer (model.layers.{index}.eh_proj.weight). llama.cpp's converter leaves DeepSeek's out:"
            " load the safetensors, or take prompt_lookup"
        )
    for name in KINDS:
        if isinstance(kinds := getattr(config, name, None), list):
            setattr(config, name, [*kinds, kinds[-1]])
    width, last = config.hidden_size, layers[-1]
    with torch.device("meta"):
        layer = type(last)(config, index)
        layer.eh_proj = nn.Linear(2 * width, width, bias=False)
        layer.enorm, layer.hnorm = copy.deepcopy(last.input_layernorm), copy.deepcopy(last.input_layernorm)
        layer.shared_head = SharedHead(copy.deepcopy(last.input_layernorm))
    layers.append(layer.to(next(last.parameters()).dtype).eval().requires_grad_(False))


def detach(model: Any) -> MTP:
    """Makes the loaded layer `model.mtp`, which is returned."""
    layers = model.get_decoder().layers
    index = len(layers) - 1
    layer = layers[index]
    del layers[index]
    model.mtp = MTP(index, layer)
    made: MTP = model.mtp
    return made
