"""Packed weights as the floats that they stand for, under the names that the replaced module has for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils._pytree import tree_map_only

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.utils.spawn_pickle import for_pickle

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
        if not self.shape:
            return self.read(0, 1).to(dtype)
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
    read = lambda first, last: values[first:last] if values.dim() else values  # noqa: E731
    return Floats(tuple(values.shape), read, values.data_ptr())


def out_of_reach(shape: tuple[int, ...], about: str, place: int) -> Floats:
    """A parameter whose values cannot be had: its shape, and a UsageError for who reads it."""

    def refuse(first: int, last: int) -> torch.Tensor:
        raise UsageError(about)

    return Floats(shape, refuse, place)


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
        own = [packed.matrix(number).rows(torch.arange(packed.n, device="cpu")) for packed in halves]
        values = own[0] if len(own) == 1 else torch.stack(own, 1).flatten(0, 1) if interleaved else torch.cat(own)
        return values.T if transposed else values

    shape = (count, k, n) if transposed else (count, n, k)
    read = lambda first, last: torch.stack([one(number) for number in range(first, last)])  # noqa: E731
    return Floats(shape, read, halves[0].data.data_ptr())


READ_ONLY = (
    "{} is packed and cannot be written to: edit it in `with ktx.edit(module) as weight:`, write to module.weight.data as a whole, assign a tensor to"
    " module.weight, give other values to model.load_state_dict({{...}}, strict=False), or put ktx.dequantize(module) in the module's place"
)
FROZEN = "{} is packed and is not trained: let its module's weight be (module.requires_grad_(True)), or train an adapter of it"
ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.baddbmm.default)
_places = itertools.count(-1, -1)  # of what is packed nowhere
_held: WeakValueDictionary[tuple[int, torch.dtype], torch.Tensor] = WeakValueDictionary()


class Dequantized(torch.Tensor):
    """A packed weight as a tensor that takes no memory: every operation on its values dequantises them.

    UsageError for what would write to it. Its `data` can be written to as a whole (`weight.data += delta`, as adapters are merged), which packs the new values at once; not a part of it.
    A module's own one is a parameter to who asks isinstance(weight, nn.Parameter): programs that exchange weights do, and leave alone what is none.
    """

    floats: Floats
    label: str  # for messages
    replace: Callable[[torch.Tensor], Floats] | None = None  # packs other values, and says them; a view has none
    train: Callable[[], None] | None = None  # has its module compute with a parameter in its place
    whole: Dequantized | None = None  # of which it is the `data`
    held: torch.Tensor | None = None
    _is_param: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        floats: Floats,
        dtype: torch.dtype,
        label: str = "this weight",
        device: torch.device = CPU,
        replace: Callable[[torch.Tensor], Floats] | None = None,
        train: Callable[[], None] | None = None,
    ) -> Dequantized:
        made: Dequantized = torch.Tensor._make_wrapper_subclass(cls, floats.shape, dtype=dtype, device=device)
        made.floats, made.label, made.replace, made.train = floats, label, replace, train
        made._is_param = replace is not None  # what torch says of parameters that are no nn.Parameter by class
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def dequantized(self) -> torch.Tensor:
        """The values as a plain tensor."""
        return self.floats.values(self.dtype).to(self.device) if self.held is None else self.held

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        """The same; what is assigned to it, or written to it as a whole, is packed."""
        given: Dequantized = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        given.replace, given.whole = self.replace, None if self.replace is None else self
        return given

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if not (isinstance(values, Dequantized) and values.floats is self.floats):
            self._pack(values)

    def requires_grad_(self, requires_grad: bool = True) -> Dequantized:
        """As torch's. One that is to be trained becomes a parameter of its module, in floats; UsageError where it cannot."""
        if requires_grad:
            if self.train is None:
                raise UsageError(FROZEN.format(self.label))
            self.train()
        return self

    @property  # type: ignore[override]
    def requires_grad(self) -> bool:
        """As torch's."""
        return torch.Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def _pack(self, values: torch.Tensor) -> None:
        if self.replace is None:
            raise UsageError(READ_ONLY.format(self.label))
        floats = self.replace(values)
        for one in (self, self.whole):
            if one is not None:
                one.floats, one.held = floats, None

    def _written(self, func: Any, args: Any, kwargs: Any) -> Dequantized:
        """Packs what an operation makes that writes to all of this one's values."""
        values = self.dequantized().clone()
        args, kwargs = tree_map_only(
            Dequantized, lambda one: values if one is self else one.dequantized(), (args, kwargs)
        )
        func(*args, **kwargs)
        self._pack(values)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in ALIASES:
            given = args[0]
            return cls(given.floats, given.dtype, given.label, given.device)
        if func in SUMS and (made := cls._sum(func, args, kwargs)) is not None:
            return made
        name = "this weight"
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, cls):
                name = value.label
                if argument.alias_info is not None and argument.alias_info.is_write:
                    if func is torch.ops.aten.set_.source_Tensor and value.replace is not None:  # torch's parametrize
                        if args[1] is not value:
                            value._pack(args[1])
                        return value
                    if value.whole is None or torch.Tag.inplace_view in func.tags:
                        raise UsageError(READ_ONLY.format(name))
                    return value._written(func, args, kwargs)
        args, kwargs = tree_map_only(Dequantized, Dequantized.dequantized, (args, kwargs))
        out = func(*args, **kwargs)
        if any(
            result.alias_info is not None for result in func._schema.returns
        ):  # what is written to a view would be lost
            out = tree_map_only(torch.Tensor, lambda view: cls._of_view(view, name), out)
        return out

    @classmethod
    def _sum(cls, func: Any, args: Any, kwargs: Any) -> Dequantized | None:
        """Stacked matrices plus others of their number, as PEFT's parametrizations add them: torch's parametrize has them computed to look at their shape. None for any other sum."""
        base, *others = args
        if not isinstance(base, Dequantized) or base.dim() != 3 or base.held is not None:
            return None
        if not all(type(other) in (torch.Tensor, torch.nn.Parameter) and other.dim() == 3 for other in others):
            return None
        shapes = [other.shape for other in others]
        fits = (
            len(shapes) == 1
            and shapes[0] == base.shape
            or len(shapes) == 2
            and {len(base), *map(len, others)} == {len(base)}
        )
        if not fits or any(other.is_inference() or other.dtype != base.dtype for other in others):
            return None
        given = [(other, other._version) for other in others]

        def read(first: int, last: int) -> torch.Tensor:
            if any(other._version != before for other, before in given):
                raise UsageError(f"what was added to {base.label} has changed since: add it again")
            own = base.floats.read(first, last).to(base.dtype)
            with torch.no_grad():
                made: torch.Tensor = func(own, *(other[first:last] for other, _ in given), **kwargs)
            return made.float()

        return cls(Floats(base.floats.shape, read, next(_places)), base.dtype, f"a sum with {base.label}", base.device)

    @classmethod
    def _of_view(cls, view: torch.Tensor, name: str) -> Dequantized:
        made = cls(plain(view), view.dtype, f"a view of {name}", view.device)
        made.held = view if view.is_contiguous() else None
        return made

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """A read-only array."""
        found = self.dequantized().numpy(*args, **kwargs)
        found.flags.writeable = False
        return found

    def tolist(self) -> Any:
        return self.dequantized().tolist()  # type: ignore[no-untyped-call]

    def untyped_storage(self) -> Any:
        """That of the values once they are in memory, which safetensors' save_model compares with `data_ptr`; before, what tells which weights are the same."""
        held = _held.get((self.floats.place, self.dtype)) if self.held is None else self.held
        return _Place(self.floats.place, self.nbytes) if held is None else held.untyped_storage()

    def data_ptr(self) -> int:
        """Of the values, which are in memory from now on as long as this tensor is; a tied weight's are its twin's."""
        if self.held is None:
            key = self.floats.place, self.dtype
            held = _held.get(key)
            if held is None:
                held = _held[key] = self.dequantized()
            self.held = held
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return for_pickle(self.dequantized()).__reduce_ex__(protocol)

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
