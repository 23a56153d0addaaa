"""Which modules go where when so much memory is given: a pure function of a model's footprint and budgets. No GPU is asked, none need be there.

Attention, norms, routers, shared experts, dense layers, the output layer, keys and values go to the GPUs, layers in turn from the first GPU to the last; then the routed
experts of as many layers as there is room for; what is left stays on the CPU, and with it the embedding, of which a token reads one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ktx.cache.kv import KVType
from ktx.errors import UsageError
from ktx.injection.device_map import PlacementEntry, spans
from ktx.injection.rules import Rule
from ktx.kernels.microbench import DEFAULT_PCIE_GB_S, min_tokens_to_stream
from ktx.ops.gpu.offload import SLOTS
from ktx.placement import workspace
from ktx.placement.memory_model import EMBEDDING, EXPERTS, GROUPS, OUTPUT, Footprint, KVMemory, ModuleMemory

RESERVE = 256 << 20  # on the CPU: what tables and one tensor in flight take beside the packed weights
SLACK = 0.05  # and so much of their bytes
CONTEXT = 512 << 20  # an allowance for what CUDA takes of each GPU: its context, kernels, cuBLAS's workspace
CROSSING = 15e-6  # seconds until hidden states begin to arrive on another device
KV, SCRATCH, SYSTEM = "keys and values", "scratch", "CUDA, reserve"
CPU = "cpu"


@dataclass(frozen=True)
class Budget:
    """Bytes that are given, `vram` of each GPU, and what they have to serve: `batch` sequences of `context` tokens, prompts `chunk` tokens at a time."""

    vram: tuple[int, ...]
    ram: int
    context: int = 8192
    batch: int = 1
    kv: KVType = torch.float16
    chunk: int = 2048

    def __post_init__(self) -> None:
        for name in ("context", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be at least 1")

    @property
    def gpus(self) -> list[str]:
        return [f"cuda:{i}" for i in range(len(self.vram))]

    def of(self, device: str) -> int:
        return self.ram if device == CPU else self.vram[self.gpus.index(device)]


@dataclass(frozen=True)
class Speeds:
    """GB/s that each side reads its memory with, GB/s between them, GOPS of the CPU for prompts (0: not known), and where the numbers are from."""

    cpu: float
    gpu: float
    cpu_from: str = "given"
    gpu_from: str = "given"
    link: float = DEFAULT_PCIE_GB_S
    link_from: str = "assumed"
    rate: float = 0.0


@dataclass(frozen=True)
class Placement:
    """A choice. `layers[i]` is layer i's device, `experts` the layers whose routed experts are there too; elsewhere they are on the CPU, but for `share[i]` of them.

    `stream`: there is room on the GPUs to bring experts there for prompts.
    """

    model: Footprint
    budget: Budget
    layers: list[str]
    experts: frozenset[int] = field(default_factory=frozenset)
    embedding: str = CPU
    share: Mapping[int, int] = field(default_factory=dict)
    stream: bool = False

    @property
    def names(self) -> list[str]:
        """The devices: the CPU first."""
        return [CPU, *self.budget.gpus]

    def device(self, part: ModuleMemory | KVMemory) -> str:
        group = getattr(part, "group", "")
        if part.pinned:
            return CPU
        if group == EMBEDDING:
            return self.embedding
        if group == EXPERTS and part.layer not in self.experts:
            return CPU
        return self.home(part)

    def home(self, part: ModuleMemory | KVMemory) -> str:
        """Where a part's layer is."""
        if part.layer is not None:
            return self.layers[part.layer] if part.layer < len(self.layers) else self.last
        return self.last

    @property
    def last(self) -> str:
        """Where the output layer is, and the norm before it."""
        return self.layers[-1] if self.layers else CPU

    @cached_property
    def devices(self) -> dict[str, str]:
        """By module path."""
        return {part.path: device for part, device in self.placed_bytes}

    @cached_property
    def placed_bytes(self) -> list[tuple[ModuleMemory, str]]:
        """What lies where; experts of which a share is on their layer's GPU are two parts."""
        found = []
        for part in self.model.parts:
            device, count = self.device(part), self.share.get(part.layer or 0, 0) if part.experts else 0
            if count and device == CPU and not part.pinned:
                beside = replace(part.of(count), path=f"{part.path}.on_gpu")
                found += [(part.of(part.experts - count), CPU), (beside, self.home(part))]
            else:
                found.append((part, device))
        return found

    @cached_property
    def bytes(self) -> dict[str, dict[str, int]]:
        """What is where: by group, then by device."""
        found: dict[str, Counter[str]] = {
            name: Counter() for name in [*(group for group, _ in GROUPS), KV, SCRATCH, SYSTEM]
        }
        for part, device in self.placed_bytes:
            found[part.group][device] += part.on(device != CPU).held
        for layer in self.model.kept:
            found[KV][self.device(layer)] += self.kv(layer)
        for device in self.names:
            found[SCRATCH][device] = self.scratch(device)
            weights = sum(found[group][device] for group, _ in GROUPS)
            found[SYSTEM][device] = int(SLACK * weights) + RESERVE if device == CPU else CONTEXT
        return {group: dict(bytes_of) for group, bytes_of in found.items()}

    def kv(self, layer: KVMemory) -> int:
        budget = self.budget
        return layer.nbytes(budget.context, budget.batch, budget.kv, self.device(layer) != CPU)

    def scratch(self, device: str) -> int:
        """Of a chunk of a prompt, or of a token of each sequence."""
        parts = [part for part, where in self.placed_bytes if where == device]
        kept = [layer for layer in self.model.kept if self.device(layer) == device]
        budget, tokens, gpu = self.budget, max(self.budget.chunk, self.budget.batch), device != CPU
        need = workspace.activations(self.model, parts, tokens, gpu) if parts else 0
        need += workspace.expanding(kept, budget.context)
        need += workspace.logits(self.model, budget.batch) if any(part.group == OUTPUT for part in parts) else 0
        if budget.vram:
            need += workspace.crossing(self.model, tokens) * (1 if gpu else SLOTS * len(budget.vram))
        if gpu:
            need += workspace.attention(kept, tokens, budget.batch) + workspace.dequantised(parts)
            need += workspace.captured(self.model, parts, kept, budget.batch) if len(budget.vram) == 1 else 0
            need += workspace.streamed(self.streamed(device)) if self.stream else 0
        return need

    def streamed(self, device: str) -> list[ModuleMemory]:
        """The experts on the CPU of layers on a GPU."""
        return [
            part for part, where in self.placed_bytes if part.experts and where == CPU and self.home(part) == device
        ]

    def total(self, device: str) -> int:
        return sum(of.get(device, 0) for of in self.bytes.values())

    def exceeded(self) -> dict[str, int]:
        """Bytes that devices lack."""
        lacks = {device: self.total(device) - self.budget.of(device) for device in self.names}
        return {device: lack for device, lack in lacks.items() if lack > 0}

    @property
    def off_device_bytes(self) -> set[tuple[int, str]]:
        """Layers, and which groups of theirs are on the CPU."""
        parts = [(part.layer, part.group) for part in self.model.parts if self.device(part) == CPU]
        return {(layer, group) for layer, group in parts if layer is not None}

    # ---- what a token costs

    def reads(self, device: str) -> int:
        """Bytes that a token of each sequence makes a device read, at the end of its context."""
        budget, gpu = self.budget, device != CPU
        weights = sum(part.read(budget.batch, gpu) for part, where in self.placed_bytes if where == device)
        kept = [layer for layer in self.model.kept if self.device(layer) == device]
        past = sum(layer.row(budget.kv, gpu) * budget.context + 2 * layer.state for layer in kept)
        return weights + past * budget.batch

    def crossings(self) -> int:
        """How often hidden states change their device for a token."""
        path, away = [self.embedding], Counter(layer for layer, _ in self.off_device_bytes)
        for layer, device in enumerate(self.layers):
            path += [device, *[CPU, device] * away[layer]]
        return sum(a != b for a, b in zip(path, path[1:], strict=False))

    def seconds(self, speeds: Speeds) -> dict[str, float]:
        """Of one token for each sequence: reading on each device, and the ways between them."""
        found = {name: self.reads(name) / 1e9 / (speeds.cpu if name == CPU else speeds.gpu) for name in self.names}
        each = CROSSING + workspace.crossing(self.model, self.budget.batch) / 2 / 1e9 / DEFAULT_PCIE_GB_S
        return found | {"crossings": self.crossings() * each}

    def streamed_from(self, speeds: Speeds) -> int:
        """Tokens from which on experts are better brought to a GPU than computed by the CPU; 0 where they are not brought."""
        parts = [part for gpu in self.budget.gpus for part in self.streamed(gpu) if part.weights]
        if not self.stream or not speeds.rate or not parts:
            return 0
        numbers = [part.weights * part.top // part.experts for part in parts]
        found = [
            min_tokens_to_stream(p.cpu.held, n, speeds.link, speeds.rate) for p, n in zip(parts, numbers, strict=True)
        ]
        return max(found)

    def shares(self) -> dict[str, int]:
        """As a rule file's `gpu_experts`."""
        return {f"layers {layer}": count for layer, count in sorted(self.share.items())}

    def map(self) -> dict[str, str]:
        """As a rule file's `devices`."""
        gpus = sorted(set(self.layers) - {CPU}, key=self.budget.gpus.index)
        if not gpus:
            return {"all": CPU}
        found = {"all": gpus[0]}
        for gpu in gpus[1:]:
            found[f"layers {spans(i for i, device in enumerate(self.layers) if device == gpu)}"] = gpu
        if len(gpus) > 1:
            found |= {"output": self.last, r"^(?:model\.)?norm$": self.last}
        if self.embedding == CPU:
            found["embedding"] = CPU
        elif self.embedding != gpus[0]:
            found["embedding"] = self.embedding
        routed = {part.layer for part in self.model.parts if part.group == EXPERTS and part.layer is not None}
        if routed and not routed & self.experts:
            found["experts"] = CPU
        elif routed - self.experts:
            found[f"experts {spans(routed - self.experts)}"] = CPU
        return found


def solve(model: Footprint, budget: Budget) -> Placement:
    """The best placement; where none fits, the one that lacks least. Room to bring experts for prompts comes before experts that stay, and after all else."""
    made = _chosen(model, budget, stream=True)
    return made if not made.exceeded() else _chosen(model, budget, stream=False)


def _chosen(model: Footprint, budget: Budget, stream: bool) -> Placement:
    if not budget.vram:
        return Placement(model, budget, [CPU] * model.layers)
    everywhere = frozenset(part.layer for part in model.parts if part.group == EXPERTS and part.layer is not None)
    for embedding in (budget.gpus[0], CPU):
        made = replace(_spread(model, budget, lambda part: True), experts=everywhere, embedding=embedding)
        if not made.exceeded():
            return made
    made = replace(_spread(model, budget, lambda part: part.group != EXPERTS), stream=stream)
    sizes = {part.layer: part.gpu.held for part in model.parts if part.group == EXPERTS}
    rooms: dict[str, int] = {}  # of GPUs that have the scratch of experts
    for layer in sorted(everywhere, key=lambda layer: (sizes[layer], layer)):
        device = made.layers[layer]
        if device not in rooms:
            rooms[device] = budget.of(device) - _with(made, layer).total(device) + sizes[layer]
        if sizes[layer] <= rooms[device]:
            made, rooms[device] = _with(made, layer), rooms[device] - sizes[layer]
    for device in budget.gpus:
        made = _filled(made, device)
    return made


def _filled(made: Placement, device: str) -> Placement:
    """With as many experts of one more layer as there is room for on a GPU."""
    parts = [part for part in made.streamed(device) if not part.pinned and part.layer is not None]
    room = made.budget.of(device) - made.total(device)
    if not parts or room <= 0:
        return made
    part = min(parts, key=lambda part: (part.gpu.held, part.layer))
    for count in range(min(part.experts - 1, part.experts * room // max(1, part.gpu.held)), 0, -1):
        found = replace(made, share={**made.share, part.layer or 0: count})
        if device not in found.exceeded():
            return found
    return made


def _with(made: Placement, layer: int) -> Placement:
    return replace(made, experts=made.experts | {layer})


def _spread(model: Footprint, budget: Budget, counts: Callable[[ModuleMemory], bool]) -> Placement:
    """Layers over the GPUs by what they weigh in each one's room."""
    weights = [0] * model.layers
    for part in model.parts:
        if counts(part) and part.group != EMBEDDING and not part.pinned:
            weights[-1 if part.layer is None else part.layer] += part.gpu.held
    for layer in model.kept:
        weights[layer.layer] += 0 if layer.pinned else layer.nbytes(budget.context, budget.batch, budget.kv, True)
    gpus = budget.gpus
    return Placement(
        model, budget, [gpus[i] for i in balanced(weights, [max(1, size - CONTEXT) for size in budget.vram])]
    )


def balanced(weights: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Which room each weight is in, in turn, so that the fullest is as empty as it can be for its size."""

    def filled(share: float) -> list[int] | None:
        found, room, left = list[int](), 0, share * rooms[0]
        for weight in weights:
            while weight > left:
                room += 1
                if room == len(rooms):
                    return None
                left = share * rooms[room]
            found.append(room)
            left -= weight
        return found

    low, high = 0.0, sum(weights) / min(rooms) + 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if filled(middle) is not None else (middle, high)
    return filled(high) or [0] * len(weights)


def shares(model: Footprint, gpus: int, places: Sequence[PlacementEntry], rules: Sequence[Rule]) -> list[int]:
    """Which of several GPUs each layer is on when they share its bytes evenly; what the map or a rule puts elsewhere is not counted."""
    elsewhere = [entry.pattern for entry in places if entry.device and not entry.several]
    fixed = [rule.name for rule in rules if rule.device and rule.name is not None]
    weights = [0] * model.layers
    for part in model.parts:
        if part.group == EMBEDDING or any(pattern.search(part.path) for pattern in [*elsewhere, *fixed]):
            continue
        weights[-1 if part.layer is None else part.layer] += part.gpu.held
    return balanced(weights, [1 << 30] * gpus)


def summary(made: Placement, speeds: Speeds | None) -> dict[str, Any]:
    """Plain data."""
    found: dict[str, Any] = {
        "devices": made.map(),
        "gpu_experts": made.shares(),
        "context": made.budget.context,
        "batch": made.budget.batch,
        "bytes": {group: of for group, of in made.bytes.items() if any(of.values())},
        "sum": {device: made.total(device) for device in made.names},
        "budget": {device: made.budget.of(device) for device in made.names},
        "a token reads": {device: made.reads(device) for device in made.names},
        "crossings": made.crossings(),
    }
    if speeds is not None:
        seconds = made.seconds(speeds)
        found |= {
            "GB/s": {CPU: speeds.cpu, "gpu": speeds.gpu},
            "seconds": seconds,
            "stream_experts": made.streamed_from(speeds) or "off",
            "tokens a second": made.budget.batch / sum(seconds.values()),
        }
    return found
