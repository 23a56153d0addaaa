"""Passes temporary tensors to spawned processes by value.

torch passes a tensor to a spawned process as the file descriptor of its shared memory, and closes the descriptor when
the tensor is freed. A temporary tensor that only the pickle refers to is freed, and its descriptor number reused,
before the process has started.
"""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy
import torch


def for_pickle(values: torch.Tensor) -> torch.Tensor | PickledByValue:
    """Wraps a temporary tensor for the pickle in progress: by value when a process is being spawned, else unchanged."""
    return values if get_spawning_popen() is None else PickledByValue(values)


class PickledByValue:
    """A tensor that is pickled as its bytes; unpickling returns the tensor."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def __reduce__(self) -> Any:
        raw = self.values.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _unpickle, (raw, self.values.dtype, tuple(self.values.shape))


def _unpickle(raw: numpy.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype).reshape(shape)
