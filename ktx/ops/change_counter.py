"""Counters of changes of operators and their weights, so that fast paths built from them can be rebuilt."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ChangeCounter:
    """Counts how often an attribute was set or deleted on any operator of this process."""

    count = 0


class CountedParameter(nn.Parameter):
    """A parameter that also counts writes to its `data` and replacements of it, because copies of its values exist.

    Attributes:
        alias: The tensor that `data` returns.
        previous_edits: The number of edits of tensors that `data` returned before.
    """

    alias: torch.Tensor | None
    previous_edits: int = 0

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True) -> CountedParameter:
        """As in torch; `data` may be another CountedParameter."""
        values = data.detach() if isinstance(data, CountedParameter) else data
        return super().__new__(cls, values, requires_grad)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its module turns the copy into a CountedParameter again (use_live_parameters).
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        """As in torch, but the same tensor each time: writes to it increment its version, not the parameter's."""
        alias = self.__dict__.get("alias")
        if alias is None or alias.data_ptr() != self.data_ptr() or alias.dtype != self.dtype:
            self._discard_alias()
            alias = self.__dict__["alias"] = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return alias

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        ChangeCounter.count += 1
        self._discard_alias()
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]

    def _discard_alias(self) -> None:
        """Discards the tensor that `data` returned, and adds its edits to `previous_edits`.

        They still count, because the new values may be at the same address, or be the same ones (`weight.data += 1`).
        """
        alias = self.__dict__.pop("alias", None)
        self.previous_edits += 1 if alias is None else 1 + alias._version


def if_copied(values: torch.Tensor) -> torch.Tensor | None:
    """Returns the tensor itself if `as_f32` copies it, else None, for the copied tensors of a Guard."""
    return None if values.dtype is torch.float32 and values.is_contiguous() else values


def as_f32(owner: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Returns a parameter in contiguous f32, as the kernels require.

    A contiguous f32 parameter is returned detached and shares memory, so writes to it take effect at once. Any other is
    copied to the owner's attribute `converted`, and copied again once it was modified or replaced.

    Args:
        owner: The module that stores the copy.
        values: The parameter.
    """
    plain = values.detach()
    if if_copied(values) is None:
        return plain
    version = plain.data_ptr(), edits(values)
    cached = owner.__dict__.get("converted")
    if cached is None or cached[0] is not values or cached[1] != version:
        cached = owner.__dict__["converted"] = values, version, plain.float().contiguous()
    return cached[2]  # type: ignore[no-any-return]


def edits(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written to in place; for a CountedParameter, also through its `data`."""
    if tensor.is_inference():  # inference tensors have no version counter
        return 0
    alias: torch.Tensor | None = tensor.__dict__.get("alias")
    return tensor._version + (0 if alias is None else alias._version) + getattr(tensor, "previous_edits", 0)
