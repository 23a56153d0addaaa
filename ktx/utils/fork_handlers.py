"""Recreates locks and thread pools in a forked child.

A forked child has only the forking thread: a lock that another thread held stays locked forever, and work queued for
another thread is never done.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

_instances: WeakSet[RecreatedOnFork] = WeakSet()


class RecreatedOnFork:
    """Base of objects that are recreated in a forked child.

    `recreate` is called on construction, and in every forked child before any other code of ktx runs there.
    """

    def __init__(self) -> None:
        self.recreate()
        _instances.add(self)

    def recreate(self) -> None:
        """Creates the state that belongs to the current process's threads."""
        raise NotImplementedError


class ForkSafeLock(RecreatedOnFork):
    """A lock that is released in a forked child.

    Only for state that is consistent at every step under the lock, such as a dict that only grows.
    """

    def recreate(self) -> None:
        """Creates an open lock, at first and in a forked child."""
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


class ForkSafeThreadPool(RecreatedOnFork, Executor):
    """A ThreadPoolExecutor that a forked child replaces by a new one, without the parent's pending work."""

    def __init__(self, count: int, name: str):
        self.count, self.name = count, name
        super().__init__()

    def recreate(self) -> None:
        """Creates an empty pool, at first and in a forked child."""
        self.pool = ThreadPoolExecutor(self.count, self.name)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As ThreadPoolExecutor's."""
        return self.pool.submit(function, *args, **kwargs)


def _renew_all() -> None:
    for instance in list(_instances):
        instance.recreate()


def _limit_torch_threads() -> None:
    """Limits torch's own operators to one thread in a forked child.

    libgomp would wait forever for the parent's threads; ktx's kernels create their own thread pool.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_renew_all)
os.register_at_fork(after_in_child=_limit_torch_threads)
