"""Packed weights as the floats that they stand for, under the names that the replaced module has for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch.utils._pytree import tree_map_only

from ktx.errors import UsageError
from ktx.kernels import cpu

CPU = torch.device("cpu")
SPAN = 1 << 26  # numbers that are dequantised at once


@dataclass(frozen=True)
class Floats:
    """A parameter: its shape, and its values f32 [last - first, ...] from one index of the first dimension to another. `place` is where its first packed bytes are."""

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    place: int

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it, a span at a time."""
        out = torch.empty(self.shape, dtype=dtype, device="cpu")
        for first, last in self.spans():
            out[first:last] = self.read(first, last)
        return out

    def spans(self) -> list[tuple[int, int]]:
        """Where to cut the first dimension, so that a piece has at most SPAN numbers."""
        length, step = self.shape[0], max(1, SPAN // max(1, math.prod(self.shape[1:])))
        return [(first, min(first + step, length)) for first in range(0, length, step)]


def plain(values: torch.Tensor) -> Floats:
    """What is not packed but no parameter either: biases."""
    return Floats(tuple(values.shape), lambda first, last: values[first:last], values.data_ptr())


def rows_of(parts: Sequence[cpu.Packed], first: int, last: int) -> torch.Tensor:
    """f32 rows of a matrix in parts."""
    found, at = [], 0
    for part in parts:
        begin, end = max(first - at, 0), min(last - at, part.n)
        if begin < end:
            found.append(part.rows(torch.arange(begin, end, device="cpu")))
        at += part.n
    return found[0] if len(found) == 1 else torch.cat(found)


def matrix(parts: Sequence[cpu.Packed]) -> Floats:
    """[rows, columns], rows of one part after those of another."""
    return Floats(
        (sum(part.n for part in parts), parts[0].k),
        lambda first, last: rows_of(parts, first, last),
        parts[0].data.data_ptr(),
    )


def experts(halves: Sequence[cpu.Packed], interleaved: bool = False, transposed: bool = False) -> Floats:
    """[experts, rows, columns] of one projection, or of two in one: rows behind each other, or in turns."""
    count, n, k = halves[0].matrices, halves[0].n * len(halves), halves[0].k

    def one(number: int) -> torch.Tensor:
        own = [cpu.unpack_expert(packed, number) for packed in halves]
        values = own[0] if len(own) == 1 else torch.stack(own, 1).flatten(0, 1) if interleaved else torch.cat(own)
        return values.T if transposed else values

    shape = (count, k, n) if transposed else (count, n, k)
    read = lambda first, last: torch.stack([one(number) for number in range(first, last)])  # noqa: E731
    return Floats(shape, read, halves[0].data.data_ptr())


READ_ONLY = (
    "a packed weight cannot be written to in place; change a copy (weight.clone()) and give it back with"
    " model.load_state_dict({...}, strict=False)"
)


_held: WeakValueDictionary[tuple[int, torch.dtype], torch.Tensor] = WeakValueDictionary()


class Dequantized(torch.Tensor):
    """A parameter that is packed, as a tensor that nobody can write to: it takes no memory, every use of its values dequantises them."""

    floats: Floats
    held: torch.Tensor | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, floats: Floats, dtype: torch.dtype) -> Dequantized:
        made: Dequantized = torch.Tensor._make_wrapper_subclass(cls, floats.shape, dtype=dtype, device=CPU)
        made.floats = floats
        return made

    def dequantized(self) -> torch.Tensor:
        """The values as a plain tensor."""
        return self.floats.values(self.dtype) if self.held is None else self.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Dequantized(args[0].floats, args[0].dtype)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Dequantized):
                raise UsageError(READ_ONLY)
        args, kwargs = tree_map_only(Dequantized, Dequantized.dequantized, (args, kwargs or {}))
        return func(*args, **kwargs)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.dequantized().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.dequantized().tolist()

    def untyped_storage(self) -> Any:
        return _Place(self.floats.place, self.nbytes)

    def data_ptr(self) -> int:
        """Of the values, which are in memory from now on as long as this tensor is; a tied weight's are its twin's."""
        if self.held is None:
            key = self.floats.place, self.dtype
            held = _held.get(key)
            if held is None:
                held = _held[key] = self.floats.values(self.dtype)
            self.held = held
        return self.held.data_ptr()

    def __setitem__(self, index: Any, values: Any) -> NoReturn:
        raise UsageError(READ_ONLY)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantized().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantized:
        return self

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Dequantized({list(self.shape)}, {self.dtype})"


@dataclass(frozen=True)
class _Place:
    """What tells programs that look for shared memory which weights are the same."""

    place: int
    size: int

    def data_ptr(self) -> int:
        return self.place

    def nbytes(self) -> int:
        return self.size
