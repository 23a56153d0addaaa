"""Runs slow work (rendering, tokenizing, compiling grammars) in thread pools outside the event loop, with timeouts."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from ktx.errors import QueueFull, UsageError
from ktx.server.errors import APIError, to_api_error
from ktx.utils.fork_handlers import ForkSafeThreadPool

RENDER_TIMEOUT_S, COMPILE_TIMEOUT_S = 20.0, 2.0  # to render a prompt, and to compile a grammar
QUEUE_TIMEOUT_S = 8.0  # until a thread of the pool is free
RENDER_THREADS = ForkSafeThreadPool(2, "ktx-prompts")
COMPILE_THREADS = ForkSafeThreadPool(4, "ktx-grammars")
T = TypeVar("T")


async def run_with_timeout(seconds: float, pool: Executor, subject: str, func: Callable[..., T], *args: Any) -> T:
    """Runs `func(*args)` in a thread pool and returns its result.

    The timeout starts when a thread starts the call, because a wait for other requests is not this request's fault.
    After a timeout or a cancellation the call is interrupted at its next step in Python, such as one of a template.

    Args:
        seconds: timeout of the call.
        pool: the thread pool.
        subject: what the call works on, for error messages.
        func: the function to call.

    Raises:
        APIError: 400, the call timed out or its input is wrong; 429, no thread was free within `QUEUE_TIMEOUT_S`.
    """
    loop = asyncio.get_running_loop()
    started: asyncio.Future[None] = loop.create_future()
    call = _Call(func, args, lambda: loop.call_soon_threadsafe(started.set_result, None))
    result = loop.run_in_executor(pool, call)
    try:
        await asyncio.wait({started}, timeout=QUEUE_TIMEOUT_S)
        if not started.done():
            raise to_api_error(
                QueueFull(
                    f"the server is busy: no thread was free for {subject} in {QUEUE_TIMEOUT_S:.0f} s; try again later"
                )
            )
        await asyncio.wait({result}, timeout=seconds)
        if not result.done():
            raise APIError(400, f"{subject} takes longer than {seconds:.0f} s to process")
        return result.result()
    except (UsageError, ValueError, KeyError, RecursionError) as error:
        raise to_api_error(error) from error
    finally:
        result.cancel()
        call.cancel()


class _Call:
    """A function call in a pool's thread that another thread can cancel. `on_start` is called before the function."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], on_start: Callable[[], Any]):
        self.func, self.args, self.on_start = func, args, on_start
        self.thread, self.lock, self.cancelled = 0, threading.Lock(), False

    def __call__(self) -> Any:
        """Runs the function in the pool's thread, which `cancel` can interrupt until the function returns."""
        with self.lock:
            if self.cancelled:
                return None
            self.thread = threading.get_ident()
        try:
            self.on_start()
            return self.func(*self.args)
        finally:
            with self.lock:
                _raise_in(self.thread, None)  # a pending exception must not hit the thread's next task
                self.thread = 0

    def cancel(self) -> None:
        """Raises TimeoutError in a running call, prevents one that has not started, ignores one that has finished."""
        with self.lock:
            self.cancelled = True
            if self.thread:
                _raise_in(self.thread, TimeoutError)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raises an exception in another thread at its next Python instruction; None cancels a pending one."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
