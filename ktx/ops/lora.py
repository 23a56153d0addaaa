"""LoRA adapters on packed weights: y = W x + s B A x, where each row of a forward uses the adapters of its request.

A module's attribute `lora` is set while an adapter of the forward applies to it, else None. Setting it counts as a
change, so exactly the fast paths (ktx.ops.guard) that bypass the module are disabled meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ktx.cache import forward_context
from ktx.cache.forward_context import AdapterStep
from ktx.devices import CPU, Device
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.ops.base import Operator
from ktx.quant.types import QTYPES
from ktx.utils.deprecation import deprecated_names
from ktx.weights.base import QuantizedTensor
from ktx.weights.lora import AdapterUse as AdapterUse
from ktx.weights.lora import AdapterUses, LowRank, Spans


@dataclass
class AdapterMapping:
    """Maps the rows of the running forward to adapters; all modules of a model share one mapping.

    Attributes:
        default_uses: the adapters of forwards outside of an engine's steps, also while another thread runs a step.
    """

    default_uses: AdapterUses = ()

    @property
    def spans(self) -> Spans | None:
        """The adapters of the tokens of this thread's step, in order; None outside of a step."""
        step = self._step()
        return None if step is None else step.tokens

    @property
    def logits_spans(self) -> Spans | None:
        """The adapters of the rows whose logits this thread's step computes, in order; None outside of a step."""
        step = self._step()
        return None if step is None else step.logits

    def _step(self) -> AdapterStep | None:
        """Returns the adapters of this thread's step, if it is a step of this mapping's model."""
        context = forward_context.current()
        step = None if context is None else context.adapters
        return step if step is not None and step.mapping is self else None

    def slices(self, rows: int) -> Iterator[tuple[slice, AdapterUses]]:
        """Yields slices of `rows` rows that have adapters, with these adapters.

        The number of rows tells which rows of the step a module is called with: those of the part that is computed
        alone (`ForwardContext.part`), all tokens, or only those whose logits are computed.

        Raises:
            UsageError: the number of rows is not that of the step, nor of the running part of it.
        """
        context = forward_context.current()
        first, count = (context and context.part) or (0, -1)  # -1: all rows of the step
        if self.spans is not None and count == rows:
            yield from _merge_spans([(count, self.uses_of_row(first))])
            return
        if self.spans is not None and not any(uses for _, uses in self.spans):
            return
        for spans in (self.spans, self.logits_spans):
            if spans is None:
                continue
            if sum(count for count, _ in spans) == rows:
                yield from _merge_spans(spans)
                return
        if self.spans is not None:
            raise UsageError(
                f"a module with a LoRA adapter is called with {rows} rows, but the step has"
                f" {sum(count for count, _ in self.spans)} tokens: the rows cannot be mapped to requests"
            )
        if self.default_uses:
            yield slice(0, rows), self.default_uses

    def uses_of_row(self, row: int) -> AdapterUses:
        """Returns the adapters of one row of the step."""
        if self.spans is None:
            return self.default_uses
        return next((uses for rows, uses in _merge_spans(self.spans) if rows.start <= row < rows.stop), ())

    def slices_of_rows(self, row_indices: torch.Tensor) -> list[tuple[slice, AdapterUses]]:
        """Like `slices`, for some of the step's rows: returns slices of `row_indices`, which are ascending."""
        uses_of_row = [self.uses_of_row(row) for row in row_indices.tolist()]
        return list(_merge_spans([(len(list(run)), uses) for uses, run in groupby(uses_of_row)]))


def _merge_spans(spans: Sequence[tuple[int, AdapterUses]]) -> Iterator[tuple[slice, AdapterUses]]:
    """Yields slices of rows that have adapters; consecutive spans with the same adapters become one slice."""
    first = 0
    for uses, run in groupby(spans, key=lambda span: span[1]):
        count = sum(count for count, _ in run)
        if uses and count:
            yield slice(first, first + count), uses
        first += count


