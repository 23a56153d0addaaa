"""What counts that operators and their weights are changed, so that what was made of them can be made anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Changes:
    """How often anything was set on any operator of this process."""

    count = 0


class Live(nn.Parameter):
    """A parameter that counts what is written to its `data` too, and says when it is given other data: copies were made of its values."""

    alias: torch.Tensor | None
    earlier: int = 0  # edits of what `data` was before

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True) -> Live:
        """As torch's, of another one's values too."""
        values = data.detach() if isinstance(data, Live) else data
        return super().__new__(cls, values, requires_grad)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(
            protocol
        )  # its module makes it one of these again

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        """As torch's, but the same tensor each time: what is written to it counts in its version, not in the parameter's."""
        given = self.__dict__.get("alias")
        if given is None or given.data_ptr() != self.data_ptr() or given.dtype != self.dtype:
            self._forget()
            given = self.__dict__["alias"] = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return given

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        Changes.count += 1
        self._forget()
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        """The tensor that `data` was, whose edits count on: other values may come at the same address, or be these (`weight.data += 1`)."""
        given = self.__dict__.pop("alias", None)
        self.earlier += 1 if given is None else 1 + given._version


def copied(values: torch.Tensor) -> torch.Tensor | None:
    """The same tensor, if `in_f32` copies it."""
    return None if values.dtype is torch.float32 and values.is_contiguous() else values


def in_f32(owner: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """A parameter as kernels take it, in f32: its own memory where it is that, so that what is written to it counts at once. Else a copy in the owner's attribute `converted`, made anew when it was written to or exchanged."""
    plain = values.detach()
    if copied(values) is None:
        return plain
    now = plain.data_ptr(), edits(values)
    known = owner.__dict__.get("converted")
    if known is None or known[0] is not values or known[1] != now:
        known = owner.__dict__["converted"] = values, now, plain.float().contiguous()
    return known[2]  # type: ignore[no-any-return]


def edits(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, through `data` too where it is a Live one."""
    if tensor.is_inference():  # nothing counts what is written to those
        return 0
    given: torch.Tensor | None = tensor.__dict__.get("alias")
    return tensor._version + (0 if given is None else given._version) + getattr(tensor, "earlier", 0)
