"""Edits packed weights: `ktx.edit` yields a matrix in f32 and packs it, `ktx.dequantize` returns float modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError, did_you_mean
from ktx.ops.base import as_weights
from ktx.ops.change_counter import ChangeCounter
from ktx.ops.float_views import Floats
from ktx.ops.lora import Lora
from ktx.ops.parameters import PARAMETRIZATIONS, Parametrizable, VisibleParameters
from ktx.quant.types import QTYPES, QType
from ktx.weights.base import QuantizedTensor


def quantize_edited(values: torch.Tensor, before: Sequence[QType], path: str, dtype: str | None) -> QuantizedTensor:
    """Quantizes edited values [n, k] for packing.

    Args:
        values: the values.
        before: the types of the matrix before the edit.
        path: the module's path, for messages.
        dtype: the weight type. None: F32 if a part was F32 or a value exceeds F16's range, else F16.

    Raises:
        UsageError: `dtype` is not a weight type.
    """
    values = values.float().contiguous()
    if dtype is None:
        use_f16 = all(qtype.name != "F32" for qtype in before) and bool(
            values.abs().max() < torch.finfo(torch.float16).max
        )
        dtype = "F16" if use_f16 else "F32"
    if dtype not in QTYPES:
        raise UsageError(f"{path}: {dtype!r} is not a weight type{did_you_mean(dtype, QTYPES)}")
    return QuantizedTensor(QTYPES[dtype].quantize(values), QTYPES[dtype], tuple(values.shape))


def checked_values(path: str, values: Any, shape: Sequence[int]) -> torch.Tensor:
    """Returns new values of a weight on the CPU; UsageError unless they are a float tensor of the weight's shape."""
    if not isinstance(values, torch.Tensor):
        raise UsageError(f"{path}.weight takes a tensor, not {type(values).__name__}")
    if tuple(values.shape) != tuple(shape) or not values.is_floating_point():
        raise UsageError(f"{path}.weight is {list(shape)}, it cannot be {list(values.shape)} of {values.dtype}")
    return values.detach().to("cpu")


# torch's own attributes (hooks, children, mode), which a module keeps when it becomes a torch module.
TORCH_ATTRIBUTES = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers"}


