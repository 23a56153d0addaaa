"""Packed weights as tensors: to be read where they are asked for, and edited as a whole.

A packed matrix has no floats that one could write to. What it shows as `weight` is computed when it is read and refuses to be written; `edit` gives
a matrix in f32 and packs what was made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ktx.errors import UsageError, nearest
from ktx.qtypes import QTYPES, QType
from ktx.quantize import quantize
from ktx.weights.source import QuantizedTensor

ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class PackedWeight(torch.Tensor):
    """A matrix [n, k] of a dtype that is dequantised at each operation on it and takes no memory before. Read-only: UsageError for what would write to it."""

    dense: Callable[[], torch.Tensor]
    says: str
    replace: Callable[[torch.Tensor], None] | None = None  # packs other values; a view has none

    @staticmethod
    def __new__(
        cls, dense: Callable[[], torch.Tensor], shape: Sequence[int], dtype: torch.dtype, device: Any, says: str
    ) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.dense, made.says = dense, says
        return made

    def __init__(self, *args: Any):
        super().__init__()

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        """The same, read-only too; what is assigned to it is packed."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if self.replace is None:
            raise UsageError(self.says)
        self.replace(values)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        schema = func._schema
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise UsageError(value.says)
        if func in ALIASES:
            (given,) = args
            return cls(given.dense, given.shape, given.dtype, given.device, given.says)
        given = next(value for value in _flat((args, kwargs)) if isinstance(value, cls))
        out = func(*tree_map(_dense, args), **tree_map(_dense, kwargs))
        if not any(result.alias_info is not None for result in schema.returns):
            return out
        return tree_map(lambda x: _view(cls, x, given.says), out)

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array."""
        found = self.dense().numpy(force=force)
        found.flags.writeable = False
        return found

    def tolist(self) -> Any:
        return self.dense().tolist()  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.dense()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, PackedWeight) else value


def _view(cls: type[PackedWeight], value: Any, says: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return cls(lambda: value, value.shape, value.dtype, value.device, says)


def _flat(values: Any) -> Iterator[Any]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, tuple | list | dict):
            yield from _flat(value)
        else:
            yield value


def shown(module: Any, types: str) -> Any:
    """What a module with `floats` and a `shape` shows as its weight."""
    dtype = module.dtype
    says = (
        f"{module.path}.weight is packed ({types}) and cannot be written to: edit it in `with ktx.edit(module) as weight:`, assign a tensor to module.weight, or"
        " put ktx.dequantize(module) in the module's place"
    )
    made = PackedWeight(lambda: module.floats().to(dtype), module.shape, dtype, module.home.torch, says)
    made.replace = lambda values: module.put(values, "weight", None, None)
    return made


def quantized(values: torch.Tensor, before: Sequence[QType], path: str, dtype: str | None) -> QuantizedTensor:
    """Edited values [n, k] as they are packed: as `dtype` says, else as F32 where they were that, F16 where that holds them, F32 where it does not."""
    values = values.detach().to("cpu", torch.float32).contiguous()
    if dtype is None:
        half = all(qtype.name != "F32" for qtype in before) and bool(
            values.abs().max() < torch.finfo(torch.float16).max
        )
        dtype = "F16" if half else "F32"
    if dtype not in QTYPES:
        raise UsageError(f"{path}: {dtype!r} is no type of weights{nearest(dtype, QTYPES)}")
    return QuantizedTensor(quantize(values, QTYPES[dtype]), QTYPES[dtype], tuple(values.shape))


def fitting(path: str, values: Any, shape: Sequence[int]) -> torch.Tensor:
    """Values that take a weight's place; UsageError for others than a tensor of floats of its shape."""
    if not isinstance(values, torch.Tensor):
        raise UsageError(f"{path}.weight takes a tensor, not {type(values).__name__}")
    if tuple(values.shape) != tuple(shape) or not values.is_floating_point():
        raise UsageError(f"{path}.weight is {list(shape)}, it cannot be {list(values.shape)} of {values.dtype}")
    return values


def only_weight(module: Any, name: str, expert: int | None) -> None:
    """UsageError unless a module's one matrix is meant."""
    if name != "weight" or expert is not None:
        raise UsageError(f"{module.path}: a {type(module).__name__} has one matrix, `weight`, and no experts")


def alone(module: Any) -> None:
    """Has a module share its matrix with none."""
    module.ties[:] = [other for other in module.ties if other is not module]
    module.ties = []


def share(module: Any, packed: Any) -> None:
    """Gives a matrix to all modules that a module shares one with."""
    for other in module.ties:
        if hasattr(other, "parts"):
            other.parts = [packed]
        else:
            other.packed = packed


@contextmanager
def edit(
    module: nn.Module, name: str = "weight", *, expert: int | None = None, dtype: str | None = None
) -> Iterator[torch.Tensor]:
    """`with ktx.edit(module) as weight:` gives the matrix f32 [n, k]; at the end what was made of it in place is packed and counts from the next forward on.

    Of experts `name` is gate_proj, up_proj or down_proj and `expert` a number, of an MLA attention `name` is kv_b_proj. `dtype` is the type to pack as (F32, F16, BF16, Q8_0, Q4_K, ...); by default a matrix becomes
    F16 (F32 where it was that, or holds numbers that F16 does not), experts keep the type that all of a layer have in common. An embedding and the output
    layer that is tied to it change together. UsageError for a module that has no packed weights, or no such one. If the block raises, nothing changes.
    """
    take, put = getattr(module, "take", None), getattr(module, "put", None)
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
    return plain(dtype)  # type: ignore[no-any-return]
