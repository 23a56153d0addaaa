"""How a checkpoint says that its weights are quantised, and whether that is what we compute: one table, read before anything is loaded.

Every key of a scheme must say exactly what the kernels do. A method, a value or a key that is not in the table is refused by name.
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
from ktx.weights.accounting import REMEDY

ABSENT = object()
NAMES = object()  # a list of modules, or none: what is quantised is seen by the tensors' types


@dataclass(frozen=True)
class Scheme:
    """A quantisation that is computed: what it is, and what each key of its configuration may say, NAMES or one of the values (ABSENT: the key may be missing)."""

    what: str
    keys: Mapping[str, Any]


SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme(
        f"e4m3 with a scale for {FP8_BLOCK} x {FP8_BLOCK} weights",
        {
            "quant_method": ("fp8",),
            "fmt": ("e4m3", ABSENT),
            "weight_block_size": ([FP8_BLOCK, FP8_BLOCK], ABSENT),  # transformers' default is the same
            "activation_scheme": ("dynamic", ABSENT),
            "scale_fmt": (
                "float",
                "ue8m0",
                None,
                ABSENT,
            ),  # of scales that are floats in the file; others are refused there
            "expert_dtype": ("fp8", None, ABSENT),
            "kv_cache_scheme": (None, ABSENT),
            "modules_to_convert": (None, [], ABSENT),  # embeddings with one scale
            "modules_to_not_convert": NAMES,
            "ignored_layers": NAMES,
            "dequantize": (True, False, None, ABSENT),
        },
    ),
    "ktx": Scheme(  # ktx.weights.packed
        "each weight in its type, as save_pretrained(folder, packed=True) writes it",
        {"quant_method": ("ktx",), "version": (1,)},
    ),
}

REFUSED: Mapping[str, str] = {  # methods that are known and not computed
    "aqlm": "AQLM, additive code books",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "FBGEMM, FP8 with a scale for each row",
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

PARTS = (
    "text_config",
    "language_config",
    "llm_config",
    "thinker_config",
)  # configurations of a language model in another one
KEYS = ("quantization_config", "compression_config", "quantization")  # of a config.json: the present name, two others
FILES: Mapping[str, str] = {  # files of their own: the method that they speak of
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def scheme_of(config: Mapping[str, Any], where: str, *folders: Path) -> str:
    """A line on the scheme that a configuration and the files of its folders speak of; empty when there is none. BadFile for one that is not computed.

    `config` is a raw config.json, of which `where` is the place.
    """
    found = [_checked(said, place) for place, said in _said(config, where)]
    for folder in dict.fromkeys(folders):
        for name, method in FILES.items():
            if (file := folder / name).is_file() and (said := _of_file(file, method)):
                found.append(_checked(said, str(file)))
    return found[0] if found else ""


def _said(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Each part of a configuration that says something of a quantisation, with its place."""
    for part in ("", *PARTS):
        of: Any = config.get(part) if part else config
        for key in KEYS if isinstance(of, Mapping) else ():
            if of.get(key):
                yield f"{where}: {part}{'.' * bool(part)}{key}", of[key]


def _of_file(file: Path, method: str) -> dict[str, Any] | None:
    """What such a file says, with its method; None when that is that nothing is quantised."""
    found = read_object(file, "quantisation")
    said = found.get("quantization", found) if method == "modelopt" else found
    if (
        method == "modelopt"
        and isinstance(said, dict)
        and not any(value for key, value in said.items() if "algo" in key)
    ):
        return None
    return {"quant_method": method} | (said if isinstance(said, dict) else {"quantization": said})


def _checked(said: Any, place: str) -> str:
    """The line on a scheme that is computed; BadFile for any other."""
    if not isinstance(said, Mapping):
        raise BadFile(f"{place}: holds {type(said).__name__}, not the keys of a quantisation")
    method = said.get("quant_method")
    if not method and (said.get("load_in_8bit") or said.get("load_in_4bit")):
        method = "bitsandbytes"
    scheme = SCHEMES.get(method) if isinstance(method, str) else None
    supported = "; ".join(f"ktx computes {name} ({known.what})" for name, known in SCHEMES.items())
    if scheme is None:
        raise BadFile(f"{place}: {_named(method)}{_shown(said)}; {supported}; {REMEDY}")
    for key, value in said.items():
        if key not in scheme.keys:
            raise BadFile(
                f"{place}: {method} with {key} {_short(value)}, a parameter that ktx does not know"
                f"{did_you_mean(key, scheme.keys)}; {supported}; {REMEDY}"
            )
    for key, allowed in scheme.keys.items():
        value = said.get(key, ABSENT)
        if not (_names(value) if allowed is NAMES else _is_one(value, allowed)):
            raise BadFile(
                f"{place}: {method} with {key} {_short(value)}, not {_wanted(allowed)}; {supported}; {REMEDY}"
            )
    return f"quantised: {method}, {scheme.what} ({place})"


def _named(method: Any) -> str:
    if method in (None, ""):
        return "names no quant_method"
    if isinstance(method, str) and method in REFUSED:
        return f"quant_method {method} ({REFUSED[method]}) is not supported"
    return f"quant_method {_short(method)} is unknown{did_you_mean(str(method), [*SCHEMES, *REFUSED])}"


def _shown(said: Mapping[str, Any]) -> str:
    """Plain values of a configuration, for an error."""
    plain = [f"{key} {_short(value)}" for key, value in said.items() if key != "quant_method" and value is not None]
    return f" ({', '.join(plain[:8])}{', ...' if len(plain) > 8 else ''})" if plain else ""


def _short(value: Any) -> str:
    text = "missing" if value is ABSENT else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _is_one(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value is one or (type(value) is type(one) and value == one) for one in allowed)


def _names(value: Any) -> bool:
    return (
        value is ABSENT or value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))
    )


def _wanted(allowed: Any) -> str:
    return "a list of modules" if allowed is NAMES else " or ".join(_short(one) for one in allowed if one is not ABSENT)
