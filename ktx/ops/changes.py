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

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(
            protocol
        )  # its module makes it one of these again

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        """As torch's, but the same tensor each time: what is written to it counts in its version, not in the parameter's."""
        given = self.__dict__.get("alias")
        if given is None or given.data_ptr() != self.data_ptr() or given.dtype != self.dtype:
            given = self.__dict__["alias"] = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return given

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        Changes.count += 1
        self.__dict__.pop("alias", None)
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]


def edits(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, through `data` too where it is a Live one."""
    if tensor.is_inference():  # nothing counts what is written to those
        return 0
    given: torch.Tensor | None = tensor.__dict__.get("alias")
    return tensor._version + (0 if given is None else given._version)
