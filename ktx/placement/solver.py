"""Placement solver: assigns modules to devices under memory budgets, from a model's footprint alone. It queries no GPU.

Attention, norms, routers, shared experts, dense layers, the output layer and the KV cache are placed on the GPUs, with
the layers distributed in order from the first GPU to the last. Then the routed experts of as many layers as fit follow.
The remaining experts stay on the CPU, and with them the embedding, of which a token reads a single row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from ktx.cache.kv import KVType
from ktx.errors import UsageError
from ktx.injection.device_map import PlacementEntry, format_ranges
from ktx.injection.inject import layer_number
from ktx.injection.rule import Rule
from ktx.kernels.microbench import DEFAULT_PCIE_GB_S, min_tokens_to_stream
from ktx.ops.gpu.offload import NUM_BUFFER_SETS
from ktx.placement import workspace
from ktx.placement.memory_model import EMBEDDING, EXPERTS, GROUPS, OUTPUT, Footprint, KVMemory, ModuleMemory

RESERVE_BYTES = 256 << 20  # bytes on the CPU for tables and one tensor in flight, in addition to the packed weights
RESERVE_FRACTION = 0.05  # reserve as a fraction of the packed weights
CUDA_CONTEXT_BYTES = 512 << 20  # allowance in bytes per GPU for CUDA's context, kernels and cuBLAS's workspace
CROSSING_LATENCY_S = 15e-6  # seconds until hidden states begin to arrive on another device
KV, SCRATCH, SYSTEM = "keys and values", "scratch", "CUDA, reserve"
CPU = "cpu"


@dataclass(frozen=True)
class Budget:
    """Memory budget in bytes, `vram` per GPU, and the workload that has to fit.

    The workload is `batch` sequences of `context` tokens with a KV cache of type `kv_dtype`, prefilled in chunks of
    `chunk_size` tokens.
    """

    vram: tuple[int, ...]
    ram: int
    context: int = 8192
    batch: int = 1
    kv_dtype: KVType = torch.float16
    chunk_size: int = 2048

    def __post_init__(self) -> None:
        for name in ("context", "batch", "chunk_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be at least 1")

    @property
    def gpus(self) -> list[str]:
        """Names of the GPUs."""
        return [f"cuda:{i}" for i in range(len(self.vram))]

    def bytes_of(self, device: str) -> int:
        """Budget of a device in bytes."""
        return self.ram if device == CPU else self.vram[self.gpus.index(device)]


@dataclass(frozen=True)
class Speeds:
    """Memory bandwidths in GB/s and the CPU's prefill rate, each with its origin.

    `cpu_gb_s` and `gpu_gb_s` are the bandwidths of the device memories, `link_gb_s` that between the two. `cpu_gops`
    is the CPU's rate in prefill (0: unknown). The `*_from` fields name the origin, which the plan prints, because a
    prediction from assumed speeds is less certain than one from measured speeds.
    """

    cpu_gb_s: float
    gpu_gb_s: float
    cpu_from: str = "given"
    gpu_from: str = "given"
    link_gb_s: float = DEFAULT_PCIE_GB_S
    link_from: str = "assumed"
    cpu_gops: float = 0.0


@dataclass(frozen=True)
class Placement:
    """An assignment of modules to devices.

    `layers[i]` is the device of layer i. `experts` are the layers all of whose routed experts are on that device too.
    Of another layer i, `num_gpu_experts[i]` experts (default 0) are on the layer's device and the rest on the CPU.
    `streams_experts` means that the GPUs have space for streaming experts in prefill.
    """

    model: Footprint
    budget: Budget
    layers: list[str]
    experts: frozenset[int] = field(default_factory=frozenset)
    embedding: str = CPU
    num_gpu_experts: Mapping[int, int] = field(default_factory=dict)
    streams_experts: bool = False

    @property
    def device_names(self) -> list[str]:
        """Names of the devices, the CPU first."""
        return [CPU, *self.budget.gpus]

    def device(self, module: ModuleMemory | KVMemory) -> str:
        """Device of a module or of a layer's KV cache.

        Modules that a rule places on the CPU (`cpu_only`) and the experts of layers outside `experts` are on the
        CPU. So are experts that are split between two devices; `placed_modules` lists both.
        """
        group = getattr(module, "group", "")
        if module.cpu_only:
            return CPU
        if group == EMBEDDING:
            return self.embedding
        if group == EXPERTS and module.layer not in self.experts:
            return CPU
        return self.layer_device(module)

    def layer_device(self, module: ModuleMemory | KVMemory) -> str:
        """Device of the layer that contains `module`."""
        if module.layer is not None:
            return self.layers[module.layer] if module.layer < len(self.layers) else self.output_device
        return self.output_device

    @property
    def output_device(self) -> str:
        """Device of the output layer and of the norm before it."""
        return self.layers[-1] if self.layers else CPU

    @cached_property
    def devices(self) -> dict[str, str]:
        """Devices by module path."""
        return {module.path: device for module, device in self.placed_modules}

    @cached_property
    def placed_modules(self) -> list[tuple[ModuleMemory, str]]:
        """Modules with their devices; experts that are split between two devices are two entries.

        All sums of bytes and reads go over this list, so that each device counts only the experts that it holds.
        """
        placed = []
        for module in self.model.modules:
            device = self.device(module)
            count = self.num_gpu_experts.get(module.layer or 0, 0) if module.num_experts else 0
            if count and device == CPU and not module.cpu_only:
                on_gpu = replace(module.subset(count), path=f"{module.path}.on_gpu")
                placed += [(module.subset(module.num_experts - count), CPU), (on_gpu, self.layer_device(module))]
            else:
                placed.append((module, device))
        return placed

    @cached_property
    def bytes(self) -> dict[str, dict[str, int]]:
        """Bytes by group (modules, KV cache, workspace, reserve), then by device: the table that `ktx plan` prints."""
        totals: dict[str, Counter[str]] = {
            name: Counter() for name in [*(group for group, _ in GROUPS), KV, SCRATCH, SYSTEM]
        }
        for module, device in self.placed_modules:
            totals[module.group][device] += module.weight_bytes(device != CPU).held_bytes
        for layer in self.model.kv_layers:
            totals[KV][self.device(layer)] += self.kv_bytes(layer)
        for device in self.device_names:
            totals[SCRATCH][device] = self.workspace_bytes(device)
            weight_bytes = sum(totals[group][device] for group, _ in GROUPS)
            totals[SYSTEM][device] = (
                int(RESERVE_FRACTION * weight_bytes) + RESERVE_BYTES if device == CPU else CUDA_CONTEXT_BYTES
            )
        return {group: dict(by_device) for group, by_device in totals.items()}

    def kv_bytes(self, layer: KVMemory) -> int:
        """Bytes of a layer's KV cache."""
        budget = self.budget
        return layer.nbytes(budget.context, budget.batch, budget.kv_dtype, self.device(layer) != CPU)

    def workspace_bytes(self, device: str) -> int:
        """Bytes of workspace on a device: an upper bound for a prefill chunk and for one decoded token per sequence.

        It adds up what forwards need in addition to weights and caches (see ktx.placement.workspace), each only on
        the devices that need it: logits where the output layer is, transfer buffers if there are GPUs, partial results
        of attention, dequantized chunks and streamed experts on GPUs, and CUDA graphs on a single GPU, because graphs
        are captured only then.
        """
        modules = [module for module, placed_on in self.placed_modules if placed_on == device]
        kv_layers = [layer for layer in self.model.kv_layers if self.device(layer) == device]
        budget, tokens, gpu = self.budget, max(self.budget.chunk_size, self.budget.batch), device != CPU
        num_bytes = workspace.activation_bytes(self.model, modules, tokens, gpu) if modules else 0
        num_bytes += workspace.mla_expansion_bytes(kv_layers, budget.context)
        if any(module.group == OUTPUT for module in modules):
            num_bytes += workspace.logits_bytes(self.model, budget.batch)
        if budget.vram:  # the CPU has its buffers once for each GPU
            num_buffers = 1 if gpu else NUM_BUFFER_SETS * len(budget.vram)
            num_bytes += num_buffers * workspace.transfer_bytes(self.model, tokens)
        if gpu:
            num_bytes += workspace.attention_bytes(kv_layers, tokens, budget.batch)
            num_bytes += workspace.dequantized_bytes(modules)
            if len(budget.vram) == 1:
                num_bytes += workspace.cuda_graph_bytes(self.model, modules, kv_layers, budget.batch)
            if self.streams_experts:
                num_bytes += workspace.streaming_bytes(self.streamed_experts(device))
        return num_bytes

    def streamed_experts(self, device: str) -> list[ModuleMemory]:
        """Experts on the CPU whose layers are on the given GPU."""
        return [
            module
            for module, placed_on in self.placed_modules
            if module.num_experts and placed_on == CPU and self.layer_device(module) == device
        ]

    def total_bytes(self, device: str) -> int:
        """Bytes in use on a device."""
        return sum(by_device.get(device, 0) for by_device in self.bytes.values())

    def exceeded(self) -> dict[str, int]:
        """Bytes by which devices exceed their budgets."""
        excess = {device: self.total_bytes(device) - self.budget.bytes_of(device) for device in self.device_names}
        return {device: num_bytes for device, num_bytes in excess.items() if num_bytes > 0}

    @property
    def cpu_groups(self) -> set[tuple[int, str]]:
        """Pairs of layer and group that are on the CPU."""
        groups = [(module.layer, module.group) for module in self.model.modules if self.device(module) == CPU]
        return {(layer, group) for layer, group in groups if layer is not None}

    # ---- cost of a decoded token

    def read_bytes_per_token(self, device: str) -> int:
        """Bytes that a device reads to decode one token of each sequence, at the end of the context.

        Decode is limited by memory bandwidth, so these bytes divided by the bandwidth predict its time. A recurrent
        state is read and written, so it counts twice.
        """
        budget, gpu = self.budget, device != CPU
        weight_bytes = sum(
            module.read_bytes(budget.batch, gpu) for module, placed_on in self.placed_modules if placed_on == device
        )
        kv_layers = [layer for layer in self.model.kv_layers if self.device(layer) == device]
        cache_bytes = sum(
            layer.row_bytes(budget.kv_dtype, gpu) * budget.context + 2 * layer.state_bytes for layer in kv_layers
        )
        return weight_bytes + cache_bytes * budget.batch

    def transfers_per_token(self) -> int:
        """How often hidden states change the device for a token.

        A layer on a GPU with modules on the CPU adds two transfers for each such group, to the CPU and back.
        """
        route, num_cpu_groups = [self.embedding], Counter(layer for layer, _ in self.cpu_groups)
        for layer, device in enumerate(self.layers):
            route += [device, *[CPU, device] * num_cpu_groups[layer]]
        return sum(device != next_device for device, next_device in pairwise(route))

    def seconds_per_token(self, speeds: Speeds) -> dict[str, float]:
        """Seconds for one token of each sequence: reads by device, and transfers between devices.

        The times are added up as if nothing overlapped, so their sum is an upper bound of the time.
        """
        read_s = {
            name: self.read_bytes_per_token(name) / 1e9 / (speeds.cpu_gb_s if name == CPU else speeds.gpu_gb_s)
            for name in self.device_names
        }
        crossing_s = (  # one way: half of the bytes
            CROSSING_LATENCY_S + workspace.transfer_bytes(self.model, self.budget.batch) / 2 / 1e9 / DEFAULT_PCIE_GB_S
        )
        return read_s | {"crossings": self.transfers_per_token() * crossing_s}

    def min_streamed_tokens(self, speeds: Speeds) -> int:
        """Smallest number of tokens for which streaming experts to a GPU beats computing them on the CPU; 0: never.

        It is the largest of the layers' break-even points, so that from there on streaming pays in every layer.
        """
        modules = [module for gpu in self.budget.gpus for module in self.streamed_experts(gpu) if module.num_weights]
        if not self.streams_experts or not speeds.cpu_gops or not modules:
            return 0
        weights_per_token = [module.num_weights * module.top_k // module.num_experts for module in modules]
        min_tokens = [
            min_tokens_to_stream(module.cpu.held_bytes, num_weights, speeds.link_gb_s, speeds.cpu_gops)
            for module, num_weights in zip(modules, weights_per_token, strict=True)
        ]
        return max(min_tokens)

    def gpu_experts_map(self) -> dict[str, int]:
        """Returns the rule file's `gpu_experts`."""
        return {f"layers {layer}": count for layer, count in sorted(self.num_gpu_experts.items())}

    def device_map(self) -> dict[str, str]:
        """Returns the rule file's `devices`, so that a user can write the computed placement to a file.

        An entry for inner modules overrides those for the modules around them: all modules are on the first GPU except
        layers on other GPUs, the output, the embedding, and the experts on the CPU.
        """
        gpus = sorted(set(self.layers) - {CPU}, key=self.budget.gpus.index)
        if not gpus:
            return {"all": CPU}
        devices = {"all": gpus[0]}
        for gpu in gpus[1:]:
            devices[f"layers {format_ranges(i for i, device in enumerate(self.layers) if device == gpu)}"] = gpu
        if len(gpus) > 1:
            devices |= {"output": self.output_device, r"^(?:model\.)?norm$": self.output_device}
        if self.embedding == CPU:
            devices["embedding"] = CPU
        elif self.embedding != gpus[0]:
            devices["embedding"] = self.embedding
        expert_layers = {
            module.layer for module in self.model.modules if module.group == EXPERTS and module.layer is not None
        }
        if expert_layers and not expert_layers & self.experts:
            devices["experts"] = CPU
        elif expert_layers - self.experts:
            devices[f"experts {format_ranges(expert_layers - self.experts)}"] = CPU
        return devices


def solve(model: Footprint, budget: Budget) -> Placement:
    """Returns the best placement, or the one that exceeds its budget least if none fits.

    Space for streaming experts in prefill takes precedence over experts that stay on a GPU, and comes after everything
    else.
    """
    placement = _solve(model, budget, stream=True)
    return placement if not placement.exceeded() else _solve(model, budget, stream=False)


def _solve(model: Footprint, budget: Budget, stream: bool) -> Placement:
    """Solves with or without space for streaming experts on the GPUs.

    First it tries to place everything on the GPUs, with the embedding on the first GPU or on the CPU. If that does not
    fit, it distributes the layers without their routed experts. Then it adds the experts of complete layers, smallest
    first, because more of them fit that way, and at the end some experts of one more layer per GPU.
    """
    if not budget.vram:
        return Placement(model, budget, [CPU] * model.num_layers)
    expert_layers = frozenset(
        module.layer for module in model.modules if module.group == EXPERTS and module.layer is not None
    )
    for embedding in (budget.gpus[0], CPU):
        placement = replace(
            _distribute_layers(model, budget, lambda module: True), experts=expert_layers, embedding=embedding
        )
        if not placement.exceeded():
            return placement
    placement = replace(
        _distribute_layers(model, budget, lambda module: module.group != EXPERTS), streams_experts=stream
    )
    layer_bytes = {module.layer: module.gpu.held_bytes for module in model.modules if module.group == EXPERTS}
    # Free bytes by GPU. The workspace for experts does not grow with the number of layers, so it is subtracted once,
    # with the first layer.
    free_bytes: dict[str, int] = {}
    for layer in sorted(expert_layers, key=lambda layer: (layer_bytes[layer], layer)):
        device = placement.layers[layer]
        if device not in free_bytes:
            free_bytes[device] = (
                budget.bytes_of(device) - _with_layer(placement, layer).total_bytes(device) + layer_bytes[layer]
            )
        if layer_bytes[layer] <= free_bytes[device]:
            placement, free_bytes[device] = _with_layer(placement, layer), free_bytes[device] - layer_bytes[layer]
    for device in budget.gpus:
        placement = _with_partial_layer(placement, device)
    return placement


def _with_partial_layer(placement: Placement, device: str) -> Placement:
    """Adds as many experts of one more layer as fit on a GPU: those of the layer with the smallest experts.

    The free bytes bound the number from above; it is decreased until the placement fits, because splitting a layer
    changes the workspace too.
    """
    modules = [
        module for module in placement.streamed_experts(device) if not module.cpu_only and module.layer is not None
    ]
    free_bytes = placement.budget.bytes_of(device) - placement.total_bytes(device)
    if not modules or free_bytes <= 0:
        return placement
    module = min(modules, key=lambda module: (module.gpu.held_bytes, module.layer))
    for count in range(
        min(module.num_experts - 1, module.num_experts * free_bytes // max(1, module.gpu.held_bytes)), 0, -1
    ):
        candidate = replace(placement, num_gpu_experts={**placement.num_gpu_experts, module.layer or 0: count})
        if device not in candidate.exceeded():
            return candidate
    return placement


def _with_layer(placement: Placement, layer: int) -> Placement:
    """Adds all experts of a layer."""
    return replace(placement, experts=placement.experts | {layer})


def _distribute_layers(model: Footprint, budget: Budget, is_counted: Callable[[ModuleMemory], bool]) -> Placement:
    """Distributes the layers in order over the GPUs, by their bytes and in proportion to each GPU's budget.

    Args:
        model: the footprint.
        budget: the budget, with at least one GPU.
        is_counted: whether the bytes of a module count; false for modules that will be on the CPU.
    """
    layer_bytes = [0] * model.num_layers  # modules after the last layer count with it
    for module in model.modules:
        if is_counted(module) and module.group != EMBEDDING and not module.cpu_only:
            layer_bytes[-1 if module.layer is None else module.layer] += module.gpu.held_bytes
    for layer in model.kv_layers:
        layer_bytes[layer.layer] += (
            0 if layer.cpu_only else layer.nbytes(budget.context, budget.batch, budget.kv_dtype, True)
        )
    gpus = budget.gpus
    return Placement(
        model,
        budget,
        [gpus[i] for i in balance_layers(layer_bytes, [max(1, size - CUDA_CONTEXT_BYTES) for size in budget.vram])],
    )


def balance_layers(layer_bytes: Sequence[int], capacities: Sequence[int]) -> list[int]:
    """Divides layers, in order, among GPUs such that the largest fill (used bytes / capacity) is minimal.

    A bisection finds the smallest fill at which a greedy assignment succeeds.

    Args:
        layer_bytes: bytes of each layer.
        capacities: capacity of each GPU in bytes.

    Returns:
        The index of the GPU of each layer, in ascending order.
    """

    def assign(max_fill: float) -> list[int] | None:
        """Fills one GPU after another up to `max_fill` times its capacity; None if the last one overflows."""
        assignment, index, free = list[int](), 0, max_fill * capacities[0]
        for num_bytes in layer_bytes:
            while num_bytes > free:
                index += 1
                if index == len(capacities):
                    return None
                free = max_fill * capacities[index]
            assignment.append(index)
            free -= num_bytes
        return assignment

    low, high = 0.0, sum(layer_bytes) / min(capacities) + 1.0
    for _ in range(50):  # bisects to the precision of a float
        middle = (low + high) / 2
        low, high = (low, middle) if assign(middle) is not None else (middle, high)
    return assign(high) or [0] * len(layer_bytes)


def split_evenly(model: Footprint, gpus: int, entries: Sequence[PlacementEntry], rules: Sequence[Rule]) -> list[int]:
    """Returns the GPU index of each layer if `gpus` GPUs share the layers evenly by bytes.

    It serves device options that name several GPUs (`cuda:0,cuda:1`) without memory budgets.
    Modules that the device map (`entries`) or a rule places elsewhere do not count.
    """
    elsewhere = [entry.pattern for entry in entries if entry.device and not entry.split_devices]
    rule_patterns = [rule.name for rule in rules if rule.device and rule.name is not None]
    layer_bytes = [0] * model.num_layers  # modules after the last layer count with it
    for module in model.modules:
        paths = list(_paths_in_layer(module.path))
        if module.group == EMBEDDING or any(
            pattern.search(p) for pattern in [*elsewhere, *rule_patterns] for p in paths
        ):
            continue
        layer_bytes[-1 if module.layer is None else module.layer] += module.gpu.held_bytes
    return balance_layers(layer_bytes, [1 << 30] * gpus)  # any equal capacities


def _paths_in_layer(path: str) -> Iterator[str]:
    """Yields the path of a module, and those of the modules around it, up to its layer."""
    yield path
    while layer_number(path := path.rpartition(".")[0]) is not None:
        yield path


def to_json(placement: Placement, speeds: Speeds | None) -> dict[str, Any]:
    """Returns the placement as plain data for `ktx plan --json`, with estimated times if `speeds` are given."""
    result: dict[str, Any] = {
        "devices": placement.device_map(),
        "gpu_experts": placement.gpu_experts_map(),
        "context": placement.budget.context,
        "batch": placement.budget.batch,
        "bytes": {group: by_device for group, by_device in placement.bytes.items() if any(by_device.values())},
        "sum": {device: placement.total_bytes(device) for device in placement.device_names},
        "budget": {device: placement.budget.bytes_of(device) for device in placement.device_names},
        "a token reads": {device: placement.read_bytes_per_token(device) for device in placement.device_names},
        "crossings": placement.transfers_per_token(),
    }
    if speeds is not None:
        seconds = placement.seconds_per_token(speeds)
        result |= {
            "GB/s": {CPU: speeds.cpu_gb_s, "gpu": speeds.gpu_gb_s},
            "seconds": seconds,
            "stream_experts": placement.min_streamed_tokens(speeds) or "off",
            "tokens a second": placement.budget.batch / sum(seconds.values()),
        }
    return result
