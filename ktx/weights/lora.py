"""Reads LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

The format is PEFT's (peft.LoraConfig, peft.tuners.lora): W' = W + s B A, with s = alpha / r, or alpha / sqrt(r) with
`use_rslora`. For a parameter that stacks experts A is [experts * r, in] and B is [out, r * experts]; the columns of one
expert in B are `experts` apart. Other kinds of adapters (DoRA, biases, complete modules, ...) are rejected by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ktx.errors import BadFile, UsageError
from ktx.utils.json_file import read_object


class AdapterUse(NamedTuple):
    """An adapter's name, and a scale on its output."""

    name: str
    factor: float = 1.0


AdapterUses = tuple[AdapterUse, ...]  # adapters whose outputs are all added
Spans = Sequence[tuple[int, AdapterUses]]  # for runs of consecutive rows: the number of rows, and their adapters
CONFIG_FILE, WEIGHTS_FILE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGE_REMEDY = (
    "merge it into its model (PEFT's merge_and_unload, llama.cpp's llama-export-lora) and load the merged model"
)
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?P<inner>(?:\.base_layer)*)"
    r"\.(?P<kind>lora_(?:embedding_)?)(?P<half>[AB])(?:\.weight)?"
)
# Copies of the base model's embeddings, which PEFT may write too.
BASE_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.weight")
READ = frozenset(  # keys of the configuration that are read here
    {"peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "init_lora_weights", "bias"}
)
IGNORED = frozenset(  # keys of the configuration that do not affect a trained adapter's computation
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
# Initializations that also change the base model's weights; the adapter is useless with the original weights.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """The update s B A of one matrix, or of all experts of a stacked matrix.

    `a` is f32 [r, in] or [experts, r, in]; `b` is f32 [out, r] or [experts, out, r], multiplied by s.
    """

    a: torch.Tensor
    b: torch.Tensor
    embedding: bool = False  # the matrix is an embedding: A's columns are tokens
    projection: str = ""  # of stacked experts, when their projections have separate adapters

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that the update is added to."""
        return (*self.b.shape[:-1], self.a.shape[-1])


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter's name, path, scale and digest."""

    name: str
    path: str
    scale: float
    digest: bytes  # of the file's content and the scale: adapters with equal digests compute the same


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    `matrices`: the updates by module path; several for the parameters of stacked experts, innermost wrapper first.
    `base_shapes`: shapes of the base model's weights that the file also contains, by module path.
    """

    adapter: Adapter
    matrices: Mapping[str, list[LowRank]]
    base_shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterSpec:
    """A requested adapter: the path of a PEFT folder, its safetensors file or a GGUF file, with a name and a scale."""

    path: Path
    name: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str | Path | AdapterSpec) -> AdapterSpec:
        """Parses [NAME=]PATH[=SCALE]; the default name is the folder's or the GGUF file's.

        The text, or all of it before the scale, is the path if such a file exists, because paths may contain =.

        Raises UsageError when the scale is not a finite number or the name is empty.
        """
        if isinstance(text, AdapterSpec):
            return text
        parts, scale = str(text).split("="), 1.0
        if len(parts) > 1 and (found := _number(parts[-1])) is not None and not Path(str(text)).expanduser().exists():
            scale, parts = found, parts[:-1]
        if not math.isfinite(scale):
            raise UsageError(f"adapter {text}: the scale must be a number, found {scale}")
        unnamed = Path("=".join(parts)).expanduser()
        if len(parts) > 1 and not unnamed.exists():
            name, path = parts[0], Path("=".join(parts[1:])).expanduser()
        else:
            path = unnamed
            folder = path.parent if path.name == WEIGHTS_FILE else path
            name = re.sub(r"\.(safetensors|gguf)$", "", folder.resolve().name, flags=re.IGNORECASE)
        if not name or not (parts[-1] if len(parts) > 1 else str(text)):
            raise UsageError(
                f"adapter {text}: expected [NAME=]PATH[=SCALE], where PATH is a folder with {CONFIG_FILE} or a"
                " GGUF file"
            )
        return cls(path, name, scale)

    def with_name(self, name: str | None, scale: float) -> AdapterSpec:
        """A copy with `name`, unless it is None or empty, and the scale multiplied by `scale`."""
        return AdapterSpec(self.path, name or self.name, self.scale * scale)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_peft_adapter(requested: AdapterSpec) -> AdapterFile:
    """Reads a PEFT adapter: checks its configuration, pairs its matrices, and computes its digest.

    The digest keeps pages of the prefix cache that were computed with another adapter, or at another scale, apart.

    Raises:
        BadFile: a file is missing or damaged.
        UsageError: the adapter is not a plain LoRA.
    """
    folder = requested.path if requested.path.is_dir() else requested.path.parent
    file = folder / WEIGHTS_FILE if requested.path.is_dir() else requested.path
    if not file.exists():
        pickled = (
            f"; {PICKLED} is a pickle, which can run code: save it again as safetensors" * (folder / PICKLED).exists()
        )
        raise BadFile(f"adapter {requested.path}: no {file.name}{pickled}")
    if not (folder / CONFIG_FILE).exists():
        raise BadFile(
            f"adapter {requested.path}: no {CONFIG_FILE} next to {file.name}; it contains the adapter's scale"
        )
    config = read_object(folder / CONFIG_FILE, "adapter configuration")
    path = str(requested.path)
    _check_config(config, path)
    content = file.read_bytes()
    try:
        from safetensors.torch import load

        tensors = load(content)
    except Exception as error:
        raise BadFile(f"{file}: is not a safetensors file: {error}") from error
    digest = hashlib.sha256(content)
    digest.update(
        repr((sorted((key, str(value)) for key, value in config.items() if key in READ), requested.scale)).encode()
    )
    copies = {  # shapes of the base model's embeddings, which PEFT may write too
        match["module"]: tuple(tensors.pop(key).shape)
        for key in list(tensors)
        if "lora_" not in key and (match := BASE_COPY.fullmatch(key))
    }
    matrices = _build_matrices(tensors, config, requested.scale, path)
    return AdapterFile(Adapter(requested.name, path, requested.scale, digest.digest()[:16]), matrices, copies)


def _check_config(config: Mapping[str, Any], path: str) -> None:
    """Raises UsageError unless the configuration is of a plain LoRA, BadFile for invalid rank or alpha patterns.

    An option that is not known must be off, because it could change what the adapter computes.
    """
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise UsageError(f"adapter {path}: peft_type {kind or 'is missing'}, only LORA is supported; {MERGE_REMEDY}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise UsageError(
            f"adapter {path}: init_lora_weights {init!r} also changes the base model, and the file contains only the "
            "update of the changed weights; convert it with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") != "none":
        raise UsageError(f"adapter {path}: bias {config['bias']!r} trains biases of the base model; {MERGE_REMEDY}")
    for key, value in config.items():
        if key not in READ | IGNORED and value:
            raise UsageError(f"adapter {path}: {key} = {value!r} is not supported; {MERGE_REMEDY}")
    _check_patterns(config, path)


def _build_matrices(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], scale: float, path: str
) -> dict[str, list[LowRank]]:
    """Pairs lora_A and lora_B, checks ranks, and multiplies B by scale and alpha.

    Returns the updates by module path: one for a plain module, several for nested parameters, innermost wrapper first.
    """
    halves: dict[tuple[str, int, bool], dict[str, torch.Tensor]] = {}
    for key, values in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise UsageError(f"adapter {path}: tensor {key} is not a lora_A or lora_B; {MERGE_REMEDY}")
        if values.ndim != 2 or not values.is_floating_point():
            raise BadFile(
                f"adapter {path}: {key} is {list(values.shape)} of {values.dtype}, it must be a matrix of floats"
            )
        group = match["module"], -match["inner"].count(".base_layer"), match["kind"] == "lora_embedding_"
        halves.setdefault(group, {})[match["half"]] = values.float()
    depths: dict[str, int] = {}
    for module, *_ in halves:
        depths[module] = depths.get(module, 0) + 1
    found: dict[str, list[LowRank]] = {}
    for (module, _depth, embedding), pair in sorted(halves.items()):
        if len(pair) < 2:
            present = next(iter(pair))
            raise BadFile(f"adapter {path}: {module} has lora_{present} but no lora_{'BA'['AB'.index(present)]}")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise BadFile(
                f"adapter {path}: {module} has lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}, "
                "of different ranks"
            )
        name = _pattern_paths(config, module, depths[module], path)[len(found.get(module, ()))]
        rank = _pattern_value(config.get("rank_pattern"), name, config.get("r"))
        alpha = _pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or pair["A"].shape[0] % rank:
            raise BadFile(f"adapter {path}: r is {rank!r}, but lora_A of {name} is {list(pair['A'].shape)}")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadFile(f"adapter {path}: lora_alpha is {alpha!r}, it must be a number")
        factor = scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a, b = pair["A"], pair["B"] * factor
        if (stacked := a.shape[0] // rank) > 1:
            a, b = a.view(stacked, rank, -1), b.view(b.shape[0], rank, stacked).permute(2, 0, 1).contiguous()
        found.setdefault(module, []).append(LowRank(a.contiguous(), b.contiguous(), embedding))
    if not found:
        raise BadFile(f"adapter {path}: contains no tensor")
    return found


def _pattern_paths(config: Mapping[str, Any], module: str, count: int, path: str) -> list[str]:
    """The paths that PEFT matches against rank_pattern and alpha_pattern, for a module's `count` matrices.

    A plain module's path is its own; that of a parameter (`target_parameters`) ends in the parameter's name. Innermost
    wrapper first.
    """
    targets = {str(target) for target in config.get("target_parameters") or ()}
    names = {target.rpartition(".")[2] for target in targets}
    own = [name for name in names if any(f".{module}.{name}".endswith(f".{target}") for target in targets)]
    # gate_up_proj first: the innermost wrapper
    paths = [f"{module}.{name}" for name in sorted(own, key=lambda name: (name.startswith("down"), name))] or [module]
    if len(paths) == count:
        return paths
    # Which path a matrix has does not matter if all have the same rank and alpha.
    if (
        len(
            {
                (
                    _pattern_value(config.get("rank_pattern"), p, None),
                    _pattern_value(config.get("alpha_pattern"), p, None),
                )
                for p in paths
            }
        )
        > 1
    ):
        raise BadFile(
            f"adapter {path}: {module} has {count} matrices for {len(paths)} of its target_parameters, but "
            "rank_pattern or alpha_pattern gives these different values"
        )
    return paths[:1] * count


def _pattern_value(patterns: Any, path: str, default: Any) -> Any:
    """The value of rank_pattern or alpha_pattern for a path; as in PEFT, keys are regular expressions for its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _check_patterns(config: Mapping[str, Any], path: str) -> None:
    """Raises BadFile unless rank_pattern and alpha_pattern are objects with valid regular expressions as keys."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise BadFile(f"adapter {path}: {key} is {patterns!r}, it must be an object that maps patterns to numbers")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadFile(
                    f"adapter {path}: {key} has {pattern!r}, which is not a valid regular expression: {error}"
                ) from error
