"""Side streams of copies and CPU functions (a CUDA stream with host functions, or a thread), and pinning of memory."""

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
from ktx.utils.fork_handlers import RecreatedOnFork

Launch = Callable[[int, Callable[[], None]], None]
PORTABLE = 1  # cudaHostRegisterPortable
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_waiting: dict[int, tuple[Callable[[], None], bool]] = {}  # registered functions by number; whether called only once
_next_number = itertools.count(1)
_graph_numbers: ContextVar[list[int] | None] = ContextVar("captured", default=None)


@_FUNCTION
def _run_registered(number: int) -> None:
    """Callback for CUDA's thread. Nothing can be raised there, so the functions store their errors."""
    function, once = _waiting[number]
    if once:
        del _waiting[number]
    function()


@contextmanager
def collect_graph_functions() -> Iterator[list[int]]:
    """Collects the numbers of the functions that a CUDA graph, captured in this context, calls at each replay.

    Pass them to `unregister` when the graph is freed.
    """
    graph_numbers: list[int] = []
    token = _graph_numbers.set(graph_numbers)
    try:
        yield graph_numbers
    finally:
        _graph_numbers.reset(token)


def unregister(numbers: Iterable[int]) -> None:
    """Unregisters functions that are not called any more, and frees what they reference."""
    for number in numbers:
        _waiting.pop(number, None)


def host_functions() -> Launch | None:
    """Returns a function (stream handle, callable) that queues the callable on a CUDA stream, to run on the CPU.

    None where libcudart is not available. The returned function raises KtxError if CUDA returns an error.
    """
    native = _load_cuda_function("cudaLaunchHostFunc", ctypes.c_void_p, _FUNCTION, ctypes.c_void_p)
    if native is None:
        return None

    def launch(stream: int, function: Callable[[], None]) -> None:
        """Queues a function on a CUDA stream by a number, because CUDA passes only an integer to the callback.

        A function in a captured graph stays registered, because each replay calls it.
        """
        key, is_capturing = next(_next_number), torch.cuda.is_current_stream_capturing()
        _waiting[key] = function, not is_capturing
        if is_capturing and (graph_numbers := _graph_numbers.get()) is not None:
            graph_numbers.append(key)
        if code := native(stream, _run_registered, key):
            del _waiting[key]
            raise KtxError(f"cudaLaunchHostFunc failed with the error {code}")

    return launch


def pin(memory: torch.Tensor) -> Callable[[], None] | None:
    """Pins memory in place, for all GPUs, so that copies from it are asynchronous.

    Returns:
        A function that unpins it; None where CUDA cannot pin it.
    """
    register = _load_cuda_function("cudaHostRegister", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    unregister, clear_error = (
        _load_cuda_function("cudaHostUnregister", ctypes.c_void_p),
        _load_cuda_function("cudaGetLastError"),
    )
    if register is None or unregister is None or clear_error is None:
        return None
    address = memory.data_ptr()
    if register(address, memory.nbytes, PORTABLE):
        clear_error()  # clears CUDA's last error, which an unrelated call would report otherwise
        return None
    return lambda: unregister(address)


def _load_cuda_function(name: str, *types: Any) -> Any:
    """Returns a function of the libcudart that torch has loaded; None if there is none. Loads no other copy itself.

    Args:
        name: of the function.
        types: ctypes of its arguments; it returns an int, the error code.
    """
    cuda_major = (torch.version.cuda or "").partition(".")[0]
    for library in (f"libcudart.so.{cuda_major}", "libcudart.so"):
        try:
            function = getattr(ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_NOLOAD), name)
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = list(types), ctypes.c_int
        return function
    return None


class CudaStream:
    """A CUDA stream concurrent to the caller's; Python does not wait. See ktx.ops.gpu.offload.Stream."""

    def __init__(self, device: torch.device, launch: Launch):
        self.device, self.launch = device, launch
        self.side = torch.cuda.Stream(device)

    def fork(self) -> None:
        """Makes the side stream wait for the work so far of the current stream."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies on the side stream."""
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
        for tensor in (target, source):
            if tensor.is_cuda:  # so that its memory is not used again before the copy is done
                tensor.record_stream(self.side)

    def call(self, function: Callable[[], None]) -> None:
        """Calls a function on the CPU, in the order of the side stream."""
        with torch.cuda.stream(self.side):
            self.launch(self.side.cuda_stream, function)

    def join(self) -> None:
        """Makes the current stream wait for the side stream."""
        torch.cuda.current_stream(self.device).wait_stream(self.side)


Jobs = queue.SimpleQueue[Callable[[], None] | None]


class ThreadStream(RecreatedOnFork):
    """The same stream as a thread: runs copies and functions in order; `join` waits and raises a copy's error."""

    def __init__(self, device: torch.device):
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = device
        super().__init__()

    def recreate(self) -> None:
        """Creates the queue anew, at first and in a forked child; the thread starts with the first job."""
        self.thread: threading.Thread | None = None
        self.error: list[BaseException] = []
        self.jobs: Jobs = queue.SimpleQueue()

    def _put(self, job: Callable[[], None]) -> None:
        """Queues a job, and starts the thread with the first one."""
        if self.thread is None:  # the thread holds no reference to the stream and ends when the stream is freed
            self.thread = threading.Thread(
                target=_run_jobs, args=(self.jobs, self.error), name="ktx-handover", daemon=True
            )
            self.thread.start()
            weakref.finalize(self, self.jobs.put, None).atexit = False
        self.jobs.put(job)

    def fork(self) -> None:
        """Queues a wait for all work that the caller's CUDA stream has now; on a fake GPU that work is already done."""
        if self.side is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._put(event.synchronize)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy."""
        self._put(lambda: self._copy(target, source))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies on the side stream and waits, because the next job may read the copy on the CPU."""
        if self.side is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
            self.side.synchronize()

    def call(self, function: Callable[[], None]) -> None:
        """Queues a call of a function."""
        self._put(function)

    def join(self) -> None:
        """Waits until all queued jobs are done; raises the first error of one."""
        reached = threading.Event()
        self._put(reached.set)
        reached.wait()
        if self.error:
            error = self.error[0]
            self.error.clear()
            raise error


def _run_jobs(jobs: Jobs, errors: list[BaseException]) -> None:
    """Runs jobs until one is None; the next `join` raises an error."""
    while (job := jobs.get()) is not None:
        try:
            with torch.inference_mode():
                job()
        except BaseException as error:
            errors.append(error)
        job = None  # the job may hold the last reference to the stream
