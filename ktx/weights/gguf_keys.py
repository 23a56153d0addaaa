"""Metadata of a GGUF file that changes what its architecture computes: each key agrees with the configuration, or the file is refused.

llama.cpp's src/llama-model.cpp and src/models say what it makes of a key. One that is in no table here is refused unless its value means "off".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ktx.errors import BadFile, did_you_mean

# GGUF architecture -> model types that it is read for; each has a test that loads it as llama.cpp's converter writes it
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "deepseek2": ("deepseek_v2", "deepseek_v3"),
    "ernie4_5-moe": ("ernie4_5_moe",),
    "glm4moe": ("glm4_moe",),
    "gpt-oss": ("gpt_oss",),
    "llama": ("llama", "mistral", "mixtral"),
    "minimax-m2": ("minimax_m2",),
    "phi3": ("phi3",),
    "qwen2": ("qwen2",),
    "qwen2moe": ("qwen2_moe",),
    "qwen3": ("qwen3",),
    "qwen35": ("qwen3_5_text",),
    "qwen35moe": ("qwen3_5_moe_text",),
    "qwen3moe": ("qwen3_moe",),
    "qwen3next": ("qwen3_next",),
}
ELSEWHERE = (  # agreement.py compares them, or the shapes of tensors do; the last do nothing to a text
    "block_count nextn_predict_layers embedding_length attention.head_count attention.head_count_kv "
    "vocab_size context_length feed_forward_length expert_count expert_feed_forward_length expert_shared_feed_forward_length expert_shared_count "
    "attention.q_lora_rank attention.kv_lora_rank rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scale_linear "
    "rope.scaling.attn_factor rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow rope.scaling.yarn_log_multiplier full_attention_interval attention.recurrent_layers "
    "rope.scaling.finetuned rope.dimension_sections tensor_data_layout attention.layer_norm_epsilon pooling_type"
).split()
NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that mean "off", beside 0, False and nothing
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
UNSET = (  # 0 says nothing
    "attention.scale",
    "expert_gating_func",
    "expert_weights_scale",
    "expert_group_count",
    "expert_group_used_count",
)
NORMED = {"mixtral": True, "minimax_m2": True, "gpt_oss": True, "ernie4_5_moe": True, "qwen3_5_moe_text": True}
GATING = {
    "deepseek_v3": (2,),
    "glm4_moe": (2,),
    "minimax_m2": (2,),
    "gpt_oss": (1, 3),
}  # of an enumeration; others: softmax


def refuse_architecture(arch: str, file: str, model_type: str) -> None:
    """BadFile for an architecture that is not read from GGUF, or not for this model."""
    if arch not in ARCHITECTURES:
        raise BadFile(
            f"{file}: general.architecture is {arch!r}{did_you_mean(arch, ARCHITECTURES)}, which ktx does not read from GGUF; "
            f"it reads {', '.join(ARCHITECTURES)}; take the model's safetensors"
        )
    if model_type not in ARCHITECTURES[arch]:
        raise BadFile(
            f"{file}: general.architecture is {arch!r}, read for {', '.join(ARCHITECTURES[arch])}, but the configuration is of {model_type}; "
            "take the folder that the file was made of, or the model's safetensors"
        )


def refuse_kind(metadata: Mapping[str, Any], file: str) -> None:
    """BadFile for a file that is no model but something that goes with one."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        remedy = ": give it to --lora" if kind == "adapter" else ""
        raise BadFile(f"{file}: general.type is {kind!r}; it goes with a model but is none{remedy}")


def scalar(value: Any) -> Any:
    """A value of metadata; of an array whose items are all the same, one of them, else a list."""
    if not hasattr(value, "__iter__") or isinstance(value, str):
        return value
    items = list(value)
    return items[0] if items and all(item == items[0] for item in items) else items


# ---- what a configuration says

ANY = object()  # it has no say: shapes of tensors have


