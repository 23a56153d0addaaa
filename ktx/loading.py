"""The only assembler: configuration, skeleton, rules, checks, weights, repair, a model that is ready."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ktx.cache.kv import Q8_0, KVType, kv_type
from ktx.compat import config_dict, dtype_plan
from ktx.config import warn_unknown
from ktx.device_map import Place, arranged, split, streaming
from ktx.devices import CPU, PRETEND, Device, gpus
from ktx.errors import BadFile, DoesNotFit, UsageError
from ktx.footprint import Footprint, footprint
from ktx.hardware import human, keep_freed_memory, memory
from ktx.inject import Plan, inject
from ktx.kernels import cpu
from ktx.kernels.kept import Store, open_store
from ktx.ops import crossing, deferral
from ktx.ops import mtp as mtp_layer
from ktx.ops.base import Operator, made_type
from ktx.ops.embed import Embedding
from ktx.ops.experts import of_layers
from ktx.ops.linear import Linear
from ktx.ops.sizes import sizes
from ktx.placement import RESERVE, SLACK, shares
from ktx.rules import FILES, Rule, Rules, load_rules
from ktx.weights.source import WeightSource, open_weights


@dataclass
class Handle:
    """What `model.ktx` holds: how the model was made."""

    plan: Plan
    weights: str
    seconds: float
    nbytes: int  # packed bytes
    bytes_per_token: int  # packed bytes that one token makes the kernels read
    isa: str
    threads: int
    kv_dtype: KVType = None  # what a cache for this model keeps keys and values in; None: as they come
    model: Callable[[], Any] = field(default=lambda: None, repr=False)  # a weak reference: the model holds its handle
    tokenizer: Any = field(default=None, repr=False)
    identity: Any = field(default=None, repr=False)  # plain values that decide what the model computes

    def engine(self, **options: Any) -> Any:
        """An engine that answers many requests at once; `options` are those of ktx.engine.engine.Options. Close it, or use it in a `with`."""
        made = importlib.import_module("ktx.engine.engine")  # it stands above this module
        return made.Engine(self.model(), self.tokenizer, made.Options(**options))

    def activity(self) -> dict[str, cpu.Counted]:
        """By module path, what the experts have done since the model was loaded."""
        return {path: cpu.Counted.read(module.counted()) for path, module in of_layers(self.model())}

    @property
    def load_speed(self) -> float:
        """GB/s of packed weights while loading."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


def read_config(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder, hub id or GGUF file. Kimi-K2 is DeepSeek-V3 under another name."""
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        from ktx.weights.metadata import config_from_gguf

        return config_from_gguf(path)
    if path.is_dir() and not (path / "config.json").exists():
        raise BadFile(
            f"{source}: has no config.json; --model must be a Hugging Face folder (its GGUF goes to --weights)"
        )
    if not path.is_dir() and (path.exists() or str(source).count("/") > 1 or str(source).startswith((".", "~", "/"))):
        raise BadFile(f"{source}: no such folder; `ktx download` fetches a model from a hub")
    if path.is_dir():
        _check_json(path / "config.json")
    try:
        raw = config_dict(str(path if path.is_dir() else source))
        if raw.get("model_type") == "kimi_k2":
            keep = {key: value for key, value in raw.items() if key not in ("auto_map", "model_type", "architectures")}
            return AutoConfig.for_model("deepseek_v3", architectures=["DeepseekV3ForCausalLM"], **keep)
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub raise a dozen unrelated types for what a config.json can say
        first = str(error).strip().partition("\n")[0]
        advice = "" if path.is_dir() else f"; `ktx download {source}` fetches a model and says why it cannot"
        raise BadFile(f"{source}: no configuration: {first[:300]}{advice}") from error


def _check_json(file: Path) -> None:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{file}: is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadFile(f"{file}: holds {type(raw).__name__}, not the keys of a configuration")


def skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The transformers model on the meta device; masks are intervals for our attention kernel in the families that we know."""
    from transformers import AutoModelForCausalLM

    import ktx.ops.attention as attention

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if config.model_type in FILES:
        model.config._attn_implementation = attention.NAME
    else:  # a family nobody here has read may use its mask elsewhere too (a sparse indexer): then it must be a matrix
        model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    return model.eval().requires_grad_(False)


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
) -> Plan:
    """What `load` would do, from headers alone."""
    targets = _targets(weight_dtype, moe_dtype)
    placed = _placed(device, moe_device, shared_device, devices, gpu_experts)
    return _prepare(model, weights, rules, torch.float32, None, None, trust_remote_code, targets, False, placed)[1]


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
        rule for rule in chosen if rule.device and rule.device.strip() != CPU.name or rule.kwargs.get("gpu_experts")
    ]
    fixed = next(iter(on_gpu), None)
    if fixed is not None:
        raise UsageError(
            f"{fixed.where}: this rule chooses a GPU itself; a placement by budget needs rules that do not"
        )
    unplaced = Rules(chosen, base=chosen.base, asked=chosen.asked)
    targets = _targets(weight_dtype, moe_dtype)
    built, made, source, _ = _prepare(
        model, weights, unplaced, torch.float32, None, moe_experts, trust_remote_code, targets, False
    )
    made.check(source)
    return footprint(built, made, source), unplaced


