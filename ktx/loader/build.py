"""Builds a model from headers alone: meta-device model, operators and plan, without reading weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.cache.kv import KVType, kv_type
from ktx.devices import CPU, gpus
from ktx.environment import check_environment
from ktx.errors import BadFile, UsageError
from ktx.injection.device_map import (
    PlacementEntry,
    PlacementOptions,
    merge_options,
    parse_stream_experts,
    split_layers,
)
from ktx.injection.inject import InjectOptions, Plan, inject
from ktx.injection.rule import Rule
from ktx.injection.rules import Rules, load_rules
from ktx.loader.meta_model import build_meta_model, read_config, resolve_model, set_experts_per_token
from ktx.model import notes
from ktx.model.lora import AdapterArgument, adapter_bytes, match_modules, parse_adapters, read_adapter
from ktx.ops import expert_deferral
from ktx.ops import mtp as mtp_layer
from ktx.ops.base import load_time_type
from ktx.ops.linear import Linear
from ktx.placement.memory_model import Footprint, compute_footprint
from ktx.placement.solver import split_evenly
from ktx.transformers_compat import config_dict
from ktx.utils.deprecation import deprecated_arguments
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.base import WeightSource
from ktx.weights.open import open_weights
from ktx.weights.packed import PackedSource, is_packed_config
from ktx.weights.quantization import check_quantization
from ktx.weights.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OLD_ARGUMENTS = {  # names in ktx 0.1 of arguments of `load` -> the names of today
    "weight_dtype": "quantize",
    "moe_dtype": "quantize_experts",
    "moe_experts": "num_experts_per_tok",
    "shared_device": "shared_expert_device",
    "stream_experts": "stream_experts_min_tokens",
    "cache_dir": "packed_cache_dir",
}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of `ktx.load`, parsed, that determine the planned model; their defaults are in its signature.

    Attributes:
        rules: name or path of a rule file, or a list of Rule; None: the rules of the model's architecture.
        dtype: compute type; None: chosen by the devices in use.
        kv_dtype: type of the KV cache (ktx.cache.kv.kv_type); None: not requested.
        num_experts_per_tok: number of experts per token; None: the configuration's.
        trust_remote_code: whether Python code from the model's folder may run.
        targets: quantized type of float weights by operator class (`quant_targets`).
        mtp: whether the layer for multi-token prediction is part of the model.
        placement: devices of modules, which come before the device map of the rules.
        config: a configuration that replaces the model's own.
    """

    rules: str | Path | Sequence[Rule] | None
    dtype: torch.dtype | None
    kv_dtype: KVType
    num_experts_per_tok: int | None
    trust_remote_code: bool
    targets: Mapping[str, str | None]
    mtp: bool
    placement: PlacementOptions
    config: PreTrainedConfig | None


@dataclass(frozen=True)
class PlannedModel:
    """A model before its weights are loaded.

    Attributes:
        model: transformers' model on the meta device, with its operators.
        plan: devices, operators and tensors of its modules.
        source: the weight files.
        dtype: compute type.
    """

    model: PreTrainedModel
    plan: Plan
    source: WeightSource
    dtype: torch.dtype


@deprecated_arguments(**OLD_ARGUMENTS)
@torch_defaults()
def plan(
    model: str | Path,
    weights: str | Path | None = None,
    rules: Any = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
    quantize_experts: str | None = None,
    *,
    device: str | Sequence[str] | None = None,
    moe_device: str | None = None,
    shared_expert_device: str | None = None,
    devices: Mapping[str, str | Sequence[str]] | None = None,
    gpu_experts: int | None = None,
    kv_dtype: KVType = None,
    num_experts_per_tok: int | None = None,
    defer_experts: int = 0,
    stream_experts_min_tokens: int | str | None = None,
    lora: AdapterArgument | Sequence[AdapterArgument] | None = None,
) -> Plan:
    """Returns the plan that `load` would execute, from headers alone; of weights only adapters are read.

    Takes the arguments of `load` and raises the same UsageError for options that are invalid.
    """
    adapter_files = [read_adapter(adapter) for adapter in parse_adapters(lora)]
    parse_stream_experts(stream_experts_min_tokens)
    options = BuildOptions(
        rules=rules,
        dtype=torch.float32,
        kv_dtype=kv_type(kv_dtype),
        num_experts_per_tok=num_experts_per_tok,
        trust_remote_code=trust_remote_code,
        targets=quant_targets(quantize, quantize_experts),
        mtp=False,
        placement=PlacementOptions(device, moe_device, shared_expert_device, devices, gpu_experts),
        config=None,
    )
    planned = prepare_model(model, weights, options)
    planned.plan.adapters = {
        file.adapter.name: adapter_bytes(match_modules(planned.model, file)) for file in adapter_files
    }
    if defer_experts:
        expert_deferral.install_deferral(planned.model, defer_experts)
    return planned.plan


@torch_defaults()
def measure_footprint(
    model: str | Path,
    weights: str | Path | None = None,
    rules: Any = None,
    *,
    trust_remote_code: bool = False,
    quantize: str | None = None,
    quantize_experts: str | None = None,
    num_experts_per_tok: int | None = None,
) -> tuple[Footprint, Rules]:
    """Returns a model's memory footprint on CPU and GPU, from headers alone, and its rules without devices.

    Takes the arguments of `load`.

    Raises:
        BadFile: the files do not fit the model.
        UsageError: a rule places a module on a GPU itself, so the solver cannot place it.
    """
    config = read_config(model, trust_remote_code)
    base_rules = load_rules(rules, config.model_type)
    gpu_rules = [
        rule for rule in base_rules if (rule.device or CPU.name).strip() != CPU.name or rule.kwargs.get("gpu_experts")
    ]
    gpu_rule = next(iter(gpu_rules), None)
    if gpu_rule is not None:
        raise UsageError(
            f"{gpu_rule.where}: this rule places a module on a GPU itself;"
            " a placement by budget needs rules that do not"
        )
    unplaced = Rules(base_rules, base=base_rules.base, explicit=base_rules.explicit)
    options = BuildOptions(
        rules=unplaced,
        dtype=torch.float32,
        kv_dtype=None,
        num_experts_per_tok=num_experts_per_tok,
        trust_remote_code=trust_remote_code,
        targets=quant_targets(quantize, quantize_experts),
        mtp=False,
        placement=PlacementOptions(),
        config=None,
    )
    planned = prepare_model(model, weights, options)
    planned.plan.check(planned.source)
    planned.plan.warn_unread()
    return compute_footprint(planned.model, planned.plan, planned.source), unplaced


def quant_targets(quantize: str | None, quantize_experts: str | None) -> dict[str, str | None]:
    """Returns the quantized type of float weights by operator class; a class that is missing keeps the file's types.

    Args:
        quantize: type for linear layers; also for experts unless `quantize_experts` is given.
        quantize_experts: type for experts.
    """
    requested = {"Linear": quantize, "Experts": quantize_experts or quantize}
    options = {"Linear": "quantize", "Experts": "quantize_experts"}
    return {
        name: load_time_type(type_name, options[name])
        for name, type_name in requested.items()
        if type_name not in (None, "auto")
    }


def prepare_model(model: str | Path, weights: str | Path | None, options: BuildOptions) -> PlannedModel:
    """Returns a model's plan and its meta-device model with operators, from headers alone.

    Args:
        model: a folder, hub id or GGUF file.
        weights: the weight files; None: those of `model`.
        options: rules, types and placement.

    Raises:
        BadFile: the files are missing or do not fit the configuration.
        UsageError: the rules or the options are invalid.
    """
    check_environment()
    model = resolve_model(model, not weights)
    config = copy.deepcopy(read_config(model, options.trust_remote_code) if options.config is None else options.config)
    weights_path = Path(weights or model).expanduser()
    if not weights_path.exists():
        raise BadFile(f"{weights_path}: no such file or folder; `ktx download` fetches a model from a hub")
    rules = load_rules(options.rules, config.model_type)
    source = open_weights(weights_path, config)
    scheme = _describe_scheme(model, weights_path) if isinstance(source, SafetensorsSource) else ""
    _check_source(source, config, must_be_packed=not weights and is_packed_config(config))
    if options.num_experts_per_tok is not None:
        set_experts_per_token(config, options.num_experts_per_tok)

    entries = merge_options(rules.entries, options.placement)
    injection = InjectOptions(
        dtype=options.dtype or _default_dtype(_names_gpu(rules, entries)),
        kv_dtype=options.kv_dtype,
        targets=options.targets,
        entries=entries,
        warn_unmatched=rules.explicit,
    )
    builder = _Builder(config, source, options)
    injection = builder.split_among_gpus(rules, injection)
    planned = builder.build(rules, injection)
    dtype = options.dtype or _default_dtype(any(device.gpu for device in planned.plan.devices.values()))
    if dtype != planned.dtype:  # no module matched the GPU entries, which was warned of already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planned = builder.build(rules, replace(injection, dtype=dtype, warn_unmatched=False))

    plan = planned.plan
    plan.scheme, plan.rules, plan.stream_experts_min_tokens = scheme, rules, rules.stream_experts_min_tokens
    plan.model_notes = notes.collect_notes(planned.model, plan, injection)
    return planned


def _check_source(source: WeightSource, config: PreTrainedConfig, must_be_packed: bool) -> None:
    """Raises BadFile if a weight source does not fit the configuration.

    `must_be_packed`: the configuration, which is from the same folder, declares packed weights.
    """
    if must_be_packed and not isinstance(source, PackedSource):
        raise BadFile(
            f"{source.path}: its config.json declares packed weights (quant_method ktx), but its files hold none;"
            " name the weights, or write the model again with save_pretrained"
        )
    mismatches = source.config_mismatches(config)
    if mismatches:
        raise BadFile(f"{source.path}: does not belong to this configuration: {'; '.join(mismatches)}")


@dataclass(frozen=True)
class _Builder:
    """Builds the meta-device model with its operators and their plan, from headers alone.

    `prepare_model` may build three times: for the bytes by which layers are split between GPUs, for the result, and
    once more if the devices in use call for another compute type than expected.
    """

    config: PreTrainedConfig
    source: WeightSource
    options: BuildOptions

    def build(self, rules: Sequence[Rule], injection: InjectOptions) -> PlannedModel:
        """Builds the model with the operators of `rules`, and the plan with its tensors."""
        model = build_meta_model(self.config, injection.dtype, self.options.trust_remote_code)
        if self.options.mtp:
            mtp_layer.append_layer(model, self.source)
        plan = inject(model, rules, self.config, injection)
        plan.ignored_patterns = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        _tie(model, plan, self.source)
        plan.fill(self.source)
        return PlannedModel(model, plan, self.source, injection.dtype)

    def split_among_gpus(self, rules: Rules, injection: InjectOptions) -> InjectOptions:
        """Returns the options with one device per entry of the device map.

        Layers of an entry with several GPUs are split by their bytes, which are taken from a plan on the CPU.
        """
        num_gpus = next((len(entry.split_devices) for entry in injection.entries if entry.split_devices), 0)
        if not num_gpus:
            return injection
        cpu_rules = [replace(rule, device=None) for rule in rules]
        on_cpu = self.build(cpu_rules, replace(injection, entries=(), warn_unmatched=False))
        footprint = compute_footprint(on_cpu.model, on_cpu.plan, self.source)
        layers = split_evenly(footprint, num_gpus, injection.entries, rules)
        return replace(injection, entries=split_layers(injection.entries, layers))


def _describe_scheme(model: str | Path, weights: Path) -> str:
    """Returns a line for the plan's notes on how a checkpoint is quantized; empty if it is not.

    Reads the configurations and the files of model and weights. Raises BadFile if the scheme is not supported.
    """
    folders = [
        folder
        for folder in (Path(model).expanduser(), weights if weights.is_dir() else weights.parent)
        if folder.is_dir()
    ]
    config_folders = [folder for folder in dict.fromkeys(folders) if (folder / "config.json").is_file()]
    configs = [(config_dict(str(folder)), str(folder / "config.json")) for folder in config_folders]
    # files beside the weights with a quantization of their own, then each config.json
    return next(
        (
            line
            for line in [check_quantization({}, "", *folders), *(check_quantization(*args) for args in configs)]
            if line
        ),
        "",
    )


def _default_dtype(gpu: bool) -> torch.dtype:
    """Returns the default compute type: bf16 if a GPU computes, else f32."""
    return torch.bfloat16 if gpu else torch.float32


def _names_gpu(rules: Sequence[Rule], entries: Sequence[PlacementEntry]) -> bool:
    """Whether rules or device map can place a module on a GPU of this machine."""
    devices = [*(rule.device for rule in rules), *(entry.device for entry in entries)]
    return bool(gpus()) and any(name and name.strip() != CPU.name for name in devices)


def _tie(model: nn.Module, plan: Plan, source: WeightSource) -> None:
    """Lets an output layer without weights in the file read the embedding's matrix, which then is in memory once.

    Weights in the file take precedence. A layer on another device than the embedding gets its own copy.
    """
    for target, origin in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if isinstance(source, SafetensorsSource) and source.spec(origin) is None and target in source.tensors:
            # The shared matrix is stored under the output layer's name.
            source.tensors[origin] = source.tensors.pop(target)
        module = model.get_submodule(target.rpartition(".")[0])
        if not isinstance(module, Linear):
            continue
        step = next(step for step in plan if step.path == module.path)
        if source.spec(target) is not None:
            step.tensors.insert(0, target)  # `record` left it out, like all tied tensors
            continue
        module.tied_to = origin
        if module.placement != plan.devices[origin.rpartition(".")[0]]:
            module.has_own_copy = True
            step.tensors.insert(0, origin)
