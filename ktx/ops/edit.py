"""Packed weights that are edited: `ktx.edit` gives a matrix in f32 and packs what was made of it, `ktx.dequantize` gives torch's own module back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError, did_you_mean
from ktx.ops.base import as_weights
from ktx.ops.change_counter import Changes
from ktx.ops.float_views import Floats
from ktx.ops.lora import Lora
from ktx.ops.parameters import PARAMETRIZATIONS, OfferedParameters, Parametrizable
from ktx.quant.quantize import quantize
from ktx.quant.types import QTYPES, QType
from ktx.weights.base import QuantizedTensor


def quantized(values: torch.Tensor, before: Sequence[QType], path: str, dtype: str | None) -> QuantizedTensor:
    """Edited values [n, k] as they are packed: as `dtype` says, else as F32 where they were that, F16 where that holds them, F32 where it does not."""
    values = values.float().contiguous()
    if dtype is None:
        half = all(qtype.name != "F32" for qtype in before) and bool(
            values.abs().max() < torch.finfo(torch.float16).max
        )
        dtype = "F16" if half else "F32"
    if dtype not in QTYPES:
        raise UsageError(f"{path}: {dtype!r} is no type of weights{did_you_mean(dtype, QTYPES)}")
    return QuantizedTensor(quantize(values, QTYPES[dtype]), QTYPES[dtype], tuple(values.shape))


def fitting(path: str, values: Any, shape: Sequence[int]) -> torch.Tensor:
    """Values on the CPU that take a weight's place; UsageError for others than a tensor of floats of its shape."""
    if not isinstance(values, torch.Tensor):
        raise UsageError(f"{path}.weight takes a tensor, not {type(values).__name__}")
    if tuple(values.shape) != tuple(shape) or not values.is_floating_point():
        raise UsageError(f"{path}.weight is {list(shape)}, it cannot be {list(values.shape)} of {values.dtype}")
    return values.detach().to("cpu")


STATE = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers"}  # torch's own: hooks, children, mode


class OneMatrix(Parametrizable):
    """An operator with one packed matrix. It shows it as `weight` and packs what is assigned to that; modules in `ties` share one."""

    derived = frozenset({"ties"})
    trains = True
    ties: list[OneMatrix]
    lora: Lora | None = None  # while adapters of the forward are meant for it, see ktx.ops.lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.changed(x) if PARAMETRIZATIONS in self._modules else self.product(x)
        lora = self.lora  # another thread's step may take it away
        return y if lora is None else lora(x, y)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What its matrix makes of rows, or of token ids."""
        raise NotImplementedError

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        """The same with the parametrizations that others put on it."""
        raise NotImplementedError

    def rows(self) -> Floats:
        """The matrix, in f32."""
        raise NotImplementedError

    def types(self) -> list[QType]:
        """Of its parts."""
        raise NotImplementedError

    def packed_from(self, weight: QuantizedTensor) -> Any:
        """What it holds, made of rows."""
        raise NotImplementedError

    def assign(self, packed: Any) -> None:
        """Has it compute with another matrix."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """[rows, columns], read-only: see ktx.ops.float_views."""
        if (
            isinstance(self._buffers, OfferedParameters) and "weight" not in self._buffers
        ):  # torch's parametrize has taken it away
            raise AttributeError("weight")
        return self.visible_parameters("weight", self.rows())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and not self.parametrized(name):
            self.assign(self.packed_from(as_weights(fitting(self.path, value, self.rows().shape))))
            self.ties[:] = [other for other in self.ties if other is not self]
            self.ties = []  # a tied output layer and its embedding are no longer that, as in transformers
        else:
            super().__setattr__(name, value)

    def offered(self) -> frozenset[str]:
        return frozenset({"weight"})

    def replaced(self, name: str, values: torch.Tensor) -> Floats:
        """Floats for this module and all that share its matrix."""
        if name != "weight":
            return super().replaced(name, values)
        self._give(as_weights(fitting(self.path, values, self.rows().shape)))
        return self.rows()

    def plain(self, dtype: torch.dtype | None) -> nn.Module:
        """For ktx.dequantize: torch's own module."""
        raise NotImplementedError

    def trained(self, name: str) -> None:
        """This module becomes torch's own, in floats, and so do all that share its matrix."""
        matrix: Any = None
        for module in self.ties or [self]:
            made = module.plain(None)
            matrix = made.weight if matrix is None else matrix
            made.weight = matrix
            made._parameters |= module._parameters  # a bias is torch's own already
            own = {name: value for name, value in module.__dict__.items() if name in STATE}
            module.__dict__.clear()
            module.__dict__.update(made.__dict__ | own)
            object.__setattr__(module, "__class__", type(made))
        Changes.count += 1
        getattr(self, name).requires_grad_(True)

    def _give(self, weight: QuantizedTensor) -> None:
        packed = self.packed_from(weight)
        for module in self.ties or [self]:
            module.assign(packed)

    def matrix_of(self, name: str, expert: int | None) -> torch.Tensor:
        """For ktx.edit."""
        if name != "weight" or expert is not None:
            raise UsageError(f"{self.path}: a {type(self).__name__} has one matrix, `weight`, and no experts")
        return self.rows().values(torch.float32)

    def pack_again(self, values: torch.Tensor, name: str, expert: int | None, dtype: str | None) -> None:
        """For ktx.edit: modules that share the matrix have the same one afterwards."""
        values = fitting(self.path, values, self.rows().shape)
        self._give(quantized(values, self.types(), self.path, dtype))


@contextmanager
def edit(
    module: nn.Module, name: str = "weight", *, expert: int | None = None, dtype: str | None = None
) -> Iterator[torch.Tensor]:
    """`with ktx.edit(module) as weight:` gives the matrix f32 [n, k]; at the end what was made of it in place is packed and counts from the next forward on.

    Of experts `name` is gate_proj, up_proj or down_proj and `expert` a number, of an MLA attention `name` is kv_b_proj. `dtype` is the type to pack as (F32, F16, BF16, Q8_0, Q4_K, ...); by default a matrix becomes
    F16 (F32 where it was that, or holds numbers that F16 does not), experts keep the type that all of a layer have in common. An embedding and the output
    layer that is tied to it change together. UsageError for a module that has no packed weights, or no such one. If the block raises, nothing changes.
    """
    take, put = getattr(module, "matrix_of", None), getattr(module, "pack_again", None)
    if take is None or put is None:
        raise UsageError(
            f"{type(module).__name__} has no packed weights: ktx.edit takes Linear, Embedding, Experts and MLA; other parameters are edited as torch's"
        )
    values: torch.Tensor = take(name, expert)
    yield values
    put(values, name, expert, dtype)


def dequantize(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """torch's own module with the weights of a Linear or an Embedding in floats (`dtype`: by default what the module computes in), to be put in its place."""
    plain = getattr(module, "plain", None)
    if plain is None:
        raise UsageError(f"{type(module).__name__} is no packed Linear or Embedding: there is nothing to dequantise")
    return plain(dtype).train(module.training)  # type: ignore[no-any-return]