Placed = Callable[[Sequence[Place]], list[Place]]  # a file's map of devices -> the one that counts


def _placed(
    device: str | Sequence[str] | None,
    moe_device: str | None,
    shared_device: str | None,
    devices: Mapping[str, str | Sequence[str]] | None,
    gpu_experts: int | None,
) -> Placed:
    return lambda file: arranged(file, device, moe_device, shared_device, devices, gpu_experts)


def _targets(weight_dtype: str | None, moe_dtype: str | None) -> dict[str, str | None]:
    """What float weights become, by operator; experts as all others unless they are named apart."""
    named = {"Linear": weight_dtype, "Experts": moe_dtype or weight_dtype}
    options = {"Linear": "dtype", "Experts": "moe_dtype"}
    return {name: made_type(word, options[name]) for name, word in named.items() if word not in (None, "auto")}


def _prepare(
    model: str | Path,
    weights: str | Path | None,
    rules: Any,
    dtype: torch.dtype | None,
    kv_dtype: KVType,
    moe_experts: int | None,
    trust_remote_code: bool,
    targets: Mapping[str, str | None],
    mtp: bool,
    placed: Placed = list,
) -> tuple[nn.Module, Plan, WeightSource, torch.dtype]:
    """The skeleton with its operators, the plan, the weights, and the type that it computes in: `dtype`, or by its devices."""
    warn_unknown()
    config = copy.deepcopy(read_config(model, trust_remote_code))
    where = Path(weights or model).expanduser()
    if not weights and not where.exists():
        where = _hub_folder(str(model))
    if not where.exists():
        raise BadFile(f"{where}: no such file or folder; `ktx download` fetches a model from a hub")
    if moe_experts is not None:
        _fewer_experts(config, moe_experts)
    chosen = load_rules(rules, config.model_type)
    source = open_weights(where, config)
    wrong = source.differences(config)
    if wrong:
        raise BadFile(f"{source.path}: does not belong to this configuration: {'; '.join(wrong)}")

    def planned(
        rules: Sequence[Rule], places: Sequence[Place], kind: torch.dtype, tell: bool
    ) -> tuple[nn.Module, Plan]:
        built = skeleton(config, kind, trust_remote_code)
        if mtp:
            mtp_layer.append(built, source)
        made = inject(built, rules, config, kind, kv_dtype, tell, targets, places)
        _tie(built, made, source)
        made.fill(source)
        return built, made

    places = placed(chosen.places)
    kind = dtype or _type_beside(_names_gpu(chosen, places))
    several = next((len(place.several) for place in places if place.several), 0)
    if several:  # split by bytes, which a plan on the CPU tells
        alike = footprint(*planned([replace(rule, device=None) for rule in chosen], (), kind, False), source)
        places = split(places, shares(alike, several, places, chosen))
    built, made = planned(chosen, places, kind, chosen.asked)
    found = dtype or _type_beside(any(device.gpu for device in made.devices.values()))
    if found != kind:  # what names a GPU found no module, and that has been told
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built, made = planned(chosen, places, found, False)
    made.stream_experts = chosen.stream_experts
    return built, made, source, found


def _type_beside(gpu: bool) -> torch.dtype:
    """What a model computes in unless something else is said."""
    return torch.bfloat16 if gpu else torch.float32


def _names_gpu(rules: Sequence[Rule], places: Sequence[Place]) -> bool:
    """Whether a module may be put on a GPU of this machine."""
    named = [*(rule.device for rule in rules), *(place.device for place in places)]
    return bool(gpus()) and any(name and name.strip() != CPU.name for name in named)


