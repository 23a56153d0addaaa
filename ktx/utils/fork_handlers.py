"""What a forked child begins with. It has the forking thread alone: a lock that another thread held stays locked for ever, and work for another is never done."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

_known: WeakSet[Renewed] = WeakSet()


class Renewed:
    """`renew` is called when the object is made, and in every forked child before any other code of ours runs there."""

    def __init__(self) -> None:
        self.renew()
        _known.add(self)

    def renew(self) -> None:
        """Makes what belongs to a process's own threads."""
        raise NotImplementedError


class Lock(Renewed):
    """A lock that is open in a forked child. Only for what is whole at every step under it, such as a dict that grows."""

    def renew(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


class Threads(Renewed, Executor):
    """A ThreadPoolExecutor; a forked child has one of its own, and nothing of what its parent's had to do."""

    def __init__(self, count: int, name: str):
        self.count, self.name = count, name
        super().__init__()

    def renew(self) -> None:
        self.pool = ThreadPoolExecutor(self.count, self.name)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.pool.submit(function, *args, **kwargs)


def _renew_all() -> None:
    for each in list(_known):
        each.renew()


def _no_threads_for_torch() -> None:
    """torch's own operators run on one thread in a forked child, because libgomp waits there for its parent's threads for ever; our kernels make a team of their own."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_renew_all)
os.register_at_fork(after_in_child=_no_threads_for_torch)
