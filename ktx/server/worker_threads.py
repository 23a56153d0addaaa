"""What takes long runs outside the event loop, in a few threads and within limits of time."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from ktx.errors import QueueFull, UsageError
from ktx.server.errors import APIError, to_api_error
from ktx.utils.fork_handlers import Threads

RENDER, COMPILE = 20.0, 2.0  # seconds for a prompt, and for a grammar
QUEUE_TIMEOUT_S = 8.0  # seconds until a thread is free
RENDER_TIMEOUT_S = Threads(2, "ktx-prompts")
COMPILE_TIMEOUT_S = Threads(4, "ktx-grammars")
T = TypeVar("T")


async def run_with_timeout(seconds: float, pool: Executor, what: str, work: Callable[..., T], *args: Any) -> T:
    """What `work` returns. Problem 400 when it takes too long from its beginning on, and 429 when no thread was free to begin it:
    what others take is not its fault. What nobody waits for any more is ended where it runs Python, such as a template.
    """
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[None] = loop.create_future()
    run = _Run(work, args, lambda: loop.call_soon_threadsafe(begun.set_result, None))
    done = loop.run_in_executor(pool, run)
    try:
        await asyncio.wait({begun}, timeout=QUEUE_TIMEOUT_S)
        if not begun.done():
            raise to_api_error(QueueFull(f"the server is busy: {what} found no thread in {QUEUE_TIMEOUT_S:.0f} s"))
        await asyncio.wait({done}, timeout=seconds)
        if not done.done():
            raise APIError(400, f"{what} takes longer than {seconds:.0f} s")
        return done.result()
    except (UsageError, ValueError, KeyError, RecursionError) as error:
        raise to_api_error(error) from error
    finally:
        done.cancel()
        run.end()


class _Run:
    """A call in a pool's thread that another thread can end. `begins` is called there first."""

    def __init__(self, work: Callable[..., Any], args: tuple[Any, ...], begins: Callable[[], Any]):
        self.work, self.args, self.begins = work, args, begins
        self.thread, self.lock, self.late = 0, threading.Lock(), False

    def __call__(self) -> Any:
        with self.lock:
            if self.late:
                return None
            self.thread = threading.get_ident()
        try:
            self.begins()
            return self.work(*self.args)
        finally:
            with self.lock:
                _raise_in(self.thread, None)  # what has not arrived yet is not for the thread's next work
                self.thread = 0

    def end(self) -> None:
        """Raises TimeoutError in the call; one that has not begun never will, and one that is over is left alone."""
        with self.lock:
            self.late = True
            if self.thread:
                _raise_in(self.thread, TimeoutError)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """An exception at the next step that the thread makes in Python; None takes back one that has not arrived."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
