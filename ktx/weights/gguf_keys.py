"""Checks the GGUF metadata that changes an architecture's computation.

A key that contradicts the configuration is an error. The meaning of each key follows llama.cpp's src/llama-model.cpp
and src/models. A key that is in no table here is an error unless its value means "off".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ktx.errors import BadFile, did_you_mean
from ktx.families import GGUF_MODEL_TYPES, gguf_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHECKED_ELSEWHERE = (  # by check_config.py, or by the tensors' shapes; the last five do not affect text models
    "block_count",
    "nextn_predict_layers",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "vocab_size",
    "context_length",
    "feed_forward_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_shared_count",
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
    "full_attention_interval",
    "attention.recurrent_layers",
    "rope.scaling.finetuned",
    "rope.dimension_sections",
    "tensor_data_layout",
    "attention.layer_norm_epsilon",
    "pooling_type",
)
OFF_VALUES: dict[str, tuple[Any, ...]] = {  # values that mean "off", in addition to 0, False and empty
    "logit_scale": (1,),
    "residual_scale": (1,),
    "embedding_scale": (1,),
    "expert_weights_scale": (1,),
    "expert_group_count": (1,),
    "expert_group_used_count": (1,),
    "moe_every_n_layers": (1,),
    "interleave_moe_layer_step": (1,),
    "num_loops": (1,),
    "rope.scaling.alpha": (1,),
}
UNSET_IF_ZERO = (
    "attention.scale",
    "expert_gating_func",
    "expert_weights_scale",
    "expert_group_count",
    "expert_group_used_count",
)


def check_architecture(arch: str, file: str, model_type: str) -> None:
    """Raises BadFile when the architecture is not supported in GGUF, or not for this model type."""
    if arch not in GGUF_MODEL_TYPES:
        raise BadFile(
            f"{file}: general.architecture is {arch!r}{did_you_mean(arch, GGUF_MODEL_TYPES)}, which ktx does not load "
            f"from GGUF; supported: {', '.join(GGUF_MODEL_TYPES)}; use the model's safetensors"
        )
    if model_type not in GGUF_MODEL_TYPES[arch]:
        raise BadFile(
            f"{file}: general.architecture is {arch!r}, supported for {', '.join(GGUF_MODEL_TYPES[arch])}, but the "
            f"configuration is of {model_type}; use the folder that the file was converted from, or the model's "
            "safetensors"
        )


def check_file_type(metadata: Mapping[str, Any], file: str) -> None:
    """Raises BadFile when general.type is not "model" (an adapter, a multimodal projector, ...)."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        remedy = ": pass it to --lora" if kind == "adapter" else ""
        raise BadFile(f"{file}: general.type is {kind!r}; it belongs to a model but is not one{remedy}")


def to_scalar(value: Any) -> Any:
    """A metadata value as a scalar: an array whose items are all equal becomes that item, any other array a list."""
    if not hasattr(value, "__iter__") or isinstance(value, str):
        return value
    items = list(value)
    return items[0] if items and all(item == items[0] for item in items) else items


# ---- expected values from the configuration

UNCHECKED = object()  # the configuration does not determine the value; the tensors' shapes do


def rope_parameters_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope parameters of full attention."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))


