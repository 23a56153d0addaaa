"""torch's defaults while a model is made, whatever the caller has set: f32, the CPU, no inference tensors. They are put back at the end."""

from __future__ import annotations

from contextlib import ContextDecorator, ExitStack
from types import TracebackType

import torch

from ktx.utils.fork_handlers import Lock

_lock = Lock()
_before: list[torch.dtype] = []  # the process's default type, once for each thread that is inside


class torch_defaults(ContextDecorator):  # noqa: N801 - used as a function
    """A context and a decorator. The default type is the process's, so of several threads the first one in keeps it and the last one out puts it back; the rest is the thread's own."""

    def _recreate_cm(self) -> torch_defaults:
        return torch_defaults()

    def __enter__(self) -> torch_defaults:
        self.stack = ExitStack()
        self.stack.callback(_leave)
        with _lock:
            _before.append(_before[0] if _before else torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":  # a device as context intercepts every call of torch
            self.stack.enter_context(torch.device("cpu"))
        self.stack.enter_context(torch.inference_mode(False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


def _leave() -> None:
    with _lock:
        before = _before.pop()
        if not _before:
            torch.set_default_dtype(before)