class MatrixOperator(Parametrizable):
    """An operator with one packed matrix, visible as `weight`; a tensor assigned to `weight` is packed.

    Modules in `ties` share one matrix.
    """

    derived = frozenset({"ties"})
    trains = True
    ties: list[MatrixOperator]
    lora: Lora | None = None  # set while adapters of the forward apply to it, see ktx.ops.lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes `product`, with the parametrizations and LoRA adapters that apply."""
        y = self.forward_parametrized(x) if PARAMETRIZATIONS in self._modules else self.product(x)
        lora = self.lora  # read once: another thread's step may set it to None
        return y if lora is None else lora(x, y)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies rows by the packed matrix, or looks token ids up in it."""
        raise NotImplementedError

    def forward_parametrized(self, x: torch.Tensor) -> torch.Tensor:
        """Like `product`, with the parametrizations registered on `weight`."""
        raise NotImplementedError

    def rows(self) -> Floats:
        """Returns the matrix as f32 values."""
        raise NotImplementedError

    def types(self) -> list[QType]:
        """Returns the weight types of its parts."""
        raise NotImplementedError

    def packed_from(self, weight: QuantizedTensor) -> Any:
        """Packs a matrix in the form that `assign` takes."""
        raise NotImplementedError

    def assign(self, packed: Any) -> None:
        """Replaces the packed matrix."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [rows, columns], read-only, see ktx.ops.float_views."""
        # torch's parametrize has removed the weight, and expects that the lookup fails then.
        if isinstance(self._buffers, VisibleParameters) and "weight" not in self._buffers:
            raise AttributeError("weight")
        return self.visible_parameter("weight", self.rows())

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch, but packs a tensor that is assigned to `weight`, and ends the tie of its modules."""
        if name == "weight" and not self.has_parametrization(name):
            self.assign(self.packed_from(as_weights(checked_values(self.path, value, self.rows().shape))))
            self.ties[:] = [other for other in self.ties if other is not self]
            self.ties = []  # an assignment ends the tie of output layer and embedding, as in transformers
        else:
            super().__setattr__(name, value)

    def visible_names(self) -> frozenset[str]:
        """Names of the matrices that `ktx.edit` accepts."""
        return frozenset({"weight"})

    def repacked(self, name: str, values: torch.Tensor) -> Floats:
        """Packs other values for this module and all that share its matrix."""
        if name != "weight":
            return super().repacked(name, values)
        self._assign_to_ties(as_weights(checked_values(self.path, values, self.rows().shape)))
        return self.rows()

    def to_torch(self, dtype: torch.dtype | None) -> nn.Module:
        """For ktx.dequantize: returns a torch module with the weights in floats."""
        raise NotImplementedError

    def trained(self, name: str) -> None:
        """Turns this module, and all that share its matrix, into torch modules with one shared float parameter.

        The objects stay the same ones, with another class, because parents and optimizers already refer to them.
        """
        weight: Any = None
        for module in self.ties or [self]:
            float_module = module.to_torch(None)
            weight = float_module.weight if weight is None else weight
            float_module.weight = weight
            float_module._parameters |= module._parameters  # a bias is a torch parameter already
            state = {name: value for name, value in module.__dict__.items() if name in TORCH_ATTRIBUTES}
            module.__dict__.clear()
            module.__dict__.update(float_module.__dict__ | state)
            object.__setattr__(module, "__class__", type(float_module))
        ChangeCounter.count += 1
        getattr(self, name).requires_grad_(True)

    def _assign_to_ties(self, weight: QuantizedTensor) -> None:
        """Packs a weight and assigns it to all modules that share the matrix."""
        packed = self.packed_from(weight)
        for module in self.ties or [self]:
            module.assign(packed)

    def dequantized_matrix(self, name: str, expert: int | None) -> torch.Tensor:
        """For ktx.edit: returns the matrix f32 [rows, columns]. UsageError for another name, or an expert."""
        if name != "weight" or expert is not None:
            raise UsageError(f"{self.path}: a {type(self).__name__} has one matrix, `weight`, and no experts")
        return self.rows().values(torch.float32)

    def repack(self, values: torch.Tensor, name: str, expert: int | None, dtype: str | None) -> None:
        """For ktx.edit: packs edited values, for all modules that share the matrix."""
        values = checked_values(self.path, values, self.rows().shape)
        self._assign_to_ties(quantize_edited(values, self.types(), self.path, dtype))


@contextmanager
def edit(
    module: nn.Module, name: str = "weight", *, expert: int | None = None, dtype: str | None = None
) -> Iterator[torch.Tensor]:
    """Edits a packed weight in place: `with ktx.edit(module) as weight: weight.mul_(2)`.

    Yields the matrix as f32 [n, k]. At the end of the block it is packed, and the next forward uses it; if the block
    raises, nothing changes. An embedding and an output layer that is tied to it change together.

    Args:
        module: a Linear, Embedding, Experts or MLA operator.
        name: the weight: "weight"; of experts gate_proj, up_proj or down_proj; of an MLA attention kv_b_proj.
        expert: id of the expert, for Experts.
        dtype: the type to pack as (F32, F16, BF16, Q8_0, Q4_K, ...). By default a matrix becomes F16 (F32 if it was
            F32, or has values outside F16's range); experts keep the type that all experts of a layer share.

    Raises:
        UsageError: the module has no packed weights, or no such one.
    """
    read, write = getattr(module, "dequantized_matrix", None), getattr(module, "repack", None)
    if read is None or write is None:
        raise UsageError(
            f"{type(module).__name__} has no packed weights: ktx.edit takes Linear, Embedding, Experts and MLA; edit"
            " other parameters with torch"
        )
    values: torch.Tensor = read(name, expert)
    yield values
    write(values, name, expert, dtype)


def dequantize(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Returns a torch module with the weights of a packed Linear or Embedding in floats, to put in its place.

    Args:
        module: a Linear or Embedding operator.
        dtype: of the weights; by default the dtype in which the module computes.

    Raises:
        UsageError: the module is not a packed Linear or Embedding.
    """
    convert = getattr(module, "to_torch", None)
    if convert is None:
        raise UsageError(f"{type(module).__name__} is not a packed Linear or Embedding: there is nothing to dequantize")
    return convert(dtype).train(module.training)  # type: ignore[no-any-return]
