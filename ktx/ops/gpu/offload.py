"""Experts in the CPU's memory for a layer on a GPU: what goes over, and in which order.

Hidden states, choices and weights are copied to pinned buffers, the CPU's kernel is started, the GPU goes on (with the shared experts), and what
the kernel made is fetched where it is needed. All of it is given to a stream of its own beside the caller's, and nothing in Python
waits: `submit` and `sync` are host functions on that stream (cudaLaunchHostFunc, found in the libcudart that torch has loaded), so a CUDA graph may hold them.
Without that function, and where a GPU is only pretended, a thread does in the same order what the stream would.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ktx.devices import Device
from ktx.kernels import cpu
from ktx.kernels.gradients import none_on_gpu
from ktx.ops.gpu import padding
from ktx.ops.gpu.streams import CudaStream, ThreadStream, host_functions
from ktx.utils.fork_handlers import Renewed, Threads

SLOTS = 2  # sets of buffers: one is filled while another's result may still be on its way


class Stream(Protocol):
    """Work in the order in which it is given, beside the caller's."""

    def fork(self) -> None:
        """What follows waits for what the caller's stream has been given."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """From the device or to it."""

    def call(self, function: Callable[[], None]) -> None:
        """Runs on the CPU when its turn has come."""

    def join(self) -> None:
        """What the caller's stream is given from now on waits for all of this."""


class PinnedBuffers:
    """Buffers in the CPU's memory that both sides see, as large as was needed so far."""

    def __init__(self, pinned: bool):
        self.pinned, self.buffers, self.job = pinned, dict[str, torch.Tensor](), None

    job: Job | None

    def part(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The buffer of a name for a tensor of this shape [tokens, columns] and type."""
        held = self.buffers.get(name)
        if held is None or held.dtype is not like.dtype or held.shape[1] != like.shape[1] or len(held) < len(like):
            with torch.inference_mode(False):  # who writes it next may not be in that mode
                held = torch.empty(like.shape, dtype=like.dtype, pin_memory=self.pinned)
            self.buffers[name] = held
        return held[: len(like)]


@dataclass
class Job:
    """One call of the experts; a CUDA graph starts it again and again. `rows` are those the caller's forward computes wide, see cpu.wide_rows;
    `count` says at each start how many of all rows, the first ones, are tokens, where not all are.
    """

    owner: ExpertOffload
    experts: Any
    inputs: tuple[torch.Tensor, ...]
    out: torch.Tensor
    rows: tuple[int, tuple[int, ...]]
    count: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.done = threading.Event()

    def submit(self) -> None:
        """Hands the work to the CPU's thread and returns."""
        self.done.clear()
        self.owner.worker.submit(self.run)

    def run(self) -> None:
        self.owner.count_waiting(self.experts)
        try:
            real = len(self.out) if self.count is None else int(self.count)
            with torch.inference_mode(), cpu.bf16_rows(*self.rows):
                self.out[:real].copy_(self.experts(*(part[:real] for part in self.inputs)))
                self.out[real:].zero_()
        except BaseException as error:  # whoever waits has to be let go, and told
            self.owner.errors.append(error)
            self.out.fill_(torch.nan)
        finally:
            self.owner.ended = time.perf_counter()
            self.done.set()

    def sync(self) -> None:
        """Waits until the work is done."""
        self.done.wait()


@dataclass
class Pending:
    """What `submit` gives and `result` takes."""

    slot: PinnedBuffers
    job: Job
    like: torch.Tensor


class ExpertOffload(Renewed):
    """The way from one device to the CPU's experts and back; all layers of a model that are on the device share it."""

    def __init__(self, stream: Stream, pinned: bool = False):
        self.stream, self.pinned = stream, pinned
        self.worker = Threads(1, "ktx-experts")
        super().__init__()

    def renew(self) -> None:
        self.all_slots = [PinnedBuffers(self.pinned) for _ in range(SLOTS)]
        self.slots = itertools.cycle(self.all_slots)
        self.errors: list[BaseException] = []
        self.layer, self.ended = -1, 0.0  # the last that the CPU worked for, and when it was done

    def count_waiting(self, experts: Any) -> None:
        """Adds the time since a layer further up was done to what these experts have waited for the device; between two forwards nobody waits."""
        number = re.search(r"\.(\d+)\.", getattr(experts, "path", ""))
        before, self.layer = self.layer, int(number[1]) if number else -1
        if 0 <= before < self.layer:
            experts.waited += time.perf_counter() - self.ended

    def submit(self, experts: Any, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pending:
        """flat [tokens, D], ids and weights [tokens, K] on the device set off; raises what went wrong since it was last asked."""
        none_on_gpu("MoE", flat, weights)
        self.check()
        slot, stream = next(self.slots), self.stream
        stream.fork()
        if slot.job is not None:  # whose result nobody came for
            stream.call(slot.job.sync)
        sources = {"hidden": flat, "ids": ids, "weights": weights}
        inputs = tuple(slot.part(name, source) for name, source in sources.items())
        for target, source in zip(inputs, sources.values(), strict=True):
            stream.copy(target, source)
        slot.job = Job(self, experts, inputs, slot.part("out", flat), cpu.rows_told(), padding.count())
        stream.call(slot.job.submit)
        return Pending(slot, slot.job, flat)

    def result(self, under_way: Pending) -> torch.Tensor:
        """[tokens, D] on the device. An error in the experts is raised here if this has to wait for them, else by the next `check`."""
        out = torch.empty_like(under_way.like)
        self.stream.call(under_way.job.sync)
        self.stream.copy(out, under_way.job.out)
        self.stream.join()
        under_way.slot.job = None
        self.check()
        return out

    def reset(self) -> None:
        """What was begun will not be waited for: it was recorded for a graph that came to nothing, and never ran."""
        for slot in self.all_slots:
            slot.job = None

    def check(self) -> None:
        """Raises the first error of the experts that nobody has been told of."""
        if self.errors:
            error = self.errors[0]
            self.errors.clear()
            raise error


def way_from(device: torch.device) -> ExpertOffload:
    """A way from a device, by what it has for it."""
    real = device.type == "cuda"
    launch = host_functions() if real else None
    stream: Stream = ThreadStream(device) if launch is None else CudaStream(device, launch)
    return ExpertOffload(stream, pinned=real)


def install(model: Any, blocks: Iterable[Any]) -> None:
    """Gives a model's blocks a way to their experts, all blocks of a device the same one. No other model has it: its errors are this model's."""
    ways: dict[Device, ExpertOffload] = {}
    for block in blocks:
        if block.placement not in ways:
            ways[block.placement] = way_from(block.placement.torch)
        block.handover = ways[block.placement]
    model.handovers = list(ways.values())


def give_up(model: Any) -> None:
    """As HandOver.give_up, on all of a model's ways."""
    for way in getattr(model, "handovers", ()):
        way.reset()


def check(model: Any) -> None:
    """Raises what went wrong on any of a model's ways; ask when a forward's results are there."""
    for way in getattr(model, "handovers", ()):
        way.check()
