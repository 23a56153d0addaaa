"""The multi-token prediction (MTP) layer that some checkpoints have after their last layer.

DeepSeek-V3, arXiv 2412.19437, section 2.2. It predicts token t + 2 from the model's hidden state at t and token t + 1.
It shares the embedding and the output layer with the model. Rules and files address it as `model.layers.N`, where N is
the number of layers of the model; after loading it is `model.mtp`, which the forward of the model does not call.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.weights.base import WeightSource

# Names of the configuration attribute that holds the number of MTP layers.
MTP_COUNT_NAMES = ("num_nextn_predict_layers", "num_mtp_layers")
# Configuration lists with one entry per layer; the MTP layer gets the entry of the last layer.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types")


def num_mtp_layers(config: Any) -> int:
    """Returns the number of MTP layers in a configuration."""
    return int(next((getattr(config, name) for name in MTP_COUNT_NAMES if getattr(config, name, None)), 0))


class SharedHead(nn.Module):
    """The norm before the output layer, under the name that it has in DeepSeek's checkpoints."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm


class MTP(nn.Module):
    """The MTP layer with its two input norms and the projection that combines a hidden state and an embedding."""

    def __init__(self, index: int, layer: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer})  # by its index in the checkpoint

    @property
    def layer(self) -> Any:
        """The MTP layer."""
        return next(iter(self.layers.values()))

    def forward(self, embeds: torch.Tensor, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Computes the hidden states of the next draft tokens; combines a token's hidden state with the next embedding.

        Args:
            embeds: The embeddings of the tokens that follow, [B, S, D].
            hidden: The hidden states of the tokens, [B, S, D].
            **kwargs: Further arguments of the decoder layer.

        Returns:
            [B, S, D], the input of the output layer and of the next MTP step.
        """
        layer = self.layer
        out = layer(layer.eh_proj(torch.cat([layer.enorm(embeds), layer.hnorm(hidden)], -1)), **kwargs)
        return layer.shared_head.norm(out[0] if isinstance(out, tuple) else out)


def append_layer(model: Any, source: WeightSource) -> None:
    """Appends the MTP layer to the layers of a model on the meta device, where rules and weights address it.

    Args:
        model: The model on the meta device.
        source: The weights.

    Raises:
        UsageError: The configuration or the file has no MTP layer.
    """
    layers, config = model.get_decoder().layers, copy.deepcopy(model.config)
    if not num_mtp_layers(config):
        raise UsageError(
            f"speculative mtp: this configuration of {config.model_type} has no MTP layer ({MTP_COUNT_NAMES[0]}); use"
            " prompt_lookup"
        )
    index = len(layers)
    if source.spec(f"model.layers.{index}.eh_proj.weight") is None:
        raise UsageError(
            f"speculative mtp: {source.path} has no MTP layer (model.layers.{index}.eh_proj.weight). llama.cpp's"
            " converter omits that of DeepSeek: load the safetensors, or use prompt_lookup"
        )
    for name in PER_LAYER_LISTS:
        if isinstance(per_layer := getattr(config, name, None), list):
            setattr(config, name, [*per_layer, per_layer[-1]])
    width, last = config.hidden_size, layers[-1]
    with torch.device("meta"):
        layer = type(last)(config, index)
        layer.eh_proj = nn.Linear(2 * width, width, bias=False)
        layer.enorm, layer.hnorm = copy.deepcopy(last.input_layernorm), copy.deepcopy(last.input_layernorm)
        layer.shared_head = SharedHead(copy.deepcopy(last.input_layernorm))
    layers.append(layer.to(next(last.parameters()).dtype).eval().requires_grad_(False))


def detach_layer(model: Any) -> MTP:
    """Moves the loaded MTP layer from the layers of the model to `model.mtp`, and returns it."""
    layers = model.get_decoder().layers
    index = len(layers) - 1
    layer = layers[index]
    del layers[index]
    model.mtp = MTP(index, layer)
    mtp: MTP = model.mtp
    return mtp
