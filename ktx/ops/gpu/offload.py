"""Offload of experts from a layer on a GPU to CPU memory: the transfers and their order.

Hidden states, expert ids and routing weights are copied to pinned buffers, the CPU kernel is started, the GPU continues
with the shared experts, and the kernel's output is copied back where it is needed. All of this is queued on a side
stream, and Python does not wait: `submit` and `sync` are host functions on that stream (cudaLaunchHostFunc, found in
the libcudart that torch has loaded), so a CUDA graph can capture them. Without that function, and on a fake GPU, a
thread does the same work in the same order.
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
from ktx.kernels.gradients import refuse_gpu_gradient
from ktx.ops.gpu import padding
from ktx.ops.gpu.streams import CudaStream, ThreadStream, host_functions
from ktx.utils.fork_handlers import ForkSafeThreadPool, RecreatedOnFork

NUM_BUFFER_SETS = 2  # sets of buffers: one is filled while the result of the other may still be in flight


class Stream(Protocol):
    """A queue of work in order, concurrent to the caller's stream."""

    def fork(self) -> None:
        """Makes the work that follows wait for all work queued on the caller's stream."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy from the device or to it."""

    def call(self, function: Callable[[], None]) -> None:
        """Queues a function, which runs on the CPU."""

    def join(self) -> None:
        """Makes work queued on the caller's stream from now on wait for all work of this stream."""


