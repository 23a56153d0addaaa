"""A model as its rules make it, from headers alone: skeleton, operators, plan."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktx.cache.kv import KVType, kv_type
from ktx.devices import CPU, gpus
from ktx.environment import check_environment
from ktx.errors import BadFile, UsageError
from ktx.injection.device_map import PlacementEntry, arranged, split, streaming
from ktx.injection.inject import Plan, inject
from ktx.injection.rules import Rule, Rules, load_rules
from ktx.loader.meta_model import fewer_experts, located, read_config, skeleton
from ktx.model import notes
from ktx.model.lora import Adapted, fitted, read, sizes, wishes
from ktx.ops import expert_deferral
from ktx.ops import mtp as mtp_layer
from ktx.ops.base import made_type
from ktx.ops.linear import Linear
from ktx.placement.memory_model import Footprint, footprint
from ktx.placement.solver import shares
from ktx.transformers_compat import config_dict
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.base import WeightSource, open_weights
from ktx.weights.packed import PackedSource, says_packed
from ktx.weights.quantization import scheme_of
from ktx.weights.safetensors import SafetensorsSource


@torch_defaults()
def plan(
    model: str | Path,
    weights: str | Path | None = None,
    rules: Any = None,
    trust_remote_code: bool = False,
    weight_dtype: str | None = None,
    moe_dtype: str | None = None,
    *,
    device: str | Sequence[str] | None = None,
    moe_device: str | None = None,
    shared_device: str | None = None,
    devices: Mapping[str, str | Sequence[str]] | None = None,
    gpu_experts: int | None = None,
    kv_dtype: KVType = None,
    moe_experts: int | None = None,
    defer_experts: int = 0,
    stream_experts: int | str | None = None,
    lora: Adapted | Sequence[Adapted] | None = None,
) -> Plan:
    """What `load` would do, from headers alone (adapters are read). The same UsageError as there for options that cannot be meant."""
    files = [read(wish) for wish in wishes(lora)]
    streaming(stream_experts)
    targets = targets_of(weight_dtype, moe_dtype)
    placed = placement_options(device, moe_device, shared_device, devices, gpu_experts)
    kept = kv_type(kv_dtype)
    built, made, *_ = prepare(
        model, weights, rules, torch.float32, kept, moe_experts, trust_remote_code, targets, False, placed
    )
    made.adapters = {file.adapter.name: sizes(fitted(built, file)) for file in files}
    if defer_experts:
        expert_deferral.install(built, defer_experts)
    return made


@torch_defaults()
def measure(
    model: str | Path,
    weights: str | Path | None = None,
    rules: Any = None,
    trust_remote_code: bool = False,
    weight_dtype: str | None = None,
    moe_dtype: str | None = None,
    moe_experts: int | None = None,
) -> tuple[Footprint, Rules]:
    """What a model takes wherever it is, from headers alone, and its rules. UsageError for rules that put a module on a GPU themselves."""
    config = read_config(model, trust_remote_code)
    chosen = load_rules(rules, config.model_type)
    on_gpu = [
        rule for rule in chosen if (rule.device or CPU.name).strip() != CPU.name or rule.kwargs.get("gpu_experts")
    ]
    fixed = next(iter(on_gpu), None)
    if fixed is not None:
        raise UsageError(
            f"{fixed.where}: this rule chooses a GPU itself; a placement by budget needs rules that do not"
        )
    unplaced = Rules(chosen, base=chosen.base, explicit=chosen.explicit)
    targets = targets_of(weight_dtype, moe_dtype)
    built, made, source, _ = prepare(
        model, weights, unplaced, torch.float32, None, moe_experts, trust_remote_code, targets, False
    )
    made.check(source)
    made.log()
    return footprint(built, made, source), unplaced


PlacementOptions = Callable[
    [Sequence[PlacementEntry]], list[PlacementEntry]
]  # a file's map of devices -> the one that counts


def placement_options(
    device: str | Sequence[str] | None,
    moe_device: str | None,
    shared_device: str | None,
    devices: Mapping[str, str | Sequence[str]] | None,
    gpu_experts: int | None,
) -> PlacementOptions:
    """A file's map with what options say before it."""
    return lambda file: arranged(file, device, moe_device, shared_device, devices, gpu_experts)


def targets_of(weight_dtype: str | None, moe_dtype: str | None) -> dict[str, str | None]:
    """What float weights become, by operator; experts as all others unless they are named apart."""
    named = {"Linear": weight_dtype, "Experts": moe_dtype or weight_dtype}
    options = {"Linear": "dtype", "Experts": "moe_dtype"}
    return {name: made_type(word, options[name]) for name, word in named.items() if word not in (None, "auto")}


