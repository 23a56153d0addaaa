"""Builds a transformers configuration from GGUF metadata, for the families whose metadata is sufficient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ktx.errors import BadFile, did_you_mean
from ktx.families import FAMILIES, GGUF_MODEL_TYPES
from ktx.families.family import Family
from ktx.weights.gguf_header import Header, architecture
from ktx.weights.gguf_keys import check_file_type, rope_scaling, to_scalar
from ktx.weights.gguf_tokenizer import eog_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# transformers' name -> metadata key without the architecture prefix; "?" marks optional keys
COMMON = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "intermediate_size": "feed_forward_length?",
    "head_dim": "attention.key_length?",
}
REMEDY = "pass the Hugging Face folder to --model and this file to --weights"


def _find_family(arch: str, metadata: dict[str, Any], path: Path) -> Family:
    """Finds the family whose configuration the metadata describes: of the architecture, with or without experts.

    Raises:
        BadFile: the architecture is not supported, or its metadata lacks part of the configuration.
    """
    families = [family for family in FAMILIES if family.gguf and family.gguf.arch == arch]
    complete = [family for family in families if family.gguf and family.gguf.config_keys is not None]
    if not complete:
        reason = (
            "its metadata lacks part of the configuration"
            if families
            else f"the architecture is not supported{did_you_mean(arch, GGUF_MODEL_TYPES)}"
        )
        raise BadFile(f"{path}: a {arch} file cannot be used alone ({reason}); {REMEDY}")
    has_experts = bool(metadata.get(f"{arch}.expert_count"))
    # The configuration of a family with experts is read from expert_count too.
    return next(
        (family for family in complete if has_experts == ("expert_count" in _config_keys(family).values())), complete[0]
    )


def _config_keys(family: Family) -> Mapping[str, str]:
    return (family.gguf.config_keys if family.gguf else None) or {}


def config_from_gguf(path: Path) -> PreTrainedConfig:
    """Builds the transformers configuration that a file's metadata describes.

    Raises:
        BadFile: the architecture's metadata is not sufficient, or a key is missing or invalid.
    """
    from transformers import AutoConfig

    from ktx.weights.gguf import read_split_header

    header = read_split_header(path)
    arch = architecture(header.metadata, str(path))
    family = _find_family(arch, header.metadata, path)
    model_type = family.model_types[0]
    check_file_type(header.metadata, str(path))
    values = {
        name: value
        for name, key in (COMMON | dict(_config_keys(family))).items()
        if (value := _read_value(header, arch, key)) is not None
    }
    values |= {
        "vocab_size": _vocabulary_size(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_theta": float(header.metadata.get(f"{arch}.rope.freq_base", 10000.0)),
    }
    # block_count includes the layers of multi-token prediction
    values["num_hidden_layers"] -= header.metadata.get(f"{arch}.nextn_predict_layers", 0)
    if arch == "deepseek2":
        model_type = _add_deepseek_values(header, values)
    values |= _bias_options(header, model_type) | dict(family.gguf.fixed if family.gguf else {})
    values |= _rope_parameters(header, arch, values)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    ends = eog_token_ids(header.metadata, str(path))
    if len(ends) > 1 or values["eos_token_id"] is None:
        values["eos_token_id"] = ends or None
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # transformers' checks raise various types; the values come from the file
        detail = str(error).strip().replace("\n", " ")[:300]
        raise BadFile(f"{path}: its metadata is not a valid {model_type} configuration: {detail}") from error


def _bias_options(header: Header, model_type: str) -> dict[str, bool]:
    """Returns the configuration's options for biases; no metadata key has them, so the presence of tensors decides."""
    options = (
        {"attention_bias": "blk.0.attn_q.bias" in header.tensors}
        if model_type in ("llama", "qwen3", "qwen3_moe")
        else {}
    )
    if model_type == "llama":
        options["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    if model_type.startswith("deepseek"):
        options["attention_bias"] = any(
            f"blk.0.attn_{part}.bias" in header.tensors for part in ("q_a", "kv_a_mqa", "output")
        )
    return options


def _read_value(header: Header, arch: str, key: str) -> Any:
    """Returns the value of one metadata key of the architecture, which must be equal for all layers.

    A `key` that ends in "?" may be missing: then None. Raises BadFile for a missing key, or a value per layer.
    """
    full_key = f"{arch}.{key.removesuffix('?')}"
    if full_key in header.metadata:
        value = to_scalar(header.metadata[full_key])
        if isinstance(value, list):
            raise BadFile(f"{header.file}: {full_key} differs from layer to layer, which no supported family has")
        return value
    if key.endswith("?"):
        return None
    raise BadFile(f"{header.file}: the metadata key {full_key} is missing; {REMEDY}")


def _vocabulary_size(header: Header) -> int:
    """The vocabulary's size, from the embedding's rows; files need not store it as a key."""
    if "token_embd.weight" not in header.tensors:
        raise BadFile(f"{header.file}: the tensor token_embd.weight is missing")
    return header.tensors["token_embd.weight"].shape[0]


def _add_deepseek_values(header: Header, values: dict[str, Any]) -> str:
    """Adds to `values` what deepseek2 files store in llama.cpp's own terms; returns transformers' model type.

    V2 and V3 are told apart by their routing: V3's router is a sigmoid.
    """
    metadata = header.metadata
    key_length = metadata.get("deepseek2.attention.key_length_mla", metadata.get("deepseek2.attention.key_length"))
    value_length = metadata.get(
        "deepseek2.attention.value_length_mla", metadata.get("deepseek2.attention.value_length")
    )
    if not isinstance(key_length, int) or not isinstance(value_length, int):
        raise BadFile(
            f"{header.file}: the metadata keys deepseek2.attention.key_length_mla and value_length_mla are missing"
        )
    values |= {
        "qk_nope_head_dim": key_length - values["qk_rope_head_dim"],
        "v_head_dim": value_length,
        "num_key_value_heads": values["num_attention_heads"],
    }
    values["head_dim"] = values["qk_rope_head_dim"]
    values["q_lora_rank"] = values.get("q_lora_rank") or None
    sigmoid = metadata.get("deepseek2.expert_gating_func", 1) == 2  # llama.cpp's numbers: 1 softmax, 2 sigmoid
    values["n_group"], values["topk_group"] = values.get("n_group") or 1, values.get("topk_group") or 1
    values.setdefault("norm_topk_prob", False)  # llama.cpp's default when the key is missing
    values["routed_scaling_factor"] = values.get("routed_scaling_factor") or 1.0
    if not sigmoid:
        values["topk_method"] = "greedy" if values["n_group"] == 1 else "group_limited_greedy"
    return "deepseek_v3" if sigmoid else "deepseek_v2"


def _rope_parameters(header: Header, arch: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns rope_parameters and the related options of the configuration. Removes rope_theta from `values`.

    Files store Llama 3's and longrope's scaling as tables, of which these are recovered, and yarn's and linear scaling
    as keys. Raises BadFile for any other scaling.
    """
    metadata = header.metadata
    kind, factor = rope_scaling(metadata, arch)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    related: dict[str, Any] = {}
    original = metadata.get(f"{arch}.rope.scaling.original_context_length") or values["max_position_embeddings"]
    rotated = metadata.get(f"{arch}.rope.dimension_count")
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    if arch != "deepseek2" and isinstance(rotated, int) and 0 < rotated < width:
        rope["partial_rotary_factor"] = related["partial_rotary_factor"] = rotated / width
    if "rope_freqs.weight" in header.tensors:
        rope |= _recover_llama3_scaling(header, rope["rope_theta"], width)
    elif "rope_factors_long.weight" in header.tensors:
        rope |= {
            "rope_type": "longrope",
            "short_factor": _read_floats(header, "rope_factors_short.weight"),
            "long_factor": _read_floats(header, "rope_factors_long.weight"),
        }
        related["original_max_position_embeddings"] = rope["original_max_position_embeddings"] = int(original)
        if f"{arch}.rope.scaling.attn_factor" in metadata:
            rope["attention_factor"] = float(metadata[f"{arch}.rope.scaling.attn_factor"])
    elif kind == "yarn":
        # The file stores a tenth of mscale_all_dim.
        mscale = float(metadata.get(f"{arch}.rope.scaling.yarn_log_multiplier", 0.0)) * 10
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "beta_fast": metadata.get(f"{arch}.rope.scaling.yarn_beta_fast") or 32,
            "beta_slow": metadata.get(f"{arch}.rope.scaling.yarn_beta_slow") or 1,
            "original_max_position_embeddings": int(original),
        }
        if attention := metadata.get(f"{arch}.rope.scaling.yarn_attn_factor"):
            rope["attention_factor"] = float(attention)
        rope |= {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "longrope"):
        raise BadFile(f"{header.file}: rope scaling {kind!r} is not supported; {REMEDY}")
    if f"{arch}.attention.sliding_window" in metadata and arch == "phi3":
        related["sliding_window"] = _read_value(header, arch, "attention.sliding_window") or None
    return {"rope_parameters": rope} | related


def _recover_llama3_scaling(header: Header, theta: float, width: int) -> dict[str, Any]:
    """Recovers Llama 3's rope scaling from the table of frequency divisors that GGUF files store instead.

    The configuration has the original context length, which follows from the wavelengths at which the divisors change
    from 1 to `factor`. Raises BadFile when no parameters reproduce the table.
    """
    table = np.array(_read_floats(header, "rope_freqs.weight"))
    factor = float(table.max())
    if (table == 1).all():
        return {}  # no scaling
    wavelength = 2 * np.pi * theta ** (np.arange(len(table)) * 2 / width)
    smooth = (1 / table - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.ones_like(table)
    transition = (smooth > 0.01) & (smooth < 0.99)
    # In the transition band 1 + 3 * smooth is the original context length in wavelengths (transformers'
    # _compute_llama3_parameters).
    if transition.any():
        original = round(float(np.median(wavelength[transition] * (1 + 3 * smooth[transition]))))
        recomputed = np.clip((original / wavelength - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - recomputed) / factor + recomputed), table, rtol=1e-2):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise BadFile(f"{header.file}: rope_freqs.weight does not contain a table of Llama 3's rope scaling; {REMEDY}")


def _read_floats(header: Header, name: str) -> list[float]:
    if name not in header.tensors:
        raise BadFile(f"{header.file}: the tensor {name} is missing")
    spec = header.tensors[name]
    if spec.qtype.name != "F32":
        raise BadFile(f"{header.file}: the tensor {name} is {spec.qtype}, expected F32")
    return [float(x) for x in np.fromfile(spec.file, dtype="<f4", count=spec.nbytes // 4, offset=spec.offset)]
