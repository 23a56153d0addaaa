"""Checks a checkpoint's quantization configuration against one table of supported schemes, before anything is loaded.

Every key of a scheme must describe exactly what the kernels compute. A method, key or value that is not in the table is
an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktx.errors import BadFile, did_you_mean
from ktx.quant.types import FP8_BLOCK
from ktx.utils.json_file import read_object
from ktx.weights.verdict import REMEDY

ABSENT = object()
# A list of module names, null or missing: which modules are quantized follows from the tensors' types.
MODULE_LIST = object()


@dataclass(frozen=True)
class Scheme:
    """A supported quantization.

    `what`: its description. `keys`: the accepted values of each configuration key, as a tuple (with ABSENT: the key may
    be missing) or MODULE_LIST.
    """

    what: str
    keys: Mapping[str, Any]


SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme(
        f"e4m3 with one scale per {FP8_BLOCK} x {FP8_BLOCK} weights",
        {
            "quant_method": ("fp8",),
            "fmt": ("e4m3", ABSENT),
            "weight_block_size": ([FP8_BLOCK, FP8_BLOCK], ABSENT),  # transformers' default is the same
            "activation_scheme": ("dynamic", ABSENT),
            # The format of scales stored as floats; scales of other types are rejected when they are read.
            "scale_fmt": ("float", "ue8m0", None, ABSENT),
            "expert_dtype": ("fp8", None, ABSENT),
            "kv_cache_scheme": (None, ABSENT),
            "modules_to_convert": (None, [], ABSENT),  # embeddings with one scale
            "modules_to_not_convert": MODULE_LIST,
            "ignored_layers": MODULE_LIST,
            "dequantize": (True, False, None, ABSENT),
        },
    ),
    "ktx": Scheme(  # ktx.weights.packed
        "each weight in its type, as save_pretrained(folder, packed=True) writes it",
        {"quant_method": ("ktx",), "version": (1,)},
    ),
}

UNSUPPORTED_METHODS: Mapping[str, str] = {  # known methods that are not supported
    "aqlm": "AQLM, additive codebooks",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "FBGEMM, FP8 with one scale per row",
    "fouroversix": "Four Over Six",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's own",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal's affine groups",
    "modelopt": "NVIDIA's ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "AMD's Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}

# Keys of a multimodal config.json that contain the language model's configuration
SUB_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
# Keys of a config.json that contain the quantization: the current name and two others
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
METHOD_FILES: Mapping[str, str] = {  # separate configuration files, and their method
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def check_quantization(config: Mapping[str, Any], where: str, *folders: Path) -> str:
    """Checks a checkpoint's quantization; returns a one-line description of it, empty when it is not quantized.

    Args:
        config: the raw config.json.
        where: the name of `config` in messages.
        folders: folders that may contain separate quantization configurations (METHOD_FILES).

    Raises:
        BadFile: the scheme is not supported.
    """
    found = [_check_scheme(quantization, place) for place, quantization in _find_quantizations(config, where)]
    for folder in dict.fromkeys(folders):
        for name, method in METHOD_FILES.items():
            if (file := folder / name).is_file() and (quantization := _read_file(file, method)):
                found.append(_check_scheme(quantization, str(file)))
    return found[0] if found else ""


def _find_quantizations(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of every quantization entry in a configuration."""
    for sub_config in ("", *SUB_CONFIGS):
        section: Any = config.get(sub_config) if sub_config else config
        for key in CONFIG_KEYS if isinstance(section, Mapping) else ():
            if section.get(key):
                yield f"{where}: {sub_config}{'.' * bool(sub_config)}{key}", section[key]


def _read_file(file: Path, method: str) -> dict[str, Any] | None:
    """Reads a quantization from a file of its own and adds the method, which only the file's name tells.

    Returns None for a ModelOpt file without an algorithm, which quantizes nothing.
    """
    content = read_object(file, "quantization")
    quantization = content.get("quantization", content) if method == "modelopt" else content
    if (
        method == "modelopt"
        and isinstance(quantization, dict)
        and not any(value for key, value in quantization.items() if "algo" in key)
    ):
        return None
    return {"quant_method": method} | (
        quantization if isinstance(quantization, dict) else {"quantization": quantization}
    )


def _check_scheme(quantization: Any, place: str) -> str:
    """Returns the description of a supported scheme. Raises BadFile for any other.

    Every key must be known and have an accepted value, because an ignored one could change the meaning of the weights.
    """
    if not isinstance(quantization, Mapping):
        raise BadFile(f"{place}: expected the keys of a quantization, found {type(quantization).__name__}")
    method = quantization.get("quant_method")
    if not method and (quantization.get("load_in_8bit") or quantization.get("load_in_4bit")):
        method = "bitsandbytes"
    scheme = SCHEMES.get(method) if isinstance(method, str) else None
    supported = "; ".join(f"ktx supports {name} ({known.what})" for name, known in SCHEMES.items())
    if scheme is None:
        raise BadFile(f"{place}: {_method_problem(method)}{_format_values(quantization)}; {supported}; {REMEDY}")
    for key, value in quantization.items():
        if key not in scheme.keys:
            raise BadFile(
                f"{place}: {method} with {key} {_short(value)}, an unknown parameter"
                f"{did_you_mean(key, scheme.keys)}; {supported}; {REMEDY}"
            )
    for key, allowed in scheme.keys.items():
        value = quantization.get(key, ABSENT)
        if not (_is_module_list(value) if allowed is MODULE_LIST else _is_one(value, allowed)):
            raise BadFile(
                f"{place}: {method} with {key} {_short(value)}, not {_format_expected(allowed)}; {supported}; {REMEDY}"
            )
    return f"quantized: {method}, {scheme.what} ({place})"


def _method_problem(method: Any) -> str:
    if method in (None, ""):
        return "quant_method is missing"
    if isinstance(method, str) and method in UNSUPPORTED_METHODS:
        return f"quant_method {method} ({UNSUPPORTED_METHODS[method]}) is not supported"
    return f"quant_method {_short(method)} is unknown{did_you_mean(str(method), [*SCHEMES, *UNSUPPORTED_METHODS])}"


def _format_values(quantization: Mapping[str, Any]) -> str:
    """The values of a quantization entry for an error message, at most eight."""
    values = [f"{key} {_short(v)}" for key, v in quantization.items() if key != "quant_method" and v is not None]
    return f" ({', '.join(values[:8])}{', ...' if len(values) > 8 else ''})" if values else ""


def _short(value: Any) -> str:
    text = "missing" if value is ABSENT else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _is_one(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value is one or (type(value) is type(one) and value == one) for one in allowed)


def _is_module_list(value: Any) -> bool:
    return (
        value is ABSENT or value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))
    )


def _format_expected(allowed: Any) -> str:
    return (
        "a list of modules"
        if allowed is MODULE_LIST
        else " or ".join(_short(one) for one in allowed if one is not ABSENT)
    )