def prepare(
    model: str | Path,
    weights: str | Path | None,
    rules: Any,
    dtype: torch.dtype | None,
    kv_dtype: KVType,
    moe_experts: int | None,
    trust_remote_code: bool,
    targets: Mapping[str, str | None],
    mtp: bool,
    placed: PlacementOptions = list,
    known: Any = None,
) -> tuple[nn.Module, Plan, WeightSource, torch.dtype]:
    """The skeleton with its operators, the plan, the weights, and the type that it computes in: `dtype`, or by its devices.

    `known` is a configuration that counts instead of the model's own.
    """
    check_environment()
    model = located(model, not weights)
    config = copy.deepcopy(read_config(model, trust_remote_code) if known is None else known)
    where = Path(weights or model).expanduser()
    if not where.exists():
        raise BadFile(f"{where}: no such file or folder; `ktx download` fetches a model from a hub")
    chosen = load_rules(rules, config.model_type)
    source = open_weights(where, config)
    scheme = _scheme(model, where) if isinstance(source, SafetensorsSource) else ""
    if not weights and says_packed(config) and not isinstance(source, PackedSource):
        raise BadFile(
            f"{source.path}: its config.json speaks of packed weights (quant_method ktx), and its files hold none; name the weights, or write the model again"
            " with save_pretrained"
        )
    wrong = source.differences(config)
    if wrong:
        raise BadFile(f"{source.path}: does not belong to this configuration: {'; '.join(wrong)}")

    if moe_experts is not None:
        fewer_experts(config, moe_experts)

    def planned(
        rules: Sequence[Rule], places: Sequence[PlacementEntry], kind: torch.dtype, tell: bool
    ) -> tuple[nn.Module, Plan]:
        built = skeleton(config, kind, trust_remote_code)
        if mtp:
            mtp_layer.append(built, source)
        made = inject(built, rules, config, kind, kv_dtype, tell, targets, places)
        made.scheme, made.ignored = scheme, tuple(getattr(built, "_keys_to_ignore_on_load_unexpected", None) or ())
        _tie(built, made, source)
        made.fill(source)
        return built, made

    places = placed(chosen.places)
    kind = dtype or _type_beside(_names_gpu(chosen, places))
    several = next((len(place.several) for place in places if place.several), 0)
    if several:  # split by bytes, which a plan on the CPU tells
        alike = footprint(*planned([replace(rule, device=None) for rule in chosen], (), kind, False), source)
        places = split(places, shares(alike, several, places, chosen))
    built, made = planned(chosen, places, kind, chosen.explicit)
    found = dtype or _type_beside(any(device.gpu for device in made.devices.values()))
    if found != kind:  # what names a GPU found no module, and that has been told
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built, made = planned(chosen, places, found, False)
    made.rules, made.stream_experts = chosen, chosen.stream_experts
    made.said = notes.notes_of(built, made, chosen, targets, kv_dtype)
    return built, made, source, found


def _scheme(model: str | Path, weights: Path) -> str:
    """How a checkpoint is quantised, by configurations of model and weights and by the files beside them. BadFile when that is not computed."""
    folders = [
        folder
        for folder in (Path(model).expanduser(), weights if weights.is_dir() else weights.parent)
        if folder.is_dir()
    ]
    configured = [folder for folder in dict.fromkeys(folders) if (folder / "config.json").is_file()]
    said = [(config_dict(str(folder)), str(folder / "config.json")) for folder in configured]
    return next((line for line in [scheme_of({}, "", *folders), *(scheme_of(*of) for of in said)] if line), "")


def _type_beside(gpu: bool) -> torch.dtype:
    """What a model computes in unless something else is said."""
    return torch.bfloat16 if gpu else torch.float32


def _names_gpu(rules: Sequence[Rule], places: Sequence[PlacementEntry]) -> bool:
    """Whether a module may be put on a GPU of this machine."""
    named = [*(rule.device for rule in rules), *(place.device for place in places)]
    return bool(gpus()) and any(name and name.strip() != CPU.name for name in named)


def _tie(model: nn.Module, made: Plan, source: WeightSource) -> None:
    """An output layer without weights of its own reads the embedding's; if the file has some, they count."""
    for target, origin in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if isinstance(source, SafetensorsSource) and source.spec(origin) is None and target in source.tensors:
            source.tensors[origin] = source.tensors.pop(target)  # the one matrix under the other name
        module = model.get_submodule(target.rpartition(".")[0])
        if not isinstance(module, Linear):
            continue
        step = next(step for step in made if step.path == module.path)
        if source.spec(target) is not None:
            step.tensors.insert(0, target)
            continue
        module.tied_to = origin
        if module.placement != made.devices[origin.rpartition(".")[0]]:  # a copy of its own
            module.copies = True
            step.tensors.insert(0, origin)
