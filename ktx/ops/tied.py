"""An output layer tied to an embedding that is torch's own: Gemma's, for example, which scales what it looks up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ktx.kernels.gradients import recorded
from ktx.ops.base import as_weights, packed_as
from ktx.ops.change_counter import Live, edits
from ktx.ops.float_views import Floats
from ktx.ops.linear import Linear
from ktx.weights.base import QuantizedTensor


class Tied(Linear):
    """Its matrix is packed, and packed anew when the embedding's has changed; what is written to it goes to the embedding too, and a gradient as well.

    `origin` is the embedding and the parameter that both have, which is None once one of them was given another.
    """

    origin: tuple[Any, nn.Parameter | None]
    packed_parts: list[Any]
    count: int

    @classmethod
    def become(cls, head: Linear, embedding: nn.Module) -> None:
        """Ties a loaded output layer to an embedding."""
        parts = head.__dict__.pop("parts")
        object.__setattr__(head, "__class__", cls)
        head.packed_parts = parts
        head.tie(embedding)

    def tie(self, embedding: Any) -> None:
        """From now on; the packed matrix is as the embedding's is."""
        weight = embedding.weight
        if type(weight) is nn.Parameter:
            weight.__class__ = Live  # which counts what is written to its data
        self.origin, self.count = (embedding, weight), edits(weight)

    def shared(self) -> Any:
        """The parameter; None where the layer is tied no more."""
        embedding, weight = self.origin
        if weight is not None and embedding._parameters.get("weight") is not weight:
            self.origin = embedding, None
        return self.origin[1]

    @property  # type: ignore[override]
    def parts(self) -> list[Any]:
        weight = self.shared()
        if weight is not None and edits(weight) != self.count:
            self.count = edits(weight)
            self.packed_parts = [packed_as(as_weights(weight.detach()), self.quant_target, self.packed_from)]
        return self.packed_parts

    @parts.setter
    def parts(self, parts: list[Any]) -> None:
        self.packed_parts = parts

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and value is self.origin[0]._parameters.get("weight"):  # as tie_weights does
            self.tie(self.origin[0])
            self.count -= 1
        else:
            super().__setattr__(name, value)
            if name == "weight":
                self.origin = self.origin[0], None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.shared()
        if weight is None or not recorded(weight):
            return super().product(x)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def rows(self) -> Floats:
        weight, found = self.shared(), super().rows()
        return found if weight is None else Floats(found.shape, found.read, weight.untyped_storage().data_ptr())

    def _give(self, weight: QuantizedTensor) -> None:
        shared = self.shared()
        if shared is None:
            super()._give(weight)
        else:
            with torch.no_grad():
                shared.copy_(weight.dequantize().view(shared.shape))
            self.packed_parts, self.count = [self.packed_from(weight)], edits(shared)

    def trained(self, name: str) -> None:
        """It becomes torch's own, with the embedding's parameter."""
        shared: Any = self.shared()
        super().trained(name)
        if shared is not None and name == "weight":
            nn.Module.__setattr__(self, "weight", shared.requires_grad_(True))

    def __getstate__(self) -> dict[str, Any]:
        _ = self.parts  # as they are now
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.shared() is not None:
            self.tie(self.origin[0])
