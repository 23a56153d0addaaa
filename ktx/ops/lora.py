"""LoRA adapters on packed weights: y = W x + s B A x, of each row of a forward with the adapters of its own request.

A module has an attribute `lora` while an adapter of the forward is meant for it, else None. Setting it counts as a change, so shortcuts (ktx.ops.guard) that do not call the
module stand aside meanwhile, and only those.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ktx.devices import CPU, Device
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops.base import Operator
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor
from ktx.weights.lora import LowRank


class Use(NamedTuple):
    """An adapter, and a factor on what it adds."""

    name: str
    factor: float = 1.0


Uses = tuple[Use, ...]  # of adapters, whose sums are added
Spans = list[tuple[int, Uses]]


@dataclass
class Mapping:
    """Which rows of the forward under way are computed with which adapters; all modules of a model have the same one. `everywhere` counts outside of an engine's steps, also while one is under way on another thread."""

    everywhere: Uses = ()

    @property
    def spans(self) -> Spans | None:
        """Counts of the tokens of this thread's step, in their order; None outside of one."""
        return self._step()[0]

    @property
    def kept(self) -> Spans | None:
        """The same of those whose logits are computed."""
        return self._step()[1]

    def _step(self) -> tuple[Spans | None, Spans | None]:
        whose, *spans = getattr(_under_way, "step", None) or (None, None, None)
        return (spans[0], spans[1]) if whose is self else (None, None)

    def of(self, rows: int) -> Iterator[tuple[slice, Uses]]:
        """Rows that have adapters. UsageError for another number of rows than the step, or the part of it that is under way, has."""
        first, count = getattr(_under_way, "part", None) or (0, -1)
        if self.spans is not None and count == rows:
            yield from _slices([(count, self.at(first))])
            return
        if self.spans is not None and not any(uses for _, uses in self.spans):
            return
        for spans in (self.spans, self.kept):
            if spans is None:
                continue
            if sum(count for count, _ in spans) == rows:
                yield from _slices(spans)
                return
        if self.spans is not None:
            raise UsageError(
                f"a module with a LoRA adapter is called with {rows} rows, the step has {sum(count for count, _ in self.spans)} tokens: whose they are is not known"
            )
        if self.everywhere:
            yield slice(0, rows), self.everywhere

    def at(self, row: int) -> Uses:
        """The adapters of one row of the step."""
        if self.spans is None:
            return self.everywhere
        return next((uses for rows, uses in _slices(self.spans) if rows.start <= row < rows.stop), ())

    def among(self, places: torch.Tensor) -> list[tuple[slice, Uses]]:
        """As `of`, for some of the step's rows, in rising order: slices of `places`."""
        each = [self.at(row) for row in places.tolist()]
        return list(_slices([(len(list(same)), uses) for uses, same in groupby(each)]))

    @contextmanager
    def step(self, spans: Sequence[tuple[int, Uses]], kept: Sequence[tuple[int, Uses]]) -> Iterator[None]:
        """While an engine computes a step of tokens, on this thread."""
        _under_way.step = self, list(spans), list(kept)
        try:
            yield
        finally:
            _under_way.step = None


_under_way = threading.local()


@contextmanager
def part(first: int, count: int) -> Iterator[None]:
    """While modules are called with `count` of the step's rows, all of one sequence, from `first` on: on this thread."""
    _under_way.part = first, count
    try:
        yield
    finally:
        _under_way.part = None


def _slices(spans: Sequence[tuple[int, Uses]]) -> Iterator[tuple[slice, Uses]]:
    """Neighbours with the same adapters together."""
    at = 0
    for uses, several in groupby(spans, key=lambda span: span[1]):
        count = sum(count for count, _ in several)
        if uses and count:
            yield slice(at, at + count), uses
        at += count


class Factors:
    """s B A of one matrix, where its module is. On the CPU both are packed: of our kernels a row's result depends on no other row."""

    def __init__(self, one: LowRank, home: Device):
        self.embedding, self.gpu = one.embedding, home.gpu
        self.a: Any = one.a.t().contiguous().to(home.torch) if one.embedding or home.gpu else packed(one.a)
        self.b: Any = one.b.t().contiguous().to(home.torch) if home.gpu else packed(one.b)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """f32 [rows, out] of rows x [rows, in], of an embedding of token ids [rows]."""
        if self.embedding:
            low = self.a[x]
        else:
            low = x.float() @ self.a if self.gpu else cpu.linear(x.float(), self.a)
        return low @ self.b if self.gpu else cpu.linear(low, self.b)


def packed(values: torch.Tensor) -> cpu.Packed:
    return cpu.pack(QuantizedTensor.of(values))


def packed_bytes(shape: Sequence[int]) -> int:
    """Memory of what `packed` makes of such a tensor."""
    return int(cpu.ops.packed_nbytes(QTYPES["F32"].code, *shape[-2:])) * math.prod(shape[:-2])


class Lora:
    """The adapters of one module's matrix, by name."""

    def __init__(self, mapping: Mapping, owner: Any):
        self.mapping, self.home = mapping, home_of(owner)
        self.of_operator = isinstance(owner, Operator)  # else of a module that is torch's own
        self.factors: dict[str, Any] = {}

    @staticmethod
    def nbytes(owner: Any, several: Sequence[LowRank]) -> int:
        """Memory of what `made` makes for a module."""
        (one,) = several
        if home_of(owner).gpu:
            return 4 * (one.a.numel() + one.b.numel())
        return (4 * one.a.numel() if one.embedding else packed_bytes(one.a.shape)) + packed_bytes(one.b.shape)

    def made(self, several: Sequence[LowRank]) -> Any:
        """What `factors` hold of an adapter's matrices, packed."""
        (one,) = several
        return Factors(one, self.home)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` [..., out], what the matrix itself made of x [..., in] (an embedding: of token ids [...]), and what adapters add to it."""
        rows = y.numel() // y.shape[-1]
        flat = x.reshape(rows, *x.shape[y.ndim - 1 :])
        more: torch.Tensor | None = None
        for own, uses in self.mapping.of(rows):
            for use in uses:
                if use.name in self.factors:
                    added = times(use.factor, self.factors[use.name](flat))
                    more = plus(added.new_zeros(()) if more is None else more, added, own)
        return y if more is None else y + more.view(y.shape).to(y.dtype)

    def listened(self, module: Any, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        """As a hook on a module of torch's own."""
        return self(args[0], y)


def home_of(module: Any) -> Device:
    """Where a module's weight is, an operator's or torch's own."""
    home: Device | None = getattr(module, "home", None)
    there = module.weight.device if home is None else home.torch
    return home or (CPU if there.type in ("cpu", "meta") else Device(str(there), there, True))


def times(factor: float, added: torch.Tensor) -> torch.Tensor:
    return added if factor == 1 else factor * added


def plus(known: torch.Tensor, added: torch.Tensor, own: slice) -> torch.Tensor:
    """known + added [..., rows, columns], of the latter the rows `own` alone; in the type of what is known."""
    if len(range(*own.indices(added.shape[-2]))) < added.shape[-2]:
        only = torch.zeros_like(added)
        only[..., own, :] = added[..., own, :]
        added = only
    return known + added.to(known.dtype)
