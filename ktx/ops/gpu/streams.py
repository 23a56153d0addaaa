"""Streams on which a GPU and the CPU take turns: CUDA's with host functions, or a thread. And memory that copies may be made from meanwhile."""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ktx.errors import KtxError
from ktx.utils.fork_handlers import Renewed

Launch = Callable[[int, Callable[[], None]], None]
PORTABLE = 1  # cudaHostRegisterPortable
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_waiting: dict[int, tuple[Callable[[], None], bool]] = {}  # by number: a function, and whether it is called only once
_numbers = itertools.count(1)
_captured: ContextVar[list[int] | None] = ContextVar("captured", default=None)


@_FUNCTION
def _called(number: int) -> None:
    """What CUDA's own thread calls. Nothing can be raised there: the functions keep their errors."""
    function, once = _waiting[number]
    if once:
        del _waiting[number]
    function()


@contextmanager
def captured() -> Iterator[list[int]]:
    """The numbers of functions that a graph captured inside calls again and again: `forget` them when there is no such graph any more."""
    numbers: list[int] = []
    token = _captured.set(numbers)
    try:
        yield numbers
    finally:
        _captured.reset(token)


def forget(numbers: Iterable[int]) -> None:
    """Lets go of functions that nobody calls any more, and of what they hold."""
    for number in numbers:
        _waiting.pop(number, None)


def host_functions() -> Launch | None:
    """Puts a function on a CUDA stream (its handle) to be called on the CPU in its turn; None where libcudart cannot be asked."""
    native = _native("cudaLaunchHostFunc", ctypes.c_void_p, _FUNCTION, ctypes.c_void_p)
    if native is None:
        return None

    def launch(stream: int, function: Callable[[], None]) -> None:
        number, again = next(_numbers), torch.cuda.is_current_stream_capturing()
        _waiting[number] = function, not again
        if again and (numbers := _captured.get()) is not None:
            numbers.append(number)
        if code := native(stream, _called, number):
            del _waiting[number]
            raise KtxError(f"cudaLaunchHostFunc failed with the error {code}")

    return launch


def pin(memory: torch.Tensor) -> Callable[[], None] | None:
    """Pins memory where it is, for all GPUs, so that copies from it run beside the program: what ends that again; None where CUDA does not do it."""
    register = _native("cudaHostRegister", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    end, forget = _native("cudaHostUnregister", ctypes.c_void_p), _native("cudaGetLastError")
    if register is None or end is None or forget is None:
        return None
    at = memory.data_ptr()
    if register(at, memory.nbytes, PORTABLE):
        forget()  # else whoever asks next would be told of it
        return None
    return lambda: end(at)


def _native(name: str, *types: Any) -> Any:
    """A function of the libcudart that torch has loaded; None if there is none."""
    major = (torch.version.cuda or "").partition(".")[0]
    for library in (f"libcudart.so.{major}", "libcudart.so"):
        try:
            found = getattr(ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_NOLOAD), name)
        except (OSError, AttributeError):
            continue
        found.argtypes, found.restype = list(types), ctypes.c_int
        return found
    return None


class CudaStream:
    """A stream of the device beside the caller's; Python waits for nothing."""

    def __init__(self, device: torch.device, launch: Launch):
        self.device, self.launch = device, launch
        self.side = torch.cuda.Stream(device)

    def fork(self) -> None:
        self.side.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
        for tensor in (target, source):
            if tensor.is_cuda:
                tensor.record_stream(self.side)

    def call(self, function: Callable[[], None]) -> None:
        with torch.cuda.stream(self.side):
            self.launch(self.side.cuda_stream, function)

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.side)


Jobs = queue.SimpleQueue[Callable[[], None] | None]


class ThreadStream(Renewed):
    """The same by a thread: copies and functions one after another; `join` waits until they are done and raises what a copy raised."""

    def __init__(self, device: torch.device):
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = device
        super().__init__()

    def renew(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: list[BaseException] = []
        self.jobs: Jobs = queue.SimpleQueue()

    def _put(self, job: Callable[[], None]) -> None:
        if self.thread is None:  # it ends with the stream, which it does not hold
            self.thread = threading.Thread(target=_work, args=(self.jobs, self.error), name="ktx-handover", daemon=True)
            self.thread.start()
            weakref.finalize(self, self.jobs.put, None).atexit = False
        self.jobs.put(job)

    def fork(self) -> None:
        if self.side is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._put(event.synchronize)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._put(lambda: self._copy(target, source))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.side is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
            self.side.synchronize()

    def call(self, function: Callable[[], None]) -> None:
        self._put(function)

    def join(self) -> None:
        reached = threading.Event()
        self._put(reached.set)
        reached.wait()
        if self.error:
            error = self.error[0]
            self.error.clear()
            raise error


def _work(jobs: Jobs, errors: list[BaseException]) -> None:
    """Does jobs until one is None; what goes wrong is told at the next join."""
    while (job := jobs.get()) is not None:
        try:
            with torch.inference_mode():
                job()
        except BaseException as error:
            errors.append(error)
        job = None  # it may be the last that holds the stream
