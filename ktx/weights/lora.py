"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

The format is PEFT's (peft.LoraConfig, peft.tuners.lora): W' = W + s B A, s = alpha / r, or alpha / sqrt(r) with `use_rslora`. Of a parameter that stacks experts A is
[experts * r, in] and B [out, r * experts], of which columns of one expert are `experts` apart. What else an adapter can be (DoRA, biases, whole modules, ...) is refused by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ktx.errors import BadFile, UsageError
from ktx.utils.json_file import read_object

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGED = "merge it into its model (merge_and_unload of PEFT, llama-export-lora of llama.cpp), and load that"
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?P<inner>(?:\.base_layer)*)\.(?P<kind>lora_(?:embedding_)?)(?P<half>[AB])(?:\.weight)?"
)
BASE = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.weight"
)  # embeddings as the base model has them, which PEFT may write too
# Keys of the configuration that change nothing of what a trained adapter computes, or that are read here.
READ = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "init_lora_weights", "bias"}
)
HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
        *(
            "target_modules",
            "exclude_modules",
            "target_parameters",
            "layers_to_transform",
            "layers_pattern",
            "lora_dropout",
        ),
        *(
            "fan_in_fan_out",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "megatron_config",
            "megatron_core",
        ),
        *("runtime_config", "qalora_group_size", "ensure_weight_tying", "velora_config"),
    }
)
# Beginnings that change the base model's weights too: what was trained on top of them is of no use without that.
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """s B A of one matrix, or of all experts of a stacked one: `a` f32 [r, in] or [experts, r, in], `b` f32 [out, r] or [experts, out, r], with s in it."""

    a: torch.Tensor
    b: torch.Tensor
    embedding: bool = False  # a lookup: A's columns are tokens
    projection: str = ""  # of stacked experts, where each was adapted by itself

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it is added to."""
        return (*self.b.shape[:-1], self.a.shape[-1])


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter that a model has."""

    name: str
    path: str
    scale: float
    digest: bytes  # of the file's content and of the scale: equal ones compute the same


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: by module path the matrices, in the order of what they are added to (several parameters of stacked experts).

    `copies` are shapes of weights of the base model that it holds too, by module path: they are the model's own.
    """

    adapter: Adapter
    matrices: Mapping[str, list[LowRank]]
    copies: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Wish:
    """What a user names: a folder of PEFT's or the safetensors file in it, or a GGUF file; a name for it, and a factor."""

    path: Path
    name: str
    scale: float = 1.0

    @classmethod
    def of(cls, text: str | Path | Wish) -> Wish:
        """[NAME=]PATH[=SCALE]; the name is the folder's or the GGUF file's by default. UsageError for a scale that is no number, or an empty name."""
        if isinstance(text, Wish):
            return text
        parts, scale = str(text).split("="), 1.0
        if len(parts) > 1 and (found := _number(parts[-1])) is not None and not Path(str(text)).expanduser().exists():
            scale, parts = found, parts[:-1]
        if not math.isfinite(scale):
            raise UsageError(f"adapter {text}: the scale must be a number, found {scale}")
        whole = Path("=".join(parts)).expanduser()
        if len(parts) > 1 and not whole.exists():
            name, path = parts[0], Path("=".join(parts[1:])).expanduser()
        else:
            path = whole
            folder = path.parent if path.name == WEIGHTS else path
            name = re.sub(r"\.(safetensors|gguf)$", "", folder.resolve().name, flags=re.IGNORECASE)
        if not name or not (parts[-1] if len(parts) > 1 else str(text)):
            raise UsageError(f"adapter {text}: give [NAME=]PATH[=SCALE], of a folder with {CONFIG} or of a GGUF file")
        return cls(path, name, scale)

    def named(self, name: str | None, scale: float) -> Wish:
        """The same by another name, where there is one, times another factor."""
        return Wish(self.path, name or self.name, self.scale * scale)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read(wish: Wish) -> AdapterFile:
    """Reads an adapter of PEFT's. BadFile for a file that is missing or broken, UsageError for an adapter that is none of LoRA's plain form."""
    folder = wish.path if wish.path.is_dir() else wish.path.parent
    file = folder / WEIGHTS if wish.path.is_dir() else wish.path
    if not file.exists():
        pickled = (
            f"; {PICKLED} is a pickle, which can run code: write it anew as safetensors" * (folder / PICKLED).exists()
        )
        raise BadFile(f"adapter {wish.path}: no {file.name}{pickled}")
    if not (folder / CONFIG).exists():
        raise BadFile(f"adapter {wish.path}: no {CONFIG} beside {file.name}, which says its scale")
    config = read_object(folder / CONFIG, "adapter configuration")
    where = str(wish.path)
    _check(config, where)
    content = file.read_bytes()
    try:
        from safetensors.torch import load

        tensors = load(content)
    except Exception as error:
        raise BadFile(f"{file}: is no safetensors file: {error}") from error
    digest = hashlib.sha256(content)
    digest.update(
        repr((sorted((key, str(value)) for key, value in config.items() if key in READ), wish.scale)).encode()
    )
    copies = {
        hit["module"]: tuple(tensors.pop(key).shape)
        for key in list(tensors)
        if "lora_" not in key and (hit := BASE.fullmatch(key))
    }
    matrices = _matrices(tensors, config, wish.scale, where)
    return AdapterFile(Adapter(wish.name, where, wish.scale, digest.digest()[:16]), matrices, copies)