def rope_of(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotated(config: Any) -> int:
    if getattr(config, "kv_lora_rank", None):
        return int(config.qk_rope_head_dim)
    part = rope_of(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim(config) * part)


def _theta(config: Any) -> Any:
    return rope_of(config).get("rope_theta") or getattr(config, "rope_theta", None)


def _first(*names: str) -> Callable[[Any], Any]:
    return lambda config: next(
        (getattr(config, name) for name in names if getattr(config, name, None) is not None), None
    )


def _latent(of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda config: of(config) if getattr(config, "kv_lora_rank", None) else None


def _normed(config: Any) -> Any:
    if config.model_type == "deepseek_v2":
        return False  # its router never does
    return NORMED.get(config.model_type, getattr(config, "norm_topk_prob", None))


def _groups(name: str) -> Callable[[Any], Any]:
    """None where routing ignores groups."""
    return lambda config: None if getattr(config, "topk_method", "") == "greedy" else getattr(config, name, None)


def _width(config: Any) -> Any:
    return ANY if getattr(config, "kv_lora_rank", None) else head_dim(config)


SAME: dict[
    str, tuple[str, Callable[[Any], Any]]
] = {  # key after the architecture -> what it is, and the configuration's value
    "attention.layer_norm_rms_epsilon": ("RMS norm's epsilon", _first("rms_norm_eps")),
    "attention.key_length": ("key width", _width),
    "attention.value_length": ("value width", _width),
    "attention.key_length_mla": ("key width", _latent(lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim)),
    "attention.value_length_mla": ("value width", _latent(lambda c: c.v_head_dim)),
    "attention.key_length_swa": ("key width in windows", head_dim),
    "attention.value_length_swa": ("value width in windows", head_dim),
    "attention.scale": ("scale of attention", lambda c: head_dim(c) ** -0.5),
    "attention.causal": ("causal attention", lambda c: True),
    "rope.freq_base": ("rope theta", _theta),
    "rope.freq_base_swa": ("rope theta in windows", _theta),
    "rope.dimension_count": ("rotated columns", _rotated),
    "rope.dimension_count_swa": ("rotated columns in windows", _rotated),
    "expert_used_count": ("experts a token", _first("num_experts_per_tok", "moe_k")),
    "expert_weights_scale": ("scale of experts", _first("routed_scaling_factor")),
    "expert_weights_norm": ("experts' weights made to add up to one", _normed),
    "expert_gating_func": ("gate of experts", lambda c: GATING.get(c.model_type, (1,))),
    "expert_group_count": ("groups of experts", _groups("n_group")),
    "expert_group_used_count": ("groups of experts a token", _groups("topk_group")),
    "leading_dense_block_count": ("leading dense layers", _first("first_k_dense_replace", "moe_layer_start_index")),
    "interleave_moe_layer_step": ("layers from one with experts to the next", _first("moe_layer_interval")),
    "ssm.conv_kernel": ("width of the convolution", _first("linear_conv_kernel_dim")),
    "ssm.state_size": ("key width of linear attention", _first("linear_key_head_dim")),
    "ssm.group_count": ("key heads of linear attention", _first("linear_num_key_heads")),
    "ssm.time_step_rank": ("value heads of linear attention", _first("linear_num_value_heads")),
    "ssm.inner_size": (
        "value columns of linear attention",
        lambda c: c.linear_value_head_dim * c.linear_num_value_heads if hasattr(c, "linear_value_head_dim") else None,
    ),
}


def key_differences(metadata: Mapping[str, Any], arch: str, config: Any) -> list[str]:
    """A line for each key of the architecture that the configuration contradicts or that nobody here computes."""
    found = []
    for full, raw in metadata.items():
        key = full.removeprefix(f"{arch}.")
        if key == full or key in ELSEWHERE or key.startswith("attention.sliding_window"):
            continue
        value = scalar(raw)
        off = value in (0, "", []) or value in NEUTRAL.get(key, ())
        if key not in SAME:
            if not off:
                found.append(f"{full} is {_shown(value)}, which ktx does not compute")
            continue
        what, of = SAME[key]
        expected = of(config)
        if expected is ANY:
            continue
        if expected is None and not off:
            found.append(f"{full} is {_shown(value)}, which a {config.model_type} does not compute")
        elif expected is not None and not _same(value, expected) and not (value == 0 and key in UNSET):
            found.append(f"{what}: {_shown(value)} in the file ({full}), {_shown(expected)} in the configuration")
    return [*found, *_window(metadata, arch, config), *_linear_layers(metadata, arch, config)]


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return value in expected
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-12)
    return bool(value == expected)


def _shown(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)[:80]


def _window(metadata: Mapping[str, Any], arch: str, config: Any) -> list[str]:
    """Attention to a window: of as many tokens, and in the same layers, as the configuration says."""
    in_file = scalar(metadata.get(f"{arch}.attention.sliding_window"))
    context = metadata.get(f"{arch}.context_length")
    if not in_file or (isinstance(in_file, int) and isinstance(context, int) and in_file >= context):
        return []  # it cuts nothing off
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if in_file != window:
        return [f"attention's window: {in_file} tokens in the file, {window or 'none'} in the configuration"]
    pattern = scalar(metadata.get(f"{arch}.attention.sliding_window_pattern"))
    if pattern is None or not kinds:
        return []
    if isinstance(pattern, bool):
        pattern = [pattern] * len(kinds)
    if isinstance(pattern, int):  # the last of so many sees everything
        pattern = [(i + 1) % pattern != 0 for i in range(len(kinds))] if pattern > 1 else [not pattern] * len(kinds)
    if [bool(windowed) for windowed in pattern[: len(kinds)]] != [kind == "sliding_attention" for kind in kinds]:
        return ["attention's window: in other layers in the file than in the configuration"]
    return []


def _linear_layers(metadata: Mapping[str, Any], arch: str, config: Any) -> list[str]:
    """Which layers are linear attention."""
    kinds = getattr(config, "layer_types", None) or []
    listed, every = metadata.get(f"{arch}.attention.recurrent_layers"), metadata.get(f"{arch}.full_attention_interval")
    if listed is not None:
        linear = [bool(item) for item in listed][: len(kinds)]
    elif isinstance(every, int) and every:
        linear = [(i + 1) % every != 0 for i in range(len(kinds))]
    else:
        return []
    if linear == [kind == "linear_attention" for kind in kinds]:
        return []
    return ["linear attention: in other layers in the file than in the configuration"]


# ---- scaled rotary positions

PLAIN = ("none", "default")
TYPES = {"default": "none", "su": "longrope"}  # transformers' names -> llama.cpp's
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def scaling_of(metadata: Mapping[str, Any], arch: str) -> tuple[str, float]:
    """Kind and factor of rope scaling; llama.cpp takes linear where only a factor is named, also by its old key."""
    factor = metadata.get(f"{arch}.rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear")) or 1.0
    kind = metadata.get(f"{arch}.rope.scaling.type") or ("linear" if factor != 1.0 else "none")
    return ("none", 1.0) if kind == "linear" and factor == 1.0 else (str(kind), float(factor))


