"""Values derived from a tensor that outlive one module call: layers share them, and they are freed with the tensor.

torch.utils.weak is not part of torch's documented API, so this is the only file that imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
_MISSING = object()  # because None is a value


class TensorMemo(Generic[T]):
    """One value for each tensor, by identity, as long as the tensor lives; a copy of the tensor has none.

    All layers of a forward get the same mask and rotary tables: what the first layer derives from these, the others
    read here. Values must not reference their tensor, which would never be freed.
    """

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()

    def get(self, tensor: torch.Tensor) -> T | None:
        """Returns the value of a tensor, or None."""
        value: T | None = self._values.get(tensor)
        return value

    def set(self, tensor: torch.Tensor, value: T) -> None:
        """Sets the value of a tensor."""
        self._values[tensor] = value

    def pop(self, tensor: torch.Tensor) -> T | None:
        """Removes and returns the value of a tensor, or None."""
        value: T | None = self._values.pop(tensor, None)
        return value

    def get_or_compute(self, tensor: torch.Tensor, compute: Callable[[], T]) -> T:
        """Returns the value of a tensor, which the first call computes."""
        value: Any = self._values.get(tensor, _MISSING)
        if value is _MISSING:
            value = self._values[tensor] = compute()
        return value  # type: ignore[no-any-return]