def _hub_folder(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except Exception as error:  # the hub client's errors have no common base but Exception
        raise BadFile(
            f"{model}: is no folder and cannot be fetched from the hub: {str(error).splitlines()[0][:200]}"
        ) from error


def _fewer_experts(config: Any, count: int) -> None:
    usual = getattr(config, "num_experts_per_tok", None)
    if usual is None:
        raise UsageError(f"moe_experts={count}: {config.model_type} has no experts")
    if not 1 <= count <= usual:
        raise UsageError(f"moe_experts={count}: must be 1 to {usual}, what the model was trained with")
    config.num_experts_per_tok = count


def _tie(model: nn.Module, made: Plan, source: WeightSource) -> None:
    """An output layer without weights of its own reads the embedding's; if the file has some, they count."""
    for target, origin in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        module = model.get_submodule(target.rpartition(".")[0])
        if not isinstance(module, Linear):
            continue
        step = next(step for step in made if step.path == module.path)
        if source.spec(target) is not None:
            step.tensors.insert(0, target)
            continue
        module.tied_to = origin
        if module.home != made.devices[origin.rpartition(".")[0]]:  # a copy of its own
            module.copies = True
            step.tensors.insert(0, origin)


def load(
    model: str | Path,
    weights: str | Path | None = None,
    rules: str | Path | Sequence[Rule] | None = None,
    *,
    dtype: torch.dtype | None = None,
    kv_dtype: KVType = None,
    threads: int | None = None,
    weight_dtype: str | None = None,
    moe_dtype: str | None = None,
    moe_experts: int | None = None,
    trust_remote_code: bool = False,
    progress: bool | Tally = True,
    cache_dir: str | Path | None = None,
    mtp: bool = False,
    defer_experts: int = 0,
    device: str | Sequence[str] | None = None,
    moe_device: str | None = None,
    shared_device: str | None = None,
    devices: Mapping[str, str | Sequence[str]] | None = None,
    gpu_experts: int | None = None,
    stream_experts: int | str | None = None,
) -> tuple[Any, Any]:
    """A transformers model on packed weights, and its tokenizer.

    `model` is a Hugging Face folder, a hub id, or a GGUF file whose metadata suffices; `weights` a GGUF file, a folder of one, or
    safetensors (default: `model` itself); `rules` a name, a path or a list of Rule (default: by architecture). `dtype` is what the model computes in (default: bf16
    if a part of it is on a GPU, else f32). `kv_dtype` is what keys and values are kept in (f16,
    bf16, f32, q8_0 or a torch type; default: f16 in ktx's caches, their own type in transformers'). `weight_dtype` and `moe_dtype` (int8, int4, int4g32,
    int4g64, int4g128) quantise float weights of linear layers and of experts while they are read. `cache_dir` is a folder that keeps packed weights on disk: the
    first start writes them, later ones map them. `device` (cpu, cuda, cuda:N, or several GPUs that share the layers) is where everything but the routed experts
    is, `moe_device` (cpu, cuda, cuda:N, numa) where those are, `shared_device` where shared experts are; `devices` is a map as rule files have it;
    `gpu_experts` is how many experts of a layer are on its GPU when the others are on the CPU, `stream_experts` (a number of tokens, auto or off; default: the file's, else
    auto) from when on these others are brought there too. `mtp` loads the checkpoint's layer for multi-token prediction too, for an engine's
    `speculative="mtp"`. `defer_experts` is how many experts of a token, those that weigh least, are added one layer later (ktx.ops.deferral). Raises
    BadFile, DoesNotFit or UsageError before anything is read when it cannot work.
    """
    streaming(stream_experts)
    team = threads or cpu.usual_threads()
    cpu.ops.set_threads(team)
    kv_dtype = kv_type(kv_dtype)
    targets, placed = (
        _targets(weight_dtype, moe_dtype),
        _placed(device, moe_device, shared_device, devices, gpu_experts),
    )
    built, made, source, dtype = _prepare(
        model, weights, rules, dtype, kv_dtype, moe_experts, trust_remote_code, targets, mtp, placed
    )
    made.check(source)
    _check_pretence(made)
    if defer_experts:
        deferral.install(built, defer_experts)
    _cached_as(built, kv_dtype)
    check_memory(made)
    tokenizer = read_tokenizer(model, source, trust_remote_code)
    start = time.perf_counter()
    store = None if cache_dir is None else _store(cache_dir, made, source)
    with progress_bar(sum(step.nbytes for step in made), progress) as advance:
        try:
            _load_all(built, made, source, dtype, team, advance, store)
        except BaseException:
            if store is not None:
                store.drop()
            raise
    if store is not None and (trouble := store.finish()):
        warnings.warn(trouble, stacklevel=2)
    _repair(built, made)
    for module in reversed(list(built.modules())):  # children before their parents
        if isinstance(module, Operator):
            module.ready()
    homes = {built.get_submodule(path): place for path, place in made.devices.items()}
    if mtp:
        beside = mtp_layer.detach(built)
        homes |= dict.fromkeys((beside, beside.layers), homes[beside.layer])
    crossing.install(built, homes)
    _stream_experts(built, made, made.stream_experts if stream_experts is None else stream_experts)
    keep_freed_memory()  # from here on: what loading borrowed has gone back
    own = sizes(built)
    config: Any = built.config
    built.ktx = Handle(
        made,
        source.path,
        time.perf_counter() - start,
        sum(size.held for size in own),
        sum(size.token for size in own),
        cpu.ops.isa(),
        team,
        _cached_as(built, kv_dtype),
        weakref.ref(built),
        tokenizer,
        [_identity(made), config.to_dict(), cpu.ops.isa(), str(dtype), defer_experts],
    )  # type: ignore[assignment]
    _generation(built, model)
    return built, tokenizer


def _stream_experts(built: nn.Module, made: Plan, wish: int | str | None) -> None:
    if any(device.gpu for device in made.devices.values()):  # else there need be no Triton
        importlib.import_module("ktx.ops.gpu.streaming").install(built, wish)


def _store(folder: str | Path, made: Plan, source: WeightSource) -> Store:
    """The packed weights of this plan on disk, or the place where they will be."""
    path = Path(source.path)
    name = path.stem if path.is_file() else path.name
    return open_store(folder, name, _identity(made), sum(step.memory for step in made))


def _identity(made: Plan) -> list[Any]:
    """The files, and what becomes of each of their tensors."""
    files = sorted({spec.file for step in made for spec in step.specs})
    stats = [
        (str(Path(file).resolve()), about.st_size, about.st_mtime_ns) for file in files for about in [os.stat(file)]
    ]
    plan = [
        (
            step.path,
            step.new,
            step.device,
            step.target,
            str(step.share),
            step.rule.kwargs if step.rule else {},
            [(s.name, s.offset) for s in step.specs],
        )
        for step in made
    ]
    return [stats, plan]


def _cached_as(model: nn.Module, wish: KVType) -> KVType:
    """What caches keep: f16 unless something else is asked for, or an attention of transformers' own reads them. UsageError when that cannot read what is asked for."""
    from ktx.ops.attention import Attention
    from ktx.ops.mla import MLA

    foreign = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention")
        and hasattr(module, "layer_idx")
        and not isinstance(module, Attention | MLA)
    ]
    if foreign and wish == Q8_0:
        raise UsageError(
            f"kv_dtype q8_0: {foreign[0]} stays transformers' own by the rules and cannot read it; replace it by ktx.ops.attention.Attention or give f16"
        )
    return wish or (None if foreign else torch.float16)


