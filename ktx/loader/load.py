"""The only assembler: a prepared model, checks, weights, repair, a model that is ready."""

from __future__ import annotations

import copy
import importlib
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktx.cache.kv import FP8, KVType, kv_type
from ktx.devices import CPU, PRETEND, Device
from ktx.errors import DoesNotFit, UsageError
from ktx.hardware import format_bytes, memory, tune_malloc
from ktx.injection.device_map import streaming
from ktx.injection.inject import Plan
from ktx.injection.rules import Rule
from ktx.kernels import cpu
from ktx.kernels.packed_cache import PackedCache, open_store
from ktx.loader.build import placement_options, prepare, targets_of
from ktx.loader.load_weights import ProgressSink, init_missing_buffers, load_weights, progress_bar
from ktx.loader.meta_model import generation, located, read_tokenizer
from ktx.model import notes
from ktx.model import self_test as selftest
from ktx.model.loaded import become
from ktx.model.lora import Adapted, Adapters, fitted, read, sizes, wishes
from ktx.model.pickling import Files, Recipe
from ktx.model.self_test import SelfTest
from ktx.ops import device_hooks, expert_deferral
from ktx.ops import mtp as mtp_layer
from ktx.ops.attention_weights import known_implementation
from ktx.ops.base import COMPUTED, Operator
from ktx.ops.experts import of_layers
from ktx.ops.fusion import layer
from ktx.ops.weight_traffic import sizes as own_sizes
from ktx.placement.solver import RESERVE, SLACK
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.base import WeightSource
from ktx.weights.lora import Adapter, Wish


def _nobody() -> None:
    """In place of a weak reference, which is neither copied nor pickled."""


