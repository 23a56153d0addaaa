"""Checks that a GGUF file belongs to a configuration: reports every mismatch before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktx.weights.base import TensorSpec
from ktx.weights.gguf_keys import to_scalar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# (metadata key without the architecture prefix, configuration attributes of which the first that exists is compared,
# description for messages)
COMPARED_KEYS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("embedding_length", ("hidden_size",), "hidden size"),
    ("attention.head_count", ("num_attention_heads",), "attention heads"),
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), "experts"),
    ("expert_feed_forward_length", ("moe_intermediate_size",), "expert width"),
    ("attention.kv_lora_rank", ("kv_lora_rank",), "kv_lora_rank"),
)


def gguf_mismatches(
    metadata: Mapping[str, Any], arch: str, tensors: Mapping[str, TensorSpec], config: PreTrainedConfig
) -> list[str]:
    """Returns the mismatches between GGUF metadata and configuration, one line each; empty when they agree."""
    mismatches: list[str | None] = [
        _layers_mismatch(metadata, arch, config),
        _vocabulary_mismatch(tensors, config),
        _kv_heads_mismatch(metadata, arch, config),
    ]
    mismatches += _varying_values(metadata, arch)
    for key, attributes, what in COMPARED_KEYS:
        in_file, in_config = to_scalar(metadata.get(f"{arch}.{key}")), _first_set(config, attributes)
        if isinstance(in_file, int) and in_file and isinstance(in_config, int) and in_file != in_config:
            mismatches.append(f"{what}: {in_file} in the file, {in_config} in the configuration")
    return [line for line in mismatches if line]


def _varying_values(metadata: Mapping[str, Any], arch: str) -> list[str]:
    """Returns a line for each value that differs from layer to layer, which no supported family has."""
    keys = (
        "attention.head_count",
        "attention.head_count_kv",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_used_count",
    )
    varying = [(f"{arch}.{key}", to_scalar(metadata.get(f"{arch}.{key}"))) for key in keys]
    return [f"{key} differs from layer to layer" for key, value in varying if isinstance(value, list)]


def _first_set(config: PreTrainedConfig, attributes: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in attributes if getattr(config, name, None) is not None), None)


def _layers_mismatch(metadata: Mapping[str, Any], arch: str, config: PreTrainedConfig) -> str | None:
    """The mismatch in the number of layers, or None. A file may count the layers of multi-token prediction or not."""
    blocks = metadata.get(f"{arch}.block_count")
    extra = metadata.get(f"{arch}.nextn_predict_layers", 0)
    layers = int(config.num_hidden_layers)
    if not isinstance(blocks, int) or layers in (blocks, blocks - (extra if isinstance(extra, int) else 0)):
        return None
    return f"layers: {blocks} in the file, {layers} in the configuration"


def _vocabulary_mismatch(tensors: Mapping[str, TensorSpec], config: PreTrainedConfig) -> str | None:
    """The mismatch in the size of the vocabulary, or None."""
    spec, vocabulary = tensors.get("token_embd.weight"), getattr(config, "vocab_size", None)
    if spec is None or vocabulary is None or spec.shape[0] == vocabulary:
        return None
    return f"vocabulary: {spec.shape[0]} in the file, {vocabulary} in the configuration"


def _kv_heads_mismatch(metadata: Mapping[str, Any], arch: str, config: PreTrainedConfig) -> str | None:
    """The mismatch in the number of key/value heads, or None.

    It is not compared for MLA models, which cache one latent: their files in absorbed form have one head.
    """
    in_file = to_scalar(metadata.get(f"{arch}.attention.head_count_kv"))
    in_config = getattr(config, "num_key_value_heads", None)
    if (
        getattr(config, "kv_lora_rank", None)
        or not isinstance(in_file, int)
        or in_config is None
        or in_file == in_config
    ):
        return None
    return f"key/value heads: {in_file} in the file, {in_config} in the configuration"