class Factors:
    """The low-rank matrices A and B of an adapter, for one matrix of the model, on its module's device.

    On the CPU both are packed, because in ktx's kernels a row's result does not depend on the other rows.
    """

    def __init__(self, adapter: LowRank, device: Device):
        self.embedding, self.gpu = adapter.embedding, device.gpu
        self.a: Any = (
            adapter.a.t().contiguous().to(device.torch) if adapter.embedding or device.gpu else packed(adapter.a)
        )
        self.b: Any = adapter.b.t().contiguous().to(device.torch) if device.gpu else packed(adapter.b)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Computes B A: rows x [rows, in] (an embedding: token ids [rows]) -> f32 [rows, out]."""
        if self.embedding:
            projected = self.a[x]
        elif self.gpu:
            projected = x.float() @ self.a
        else:
            projected = cpu.linear(x.float(), self.a)
        return projected @ self.b if self.gpu else cpu.linear(projected, self.b)


def packed(values: torch.Tensor) -> cpu.Packed:
    """Packs a tensor's values for the CPU kernels, in f32."""
    return cpu.pack(QuantizedTensor.from_float(values))


def packed_bytes(shape: Sequence[int]) -> int:
    """Returns the bytes of `packed` for a tensor of this shape, before the tensor is read."""
    return int(cpu.ops.packed_nbytes(QTYPES["F32"].code, *shape[-2:])) * math.prod(shape[:-2])


class Lora:
    """The adapters of one module's matrix; `factors` maps an adapter's name to its factors."""

    def __init__(self, mapping: AdapterMapping, owner: Any):
        self.mapping, self.device = mapping, device_of(owner)
        self.of_operator = isinstance(owner, Operator)  # False: a torch module
        self.factors: dict[str, Any] = {}

    @staticmethod
    def nbytes(owner: Any, adapters: Sequence[LowRank]) -> int:
        """Returns the bytes that `pack` allocates for the adapter of a module, in f32, to check that they fit."""
        (adapter,) = adapters
        if device_of(owner).gpu:
            return 4 * (adapter.a.numel() + adapter.b.numel())
        return (4 * adapter.a.numel() if adapter.embedding else packed_bytes(adapter.a.shape)) + packed_bytes(
            adapter.b.shape
        )

    def pack(self, adapters: Sequence[LowRank]) -> Any:
        """Packs an adapter's matrices as a value of `factors`."""
        (adapter,) = adapters
        return Factors(adapter, self.device)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns y plus the adapters' outputs, for each row those of the adapters that its request uses.

        Args:
            x: the module's input [..., in]; for an embedding, token ids [...].
            y: the output of the packed matrix [..., out].
        """
        rows = y.numel() // y.shape[-1]
        flat = x.reshape(rows, *x.shape[y.ndim - 1 :])  # token ids have no last dimension to keep
        total: torch.Tensor | None = None
        for indices, uses in self.mapping.slices(rows):
            for use in uses:
                if use.name in self.factors:
                    added = scaled(use.factor, self.factors[use.name](flat))
                    total = add_rows(added.new_zeros(()) if total is None else total, added, indices)
        return y if total is None else y + total.view(y.shape).to(y.dtype)

    def forward_hook(self, module: Any, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' outputs as a forward hook, for torch modules, which do not read the attribute `lora`."""
        return self(args[0], y)


def device_of(module: Any) -> Device:
    """Returns the device of a module's weight, for operators and torch modules."""
    placement: Device | None = getattr(module, "placement", None)
    weight_device = module.weight.device if placement is None else placement.torch
    return placement or (
        CPU if weight_device.type in ("cpu", "meta") else Device(str(weight_device), weight_device, True)
    )


def scaled(factor: float, added: torch.Tensor) -> torch.Tensor:
    """Scales an adapter's output; a factor of 1 returns the tensor itself."""
    return added if factor == 1 else factor * added


def add_rows(base: torch.Tensor, added: torch.Tensor, indices: slice) -> torch.Tensor:
    """Returns base + added [..., rows, columns] in the dtype of `base`; only the rows `indices` of `added` count."""
    if len(range(*indices.indices(added.shape[-2]))) < added.shape[-2]:
        masked = torch.zeros_like(added)
        masked[..., indices, :] = added[..., indices, :]
        added = masked
    return base + added.to(base.dtype)


__getattr__ = deprecated_names(__name__, Use="AdapterUse")