class PinnedBuffers:
    """Buffers in CPU memory for one job; they grow on demand.

    Attributes:
        pinned: whether the memory is pinned.
        job: the job that uses the buffers; None when its result has been fetched.
    """

    def __init__(self, pinned: bool):
        self.pinned, self.buffers, self.job = pinned, dict[str, torch.Tensor](), None

    job: Job | None

    def buffer_for(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns a buffer in CPU memory for a tensor [tokens, columns], with its shape and dtype.

        Args:
            name: of the buffer.
            like: the tensor; a larger buffer of an earlier job is used again.
        """
        buffer = self.buffers.get(name)
        if (
            buffer is None
            or buffer.dtype is not like.dtype
            or buffer.shape[1] != like.shape[1]
            or len(buffer) < len(like)
        ):
            with torch.inference_mode(False):  # the next writer may run outside inference mode
                buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=self.pinned)
            self.buffers[name] = buffer
        return buffer[: len(like)]


@dataclass
class Job:
    """One call of the experts on the CPU; a CUDA graph starts it at each replay.

    Attributes:
        owner: receives the errors and the timing.
        experts: callable (hidden, ids, weights) -> hidden.
        inputs: hidden states, ids and weights in pinned memory.
        out: the output [rows, D] in pinned memory.
        rows: the rows that the caller's forward computes in bf16, see cpu.bf16_rows.
        count: int64 [1], read at each start: the number of leading rows that are tokens; None: all are.
    """

    owner: ExpertOffload
    experts: Any
    inputs: tuple[torch.Tensor, ...]
    out: torch.Tensor
    rows: tuple[int, tuple[int, ...]]
    count: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.finished = threading.Event()

    def submit(self) -> None:
        """Submits the call to the worker thread and returns."""
        self.finished.clear()
        self.owner.worker.submit(self.run)

    def run(self) -> None:
        """Computes the experts, on the worker thread.

        On an error the output is NaN and the owner stores the error, because nothing can be raised on that thread.
        """
        self.owner.count_waiting(self.experts)
        try:
            num_tokens = len(self.out) if self.count is None else int(self.count)
            with torch.inference_mode(), cpu.bf16_rows(*self.rows):
                self.out[:num_tokens].copy_(self.experts(*(tensor[:num_tokens] for tensor in self.inputs)))
                self.out[num_tokens:].zero_()  # the padding of a captured step
        except BaseException as error:  # the waiting side must be released, and raises it in `check`
            self.owner.errors.append(error)
            self.out.fill_(torch.nan)
        finally:
            self.owner.ended = time.perf_counter()
            self.finished.set()

    def sync(self) -> None:
        """Waits until the call is done."""
        self.finished.wait()


@dataclass
class Pending:
    """A submitted job: returned by `ExpertOffload.submit`, taken by `ExpertOffload.result`."""

    buffer_set: PinnedBuffers
    job: Job
    like: torch.Tensor


class ExpertOffload(RecreatedOnFork):
    """Runs experts on the CPU for the layers of a model that are on one device; all these layers share it.

    Args:
        stream: the side stream of copies and host functions.
        pinned: whether buffers are pinned.
    """

    def __init__(self, stream: Stream, pinned: bool = False):
        self.stream, self.pinned = stream, pinned
        self.worker = ForkSafeThreadPool(1, "ktx-experts")
        super().__init__()

    def recreate(self) -> None:
        """Creates the buffers and the error list anew, at first and in a forked child."""
        self.all_buffers = [PinnedBuffers(self.pinned) for _ in range(NUM_BUFFER_SETS)]
        self.buffer_sets = itertools.cycle(self.all_buffers)
        self.errors: list[BaseException] = []
        self.layer, self.ended = -1, 0.0  # index of the last layer computed on the CPU, and the time when it ended

    def count_waiting(self, experts: Any) -> None:
        """Adds the time since an earlier layer of the forward ended to `experts.wait_s`, the wait for the device.

        The time between two forwards is not counted.
        """
        number = re.search(r"\.(\d+)\.", getattr(experts, "path", ""))
        before, self.layer = self.layer, int(number[1]) if number else -1
        if 0 <= before < self.layer:
            experts.wait_s += time.perf_counter() - self.ended

    def submit(self, experts: Any, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pending:
        """Queues the experts' computation of flat [tokens, D] with ids and weights [tokens, K], all on the device.

        Python does not wait, so that the device can compute in the meantime; `result` returns the output.

        Raises:
            BaseException: the first error of an earlier job that was not raised yet.
        """
        refuse_gpu_gradient("MoE", flat, weights)
        self.check()
        buffer_set, stream = next(self.buffer_sets), self.stream
        stream.fork()
        if buffer_set.job is not None:  # its result was not fetched: wait before the buffers are overwritten
            stream.call(buffer_set.job.sync)
        sources = {"hidden": flat, "ids": ids, "weights": weights}
        inputs = tuple(buffer_set.buffer_for(name, source) for name, source in sources.items())
        for target, source in zip(inputs, sources.values(), strict=True):
            stream.copy(target, source)
        buffer_set.job = Job(
            self, experts, inputs, buffer_set.buffer_for("out", flat), cpu.current_bf16_rows(), padding.num_tokens()
        )
        stream.call(buffer_set.job.submit)
        return Pending(buffer_set, buffer_set.job, flat)

    def result(self, pending: Pending) -> torch.Tensor:
        """Queues the copy of a submitted job's output to the device, behind the job, and returns it [tokens, D].

        Raises:
            BaseException: an error of the experts, if the stream waits for them; otherwise the next `check` raises it.
        """
        out = torch.empty_like(pending.like)
        self.stream.call(pending.job.sync)
        self.stream.copy(out, pending.job.out)
        self.stream.join()
        pending.buffer_set.job = None
        self.check()
        return out

    def reset(self) -> None:
        """Discards jobs in flight: they were captured for a CUDA graph that failed, and never ran."""
        for buffer_set in self.all_buffers:
            buffer_set.job = None

    def check(self) -> None:
        """Raises the first error of the experts that was not raised yet, and clears all."""
        if self.errors:
            error = self.errors[0]
            self.errors.clear()
            raise error


def create_offload(device: torch.device) -> ExpertOffload:
    """Creates the offload of a device: on a CUDA stream if host functions are available, else on a thread."""
    is_cuda = device.type == "cuda"
    launch = host_functions() if is_cuda else None
    stream: Stream = ThreadStream(device) if launch is None else CudaStream(device, launch)
    return ExpertOffload(stream, pinned=is_cuda)


def install(model: Any, blocks: Iterable[Any]) -> None:
    """Installs one offload per device on a model's MoE blocks, and lists them in `model.offloads`.

    Models share none, so an offload's errors belong to its model.
    """
    offloads: dict[Device, ExpertOffload] = {}
    for block in blocks:
        if block.placement not in offloads:
            offloads[block.placement] = create_offload(block.placement.torch)
        block.offload = offloads[block.placement]
    model.offloads = list(offloads.values())


def reset_offloads(model: Any) -> None:
    """Resets all of a model's offloads, see ExpertOffload.reset."""
    for offload in getattr(model, "offloads", ()):
        offload.reset()


def raise_offload_errors(model: Any) -> None:
    """Raises an error of any of a model's offloads; call it when a forward's results are complete."""
    for offload in getattr(model, "offloads", ()):
        offload.check()
