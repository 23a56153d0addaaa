"""Linear on packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.kept import kept
from ktx.ops import stored
from ktx.ops.base import Context, as_weights, is_plain, packed_as
from ktx.ops.floats import Floats, matrix, plain
from ktx.ops.parameters import Changed
from ktx.ops.stored import Stored
from ktx.ops.weights import OneMatrix
from ktx.qtypes import QType
from ktx.weights.source import QuantizedTensor, WeightSource


class Linear(OneMatrix, nn.Linear):  # type: ignore[override]
    """y = x W^T + b with W as the file has it; several row-wise parts when the file keeps the rows in tensors of different types.

    `weight` is dequantised where it is read (ktx.ops.weights); a tensor that is assigned to it is packed. `requires_grad` is never set.
    """

    reads = frozenset({"parts", "bias"})

    def __init__(self, path: str, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        nn.Module.__init__(self)  # not nn.Linear's, which makes a matrix
        self.path, self.in_features, self.out_features, self.dtype = path, in_features, out_features, dtype
        self.has_bias, self.tied_to = bias, ""
        self.copies = False  # a tied layer on another device than the embedding has its matrix twice
        self.bias: torch.Tensor | None = None  # type: ignore[assignment]
        self.parts: list[cpu.Packed] = []
        self.target: str | None = None
        self.ties = []  # all modules that share one matrix

    @classmethod
    def from_hf(cls, old: nn.Module, ctx: Context, **kwargs: Any) -> Linear:
        if not is_plain(old, nn.Linear):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, Linear stands in for plain nn.Linear only; leave it as it is"
            )
        return cls(ctx.path, old.in_features, old.out_features, old.bias is not None, ctx.dtype)

    def tensors(self) -> list[str]:
        name = self.tied_to or f"{self.path}.weight"
        return [name, f"{self.path}.bias"] if self.has_bias else [name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        named = {self.tensors()[0]: (self.out_features, self.in_features)}
        return named | ({f"{self.path}.bias": (self.out_features,)} if self.has_bias else {})

    def load(self, source: WeightSource) -> None:
        if not self.parts:  # a tied output layer is given the embedding's
            name = self.tensors()[0]
            self.parts = kept(lambda: [packed_as(part, self.target) for part in source.parts(name)])
        if self.has_bias:
            self._hold_bias(source.get(f"{self.path}.bias").dequantize().reshape(-1).contiguous())

    def _hold_bias(self, bias: torch.Tensor) -> None:
        """In f32 whatever the model computes in, so it is not registered; to who asks isinstance(bias, nn.Parameter) it is one, as the weight is."""
        self.bias = bias
        bias._is_param = True  # type: ignore[attr-defined]

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        changed = Changed.of(self, "weight")
        y = changed.product(x, 0)
        if changed.added:
            return y + self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return cpu.linear(x, self.parts[0], self.bias)
        y = torch.cat([cpu.linear(x, part) for part in self.parts], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def floats(self) -> dict[str, Floats]:
        self.check_loaded()
        registered = "bias" in self._parameters  # once somebody has assigned one, which torch writes and counts itself
        bias = {} if self.bias is None or registered else {"bias": plain(self.bias)}
        return {"weight": self.rows()} | bias

    def rows(self) -> Floats:
        """Its weight f32 [out_features, in_features]."""
        return matrix(self.parts)

    def packed_state(self) -> dict[str, list[Stored] | torch.Tensor]:
        self.check_loaded()
        found: dict[str, list[Stored] | torch.Tensor] = {"weight": [stored.matrix(part) for part in self.parts]}
        return found if self.bias is None else found | {"bias": self.bias}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        if "weight" in values:
            self.parts = [packed_as(as_weights(values["weight"]), self.target, self.packed_from)]
        if "bias" in values:
            self._hold_bias(values["bias"].to(self.home.torch, torch.float32, copy=True))

    def packed_from(self, weight: QuantizedTensor, to: QType | None = None) -> Any:
        """A part made of rows, as the type `to`."""
        return cpu.pack(weight, to)

    def types(self) -> list[QType]:
        return [part.qtype for part in self.parts]

    def hold(self, packed: Any) -> None:
        self.parts = [packed]

    def plain(self, dtype: torch.dtype | None) -> nn.Linear:
        """For ktx.dequantize."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.rows().values(dtype or self.dtype).to(self.home.torch), requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.to(dtype or self.dtype, copy=True), requires_grad=False)
        return made

    def weight_bytes(self) -> tuple[int, int]:
        held = sum(part.nbytes for part in self.parts)
        return held, held

    def extra_repr(self) -> str:
        types = "+".join(part.qtype.name for part in self.parts) or "not loaded"
        return f"{self.in_features} -> {self.out_features}, {types}"
