"""`ktx.load`: builds a model on the meta device, checks it, loads its weights and returns it ready to run."""

from __future__ import annotations

import importlib
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.cache.kv import FP8, KVType, kv_type
from ktx.devices import GPU_VARIABLE
from ktx.errors import UsageError
from ktx.hardware import tune_malloc
from ktx.injection.device_map import PlacementOptions, parse_stream_experts
from ktx.injection.inject import Plan
from ktx.injection.rule import Rule
from ktx.kernels import cpu
from ktx.loader.build import OLD_ARGUMENTS, BuildOptions, PlannedModel, prepare_model, quant_targets
from ktx.loader.load_weights import ProgressSink, init_missing_buffers, load_weights, progress_bar
from ktx.loader.meta_model import read_tokenizer, resolve_model, set_generation_config
from ktx.loader.resources import check_memory, open_packed_cache, plan_identity
from ktx.model import notes
from ktx.model import self_test as selftest
from ktx.model.loaded import set_loaded_class
from ktx.model.lora import (
    AdapterArgument,
    Adapters,
    MatchedModules,
    adapter_bytes,
    match_modules,
    parse_adapters,
    read_adapter,
)
from ktx.model.pickling import BuildArguments, WeightFiles
from ktx.model.self_test import SelfTest
from ktx.ops import device_hooks, expert_deferral
from ktx.ops import mtp as mtp_layer
from ktx.ops.attention_weights import check_implementation
from ktx.ops.base import COMPUTE_DTYPES, Operator
from ktx.ops.experts import experts_by_path
from ktx.ops.fusion.layer_group import group_layers
from ktx.ops.weight_traffic import module_bytes as own_sizes
from ktx.utils.deprecation import deprecated_arguments, deprecated_members
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.gguf_lora import GGUFAdapter
from ktx.weights.lora import Adapter, AdapterFile, AdapterSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ktx.engine.engine import Engine


def _no_model() -> None:
    """Stands in for the weak reference to the model, which can be neither copied nor pickled."""


