"""Embeddings with packed weights."""

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
from ktx.ops.edit import MatrixOperator
from ktx.ops.float_views import Floats, view_matrix
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import full_weight
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor, WeightSource

ID_DTYPES = (torch.int64, torch.int32)  # the dtypes of token ids that nn.Embedding accepts


class Embedding(MatrixOperator, nn.Embedding):  # type: ignore[override]
    """Looks up token ids in a packed weight and dequantizes their rows; a tied output layer shares the weight."""

    def __init__(self, path: str, rows: int, width: int, padding: int | None, dtype: torch.dtype):
        """Creates an embedding without weights, with the attributes of nn.Embedding.

        Args:
            path: its module path.
            rows: number of token ids.
            width: columns of a row.
            padding: nn.Embedding's padding_idx.
            dtype: of its output.
        """
        nn.Module.__init__(self)  # not that of nn.Embedding, which allocates the weight
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.path, self.num_embeddings, self.embedding_dim, self.padding_idx, self.dtype = (
            path,
            rows,
            width,
            padding,
            dtype,
        )
        self.packed: cpu.Packed | None = None
        self.ties = []  # all modules that share the weight

    @classmethod
    def from_hf(cls, old: nn.Module, ctx: Context, **kwargs: Any) -> Embedding:
        """Creates the operator that replaces a plain nn.Embedding; UsageError for a module that computes otherwise."""
        if not is_plain(old, nn.Embedding):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}: Embedding replaces only plain nn.Embedding; leave the module as"
                " it is"
            )
        return cls(ctx.path, old.num_embeddings, old.embedding_dim, old.padding_idx, ctx.dtype)

    def tensors(self) -> list[str]:
        """Returns the path of the weight."""
        return [f"{self.path}.weight"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the weight by its path."""
        return {f"{self.path}.weight": (self.num_embeddings, self.embedding_dim)}

    def load(self, source: WeightSource) -> None:
        """Reads and packs the weight."""
        (self.packed,) = cached_pack(lambda: [cpu.pack(source.get(f"{self.path}.weight"))])

    def forward_parametrized(self, ids: torch.Tensor) -> torch.Tensor:
        """Computes ids -> [..., D] with the full matrix, which a parametrization returns."""
        return F.embedding(ids, full_weight(self, "weight"), self.padding_idx)

    def product(self, ids: torch.Tensor) -> torch.Tensor:
        """Dequantizes the rows of token ids [...] -> [..., embedding_dim] in `dtype`.

        Raises:
            UsageError: `max_norm` is set, or the ids are not int64 or int32.
            IndexError: an id is outside the vocabulary.
        """
        assert self.packed is not None, f"{self.path} is not loaded"
        if self.max_norm is not None:
            raise UsageError(
                f"{self.path}.max_norm is {self.max_norm}: a lookup would modify the packed weight; set it to None and"
                " edit the weight in `with ktx.edit(module) as weight:`, or replace the module with"
                " ktx.dequantize(module)"
            )
        if ids.dtype not in ID_DTYPES:
            raise UsageError(f"{self.path} takes token ids in int64 or int32, not in {ids.dtype}; pass ids.long()")
        try:
            rows = self.packed.rows(ids.reshape(-1).to(torch.int64).contiguous())
        except RuntimeError as error:
            if bool(((ids >= 0) & (ids < self.packed.n)).all()):
                raise
            raise IndexError(
                f"{self.path} has the token ids 0 to {self.packed.n - 1}, the input has {int(ids.min())} to"
                f" {int(ids.max())}"
            ) from error
        return rows.to(self.dtype).reshape(*ids.shape, self.packed.k)

    def floats(self) -> dict[str, Floats]:
        """Returns a dequantizing view of the weight [vocabulary, D]."""
        self.check_loaded()
        return {"weight": self.rows()}

    def rows(self) -> Floats:
        """Returns a dequantizing view of the weight, f32 [num_embeddings, embedding_dim]."""
        assert self.packed is not None, f"{self.path} is not loaded"
        return view_matrix([self.packed])

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        """Returns the packed weight in its type."""
        self.check_loaded()
        return {"weight": [stored.matrix_state(self.packed)]}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Packs other values of the weight."""
        self.packed = self.packed_from(as_weights(values["weight"]))

    def packed_from(self, weight: QuantizedTensor) -> Any:
        """Packs the weight."""
        return cpu.pack(weight)

    def types(self) -> list[QType]:
        """The quant types of its packed weight."""
        assert self.packed is not None, f"{self.path} is not loaded"
        return [self.packed.qtype]

    def assign(self, packed: Any) -> None:
        """Replaces the packed weight."""
        self.packed = packed

    def to_torch(self, dtype: torch.dtype | None) -> nn.Embedding:
        """Returns an nn.Embedding with the dequantized weight, for ktx.dequantize; `dtype` defaults to `self.dtype`."""
        weight = self.rows().values(dtype or self.dtype).to(self.placement.torch)
        embedding = nn.Embedding.from_pretrained(weight, padding_idx=self.padding_idx)  # type: ignore[no-untyped-call]
        return embedding  # type: ignore[no-any-return]

    def weight_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the weight, and those of one row."""
        num_bytes = 0 if self.packed is None else self.packed.nbytes
        return num_bytes, num_bytes // self.num_embeddings