def _check_pretence(made: Plan) -> None:
    """UsageError where GPUs are pretended and nothing would run their kernels."""
    if any(device.pretended for device in made.devices.values()) and not int(os.environ.get("TRITON_INTERPRET") or 0):
        raise UsageError(
            f"{PRETEND}={os.environ.get(PRETEND)}: kernels of pretended GPUs run in Triton's interpreter; set TRITON_INTERPRET=1 before Python starts"
        )


def check_memory(made: Plan) -> None:
    """DoesNotFit, with the numbers, when packed weights and a reserve exceed the memory that is free, the machine's or a GPU's."""
    need, (total, available) = memory_needed(made), memory()
    if need > available:
        raise DoesNotFit(
            f"the weights need {human(need)} of memory, {human(available)} of {human(total)} are free; close programs or take a smaller quant"
        )
    for device in sorted({device for device in made.devices.values() if device.gpu}, key=str):
        need, (total, available) = memory_needed(made, device), device.memory
        if need > available:
            raise DoesNotFit(
                f"{device}: the weights need {human(need)} of memory, {human(available)} of {human(total)} are free; put less on it or take a smaller quant"
            )


def memory_needed(made: Plan, device: Device = CPU) -> int:
    """Bytes of packed weights on a device and a reserve."""
    return int(sum(step.memory for step in made if step.device == device.name) * (1 + SLACK)) + RESERVE