def head_dim(config: PreTrainedConfig) -> int:
    """Returns the number of columns of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _num_rotated_columns(config: PreTrainedConfig) -> int:
    """The number of a head's columns that rope rotates."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.qk_rope_head_dim)
    factor = (
        rope_parameters_of(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    )
    return int(head_dim(config) * factor)


def _theta(config: PreTrainedConfig) -> Any:
    return rope_parameters_of(config).get("rope_theta") or getattr(config, "rope_theta", None)


def _first_set(*names: str) -> Callable[[Any], Any]:
    """Returns a function from a configuration to the first of these attributes that is set."""
    return lambda config: next(
        (getattr(config, name) for name in names if getattr(config, name, None) is not None), None
    )


def _if_mla(expected: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Restricts an expected value to MLA models; for the others it is None."""
    return lambda config: expected(config) if getattr(config, "kv_lora_rank", None) else None


def _norm_topk_prob(config: PreTrainedConfig) -> Any:
    family = gguf_of(config.model_type)
    if family and family.norm_topk_prob is not None:
        return family.norm_topk_prob
    return getattr(config, "norm_topk_prob", None)


def _gating_functions(config: PreTrainedConfig) -> tuple[int, ...]:
    """The accepted values of llama.cpp's enumeration."""
    family = gguf_of(config.model_type)
    return family.gating if family else (1,)


def _expert_groups(name: str) -> Callable[[Any], Any]:
    """Reads attribute `name` of a configuration; None when its routing ignores groups."""
    return lambda config: None if getattr(config, "topk_method", "") == "greedy" else getattr(config, name, None)


def _kv_width(config: PreTrainedConfig) -> Any:
    return UNCHECKED if getattr(config, "kv_lora_rank", None) else head_dim(config)


# key without the architecture prefix -> (description for messages, the expected value from a configuration)
EXPECTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "attention.layer_norm_rms_epsilon": ("RMS norm's epsilon", _first_set("rms_norm_eps")),
    "attention.key_length": ("key width", _kv_width),
    "attention.value_length": ("value width", _kv_width),
    "attention.key_length_mla": ("key width", _if_mla(lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim)),
    "attention.value_length_mla": ("value width", _if_mla(lambda c: c.v_head_dim)),
    "attention.key_length_swa": ("key width of sliding-window layers", head_dim),
    "attention.value_length_swa": ("value width of sliding-window layers", head_dim),
    "attention.scale": (
        "attention scale",
        lambda c: getattr(c, "attention_multiplier", None) or head_dim(c) ** -0.5,
    ),
    "attention.causal": ("causal attention", lambda c: True),
    "rope.freq_base": ("rope theta", _theta),
    "rope.freq_base_swa": ("rope theta of sliding-window layers", _theta),
    "rope.dimension_count": ("rotated columns", _num_rotated_columns),
    "rope.dimension_count_swa": ("rotated columns of sliding-window layers", _num_rotated_columns),
    "expert_used_count": ("experts per token", _first_set("num_experts_per_tok", "moe_k")),
    "expert_weights_scale": ("scale of routing weights", _first_set("routed_scaling_factor")),
    "expert_weights_norm": ("normalized routing weights", _norm_topk_prob),
    "expert_gating_func": ("router's gating function", _gating_functions),
    "expert_group_count": ("expert groups", _expert_groups("n_group")),
    "expert_group_used_count": ("expert groups per token", _expert_groups("topk_group")),
    "leading_dense_block_count": ("leading dense layers", _first_set("first_k_dense_replace", "moe_layer_start_index")),
    "interleave_moe_layer_step": ("distance between MoE layers", _first_set("moe_layer_interval")),
    "ssm.conv_kernel": ("convolution width", _first_set("linear_conv_kernel_dim")),
    "ssm.state_size": ("key width of linear attention", _first_set("linear_key_head_dim")),
    "ssm.group_count": ("key heads of linear attention", _first_set("linear_num_key_heads")),
    "ssm.time_step_rank": ("value heads of linear attention", _first_set("linear_num_value_heads")),
    "ssm.inner_size": (
        "value columns of linear attention",
        lambda c: c.linear_value_head_dim * c.linear_num_value_heads if hasattr(c, "linear_value_head_dim") else None,
    ),
}


def _declared_keys(config: PreTrainedConfig) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """The keys that the declaration of the configuration's family names, each with the attribute of its value."""
    family = gguf_of(config.model_type)
    keys = (family.config_keys if family else None) or {}
    return {key.removesuffix("?"): (name, _first_set(name)) for name, key in keys.items()}


def key_mismatches(metadata: Mapping[str, Any], arch: str, config: PreTrainedConfig) -> list[str]:
    """Returns a line for each key of `arch` that contradicts the configuration or is not supported.

    Unknown keys are reported too unless their value means "off", because a key that ktx ignores may change the
    computation. UNCHECKED values follow from the tensors' shapes, which are checked elsewhere.
    """
    mismatches = []
    expected_values = _declared_keys(config) | EXPECTED
    for full_key, raw in metadata.items():
        key = full_key.removeprefix(f"{arch}.")
        if key == full_key or key in CHECKED_ELSEWHERE or key.startswith("attention.sliding_window"):
            continue
        value = to_scalar(raw)
        is_off = value in (0, "", []) or value in OFF_VALUES.get(key, ())
        if key not in expected_values:
            if not is_off:
                mismatches.append(f"{full_key} is {_format(value)}, which ktx does not support")
            continue
        description, expected_of = expected_values[key]
        expected = expected_of(config)
        if expected is UNCHECKED:
            continue
        if expected is None and not is_off:
            mismatches.append(f"{full_key} is {_format(value)}, which {config.model_type} does not support")
        elif expected is not None and not _same(value, expected) and not (value == 0 and key in UNSET_IF_ZERO):
            mismatches.append(
                f"{description}: {_format(value)} in the file ({full_key}), {_format(expected)} in the configuration"
            )
    return [
        *mismatches,
        *_sliding_window_mismatches(metadata, arch, config),
        *_linear_layer_mismatches(metadata, arch, config),
    ]


def _same(value: Any, expected: Any) -> bool:
    """Whether a file's value is one of the accepted ones (a tuple), or equals the expected one up to rounding."""
    if isinstance(expected, tuple):
        return value in expected
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-12)
    return bool(value == expected)


