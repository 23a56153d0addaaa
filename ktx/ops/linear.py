"""Linear on packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gradients import recorded
from ktx.kernels.packed_cache import cached_pack
from ktx.ops import packed_state as stored
from ktx.ops.base import Context, as_weights, is_plain, packed_as
from ktx.ops.change_counter import copied, in_f32
from ktx.ops.edit import OneMatrix
from ktx.ops.float_views import Floats, matrix
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import ParametrizedProduct
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor, WeightSource


class Linear(OneMatrix, nn.Linear):  # type: ignore[override]
    """y = x W^T + b with W as the file has it; several row-wise parts when the file keeps the rows in tensors of different types.

    `weight` is dequantised where it is read (ktx.ops.edit); a tensor that is assigned to it is packed. The bias is torch's own parameter.
    """

    remade = ("converted",)
    reads = frozenset({"parts", "bias"})

    def __init__(self, path: str, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        nn.Module.__init__(self)  # not nn.Linear's, which makes a matrix
        self.path, self.in_features, self.out_features, self.dtype = path, in_features, out_features, dtype
        self.has_bias, self.tied_to = bias, ""
        self.copies = False  # a tied layer on another device than the embedding has its matrix twice
        self.register_parameter("bias", None)
        self.parts: list[cpu.Packed] = []
        self.quant_target: str | None = None
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
            self.parts = cached_pack(lambda: [packed_as(part, self.quant_target) for part in source.parts(name)])
        self.load_bias(source)

    def load_bias(self, source: WeightSource) -> None:
        """The bias is torch's own parameter, in the type that the model computes in."""
        if self.has_bias:
            values = source.get(f"{self.path}.bias").dequantize().reshape(-1).to(self.placement.torch, self.dtype)
            self.bias = nn.Parameter(values.contiguous(), requires_grad=False)
            self.bias._is_hf_initialized = True  # type: ignore[attr-defined] # transformers' initialiser leaves it alone

    @property
    def bias_in_f32(self) -> torch.Tensor | None:
        """The bias as kernels that copy it take it: f32 [out_features], without gradient."""
        return None if self.bias is None else in_f32(self, self.bias)

    def copied_bias(self) -> torch.Tensor | None:
        """The bias, if that is a copy of it."""
        return None if self.bias is None else copied(self.bias)

    def _added(self) -> torch.Tensor | None:
        """The bias f32, with its gradient where it is trained."""
        bias = self.bias
        return bias if bias is None else bias.float() if recorded(bias) else in_f32(self, bias)

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        changed = ParametrizedProduct.of(self, "weight")
        y = changed.product(x, 0)
        if changed.added:
            return y + self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return cpu.linear(x, self.parts[0], self._added())
        y = torch.cat([cpu.linear(x, part) for part in self.parts], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def floats(self) -> dict[str, Floats]:
        self.check_loaded()
        return {"weight": self.rows()}

    def rows(self) -> Floats:
        """Its weight f32 [out_features, in_features]."""
        return matrix(self.parts)

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        self.check_loaded()
        return {"weight": [stored.matrix(part) for part in self.parts]}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        self.parts = [packed_as(as_weights(values["weight"]), self.quant_target, self.packed_from)]

    def packed_from(self, weight: QuantizedTensor, to: QType | None = None) -> Any:
        """A part made of rows, as the type `to`."""
        return cpu.pack(weight, to)

    def types(self) -> list[QType]:
        return [part.qtype for part in self.parts]

    def assign(self, packed: Any) -> None:
        self.parts = [packed]

    def plain(self, dtype: torch.dtype | None) -> nn.Linear:
        """For ktx.dequantize."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(
            self.rows().values(dtype or self.dtype).to(self.placement.torch), requires_grad=False
        )
        if self.bias is not None:
            bias = self.bias.detach().to(dtype or self.dtype, copy=True)
            made.bias = nn.Parameter(bias, requires_grad=False)
        return made

    def weight_bytes(self) -> tuple[int, int]:
        held = sum(part.nbytes for part in self.parts)
        return held, held

    def extra_repr(self) -> str:
        types = "+".join(part.qtype.name for part in self.parts) or "not loaded"
        return f"{self.in_features} -> {self.out_features}, {types}"
