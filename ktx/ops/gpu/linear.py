"""Linear on packed weights on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ktx.kernels.gpu import linear as gpu_linear
from ktx.kernels.gradients import refuse_gpu_gradient
from ktx.ops import linear
from ktx.ops.base import pack_as
from ktx.ops.float_views import Floats
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor, WeightSource


class Linear(linear.Linear):
    """GPU version of ktx.ops.linear.Linear; the parts are on the device in SoA layout."""

    parts: list[Any]

    def load(self, source: WeightSource) -> None:
        """Reads the weight and packs it on the GPU, and reads the bias."""
        if not self.parts:  # a tied output layer already has the embedding's
            pack = partial(gpu_linear.pack, device=self.placement.torch)
            self.parts = [pack_as(part, self.quant_target, pack) for part in source.get_parts(self.tensors()[0])]
        self.load_bias(source)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x W^T + b on the device. With several parts the bias is added to the rounded product, in f32."""
        refuse_gpu_gradient("Linear", self.bias)
        bias = self.bias_in_f32
        if len(self.parts) == 1:
            return gpu_linear.linear(x, self.parts[0], bias)
        y = torch.cat([gpu_linear.linear(x, part) for part in self.parts], -1)
        return y if bias is None else (y.float() + bias).to(y.dtype)

    def rows(self) -> Floats:
        """Returns a dequantizing view of the weight."""
        read = lambda first, last: self._floats()[first:last]  # noqa: E731
        return Floats((self.out_features, self.in_features), read, id(self.parts[0]))

    def _floats(self) -> torch.Tensor:
        return torch.cat([gpu_linear.dequantize(part, torch.float32) for part in self.parts]).cpu()

    def packed_from(self, weight: QuantizedTensor, to: QType | None = None) -> Any:
        """Packs a part of the weight on the GPU, quantized to `to` if given."""
        return gpu_linear.pack(weight, to, device=self.placement.torch)