def _format(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)[:80]


def _sliding_window_mismatches(metadata: Mapping[str, Any], arch: str, config: PreTrainedConfig) -> list[str]:
    """Returns mismatches in the size of the sliding window, or in the layers that use it.

    A file gives the layers as a list of booleans or as the period of a pattern; without either only sizes are compared.
    """
    in_file = to_scalar(metadata.get(f"{arch}.attention.sliding_window"))
    context = metadata.get(f"{arch}.context_length")
    if not in_file or (isinstance(in_file, int) and isinstance(context, int) and in_file >= context):
        return []  # the window covers the whole context
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if in_file != window:
        return [f"sliding window: {in_file} tokens in the file, {window or 'none'} in the configuration"]
    pattern = to_scalar(metadata.get(f"{arch}.attention.sliding_window_pattern"))
    if pattern is None or not kinds:
        return []
    if isinstance(pattern, bool):
        pattern = [pattern] * len(kinds)
    if isinstance(pattern, int):  # the last layer of each `pattern` layers has full attention
        pattern = [(i + 1) % pattern != 0 for i in range(len(kinds))] if pattern > 1 else [not pattern] * len(kinds)
    if [bool(windowed) for windowed in pattern[: len(kinds)]] != [kind == "sliding_attention" for kind in kinds]:
        return ["sliding window: the file and the configuration use it in different layers"]
    return []


def _linear_layer_mismatches(metadata: Mapping[str, Any], arch: str, config: PreTrainedConfig) -> list[str]:
    """Returns a line if file and configuration disagree on the layers with linear attention, else an empty list.

    A file lists these layers, or gives N for full attention in every N-th layer.
    """
    kinds = getattr(config, "layer_types", None) or []
    listed, interval = (
        metadata.get(f"{arch}.attention.recurrent_layers"),
        metadata.get(f"{arch}.full_attention_interval"),
    )
    if listed is not None:
        linear = [bool(item) for item in listed][: len(kinds)]
    elif isinstance(interval, int) and interval:
        linear = [(i + 1) % interval != 0 for i in range(len(kinds))]
    else:
        return []
    if linear == [kind == "linear_attention" for kind in kinds]:
        return []
    return ["linear attention: the file and the configuration use it in different layers"]


# ---- rope scaling

UNSCALED = ("none", "default")
SCALING_TYPES = {"default": "none", "su": "longrope"}  # transformers' names -> llama.cpp's
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def rope_scaling(metadata: Mapping[str, Any], arch: str) -> tuple[str, float]:
    """The type and factor of rope scaling; like llama.cpp, a factor without a type means linear (either key)."""
    factor = metadata.get(f"{arch}.rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear")) or 1.0
    kind = metadata.get(f"{arch}.rope.scaling.type") or ("linear" if factor != 1.0 else "none")
    return ("none", 1.0) if kind == "linear" and factor == 1.0 else (str(kind), float(factor))