def rope_differences(
    metadata: Mapping[str, Any], arch: str, config: Any, tables: Mapping[str, Callable[[], list[float]]]
) -> list[str]:
    """Lines on scaled rotary positions. `tables` gives the values of those of ROPE_TABLES that the file has."""
    rope = rope_of(config)
    mine = TYPES.get(str(rope.get("rope_type", "default")), str(rope.get("rope_type")))
    found = _table_differences(rope, mine, config, tables)
    kind, factor = scaling_of(metadata, arch)
    said = {
        key: metadata[f"{arch}.rope.scaling.{key}"]
        for key in _scaling(rope, config)
        if f"{arch}.rope.scaling.{key}" in metadata
    }
    if tables:
        said.pop("factor", None)
    elif kind != mine and (f"{arch}.rope.scaling.type" in metadata or kind not in PLAIN):
        return [*found, f"rope scaling: {kind} in the file, {mine} in the configuration"]
    if kind == mine == "linear":
        said["factor"] = factor
    for key, value in said.items():
        expected = _scaling(rope, config)[key]
        if kind in PLAIN and key != "attn_factor":
            continue  # nothing is scaled
        if not any(_same(value, one) for one in expected):
            shown = ", ".join(_shown(one) for one in expected)
            found.append(f"rope.scaling.{key}: {_shown(value)} in the file, {shown} in the configuration")
    return found


def _scaling(rope: Mapping[str, Any], config: Any) -> dict[str, tuple[Any, ...]]:
    """Values of keys under rope.scaling that agree with the configuration."""
    factor = float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = original or config.max_position_embeddings
    attention = rope.get("attention_factor")
    stretched = config.max_position_embeddings / original
    long = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
    return {
        "factor": (factor,),
        "original_context_length": (original,),
        "attn_factor": (attention if attention is not None else long if rope.get("rope_type") == "longrope" else 1.0,),
        "yarn_ext_factor": (1, -1),
        "yarn_attn_factor": (
            attention if attention is not None else 0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
        ),
        "yarn_beta_fast": (rope.get("beta_fast") or 32,),
        "yarn_beta_slow": (rope.get("beta_slow") or 1,),
        "yarn_log_multiplier": (0.1 * float(rope.get("mscale_all_dim") or 0),),
    }


def _table_differences(
    rope: Mapping[str, Any], mine: str, config: Any, tables: Mapping[str, Callable[[], list[float]]]
) -> list[str]:
    found = []
    for name, read in tables.items():
        kind = "llama3" if name == "rope_freqs.weight" else "longrope"
        table = read()
        if all(value == 1.0 for value in table):
            continue  # divides by one
        if mine != kind:
            found.append(f"rope scaling: {kind} in the file ({name}), {mine} in the configuration")
            continue
        expected = (
            _divisors(rope, len(table), config)
            if kind == "llama3"
            else rope[f"{name.split('_')[2].split('.')[0]}_factor"]
        )
        if len(expected) != len(table) or not all(
            math.isclose(a, b, rel_tol=1e-2) for a, b in zip(table, expected, strict=True)
        ):
            found.append(f"rope scaling: {name} holds other numbers than the configuration makes")
    return found


def _divisors(rope: Mapping[str, Any], count: int, config: Any) -> list[float]:
    """Llama 3's, by which frequencies are divided (transformers' _compute_llama3_parameters)."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    found = []
    for i in range(count):
        wavelength = 2 * math.pi * _theta(config) ** (i / count)
        smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found
