"""Sets torch's defaults (f32, CPU, no inference mode) while a model is built, and restores the caller's."""

from __future__ import annotations

from contextlib import ContextDecorator, ExitStack
from types import TracebackType

import torch

from ktx.utils.fork_handlers import ForkSafeLock

_lock = ForkSafeLock()
_saved_dtypes: list[torch.dtype] = []  # the process's original default dtype, once per thread inside the context


class torch_defaults(ContextDecorator):  # noqa: N801 - used as a function
    """A context manager and decorator.

    The default dtype is global to the process, so the first thread that enters saves it and the last thread that leaves
    restores it. Default device and inference mode are per thread.
    """

    def _recreate_cm(self) -> torch_defaults:
        return torch_defaults()

    def __enter__(self) -> torch_defaults:
        """Saves the caller's defaults and sets ktx's; the first thread that enters saves the process's dtype."""
        self.stack = ExitStack()
        self.stack.callback(_restore_dtype)
        with _lock:
            _saved_dtypes.append(_saved_dtypes[0] if _saved_dtypes else torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":  # only then, because a device context intercepts every torch call
            self.stack.enter_context(torch.device("cpu"))
        self.stack.enter_context(torch.inference_mode(False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


def _restore_dtype() -> None:
    """Removes one saved entry; the last one restores the process's default dtype."""
    with _lock:
        original = _saved_dtypes.pop()
        if not _saved_dtypes:
            torch.set_default_dtype(original)