def rope_mismatches(
    metadata: Mapping[str, Any], arch: str, config: PreTrainedConfig, tables: Mapping[str, Callable[[], list[float]]]
) -> list[str]:
    """Returns mismatches in rope scaling, of the keys and of the tables of frequency divisors.

    `tables`: readers of the ROPE_TABLES that the file has, by tensor name; they replace the keys for type and factor.
    """
    rope = rope_parameters_of(config)
    config_kind = SCALING_TYPES.get(str(rope.get("rope_type", "default")), str(rope.get("rope_type")))
    mismatches = _table_mismatches(rope, config_kind, config, tables)
    kind, factor = rope_scaling(metadata, arch)
    in_file = {
        key: metadata[f"{arch}.rope.scaling.{key}"]
        for key in _expected_scaling(rope, config)
        if f"{arch}.rope.scaling.{key}" in metadata
    }
    if tables:
        in_file.pop("factor", None)
    elif kind != config_kind and (f"{arch}.rope.scaling.type" in metadata or kind not in UNSCALED):
        return [*mismatches, f"rope scaling: {kind} in the file, {config_kind} in the configuration"]
    if kind == config_kind == "linear":
        in_file["factor"] = factor
    for key, value in in_file.items():
        expected = _expected_scaling(rope, config)[key]
        if kind in UNSCALED and key != "attn_factor":
            continue  # nothing is scaled
        if not any(_same(value, one) for one in expected):
            in_config = ", ".join(_format(one) for one in expected)
            mismatches.append(f"rope.scaling.{key}: {_format(value)} in the file, {in_config} in the configuration")
    return mismatches


def _expected_scaling(rope: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, tuple[Any, ...]]:
    """Returns the values that each GGUF key under rope.scaling may have, if the file has it, for this configuration."""
    factor = float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = original or config.max_position_embeddings
    attention = rope.get("attention_factor")
    extension = config.max_position_embeddings / original
    longrope_factor = math.sqrt(1 + math.log(extension) / math.log(original)) if extension > 1 else 1.0
    return {
        "factor": (factor,),
        "original_context_length": (original,),
        "attn_factor": (
            attention if attention is not None else longrope_factor if rope.get("rope_type") == "longrope" else 1.0,
        ),
        "yarn_ext_factor": (1, -1),
        "yarn_attn_factor": (
            # YaRN's own factor by default
            attention if attention is not None else 0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
        ),
        "yarn_beta_fast": (rope.get("beta_fast") or 32,),
        "yarn_beta_slow": (rope.get("beta_slow") or 1,),
        "yarn_log_multiplier": (0.1 * float(rope.get("mscale_all_dim") or 0),),
    }


def _table_mismatches(
    rope: Mapping[str, Any], config_kind: str, config: PreTrainedConfig, tables: Mapping[str, Callable[[], list[float]]]
) -> list[str]:
    """Returns mismatches between the file's rope tables and the configuration's rope scaling.

    A file stores scaling of Llama 3 (rope_freqs) and of longrope (rope_factors_long, rope_factors_short) as divisors of
    each frequency. A table of ones means no scaling.
    """
    mismatches = []
    for name, read in tables.items():
        kind = "llama3" if name == "rope_freqs.weight" else "longrope"
        table = read()
        if all(value == 1.0 for value in table):
            continue  # no scaling
        if config_kind != kind:
            mismatches.append(f"rope scaling: {kind} in the file ({name}), {config_kind} in the configuration")
            continue
        expected = (
            _llama3_divisors(rope, len(table), config)
            if kind == "llama3"
            else rope[f"{name.split('_')[2].split('.')[0]}_factor"]  # long_factor or short_factor
        )
        if len(expected) != len(table) or not all(
            math.isclose(a, b, rel_tol=1e-2) for a, b in zip(table, expected, strict=True)
        ):
            mismatches.append(f"rope scaling: the values of {name} differ from those that the configuration gives")
    return mismatches


def _llama3_divisors(rope: Mapping[str, Any], count: int, config: PreTrainedConfig) -> list[float]:
    """Returns Llama 3's divisor of each frequency (transformers' _compute_llama3_parameters).

    Low frequencies are divided by `factor`, high ones by 1, those between by a smooth transition.
    """
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    divisors = []
    for i in range(count):
        wavelength = 2 * math.pi * _theta(config) ** (i / count)
        smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors
