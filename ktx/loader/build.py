"""Builds a model from headers alone: meta-device model, operators and plan, without reading weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.cache.kv import KVType, kv_type
from ktx.devices import CPU, gpus
from ktx.environment import check_environment
from ktx.errors import BadFile, UsageError
from ktx.injection.device_map import PlacementEntry, merge_options, parse_stream_experts, split_layers
from ktx.injection.inject import Plan, inject
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
    targets = quant_targets(quantize, quantize_experts)
    placement = placement_options(device, moe_device, shared_expert_device, devices, gpu_experts)
    cache_dtype = kv_type(kv_dtype)
    meta_model, result, *_ = prepare_model(
        model,
        weights,
        rules,
        dtype=torch.float32,
        kv_dtype=cache_dtype,
        num_experts_per_tok=num_experts_per_tok,
        trust_remote_code=trust_remote_code,
        targets=targets,
        mtp=False,
        placement=placement,
    )
    result.adapters = {file.adapter.name: adapter_bytes(match_modules(meta_model, file)) for file in adapter_files}
    if defer_experts:
        expert_deferral.install_deferral(meta_model, defer_experts)
    return result


@torch_defaults()
def measure_footprint(
    model: str | Path,
    weights: str | Path | None = None,
    rules: Any = None,
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
    targets = quant_targets(quantize, quantize_experts)
    meta_model, plan, source, _ = prepare_model(
        model,
        weights,
        unplaced,
        dtype=torch.float32,
        kv_dtype=None,
        num_experts_per_tok=num_experts_per_tok,
        trust_remote_code=trust_remote_code,
        targets=targets,
        mtp=False,
    )
    plan.check(source)
    plan.warn_unread()
    return compute_footprint(meta_model, plan, source), unplaced


# Rule file's device map -> device map in effect.
PlacementOptions = Callable[[Sequence[PlacementEntry]], list[PlacementEntry]]


def placement_options(
    device: str | Sequence[str] | None,
    moe_device: str | None,
    shared_expert_device: str | None,
    devices: Mapping[str, str | Sequence[str]] | None,
    gpu_experts: int | None,
) -> PlacementOptions:
    """Returns a function that puts these options in front of a rule file's device map.

    The device map is known only once `prepare_model` has read the rules, so the options cannot be merged earlier.
    """
    return lambda file: merge_options(file, device, moe_device, shared_expert_device, devices, gpu_experts)


def quant_targets(quantize: str | None, quantize_experts: str | None) -> dict[str, str | None]:
    """Returns the quantized type of float weights by operator class.

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


def prepare_model(
    model: str | Path,
    weights: str | Path | None,
    rules: Any,
    dtype: torch.dtype | None,
    kv_dtype: KVType,
    num_experts_per_tok: int | None,
    trust_remote_code: bool,
    targets: Mapping[str, str | None],
    mtp: bool,
    placement: PlacementOptions = list,
    config_override: PreTrainedConfig | None = None,
) -> tuple[PreTrainedModel, Plan, WeightSource, torch.dtype]:
    """Returns the meta-device model with its operators, the plan, the weight source and the compute type.

    Args:
        dtype: the compute type; None chooses it by the devices in use.
        targets: quantized type of float weights by operator class.
        placement: maps the rule file's device map to the one in effect.
        config_override: a configuration that replaces the model's own.

    Raises:
        BadFile: the files are missing or do not fit the configuration.
        UsageError: the rules or the options are invalid.
    """
    check_environment()
    model = resolve_model(model, not weights)
    config = copy.deepcopy(read_config(model, trust_remote_code) if config_override is None else config_override)
    weights_path = Path(weights or model).expanduser()
    if not weights_path.exists():
        raise BadFile(f"{weights_path}: no such file or folder; `ktx download` fetches a model from a hub")
    base_rules = load_rules(rules, config.model_type)
    source = open_weights(weights_path, config)
    scheme = _scheme(model, weights_path) if isinstance(source, SafetensorsSource) else ""
    if not weights and is_packed_config(config) and not isinstance(source, PackedSource):
        raise BadFile(
            f"{source.path}: its config.json declares packed weights (quant_method ktx), but its files hold none;"
            " name the weights, or write the model again with save_pretrained"
        )
    mismatches = source.config_mismatches(config)
    if mismatches:
        raise BadFile(f"{source.path}: does not belong to this configuration: {'; '.join(mismatches)}")

    if num_experts_per_tok is not None:
        set_experts_per_token(config, num_experts_per_tok)

    def build_plan(
        rules: Sequence[Rule], entries: Sequence[PlacementEntry], compute_dtype: torch.dtype, warn: bool
    ) -> tuple[PreTrainedModel, Plan]:
        """Builds the meta-device model with its operators and their plan, from headers alone.

        It may run three times: for the bytes by which layers are split between GPUs, for the result, and once more if
        the devices in use call for another compute type than expected.
        """
        meta_model = build_meta_model(config, compute_dtype, trust_remote_code)
        if mtp:
            mtp_layer.append_layer(meta_model, source)
        plan = inject(meta_model, rules, config, compute_dtype, kv_dtype, warn, targets, entries)
        plan.scheme, plan.ignored_patterns = (
            scheme,
            tuple(getattr(meta_model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        )
        _tie(meta_model, plan, source)
        plan.fill(source)
        return meta_model, plan

    entries = placement(base_rules.entries)
    compute_dtype = dtype or _default_dtype(_names_gpu(base_rules, entries))
    num_gpus = next((len(entry.split_devices) for entry in entries if entry.split_devices), 0)
    if num_gpus:  # layers are split by bytes, which are taken from a plan on the CPU
        cpu_footprint = compute_footprint(
            *build_plan([replace(rule, device=None) for rule in base_rules], (), compute_dtype, False), source
        )
        entries = split_layers(entries, split_evenly(cpu_footprint, num_gpus, entries, base_rules))
    meta_model, plan = build_plan(base_rules, entries, compute_dtype, base_rules.explicit)
    final_dtype = dtype or _default_dtype(any(device.gpu for device in plan.devices.values()))
    if final_dtype != compute_dtype:  # no module matched the GPU entries, which was warned of already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meta_model, plan = build_plan(base_rules, entries, final_dtype, False)
    plan.rules, plan.stream_experts_min_tokens = base_rules, base_rules.stream_experts_min_tokens
    plan.model_notes = notes.collect_notes(meta_model, plan, base_rules, targets, kv_dtype)
    return meta_model, plan, source, final_dtype


def _scheme(model: str | Path, weights: Path) -> str:
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
            step.tensors.insert(0, target)
            continue
        module.tied_to = origin
        if module.placement != plan.devices[origin.rpartition(".")[0]]:
            module.has_own_copy = True
            step.tensors.insert(0, origin)
