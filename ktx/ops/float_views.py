"""Tensors that view packed weights as floats, under the parameter names of the replaced module."""

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
from ktx.utils.deprecation import deprecated_arguments, deprecated_members
from ktx.utils.spawn_pickle import for_pickle

CPU = torch.device("cpu")
MAX_RANGE_VALUES = 1 << 26  # values that are dequantized at once


@deprecated_members(place="memory_id")
@deprecated_arguments(place="memory_id")
@dataclass(frozen=True)
class Floats:
    """The float values of a packed parameter.

    Attributes:
        shape: of the parameter.
        read: (first, last) -> f32 [last - first, ...], a range of the first dimension.
        memory_id: identifies the packed memory: the address of its first bytes, or another unique number.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    memory_id: int

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns all values, dequantized range by range to bound temporary memory."""
        if not self.shape:
            return self.read(0, 1).to(dtype)
        out = torch.empty(self.shape, dtype=dtype, device="cpu")
        for first, last in self.ranges():
            out[first:last] = self.read(first, last)
        return out

    def ranges(self) -> list[tuple[int, int]]:
        """Splits the first dimension into ranges of at most MAX_RANGE_VALUES values, at least one index each."""
        length, step = self.shape[0], max(1, MAX_RANGE_VALUES // max(1, math.prod(self.shape[1:])))
        return [(first, min(first + step, length)) for first in range(0, length, step)]


def view_tensor(values: torch.Tensor) -> Floats:
    """Views an unpacked tensor that is no parameter, such as a bias."""
    read = lambda first, last: values[first:last] if values.dim() else values  # noqa: E731
    return Floats(tuple(values.shape), read, values.data_ptr())


def unreadable(shape: tuple[int, ...], message: str, memory_id: int) -> Floats:
    """Returns a parameter whose values cannot be read: reading raises UsageError(message)."""

    def refuse(first: int, last: int) -> torch.Tensor:
        raise UsageError(message)

    return Floats(shape, refuse, memory_id)


def rows_of(parts: Sequence[cpu.Packed], first: int, last: int) -> torch.Tensor:
    """Dequantizes the rows `first` to `last` of a matrix that is stored in row-wise parts; f32 [last - first, k]."""
    rows, offset = [], 0
    for part in parts:
        begin, end = max(first - offset, 0), min(last - offset, part.n)
        if begin < end:
            rows.append(part.rows(torch.arange(begin, end, device="cpu")))
        offset += part.n
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def view_matrix(parts: Sequence[cpu.Packed]) -> Floats:
    """Views a matrix [rows, columns] that is stored in row-wise parts."""
    return Floats(
        (sum(part.n for part in parts), parts[0].k),
        lambda first, last: rows_of(parts, first, last),
        parts[0].data.data_ptr(),
    )


def view_experts(projections: Sequence[cpu.Packed], interleaved: bool = False, transposed: bool = False) -> Floats:
    """Views one projection, or two in one parameter, as the replaced module's parameter [experts, rows, columns].

    Args:
        projections: the packed projections.
        interleaved: whether the rows of two projections alternate; False: they are concatenated.
        transposed: whether the parameter is [experts, columns, rows].
    """
    first_projection = projections[0]
    count, num_rows, columns = first_projection.matrices, first_projection.n * len(projections), first_projection.k

    def matrix_of(expert: int) -> torch.Tensor:
        rows = [packed.matrix(expert).rows(torch.arange(packed.n, device="cpu")) for packed in projections]
        values = rows[0] if len(rows) == 1 else torch.stack(rows, 1).flatten(0, 1) if interleaved else torch.cat(rows)
        return values.T if transposed else values

    shape = (count, columns, num_rows) if transposed else (count, num_rows, columns)
    read = lambda first, last: torch.stack([matrix_of(expert) for expert in range(first, last)])  # noqa: E731
    return Floats(shape, read, first_projection.data.data_ptr())


READ_ONLY = (
    "{} is packed and cannot be written to: edit it in `with ktx.edit(module) as weight:`, write to all of"
    " module.weight.data, assign a tensor to module.weight, pass other values to"
    " model.load_state_dict({{...}}, strict=False), or replace the module with ktx.dequantize(module)"
)
NOT_TRAINABLE = (
    "{} is packed and cannot be trained: train its module's weight (module.requires_grad_(True)), or an adapter of it"
)
ALIAS_OPS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


ADD_OPS = (torch.ops.aten.add.Tensor, torch.ops.aten.baddbmm.default)
_next_memory_id = itertools.count(-1, -1)  # unique `Floats.memory_id`s of values that are not packed
# Dequantized values in memory, by `Floats.memory_id` and dtype.
_dequantized: WeakValueDictionary[tuple[int, torch.dtype], torch.Tensor] = WeakValueDictionary()


class Dequantized(torch.Tensor):
    """A packed weight as a tensor without memory of its own: every operation on its values dequantizes them.

    An operation that would write to it raises UsageError. Its `data` can be written to in full (`weight.data += delta`,
    as adapters are merged), which packs the new values at once, but not in part. isinstance(weight, nn.Parameter) is
    true for a module's own weight, because programs that replace weights skip tensors that are not parameters.
    """

    floats: Floats
    label: str  # for messages
    on_write: Callable[[torch.Tensor], Floats] | None = None  # packs other values and returns them; None for a view
    on_train: Callable[[], None] | None = None  # replaces it by a trainable parameter of its module
    data_of: Dequantized | None = None  # the tensor whose `data` this is
    cached_values: torch.Tensor | None = None  # the dequantized values, if they are in memory
    _is_param: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        floats: Floats,
        dtype: torch.dtype,
        label: str = "this weight",
        device: torch.device = CPU,
        on_write: Callable[[torch.Tensor], Floats] | None = None,
        on_train: Callable[[], None] | None = None,
    ) -> Dequantized:
        """Creates a tensor without memory; see the class attributes.

        Args:
            floats: the values.
            dtype: in which they are dequantized.
            label: the path of the weight, for messages.
            device: of the module.
            on_write: packs other values and returns them; None: a view that cannot be written to.
            on_train: turns the weight into a trainable parameter of its module; None: it cannot be trained.
        """
        tensor: Dequantized = torch.Tensor._make_wrapper_subclass(cls, floats.shape, dtype=dtype, device=device)
        tensor.floats, tensor.label, tensor.on_write, tensor.on_train = floats, label, on_write, on_train
        tensor._is_param = on_write is not None  # torch's mark of parameters whose class is not nn.Parameter
        return tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def dequantized(self) -> torch.Tensor:
        """Returns the values as a plain tensor."""
        return self.floats.values(self.dtype).to(self.device) if self.cached_values is None else self.cached_values

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        """The same values; a tensor assigned to it, or an operation that writes to all of it, is packed."""
        alias: Dequantized = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        alias.on_write, alias.data_of = self.on_write, None if self.on_write is None else self
        return alias

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if not (isinstance(values, Dequantized) and values.floats is self.floats):
            self._pack(values)

    def requires_grad_(self, requires_grad: bool = True) -> Dequantized:
        """As torch's; a weight to be trained becomes a float parameter of its module. UsageError where it cannot."""
        if requires_grad:
            if self.on_train is None:
                raise UsageError(NOT_TRAINABLE.format(self.label))
            self.on_train()
        return self

    @property  # type: ignore[override]
    def requires_grad(self) -> bool:
        """As torch's."""
        return torch.Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def _pack(self, values: torch.Tensor) -> None:
        """Packs other values, and lets this tensor, and the one whose `data` it is, view them."""
        if self.on_write is None:
            raise UsageError(READ_ONLY.format(self.label))
        floats = self.on_write(values)
        for tensor in (self, self.data_of):
            if tensor is not None:
                tensor.floats, tensor.cached_values = floats, None

    def _write(self, func: Any, args: Any, kwargs: Any) -> Dequantized:
        """Runs an operation that writes to all values of this tensor, and packs the result."""
        values = self.dequantized().clone()
        args, kwargs = tree_map_only(
            Dequantized, lambda tensor: values if tensor is self else tensor.dequantized(), (args, kwargs)
        )
        func(*args, **kwargs)
        self._pack(values)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operation on the dequantized values.

        Aliases stay packed views, PEFT's sums are computed lazily (`_add_lazily`), a write to all of `data` is packed,
        and any other write raises UsageError, because it would only change a temporary copy. So results that are views
        of that copy are read-only too.
        """
        kwargs = kwargs or {}
        if func in ALIAS_OPS:
            source = args[0]
            return cls(source.floats, source.dtype, source.label, source.device)
        if func in ADD_OPS and (total := cls._add_lazily(func, args, kwargs)) is not None:
            return total
        name = "this weight"
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, cls):
                name = value.label
                if argument.alias_info is not None and argument.alias_info.is_write:
                    if func is torch.ops.aten.set_.source_Tensor and value.on_write is not None:  # torch's parametrize
                        if args[1] is not value:
                            value._pack(args[1])
                        return value
                    if value.data_of is None or torch.Tag.inplace_view in func.tags:
                        raise UsageError(READ_ONLY.format(name))
                    return value._write(func, args, kwargs)
        args, kwargs = tree_map_only(Dequantized, Dequantized.dequantized, (args, kwargs))
        out = func(*args, **kwargs)
        if any(result.alias_info is not None for result in func._schema.returns):
            # A write to a view of the dequantized values would be lost.
            out = tree_map_only(torch.Tensor, lambda view: cls._wrap_view(view, name), out)
        return out

    @classmethod
    def _add_lazily(cls, func: Any, args: Any, kwargs: Any) -> Dequantized | None:
        """Adds matrices lazily to a stack of as many, as PEFT's parametrizations do; None for any other sum.

        torch's parametrize computes the sum only to read its shape, so dequantizing the stack would be wasted.
        """
        base, *others = args
        if not isinstance(base, Dequantized) or base.dim() != 3 or base.cached_values is not None:
            return None
        if not all(type(other) in (torch.Tensor, torch.nn.Parameter) and other.dim() == 3 for other in others):
            return None
        shapes = [other.shape for other in others]
        # a sum with one stack of the same shape, or baddbmm: a sum with the products of two stacks
        fits = (len(shapes) == 1 and shapes[0] == base.shape) or (
            len(shapes) == 2 and {len(base), *map(len, others)} == {len(base)}
        )
        if not fits or any(other.is_inference() or other.dtype != base.dtype for other in others):
            return None
        versions = [(other, other._version) for other in others]

        def read(first: int, last: int) -> torch.Tensor:
            if any(other._version != before for other, before in versions):
                raise UsageError(f"a tensor that was added to {base.label} has changed since: add it again")
            base_values = base.floats.read(first, last).to(base.dtype)
            with torch.no_grad():
                total: torch.Tensor = func(base_values, *(other[first:last] for other, _ in versions), **kwargs)
            return total.float()

        return cls(
            Floats(base.floats.shape, read, next(_next_memory_id)), base.dtype, f"a sum with {base.label}", base.device
        )

    @classmethod
    def _wrap_view(cls, view: torch.Tensor, name: str) -> Dequantized:
        """Returns a view of dequantized values as a read-only tensor."""
        tensor = cls(view_tensor(view), view.dtype, f"a view of {name}", view.device)
        tensor.cached_values = view if view.is_contiguous() else None
        return tensor

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """A read-only array."""
        array = self.dequantized().numpy(*args, **kwargs)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """Returns the dequantized values as nested lists."""
        return self.dequantized().tolist()  # type: ignore[no-untyped-call]

    def untyped_storage(self) -> Any:
        """The storage of the dequantized values once they are in memory, which safetensors' save_model compares with
        `data_ptr`; before that, an identifier of the packed memory, equal for tied weights.
        """
        values = (
            _dequantized.get((self.floats.memory_id, self.dtype)) if self.cached_values is None else self.cached_values
        )
        return _PackedStorage(self.floats.memory_id, self.nbytes) if values is None else values.untyped_storage()

    def data_ptr(self) -> int:
        """The address of the dequantized values, which this tensor caches from now on; tied weights share them."""
        if self.cached_values is None:
            key = self.floats.memory_id, self.dtype
            values = _dequantized.get(key)
            if values is None:
                values = _dequantized[key] = self.dequantized()
            self.cached_values = values
        return self.cached_values.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return for_pickle(self.dequantized()).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantized:
        return self

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Dequantized({list(self.shape)}, {self.dtype})"


@dataclass(frozen=True)
class _PackedStorage:
    """A storage for programs that search for shared memory: equal for weights in the same packed memory."""

    memory_id: int
    size: int

    def data_ptr(self) -> int:
        return self.memory_id

    def nbytes(self) -> int:
        return self.size
