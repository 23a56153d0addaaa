"""Tensors that are made for a pickle alone, as processes that are being spawned get them.

torch hands a spawned process the descriptor of a tensor's shared memory by its number, and closes it with the tensor: of one that nothing but the pickle needs it is closed, and
its number taken by another, before the process has begun.
"""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy
import torch


def for_pickle(values: torch.Tensor) -> torch.Tensor | Passed:
    """A tensor that nothing else holds, for a pickle under way: by value where a process is being spawned."""
    return values if get_spawning_popen() is None else Passed(values)


class Passed:
    """A tensor whose pickle holds its bytes; it is read as the tensor."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def __reduce__(self) -> Any:
        raw = self.values.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _passed, (raw, self.values.dtype, tuple(self.values.shape))


def _passed(raw: numpy.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype).reshape(shape)
