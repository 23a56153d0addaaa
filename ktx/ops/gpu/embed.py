"""Embedding lookup in packed rows on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from ktx.kernels.gpu import linear
from ktx.ops import embed
from ktx.ops.float_views import Floats
from ktx.weights.base import QuantizedTensor, WeightSource


class Embedding(embed.Embedding):
    """GPU version of ktx.ops.embed.Embedding. Token ids past the end are not detected, to avoid a device sync."""

    packed: Any

    def load(self, source: WeightSource) -> None:
        """Reads the weight and packs it on the GPU."""
        self.packed = linear.pack(source.get(f"{self.path}.weight"), device=self.placement.torch)

    def product(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows of ids [...] as floats [..., D]."""
        assert self.packed is not None, f"{self.path} is not loaded"
        rows = linear.dequantize_rows(self.packed, ids.reshape(-1).to(torch.int64), self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def rows(self) -> Floats:
        """Returns a dequantizing view of the weight; its values are read to the CPU."""
        read = lambda first, last: linear.dequantize(self.packed, torch.float32)[first:last].cpu()  # noqa: E731
        return Floats((self.num_embeddings, self.embedding_dim), read, id(self.packed))

    def packed_from(self, weight: QuantizedTensor) -> Any:
        """Packs the weight on the GPU."""
        return linear.pack(weight, device=self.placement.torch)
