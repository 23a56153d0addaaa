"""Embeddings looked up in packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.kept import kept
from ktx.ops.base import Context, Operator, as_weights, is_plain
from ktx.ops.floats import Floats, matrix
from ktx.weights.source import WeightSource


class Embedding(Operator):
    """Token ids -> rows, dequantised as they are read. A tied output layer uses the same packed rows."""

    def __init__(self, path: str, rows: int, width: int, padding: int | None, dtype: torch.dtype):
        super().__init__()
        self.path, self.num_embeddings, self.embedding_dim, self.padding_idx, self.dtype = (
            path,
            rows,
            width,
            padding,
            dtype,
        )
        self.packed: cpu.Packed | None = None

    @classmethod
    def from_hf(cls, old: nn.Module, ctx: Context, **kwargs: Any) -> Embedding:
        if not is_plain(old, nn.Embedding):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, Embedding stands in for plain nn.Embedding only; leave it as it is"
            )
        return cls(ctx.path, old.num_embeddings, old.embedding_dim, old.padding_idx, ctx.dtype)

    def tensors(self) -> list[str]:
        return [f"{self.path}.weight"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.path}.weight": (self.num_embeddings, self.embedding_dim)}

    def load(self, source: WeightSource) -> None:
        (self.packed,) = kept(lambda: [cpu.pack(source.get(f"{self.path}.weight"))])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None, f"{self.path} is not loaded"
        rows = self.packed.rows(ids.reshape(-1).to(torch.int64).contiguous())
        return rows.to(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def floats(self) -> dict[str, Floats]:
        self.on_cpu()
        assert self.packed is not None
        return {"weight": matrix([self.packed])}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        self.packed = cpu.pack(as_weights(values["weight"]))

    @property
    def weight(self) -> torch.Tensor:
        assert self.packed is not None, f"{self.path} is not loaded"
        return self.packed.rows(torch.arange(self.num_embeddings, device="cpu")).to(self.dtype)

    def weight_bytes(self) -> tuple[int, int]:
        held = 0 if self.packed is None else self.packed.nbytes
        return held, held // self.num_embeddings
