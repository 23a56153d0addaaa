"""Linear layers with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gradients import is_recorded
from ktx.kernels.packed_cache import cached_pack
from ktx.ops import packed_state as stored
from ktx.ops.base import Context, as_weights, is_plain, pack_as
from ktx.ops.change_counter import as_f32, if_copied
from ktx.ops.edit import MatrixOperator
from ktx.ops.float_views import Floats, view_matrix
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import ParametrizedProduct
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor, WeightSource


class Linear(MatrixOperator, nn.Linear):  # type: ignore[override]
    """y = x W^T + b, with W packed in the quantized type of the file.

    W consists of several row-wise parts if the file stores its rows in tensors of different types. Reading `weight`
    dequantizes it (ktx.ops.edit); a tensor that is assigned to it is packed. The bias is a torch parameter.
    """

    remade = ("converted",)
    reads = frozenset({"parts", "bias"})

    def __init__(self, path: str, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        """Creates a layer without weights.

        Args:
            path: its module path.
            in_features: number of columns of W.
            out_features: number of rows of W.
            bias: whether it has a bias, which `load` reads.
            dtype: of its weight as floats and of its bias.
        """
        nn.Module.__init__(self)  # not that of nn.Linear, which allocates the weight
        self.path, self.in_features, self.out_features, self.dtype = path, in_features, out_features, dtype
        self.has_bias, self.tied_to = bias, ""
        # Whether a tied layer is on another device than the embedding and holds its own copy of the weight.
        self.has_own_copy = False
        self.register_parameter("bias", None)
        self.parts: list[cpu.Packed] = []
        self.quant_target: str | None = None
        self.ties = []  # all modules that share the weight

    @classmethod
    def from_hf(cls, old: nn.Module, ctx: Context, **kwargs: Any) -> Linear:
        """Creates the operator that replaces a plain nn.Linear; UsageError for a module that computes otherwise."""
        if not is_plain(old, nn.Linear):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}: Linear replaces only plain nn.Linear; leave the module as it is"
            )
        return cls(ctx.path, old.in_features, old.out_features, old.bias is not None, ctx.dtype)

    def tensors(self) -> list[str]:
        """Returns the paths of the weight, which may be another module's, and of the bias."""
        name = self.tied_to or f"{self.path}.weight"
        return [name, f"{self.path}.bias"] if self.has_bias else [name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of weight and bias by their paths."""
        shapes = {self.tensors()[0]: (self.out_features, self.in_features)}
        return shapes | ({f"{self.path}.bias": (self.out_features,)} if self.has_bias else {})

    def load(self, source: WeightSource) -> None:
        """Reads and packs the weight, whose rows may have several types, and reads the bias."""
        if not self.parts:  # else this is a tied output layer, which already has the parts of the embedding
            name = self.tensors()[0]
            self.parts = cached_pack(lambda: [pack_as(part, self.quant_target) for part in source.get_parts(name)])
        self.load_bias(source)

    def load_bias(self, source: WeightSource) -> None:
        """Loads the bias as a torch parameter in the dtype that the model computes in."""
        if self.has_bias:
            values = source.get(f"{self.path}.bias").dequantize().reshape(-1).to(self.placement.torch, self.dtype)
            self.bias = nn.Parameter(values.contiguous(), requires_grad=False)
            # The weight initializer of transformers skips it then.
            self.bias._is_hf_initialized = True  # type: ignore[attr-defined]

    @property
    def bias_in_f32(self) -> torch.Tensor | None:
        """The bias in f32 [out_features], detached, for kernels that copy it."""
        return None if self.bias is None else as_f32(self, self.bias)

    def copied_bias(self) -> torch.Tensor | None:
        """Returns the bias if `bias_in_f32` is a copy of it, else None."""
        return None if self.bias is None else if_copied(self.bias)

    def _bias_to_add(self) -> torch.Tensor | None:
        """Returns the bias in f32; attached to the autograd graph if it is trained."""
        bias = self.bias
        return bias if bias is None else bias.float() if is_recorded(bias) else as_f32(self, bias)

    def forward_parametrized(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the layer with its parametrized weight; low-rank updates are added to the packed product."""
        parametrized = ParametrizedProduct.of(self, "weight")
        y = parametrized.product(x, 0)
        if parametrized.is_added:
            return y + self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x [..., in] -> [..., out] with the packed parts, and adds the bias."""
        if len(self.parts) == 1:
            return cpu.linear(x, self.parts[0], self._bias_to_add())
        y = torch.cat([cpu.linear(x, part) for part in self.parts], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def floats(self) -> dict[str, Floats]:
        """Returns a dequantizing view of the weight [out, in]."""
        self.check_loaded()
        return {"weight": self.rows()}

    def rows(self) -> Floats:
        """Returns a dequantizing view of the weight, f32 [out_features, in_features]."""
        return view_matrix(self.parts)

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        """Returns the packed parts of the weight in their types."""
        self.check_loaded()
        return {"weight": [stored.matrix_state(part) for part in self.parts]}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Packs other values of the weight, quantized to `quant_target` if that is set."""
        self.parts = [pack_as(as_weights(values["weight"]), self.quant_target, self.packed_from)]

    def packed_from(self, weight: QuantizedTensor, to: QType | None = None) -> Any:
        """Packs a part of the weight, quantized to `to` if given."""
        return cpu.pack(weight, to)

    def types(self) -> list[QType]:
        """The quant types of its packed parts."""
        return [part.qtype for part in self.parts]

    def assign(self, packed: Any) -> None:
        """Replaces the packed weight by one part."""
        self.parts = [packed]

    def to_torch(self, dtype: torch.dtype | None) -> nn.Linear:
        """Returns an nn.Linear with the dequantized weight, for ktx.dequantize; `dtype` defaults to `self.dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(
            self.rows().values(dtype or self.dtype).to(self.placement.torch), requires_grad=False
        )
        if self.bias is not None:
            bias = self.bias.detach().to(dtype or self.dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def weight_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the weight, all of which a token reads."""
        num_bytes = sum(part.nbytes for part in self.parts)
        return num_bytes, num_bytes

    def extra_repr(self) -> str:
        """Describes sizes and quant types in the module's repr."""
        types = "+".join(part.qtype.name for part in self.parts) or "not loaded"
        return f"{self.in_features} -> {self.out_features}, {types}"
