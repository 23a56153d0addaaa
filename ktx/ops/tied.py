"""An output layer tied to an embedding that stays a torch module, such as the scaled embedding of Gemma."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ktx.kernels.gradients import is_recorded
from ktx.ops.base import as_weights, pack_as
from ktx.ops.change_counter import CountedParameter, edits
from ktx.ops.float_views import Floats
from ktx.ops.linear import Linear
from ktx.weights.base import QuantizedTensor


class TiedLinear(Linear):
    """A Linear that packs the weight of an embedding, and packs it again when that weight has changed.

    Writes to its weight, and gradients, go to the weight of the embedding.

    Attributes:
        origin: The embedding, and the shared parameter; None once either of them got another weight.
        packed_parts: The packed weight.
        packed_edits: The number of edits of the shared parameter when it was packed.
    """

    origin: tuple[Any, nn.Parameter | None]
    packed_parts: list[Any]
    packed_edits: int

    @classmethod
    def tie_head(cls, head: Linear, embedding: nn.Module) -> None:
        """Ties a loaded output layer to an embedding."""
        parts = head.__dict__.pop("parts")
        object.__setattr__(head, "__class__", cls)
        head.packed_parts = parts
        head.tie(embedding)

    def tie(self, embedding: Any) -> None:
        """Ties the layer to an embedding whose weight equals the packed weight."""
        weight = embedding.weight
        if type(weight) is nn.Parameter:
            weight.__class__ = CountedParameter  # which counts writes to its data
        self.origin, self.packed_edits = (embedding, weight), edits(weight)

    def shared_weight(self) -> Any:
        """Returns the shared parameter; None if the layer is no longer tied.

        The layer is untied as soon as the embedding has another parameter than the one that was packed.
        """
        embedding, weight = self.origin
        if weight is not None and embedding._parameters.get("weight") is not weight:
            self.origin = embedding, None
        return self.origin[1]

    @property  # type: ignore[override]
    def parts(self) -> list[Any]:
        """The packed matrix of the embedding, packed again after its parameter was changed."""
        weight = self.shared_weight()
        if weight is not None and edits(weight) != self.packed_edits:
            self.packed_edits = edits(weight)
            self.packed_parts = [pack_as(as_weights(weight.detach()), self.quant_target, self.packed_from)]
        return self.packed_parts

    @parts.setter
    def parts(self, parts: list[Any]) -> None:
        self.packed_parts = parts

    def __setattr__(self, name: str, value: Any) -> None:
        """Ties the layer again if `value` is the embedding's parameter, as transformers' tie_weights() assigns it.

        Any other value assigned to `weight` unties the layer.
        """
        if name == "weight" and value is self.origin[0]._parameters.get("weight"):
            self.tie(self.origin[0])
            self.packed_edits -= 1  # differs from the current count, so `parts` packs the weight again
        else:
            super().__setattr__(name, value)
            if name == "weight":
                self.origin = self.origin[0], None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x W^T, in plain torch with the shared parameter if autograd records that parameter."""
        weight = self.shared_weight()
        if weight is None or not is_recorded(weight):
            return super().product(x)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def rows(self) -> Floats:
        """Returns a dequantizing view of the shared weight."""
        weight, view = self.shared_weight(), super().rows()
        return view if weight is None else Floats(view.shape, view.read, weight.untyped_storage().data_ptr())

    def _assign_to_ties(self, weight: QuantizedTensor) -> None:
        """Writes the values to the shared parameter, so that the embedding changes too; untied, only packs them."""
        shared = self.shared_weight()
        if shared is None:
            super()._assign_to_ties(weight)
        else:
            with torch.no_grad():
                shared.copy_(weight.dequantize().view(shared.shape))
            self.packed_parts, self.packed_edits = [self.packed_from(weight)], edits(shared)

    def trained(self, name: str) -> None:
        """Turns the layer into an nn.Linear that shares the parameter of the embedding."""
        shared: Any = self.shared_weight()
        super().trained(name)
        if shared is not None and name == "weight":
            nn.Module.__setattr__(self, "weight", shared.requires_grad_(True))

    def __getstate__(self) -> dict[str, Any]:
        _ = self.parts  # packs the weight again if it has changed
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.shared_weight() is not None:
            self.tie(self.origin[0])
