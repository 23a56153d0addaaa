"""The interface between operators and checkpoint formats: `WeightSource`, `TensorSpec`, `QuantizedTensor`.

Names are always parameter paths of the transformers model. Every source also provides names that no transformers model
has: `<mlp>.experts.{gate,up,down}_proj` [experts, rows, columns] (with `_bias` where the family has biases), and for
MLA `<attention>.k_b_proj.weight` [heads, kv_lora_rank, qk_nope_head_dim] (W_UK transposed) and `.v_b_proj.weight`
[heads, v_head_dim, kv_lora_rank]. A file may hold a second copy of W_UK, with rows along the latent dimension, under
the first name followed by `EXPANDED`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ktx.quant.types import QTYPES, QType
from ktx.utils.deprecation import deprecated_members
from ktx.weights.verdict import Reads, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXPANDED = ".expanded"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's entry in a file header.

    `shape` is in elements, [..., rows, columns]. `nbytes` is its size and `offset` its position in `file`, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    nbytes: int
    file: str
    offset: int


@deprecated_members(of="from_float")
@dataclass
class QuantizedTensor:
    """Weights in their stored format: `data` uint8 [..., row_bytes], usually a view of the mapped file.

    Float types are stored as bytes too. `shape` is in elements.
    """

    data: torch.Tensor
    qtype: QType
    shape: tuple[int, ...]
    scale: torch.Tensor | None = None  # F8_E4M3: f32 [..., ceil(n/128), ceil(k/128)]

    @classmethod
    def from_float(cls, values: torch.Tensor) -> QuantizedTensor:
        """Wraps a float tensor as F32 weights."""
        values = values.float().contiguous()
        data = values.reshape(-1).view(torch.uint8).reshape(*values.shape[:-1], values.shape[-1] * 4)
        return cls(data, QTYPES["F32"], tuple(values.shape))

    def __getitem__(self, index: int) -> QuantizedTensor:
        scale = None if self.scale is None else self.scale[index]
        return QuantizedTensor(self.data[index], self.qtype, self.shape[1:], scale)

    def rows(self, index: slice | torch.Tensor) -> QuantizedTensor:
        """Selects rows of the matrix (or of each matrix).

        Packed data needs no dequantization, because a block never crosses a row; tensors with `scale` become F32.
        """
        if self.scale is not None:
            return QuantizedTensor.from_float(self.dequantize()[..., index, :])
        data = self.data[..., index, :]
        return QuantizedTensor(data, self.qtype, (*self.shape[:-2], data.shape[-2], self.shape[-1]))

    def matrices(self, first: int, last: int) -> QuantizedTensor:
        """The stacked matrices with indices `first` to `last` (exclusive)."""
        scale = None if self.scale is None else self.scale[first:last]
        return QuantizedTensor(self.data[first:last], self.qtype, (last - first, *self.shape[1:]), scale)

    def reshape(self, *shape: int) -> QuantizedTensor:
        """Reshapes all dimensions but the last, which must keep its size."""
        return QuantizedTensor(
            self.data.reshape(*shape[:-1], self.data.shape[-1]), self.qtype, tuple(shape), self.scale
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the values as a tensor of `shape` and `dtype`."""
        if self.scale is not None and self.data.dim() == 3:
            return torch.stack([self[i].dequantize(dtype) for i in range(self.shape[0])])
        return self.qtype.dequantize(self.data, self.scale).reshape(self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes, including the scales."""
        return self.data.numel() + (0 if self.scale is None else self.scale.numel() * 4)


@runtime_checkable
class WeightSource(Protocol):
    """A checkpoint (file or folder), accessed by parameter path. `get` and `get_parts` are thread-safe."""

    path: str
    metadata: dict[str, Any]
    total_bytes: int
    tensors: dict[str, TensorSpec]  # every tensor in the files

    def spec(self, name: str) -> TensorSpec | None:
        """The parameter's shape, type and size; None when the checkpoint does not have it."""

    def specs(self, name: str) -> list[TensorSpec]:
        """The stored tensors that the parameter is built from, in file order."""

    def get(self, name: str) -> QuantizedTensor:
        """The parameter as one tensor. Raises BadFile when it is missing or damaged."""

    def get_parts(self, name: str) -> list[QuantizedTensor]:
        """The parameter as consecutive blocks of rows, each in its stored type."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Asks the kernel to read the parameters' pages ahead."""

    def release(self, names: Iterable[str]) -> None:
        """Unmaps the parameters' pages from this process; they stay in the page cache."""

    def config_mismatches(self, config: PreTrainedConfig) -> list[str]:
        """Mismatches between the checkpoint and `config`, one line each; empty when they agree."""

    def source_tensors(self, name: str) -> list[str]:
        """Keys of `tensors` that the parameter is built from, including scales stored as separate tensors."""

    def unreadable_reason(self, name: str) -> str:
        """Why a present parameter cannot be read, as text that follows its name; empty when it can."""

    def classify_unread(self, key: str, reads: Reads) -> Verdict:
        """Classifies a tensor that no module reads."""


def concat_rows(parts: Sequence[QuantizedTensor], shape: tuple[int, ...]) -> QuantizedTensor:
    """Concatenates the parts in which a file stores one parameter, such as single experts, into a tensor of `shape`.

    The result stays quantized when all parts have one type, else it is dequantized to F32.
    """
    first = parts[0]
    if len(parts) == 1:
        return first if first.shape == shape else first.reshape(*shape)
    if all(part.qtype is first.qtype and part.scale is None for part in parts):
        flat = [part.data.reshape(-1, part.data.shape[-1]) for part in parts]
        return QuantizedTensor(torch.cat(flat).reshape(*shape[:-1], -1), first.qtype, shape)
    return QuantizedTensor.from_float(
        torch.cat([part.dequantize().reshape(-1, shape[-1]) for part in parts]).reshape(shape)
    )