@deprecated_members(of="for_copy")
@dataclass
class LoadInfo:
    """How a model was loaded; the object behind `model.ktx`."""

    plan: Plan
    weights: str
    seconds: float
    nbytes: int  # bytes of packed weights
    bytes_per_token: int  # bytes of packed weights that the kernels read per decoded token
    isa: str
    threads: int
    kv_dtype: KVType = None  # type of the KV cache; None: the type that the model computes keys and values in
    model: Callable[[], Any] = field(default=_no_model, repr=False)  # weak, because the model holds this object
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    identity: Any = field(default=None, repr=False)  # plain values that determine the model's results
    self_test: SelfTest = True  # whether an engine runs the self-test too; "engine": only the engine runs it
    notes: list[notes.Note] = field(default_factory=list)  # slow parts, and options that take no effect
    files: WeightFiles | None = field(default=None, repr=False)  # source files of the packed weights
    adapters: Adapters = field(default_factory=Adapters, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": _no_model}  # ktx.model.loaded sets it in a copy

    def for_copy(self, model: nn.Module) -> LoadInfo:
        """Returns a copy of this object that refers to `model`, a copy of the loaded model."""
        return replace(self, model=weakref.ref(model))

    @deprecated_arguments(cache_lens="kv_cache_tokens")
    def engine(self, **options: Any) -> Engine:
        """Returns an engine that serves many requests with continuous batching.

        Close the engine after use, or use it in a `with` statement.

        Args:
            options: fields of ktx.engine.engine.Options.

        Raises:
            UsageError: the model was loaded without a tokenizer.
        """
        from ktx.engine.engine import Engine, Options  # late, because loading alone needs no engine

        if self.tokenizer is None:
            raise UsageError(
                "an engine needs a tokenizer, but the model was loaded without one: set model.ktx.tokenizer"
            )
        return Engine(self.model(), self.tokenizer, Options(**options))

    @property
    def loras(self) -> dict[str, Adapter]:
        """The loaded LoRA adapters by name."""
        return self.adapters.named

    def load_lora(self, path: str | Path, name: str | None = None, scale: float = 1.0) -> str:
        """Loads a LoRA adapter and returns its name.

        The adapter is inactive until `use_lora` or a request of an engine names it.

        Args:
            path: a PEFT folder, the safetensors file in one, or a llama.cpp GGUF file.
            name: default: the name of the folder or of the file.
            scale: factor on the adapter's output.

        Raises:
            BadFile: the adapter cannot be read, or it does not fit the model.
            UsageError: the adapter is of an unsupported kind, or its name is taken.
        """
        file = read_adapter(AdapterSpec.parse(path).with_name(name, scale))
        self.adapters.add(file.adapter, match_modules(self.model(), file))
        return file.adapter.name

    def unload_lora(self, name: str) -> None:
        """Unloads an adapter and frees its memory. Raises UsageError if no adapter has this name."""
        self.adapters.drop(name)

    def use_lora(self, *names: str) -> None:
        """Activates the named adapters, whose outputs are summed; without names, deactivates all adapters.

        Applies to `generate`, to forwards, and to requests of an engine that name no adapter.
        """
        self.adapters.use(names)

    def activity(self) -> dict[str, cpu.ExpertStats]:
        """Expert statistics since the model was loaded, by module path."""
        return {path: cpu.ExpertStats.read(module.total_counts()) for path, module in experts_by_path(self.model())}

    @property
    def load_speed(self) -> float:
        """GB of packed weights loaded per second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of `load`, parsed; their defaults are in its signature.

    Attributes:
        build: options that determine the planned model.
        adapter_files: the LoRA adapters' files, which are read before the model.
        num_threads: size of the kernels' thread pool.
        attn_implementation: argument of `model.set_attn_implementation`; None: the model's default.
        defer_experts: number of experts of a token whose output is added one layer later.
        stream_experts_min_tokens: min number of tokens from which the CPU's experts are streamed to the GPU, auto or
            off; None: the rule file's value.
        packed_cache_dir: folder that caches packed weights on disk; None: no such cache.
        progress: whether to draw a progress bar, or a sink that receives the bytes.
        self_test: whether the model is tested, or only by its engine.
        tokenizer: whether the tokenizer is read.
    """

    build: BuildOptions
    adapter_files: Sequence[AdapterFile | GGUFAdapter]
    num_threads: int
    attn_implementation: str | None
    defer_experts: int
    stream_experts_min_tokens: int | str | None
    packed_cache_dir: str | Path | None
    progress: bool | ProgressSink
    self_test: SelfTest
    tokenizer: bool


@deprecated_arguments(**OLD_ARGUMENTS)
@torch_defaults()
def load(
    model: str | Path,
    weights: str | Path | None = None,
    rules: str | Path | Sequence[Rule] | None = None,
    *,
    dtype: torch.dtype | None = None,
    kv_dtype: KVType = None,
    threads: int | None = None,
    quantize: str | None = None,
    quantize_experts: str | None = None,
    num_experts_per_tok: int | None = None,
    trust_remote_code: bool = False,
    progress: bool | ProgressSink = True,
    packed_cache_dir: str | Path | None = None,
    mtp: bool = False,
    defer_experts: int = 0,
    device: str | Sequence[str] | None = None,
    moe_device: str | None = None,
    shared_expert_device: str | None = None,
    devices: Mapping[str, str | Sequence[str]] | None = None,
    gpu_experts: int | None = None,
    stream_experts_min_tokens: int | str | None = None,
    self_test: SelfTest = True,
    lora: AdapterArgument | Sequence[AdapterArgument] | None = None,
    attn_implementation: str | None = None,
    config: PreTrainedConfig | None = None,
    tokenizer: bool = True,
) -> tuple[Any, Any]:
    """Loads a transformers model with packed weights; returns the model and its tokenizer.

    Args:
        model: a Hugging Face folder, a hub id (OWNER/NAME or OWNER/NAME@REVISION), or a GGUF file with enough metadata.
        weights: a GGUF file, a folder with one, or safetensors. Default: `model` itself.
        rules: name or path of a rule file, or a list of Rule. Default: the rules of the model's architecture.
        dtype: type that the model computes in. Default: bf16 if a part of the model is on a GPU, else f32.
        kv_dtype: type of the KV cache: f16, bf16, f32, q8_0, fp8 or a torch type. Default: f16 in ktx's caches, the
            model's own type in transformers' caches.
        threads: size of the kernels' thread pool. Default: KTX_THREADS, else ktx.hardware.default_threads.
        quantize, quantize_experts: int8, int4, int4g32, int4g64 or int4g128. Quantizes float weights of linear layers
            and of experts while they are loaded. Default of `quantize_experts`: `quantize`.
        num_experts_per_tok: number of experts per token, at most as many as the model was trained with.
        trust_remote_code: whether Python code from the model's folder may run.
        progress: whether to draw a progress bar on a terminal, or a sink that is called next to the bar.
        packed_cache_dir: folder that caches packed weights on disk. The first load writes them, later loads map them.
        mtp: loads the checkpoint's layer for multi-token prediction too, for an engine with `speculative="mtp"`.
        defer_experts: number of lowest-weighted experts of a token whose output is added one layer later
            (ktx.ops.expert_deferral).
        device: cpu, cuda, cuda:N, or several GPUs among which the layers are split; holds everything but the routed
            experts.
        moe_device: cpu, cuda, cuda:N or numa; holds the routed experts.
        shared_expert_device: holds the shared experts.
        devices: device map as in rule files.
        gpu_experts: number of experts per layer on the layer's GPU; the remaining experts stay on the CPU.
        stream_experts_min_tokens: min number of tokens from which the CPU's experts are streamed to the GPU too: a
            number, auto or off. Default: the rule file's value, else auto.
        self_test: computes two tokens in one forward, then the second one again through the cache
            (ktx.model.self_test). "engine" leaves the test to the engine, which runs it with its own forwards.
        lora: one or several LoRA adapters, each [NAME=]PATH[=SCALE] of a PEFT folder or a llama.cpp GGUF file. They are
            active from the start; `model.ktx.use_lora` selects others.
        attn_implementation: argument of `model.set_attn_implementation`: ktx, sdpa, eager, or a name of an attention
            function registered in transformers. Default: "ktx".
        config: a transformers configuration that replaces the model's own.
        tokenizer: if false, no tokenizer is read and None is returned in its place.

    Raises:
        BadFile, DoesNotFit, UsageError: the model cannot be loaded; raised before any weights are read.
        SelfTestFailed: the two computations of a token differ, or logits are not finite or all equal.
    """
    check_implementation(attn_implementation)
    if dtype not in (None, *COMPUTE_DTYPES):
        raise UsageError(f"dtype {dtype}: ktx computes in {', '.join(map(str, COMPUTE_DTYPES))}")
    parse_stream_experts(stream_experts_min_tokens)
    selftest.check_option(self_test)
    options = LoadOptions(
        build=BuildOptions(
            rules=rules,
            dtype=dtype,
            kv_dtype=kv_type(kv_dtype),
            num_experts_per_tok=num_experts_per_tok,
            trust_remote_code=trust_remote_code,
            targets=quant_targets(quantize, quantize_experts),
            mtp=mtp,
            placement=PlacementOptions(device, moe_device, shared_expert_device, devices, gpu_experts),
            config=config,
        ),
        adapter_files=[read_adapter(requested) for requested in parse_adapters(lora)],
        num_threads=cpu.pool_size(threads),
        attn_implementation=attn_implementation,
        defer_experts=defer_experts,
        stream_experts_min_tokens=stream_experts_min_tokens,
        packed_cache_dir=packed_cache_dir,
        progress=progress,
        self_test=self_test,
        tokenizer=tokenizer,
    )
    return _load_model(resolve_model(model, not weights), weights, options)


def _load_model(model: Path, weights: str | Path | None, options: LoadOptions) -> tuple[Any, Any]:
    """Plans a model, checks the plan, loads the weights, completes the model and tests it.

    Args, return values and errors are those of `load`.
    """
    cpu.ops.set_threads(options.num_threads)
    with notes.capture_warnings() as load_warnings:
        planned = prepare_model(model, weights, options.build)
    hf_model: Any = planned.model
    _set_attention(hf_model, options.attn_implementation)
    adapters = _check_plan(planned, options)
    if options.defer_experts:
        expert_deferral.install_deferral(hf_model, options.defer_experts)
    tokenizer = read_tokenizer(model, planned.source, options.build.trust_remote_code) if options.tokenizer else None
    files = WeightFiles(
        BuildArguments.of(planned, options.build, options.packed_cache_dir),
        {spec.file for step in planned.plan for spec in step.specs},
    )
    start_s = time.perf_counter()
    _load_weights(planned, options, files)
    _complete_model(planned, options)
    weight_sizes = own_sizes(hf_model)
    hf_model.ktx = info = LoadInfo(
        plan=planned.plan,
        weights=planned.source.path,
        seconds=time.perf_counter() - start_s,
        nbytes=sum(size.held_bytes for size in weight_sizes),
        bytes_per_token=sum(size.bytes_per_token for size in weight_sizes),
        isa=cpu.ops.isa(),
        threads=options.num_threads,
        kv_dtype=_resolve_kv_dtype(hf_model, options.build.kv_dtype),
        model=weakref.ref(hf_model),
        tokenizer=tokenizer,
        identity=[
            plan_identity(planned.plan),
            hf_model.config.to_dict(),
            cpu.ops.isa(),
            str(planned.dtype),
            options.defer_experts,
        ],
        self_test=options.self_test,
        files=files,
    )
    for adapter, modules in adapters:
        info.adapters.add(adapter, modules)
    info.adapters.use([adapter.name for adapter, _ in adapters])
    notes.add_notes(info.notes, [*planned.plan.model_notes, *load_warnings, *notes.openmp_notes()])
    set_generation_config(hf_model, model, planned.source)
    if options.self_test is True:
        selftest.check(hf_model)
    return hf_model, tokenizer


def _check_plan(planned: PlannedModel, options: LoadOptions) -> list[tuple[Adapter, MatchedModules]]:
    """Checks everything that can be checked before weights are read, so that no error comes after minutes of loading.

    Returns:
        The adapters with the modules that they match; their bytes become part of the plan.

    Raises:
        BadFile, DoesNotFit, UsageError: the model cannot be loaded.
    """
    model, plan, kv_dtype = planned.model, planned.plan, options.build.kv_dtype
    plan.check(planned.source)
    adapters = [(file.adapter, match_modules(model, file)) for file in options.adapter_files]
    plan.adapters = {adapter.name: adapter_bytes(modules) for adapter, modules in adapters}
    plan.warn_unread()
    _check_fake_gpus(plan)
    if kv_dtype == FP8:
        _check_fp8(plan)
    _resolve_kv_dtype(model, kv_dtype)  # for its error only
    check_memory(plan)
    return adapters


def _load_weights(planned: PlannedModel, options: LoadOptions, files: WeightFiles) -> None:
    """Loads the weights with a progress bar, from the packed cache on disk if there is one, and all other buffers."""
    plan, cache_dir = planned.plan, options.packed_cache_dir
    packed_cache = None if cache_dir is None else open_packed_cache(cache_dir, plan, planned.source)
    with progress_bar(sum(step.nbytes for step in plan), options.progress) as advance:
        try:
            load_weights(planned, advance, threads=options.num_threads, store=packed_cache, origin=files)
        except BaseException:
            if packed_cache is not None:
                packed_cache.abort()
            raise
    if packed_cache is not None and (error := packed_cache.commit()):
        warnings.warn(error, stacklevel=2)
    init_missing_buffers(planned.model, plan)


def _complete_model(planned: PlannedModel, options: LoadOptions) -> None:
    """Makes a model with loaded weights ready to run.

    Computes what operators derive from weights, installs transfers, fusion and offloading, and sets the model's class.
    """
    model, plan = planned.model, planned.plan
    for module in reversed(list(model.modules())):  # children before their parents
        if isinstance(module, Operator):
            module.use_live_parameters()
            module.ready()
            module.is_ready = True
    devices_of = {model.get_submodule(path): place for path, place in plan.devices.items()}
    if options.build.mtp:
        mtp_model = mtp_layer.detach_layer(model)
        devices_of |= dict.fromkeys((mtp_model, mtp_model.layers), devices_of[mtp_model.layer])
    device_hooks.install_transfer_hooks(model, devices_of, planned.dtype)
    group_layers(model)
    requested = options.stream_experts_min_tokens
    _install_expert_offload(model, plan, plan.stream_experts_min_tokens if requested is None else requested)
    tune_malloc()  # only now: loading has returned its temporary memory
    set_loaded_class(model)


def _set_attention(model: PreTrainedModel, attn_implementation: str | None) -> None:
    """Sets transformers' attention function. Raises UsageError for one that is unknown or not installed."""
    if attn_implementation is not None:
        try:
            model.set_attn_implementation(attn_implementation)
        except (ImportError, ValueError) as error:
            raise UsageError(f"attn_implementation {attn_implementation!r}: {str(error).splitlines()[0]}") from error


def _install_expert_offload(model: nn.Module, plan: Plan, requested: int | str | None) -> None:
    """Installs offloading and streaming of the CPU's experts for blocks on GPUs; without a GPU does nothing."""
    if any(device.gpu for device in plan.devices.values()):  # without a GPU Triton may not be installed
        importlib.import_module("ktx.ops.gpu.moe").install_offload(model)
        importlib.import_module("ktx.ops.gpu.expert_streaming").install_streaming(model, requested)


def _resolve_kv_dtype(model: nn.Module, requested: KVType) -> KVType:
    """Returns the KV cache's type: the requested one, else f16, or None if a transformers attention module reads it.

    Raises:
        UsageError: a transformers attention module cannot read the requested type.
    """
    foreign_attention = notes.foreign_attention(model)
    if foreign_attention and isinstance(requested, str):
        raise UsageError(
            f"kv_dtype {requested}: the rules keep transformers' attention module {foreign_attention[0]},"
            " which cannot read it; replace the module by ktx.ops.attention.Attention or use f16"
        )
    return requested or (None if foreign_attention else torch.float16)


def _check_fake_gpus(plan: Plan) -> None:
    """Raises UsageError if GPUs are fake and Triton's interpreter, which would run their kernels, is off."""
    if any(device.fake for device in plan.devices.values()) and not int(os.environ.get("TRITON_INTERPRET") or 0):
        raise UsageError(
            f"{GPU_VARIABLE}={os.environ.get(GPU_VARIABLE)}: kernels of fake GPUs run in Triton's interpreter;"
            " set TRITON_INTERPRET=1 before Python starts"
        )


def _check_fp8(plan: Plan) -> None:
    """Raises UsageError if a GPU does not support e4m3, the element type of an fp8 KV cache."""
    for device in {device for device in plan.devices.values() if device.gpu and not device.fake}:
        if (capability := torch.cuda.get_device_capability(device.torch)) < (8, 9):
            raise UsageError(
                f"kv_dtype fp8: {device} has compute capability {capability[0]}.{capability[1]},"
                " but e4m3 needs 8.9 (Ada, Hopper); use f16"
            )