def _check(config: Mapping[str, Any], where: str) -> None:
    """UsageError for what is no plain LoRA, BadFile for patterns that are none."""
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise UsageError(f"adapter {where}: peft_type {kind or 'is missing'}, LORA is computed; {MERGED}")
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(OWN_BASE):
        raise UsageError(
            f"adapter {where}: init_lora_weights {begun!r} changes the base model too, and the file holds only what was added to that; convert it with"
            " PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") != "none":
        raise UsageError(f"adapter {where}: bias {config['bias']!r} trains biases of the base model; {MERGED}")
    for key, value in config.items():
        if key not in READ | HARMLESS and value:
            raise UsageError(f"adapter {where}: {key} = {value!r} is not computed; {MERGED}")
    _check_patterns(config, where)


def _matrices(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], scale: float, where: str
) -> dict[str, list[LowRank]]:
    """By module path: of a plain module one, of nested parameters those from inside out, as they were wrapped."""
    halves: dict[tuple[str, int, bool], dict[str, torch.Tensor]] = {}
    for key, values in tensors.items():
        hit = KEY.fullmatch(key)
        if hit is None:
            raise UsageError(f"adapter {where}: tensor {key} is no half of a LoRA; {MERGED}")
        if values.ndim != 2 or not values.is_floating_point():
            raise BadFile(
                f"adapter {where}: {key} is {list(values.shape)} of {values.dtype}, it must be a matrix of floats"
            )
        about = hit["module"], -hit["inner"].count(".base_layer"), hit["kind"] == "lora_embedding_"
        halves.setdefault(about, {})[hit["half"]] = values.float()
    depths: dict[str, int] = {}
    for module, *_ in halves:
        depths[module] = depths.get(module, 0) + 1
    found: dict[str, list[LowRank]] = {}
    for (module, _depth, embedding), both in sorted(halves.items()):
        if len(both) < 2:
            there = next(iter(both))
            raise BadFile(f"adapter {where}: {module} has lora_{there} and no lora_{'BA'['AB'.index(there)]}")
        if both["A"].shape[0] != both["B"].shape[1]:
            raise BadFile(
                f"adapter {where}: {module} has lora_A {list(both['A'].shape)} and lora_B {list(both['B'].shape)}, of different ranks"
            )
        name = _names(config, module, depths[module], where)[len(found.get(module, ()))]
        rank = _pattern(config.get("rank_pattern"), name, config.get("r"))
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or both["A"].shape[0] % rank:
            raise BadFile(f"adapter {where}: r is {rank!r}, and lora_A of {name} is {list(both['A'].shape)}")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadFile(f"adapter {where}: lora_alpha is {alpha!r}, it must be a number")
        factor = scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a, b = both["A"], both["B"] * factor
        if (stacked := a.shape[0] // rank) > 1:
            a, b = a.view(stacked, rank, -1), b.view(b.shape[0], rank, stacked).permute(2, 0, 1).contiguous()
        found.setdefault(module, []).append(LowRank(a.contiguous(), b.contiguous(), embedding))
    if not found:
        raise BadFile(f"adapter {where}: holds no tensor")
    return found


def _names(config: Mapping[str, Any], module: str, count: int, where: str) -> list[str]:
    """What PEFT looks for in rank_pattern and alpha_pattern, of a module's `count` matrices from inside out: the module's path, of parameters (`target_parameters`) with the parameter's name."""
    targets = {str(target) for target in config.get("target_parameters") or ()}
    names = {target.rpartition(".")[2] for target in targets}
    own = [name for name in names if any(f".{module}.{name}".endswith(f".{target}") for target in targets)]
    paths = [f"{module}.{name}" for name in sorted(own, key=lambda name: (name.startswith("down"), name))] or [module]
    if len(paths) == count:
        return paths
    if (
        len(
            {
                (_pattern(config.get("rank_pattern"), path, None), _pattern(config.get("alpha_pattern"), path, None))
                for path in paths
            }
        )
        > 1
    ):
        raise BadFile(
            f"adapter {where}: {module} has {count} matrices for {len(paths)} of its target_parameters, and rank_pattern or alpha_pattern tells these apart"
        )
    return paths[:1] * count


def _pattern(patterns: Any, path: str, otherwise: Any) -> Any:
    """The entry of rank_pattern or alpha_pattern for a path, as PEFT matches: a regular expression for the path or its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return otherwise


def _check_patterns(config: Mapping[str, Any], where: str) -> None:
    """BadFile for rank_pattern and alpha_pattern that are no regular expressions with numbers."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise BadFile(f"adapter {where}: {key} is {patterns!r}, it must be an object from patterns to numbers")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadFile(
                    f"adapter {where}: {key} has {pattern!r}, which is no regular expression: {error}"
                ) from error