def read_tokenizer(model: str | Path, source: WeightSource, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or the GGUF's own when the folder has none."""
    from transformers import AutoTokenizer

    path = Path(model).expanduser()
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if path.suffix == ".gguf" or (path.is_dir() and not any((path / name).exists() for name in names)):
        from ktx.weights.metadata import tokenizer_from_gguf

        return tokenizer_from_gguf(source.metadata, source.path)
    try:
        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BadFile(f"{model}: no tokenizer: {str(error).strip().splitlines()[0][:300]}") from error


# ---- weights


def _load_all(
    model: nn.Module,
    made: Plan,
    source: WeightSource,
    dtype: torch.dtype,
    threads: int,
    advance: Callable[[int], None],
    store: Store | None = None,
) -> None:
    """Every step in file order on `threads` threads; the first error stops the rest."""
    keep = _dtype_of(model, dtype)
    steps = sorted(made, key=lambda step: min(((spec.file, spec.offset) for spec in step.specs), default=("", 0)))

    def one(index: int) -> None:
        for following in steps[index + threads : index + threads + 1] if store is None or not store.found else ():
            source.prefetch(following.tensors)
        step = steps[index]
        module = model.get_submodule(step.path) if step.path else model
        if isinstance(module, Operator) and not _shares(module):
            with nullcontext() if store is None else store.of(step.path):
                module.load(source)
        own = {name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
        for full in step.tensors:
            name = full.removeprefix(f"{step.path}.")
            if name in own:
                _set_own(module, name, source.get(full).dequantize().to(made.devices[step.path].torch), keep(full))
        source.release(step.tensors)
        advance(step.nbytes)

    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(one, index) for index in range(len(steps))]
        for job in jobs:
            try:
                job.result()
            except BaseException:
                for other in jobs:
                    other.cancel()
                raise
    for module in model.modules():
        if isinstance(module, Linear) and _shares(module):
            owner = model.get_submodule(module.tied_to.rpartition(".")[0])
            if isinstance(owner, Embedding) and owner.packed is not None:
                module.parts = [owner.packed]
            module.load(source)


def _shares(module: nn.Module) -> bool:
    """Whether an output layer has no matrix of its own but the embedding's."""
    return isinstance(module, Linear) and bool(module.tied_to) and not module.copies


def _set_own(module: nn.Module, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    old = module._parameters.get(name)
    if old is not None:
        module._parameters[name] = nn.Parameter(values.reshape(old.shape).to(dtype), requires_grad=False)
        module._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr] # transformers' initialiser leaves it alone
    else:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = values.reshape(buffer.shape).to(
            torch.float32 if buffer.is_floating_point() else buffer.dtype
        )


def _dtype_of(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    plan = dtype_plan(model, dtype)

    def dtype_for(name: str) -> torch.dtype:
        return plan.get(name, dtype)

    return dtype_for


def _repair(model: Any, made: Plan) -> None:
    """What no file holds: rotary tables and other computed buffers, by transformers' own initialiser, then to their module's device; after that nothing may be left on meta."""
    for path, module in model.named_modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if meta:
            model._init_weights(module)
        for name in meta:
            module._buffers[name] = module._buffers[name].to(made.devices[path].torch)
    for target in dict(getattr(model, "all_tied_weights_keys", None) or {}):
        module, _, name = target.rpartition(".")
        owner = model.get_submodule(module)
        if isinstance(owner, nn.Linear):  # kept by the rules: tied as transformers does
            source = model.get_submodule(model.all_tied_weights_keys[target].rpartition(".")[0]).weight
            source = source.to(made.devices[module].torch)
            owner._parameters[name] = (
                source if isinstance(source, nn.Parameter) else nn.Parameter(source, requires_grad=False)
            )
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise BadFile(f"these parameters were not loaded: {', '.join(left[:5])}{' and more' if len(left) > 5 else ''}")


def _generation(model: Any, folder: str | Path) -> None:
    from transformers import GenerationConfig

    if (Path(folder).expanduser() / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.generation_config.disable_compile = (
        True  # kernels are opaque to the compiler; compiling around them costs minutes
    )


class Tally(Protocol):
    """Whoever else wants to know how many bytes have been read."""

    total: int

    def advance(self, nbytes: int) -> None:
        """More of them have."""


@contextmanager
def progress_bar(total: int, show: bool | Tally) -> Iterator[Callable[[int], None]]:
    """One bar in bytes with GB/s and the time left on a terminal; nothing elsewhere. A Tally is told beside it."""
    if not isinstance(show, bool):
        show.total = total
        with progress_bar(total, True) as advance:

            def both(nbytes: int) -> None:
                show.advance(nbytes)
                advance(nbytes)

            yield both
        return
    if not show or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