@dataclass
class LoadInfo:
    """What `model.ktx` holds: how the model was made."""

    plan: Plan
    weights: str
    seconds: float
    nbytes: int  # packed bytes
    bytes_per_token: int  # packed bytes that one token makes the kernels read
    isa: str
    threads: int
    kv_dtype: KVType = None  # what a cache for this model keeps keys and values in; None: as they come
    model: Callable[[], Any] = field(default=_nobody, repr=False)  # a weak reference: the model holds its handle
    tokenizer: Any = field(default=None, repr=False)
    identity: Any = field(default=None, repr=False)  # plain values that decide what the model computes
    self_test: SelfTest = True  # whether an engine is tested by a few tokens too; "engine": nothing else was
    notes: list[notes.Note] = field(default_factory=list)  # where it is slow, or does something else than was asked
    files: Files | None = field(default=None, repr=False)  # that the packed weights came from
    adapters: Adapters = field(default_factory=Adapters, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": _nobody}  # ktx.model.loaded gives a copy its own

    def of(self, model: nn.Module) -> LoadInfo:
        """The same for a copy of the model."""
        return replace(self, model=weakref.ref(model))

    def engine(self, **options: Any) -> Any:
        """An engine that answers many requests at once; `options` are those of ktx.engine.engine.Options. Close it, or use it in a `with`."""
        made = importlib.import_module("ktx.engine.engine")  # it stands above this module
        return made.Engine(self.model(), self.tokenizer, made.Options(**options))

    @property
    def loras(self) -> dict[str, Adapter]:
        """The LoRA adapters that are loaded, by name."""
        return self.adapters.named

    def load_lora(self, path: str | Path, name: str | None = None, scale: float = 1.0) -> str:
        """Loads a LoRA adapter, PEFT's folder or the safetensors file in it or a GGUF file of llama.cpp's, and returns its name (default: the folder's or the file's). It counts where it is named: in `use_lora`, or in an engine's request. BadFile or UsageError for one that does not fit."""
        file = read(Wish.of(path).named(name, scale))
        self.adapters.add(file.adapter, fitted(self.model(), file))
        return file.adapter.name

    def unload_lora(self, name: str) -> None:
        """Forgets an adapter. UsageError for a name that there is not."""
        self.adapters.drop(name)

    def use_lora(self, *names: str) -> None:
        """The adapters whose sum counts from now on, in `generate`, in forwards, and in an engine's requests that name none; without names: none of them."""
        self.adapters.use(names)

    def activity(self) -> dict[str, cpu.ExpertStats]:
        """By module path, what the experts have done since the model was loaded."""
        return {path: cpu.ExpertStats.read(module.counted()) for path, module in of_layers(self.model())}

    @property
    def load_speed(self) -> float:
        """GB/s of packed weights while loading."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


@torch_defaults()
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
    progress: bool | ProgressSink = True,
    cache_dir: str | Path | None = None,
    mtp: bool = False,
    defer_experts: int = 0,
    device: str | Sequence[str] | None = None,
    moe_device: str | None = None,
    shared_device: str | None = None,
    devices: Mapping[str, str | Sequence[str]] | None = None,
    gpu_experts: int | None = None,
    stream_experts: int | str | None = None,
    self_test: SelfTest = True,
    lora: Adapted | Sequence[Adapted] | None = None,
    attn_implementation: str | None = None,
    config: Any = None,
    tokenizer: bool = True,
) -> tuple[Any, Any]:
    """A transformers model on packed weights, and its tokenizer.

    `model` is a Hugging Face folder, a hub id (OWNER/NAME, or OWNER/NAME@REVISION), or a GGUF file whose metadata suffices; `weights` a GGUF file, a folder of one, or
    safetensors (default: `model` itself); `rules` a name, a path or a list of Rule (default: by architecture). `dtype` is what the model computes in (default: bf16
    if a part of it is on a GPU, else f32). `kv_dtype` is what keys and values are kept in (f16,
    bf16, f32, q8_0, fp8 or a torch type; default: f16 in ktx's caches, their own type in transformers'). `weight_dtype` and `moe_dtype` (int8, int4, int4g32,
    int4g64, int4g128) quantise float weights of linear layers and of experts while they are read. `cache_dir` is a folder that keeps packed weights on disk: the
    first start writes them, later ones map them. `device` (cpu, cuda, cuda:N, or several GPUs that share the layers) is where everything but the routed experts
    is, `moe_device` (cpu, cuda, cuda:N, numa) where those are, `shared_device` where shared experts are; `devices` is a map as rule files have it;
    `gpu_experts` is how many experts of a layer are on its GPU when the others are on the CPU, `stream_experts` (a number of tokens, auto or off; default: the file's, else
    auto) from when on these others are brought there too. `mtp` loads the checkpoint's layer for multi-token prediction too, for an engine's
    `speculative="mtp"`. `defer_experts` is how many experts of a token, those that weigh least, are added one layer later (ktx.ops.expert_deferral). Raises
    BadFile, DoesNotFit or UsageError before anything is read when it cannot work. `self_test` computes two tokens at the end, in one forward and through
    the cache (ktx.model.self_test); SelfTestFailed when the two differ, or logits are not finite or all alike. "engine" leaves that to the engine that will be made of
    the model, which computes them in its own way. `lora` is a LoRA adapter or several, [NAME=]PATH[=SCALE] of PEFT's folders or llama.cpp's GGUF files, whose sum counts
    from the beginning (`model.ktx.use_lora` chooses others). `attn_implementation` (ktx, sdpa, eager, or a name that transformers knows a function by) is what
    `model.set_attn_implementation` takes; it stays "ktx" unless one is named. `config` is a transformers configuration that counts instead of the model's own.
    Without `tokenizer` none is read, and None is returned in its place.
    """
    known_implementation(attn_implementation)
    if dtype not in (None, *COMPUTED):
        raise UsageError(f"dtype {dtype}: ktx computes in {', '.join(map(str, COMPUTED))}")
    files_of_adapters = [read(wish) for wish in wishes(lora)]
    streaming(stream_experts)
    selftest.asked(self_test)
    team = cpu.pool_size(threads)
    cpu.ops.set_threads(team)
    kv_dtype = kv_type(kv_dtype)
    targets = targets_of(weight_dtype, moe_dtype)
    placed = placement_options(device, moe_device, shared_device, devices, gpu_experts)
    model = located(model, not weights)
    with notes.heard() as warned:
        built, made, source, dtype = prepare(
            model, weights, rules, dtype, kv_dtype, moe_experts, trust_remote_code, targets, mtp, placed, config
        )
    _implement(built, attn_implementation)
    made.check(source)
    adapters = [(file.adapter, fitted(built, file)) for file in files_of_adapters]
    made.adapters = {adapter.name: sizes(modules) for adapter, modules in adapters}
    made.log()
    _check_pretence(made)
    if kv_dtype == FP8:
        _check_fp8(made)
    if defer_experts:
        expert_deferral.install(built, defer_experts)
    _cached_as(built, kv_dtype)
    check_memory(made)
    words = read_tokenizer(model, source, trust_remote_code) if tokenizer else None
    files = Files(
        Recipe(
            str(Path(source.path).absolute()),
            copy.deepcopy(built.config),
            made.rules,
            dtype,
            kv_dtype,
            trust_remote_code,
            targets,
            mtp,
            (device, moe_device, shared_device, devices, gpu_experts),
            None if cache_dir is None else str(Path(cache_dir).expanduser().absolute()),
        ),
        {spec.file for step in made for spec in step.specs},
    )
    start = time.perf_counter()
    store = None if cache_dir is None else store_of(cache_dir, made, source)
    with progress_bar(sum(step.nbytes for step in made), progress) as advance:
        try:
            load_weights(built, made, source, dtype, team, advance, store, files)
        except BaseException:
            if store is not None:
                store.abort()
            raise
    if store is not None and (trouble := store.commit()):
        warnings.warn(trouble, stacklevel=2)
    init_missing_buffers(built, made)
    for module in reversed(list(built.modules())):  # children before their parents
        if isinstance(module, Operator):
            module.enliven()
            module.ready()
            module.is_ready = True
    homes = {built.get_submodule(path): place for path, place in made.devices.items()}
    if mtp:
        beside = mtp_layer.detach(built)
        homes |= dict.fromkeys((beside, beside.layers), homes[beside.layer])
    device_hooks.install(built, homes, dtype)
    layer.group_layers(built)
    _stream_experts(built, made, made.stream_experts if stream_experts is None else stream_experts)
    tune_malloc()  # from here on: what loading borrowed has gone back
    become(built)
    own = own_sizes(built)
    counts: Any = built.config
    handle = built.ktx = LoadInfo(
        made,
        source.path,
        time.perf_counter() - start,
        sum(size.held for size in own),
        sum(size.token for size in own),
        cpu.ops.isa(),
        team,
        _cached_as(built, kv_dtype),
        weakref.ref(built),
        words,
        [_identity(made), counts.to_dict(), cpu.ops.isa(), str(dtype), defer_experts],
        self_test,
        files=files,
    )  # type: ignore[assignment]
    for adapter, modules in adapters:
        handle.adapters.add(adapter, modules)
    handle.adapters.use([adapter.name for adapter, _ in adapters])
    notes.tell(handle.notes, [*made.said, *warned, *notes.spinning()])
    generation(built, model, source)
    if self_test is True:
        selftest.check(built)
    return built, words


def _implement(built: Any, attn_implementation: str | None) -> None:
    """Has transformers choose a function of attention. UsageError for one that cannot be had."""
    if attn_implementation is not None:
        try:
            built.set_attn_implementation(attn_implementation)
        except (ImportError, ValueError) as error:
            raise UsageError(f"attn_implementation {attn_implementation!r}: {str(error).splitlines()[0]}") from error


def _stream_experts(built: nn.Module, made: Plan, wish: int | str | None) -> None:
    if any(device.gpu for device in made.devices.values()):  # else there need be no Triton
        importlib.import_module("ktx.ops.gpu.moe").hand_over(built)
        importlib.import_module("ktx.ops.gpu.expert_streaming").install(built, wish)


def store_of(folder: str | Path, made: Plan, source: WeightSource) -> PackedCache:
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
    foreign = notes.foreign_attention(model)
    if foreign and isinstance(wish, str):
        raise UsageError(
            f"kv_dtype {wish}: {foreign[0]} stays transformers' own by the rules and cannot read it; replace it by ktx.ops.attention.Attention or give f16"
        )
    return wish or (None if foreign else torch.float16)


def _check_pretence(made: Plan) -> None:
    """UsageError where GPUs are pretended and nothing would run their kernels."""
    if any(device.pretended for device in made.devices.values()) and not int(os.environ.get("TRITON_INTERPRET") or 0):
        raise UsageError(
            f"{PRETEND}={os.environ.get(PRETEND)}: kernels of pretended GPUs run in Triton's interpreter; set TRITON_INTERPRET=1 before Python starts"
        )


def _check_fp8(made: Plan) -> None:
    """UsageError where a GPU cannot read e4m3."""
    for device in {device for device in made.devices.values() if device.gpu and not device.pretended}:
        if (found := torch.cuda.get_device_capability(device.torch)) < (8, 9):
            raise UsageError(
                f"kv_dtype fp8: {device} has the compute capability {found[0]}.{found[1]}, e4m3 needs 8.9 (Ada, Hopper); give f16"
            )


def check_memory(made: Plan) -> None:
    """DoesNotFit, with the numbers, when packed weights and a reserve exceed the memory that is free, the machine's or a GPU's."""
    need, (total, available) = memory_needed(made), memory()
    if need > available:
        raise DoesNotFit(
            f"the weights need {format_bytes(need)} of memory, {format_bytes(available)} of {format_bytes(total)} are free; close programs or take a smaller quant"
        )
    for device in sorted({device for device in made.devices.values() if device.gpu}, key=str):
        need, (total, available) = memory_needed(made, device), device.memory
        if need > available:
            raise DoesNotFit(
                f"{device}: the weights need {format_bytes(need)} of memory, {format_bytes(available)} of {format_bytes(total)} are free; put less on it or take a smaller quant"
            )


def memory_needed(made: Plan, device: Device = CPU) -> int:
    """Bytes of packed weights and of adapters on a device, and a reserve."""
    held = sum(step.memory for step in made if step.device == device.name)
    held += sum(adapter.get(device, 0) for adapter in made.adapters.values())
    return int(held * (1 + SLACK)) + RESERVE
