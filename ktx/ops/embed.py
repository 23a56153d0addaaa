"""Embeddings looked up in packed rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.packed_cache import cached_pack
from ktx.ops import packed_state as stored
from ktx.ops.base import Context, as_weights, is_plain
from ktx.ops.edit import OneMatrix
from ktx.ops.float_views import Floats, matrix
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import whole
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor, WeightSource

INTEGERS = (torch.int64, torch.int32)  # that torch's embedding takes


class Embedding(OneMatrix, nn.Embedding):  # type: ignore[override]
    """Token ids -> rows, dequantised as they are read. A tied output layer uses the same packed rows."""

    def __init__(self, path: str, rows: int, width: int, padding: int | None, dtype: torch.dtype):
        nn.Module.__init__(self)  # not nn.Embedding's, which makes a matrix
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.path, self.num_embeddings, self.embedding_dim, self.padding_idx, self.dtype = (
            path,
            rows,
            width,
            padding,
            dtype,
        )
        self.packed: cpu.Packed | None = None
        self.ties = []  # all modules that share one matrix

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
        (self.packed,) = cached_pack(lambda: [cpu.pack(source.get(f"{self.path}.weight"))])

    def changed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, whole(self, "weight"), self.padding_idx)

    def product(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None, f"{self.path} is not loaded"
        if self.max_norm is not None:
            raise UsageError(
                f"{self.path}.max_norm is {self.max_norm}: a lookup would write to packed rows; set it to None and edit the rows in"
                " `with ktx.edit(module) as weight:`, or put ktx.dequantize(module) in the module's place"
            )
        if ids.dtype not in INTEGERS:
            raise UsageError(f"{self.path} takes token ids of int64 or int32, not of {ids.dtype}: ids.long()")
        try:
            rows = self.packed.rows(ids.reshape(-1).to(torch.int64).contiguous())
        except RuntimeError as error:
            if bool(((ids >= 0) & (ids < self.packed.n)).all()):
                raise
            raise IndexError(
                f"{self.path} has the token ids 0 to {self.packed.n - 1}, it was given {int(ids.min())} to {int(ids.max())}"
            ) from error
        return rows.to(self.dtype).reshape(*ids.shape, self.packed.k)

    def floats(self) -> dict[str, Floats]:
        self.check_loaded()
        return {"weight": self.rows()}

    def rows(self) -> Floats:
        """Its weight f32 [num_embeddings, embedding_dim]."""
        assert self.packed is not None, f"{self.path} is not loaded"
        return matrix([self.packed])

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        self.check_loaded()
        return {"weight": [stored.matrix(self.packed)]}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        self.packed = self.packed_from(as_weights(values["weight"]))

    def packed_from(self, weight: QuantizedTensor) -> Any:
        """What it holds, made of rows."""
        return cpu.pack(weight)

    def types(self) -> list[QType]:
        assert self.packed is not None, f"{self.path} is not loaded"
        return [self.packed.qtype]

    def assign(self, packed: Any) -> None:
        self.packed = packed

    def plain(self, dtype: torch.dtype | None) -> nn.Embedding:
        """For ktx.dequantize."""
        weight = self.rows().values(dtype or self.dtype).to(self.placement.torch)
        made = nn.Embedding.from_pretrained(weight, padding_idx=self.padding_idx)  # type: ignore[no-untyped-call]
        return made  # type: ignore[no-any-return]

    def weight_bytes(self) -> tuple[int, int]:
        held = 0 if self.packed is None else self.packed.nbytes
        return held, held // self.num_embeddings
