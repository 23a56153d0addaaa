"""Where weights come from: the words that operators and file formats share.

Names are always the parameter paths of the transformers model. Some exist in no model but in every file, and every source answers
them: `<mlp>.experts.{gate,up,down}_proj` [experts, rows, columns] (with `_bias` where the family has biases), and for
MLA `<attention>.k_b_proj.weight` [heads, kv_lora_rank, qk_nope_head_dim] (W_UK transposed) and `.v_b_proj.weight`
[heads, v_head_dim, kv_lora_rank]. A file may hold W_UK once more, rows along the latent, under the first name with `EXPANDED` behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ktx.errors import BadFile
from ktx.quant.types import QTYPES, QType
from ktx.weights.accounting import Reads, Verdict
from ktx.weights.gguf_files import ggufs_in, is_gguf

EXPANDED = ".expanded"


@dataclass(frozen=True)
class TensorSpec:
    """What a file header says of a tensor; `shape` is logical, rows last but one, columns last."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    nbytes: int
    file: str
    offset: int


@dataclass
class QuantizedTensor:
    """Weights as the file has them: `data` uint8 [..., row_bytes], a view of the mapped file. Floats are bytes too."""

    data: torch.Tensor
    qtype: QType
    shape: tuple[int, ...]
    scale: torch.Tensor | None = None  # F8_E4M3: f32 [..., ceil(n/128), ceil(k/128)]

    @classmethod
    def of(cls, values: torch.Tensor) -> QuantizedTensor:
        """A float tensor as weights of type F32."""
        values = values.float().contiguous()
        data = values.reshape(-1).view(torch.uint8).reshape(*values.shape[:-1], values.shape[-1] * 4)
        return cls(data, QTYPES["F32"], tuple(values.shape))

    def __getitem__(self, index: int) -> QuantizedTensor:
        scale = None if self.scale is None else self.scale[index]
        return QuantizedTensor(self.data[index], self.qtype, self.shape[1:], scale)

    def rows(self, index: slice | torch.Tensor) -> QuantizedTensor:
        """Rows of a matrix (or of each matrix): legal on packed data, because a block never crosses a row."""
        if self.scale is not None:
            return QuantizedTensor.of(self.dequantize()[..., index, :])
        data = self.data[..., index, :]
        return QuantizedTensor(data, self.qtype, (*self.shape[:-2], data.shape[-2], self.shape[-1]))

    def matrices(self, first: int, last: int) -> QuantizedTensor:
        """Some of several matrices, from `first` up to `last`."""
        scale = None if self.scale is None else self.scale[first:last]
        return QuantizedTensor(self.data[first:last], self.qtype, (last - first, *self.shape[1:]), scale)

    def reshape(self, *shape: int) -> QuantizedTensor:
        """Another shape with the same columns."""
        return QuantizedTensor(
            self.data.reshape(*shape[:-1], self.data.shape[-1]), self.qtype, tuple(shape), self.scale
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights' values, of `shape`."""
        if self.scale is not None and self.data.dim() == 3:
            return torch.stack([self[i].dequantize(dtype) for i in range(self.shape[0])])
        return self.qtype.dequantize(self.data, self.scale).reshape(self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.data.numel() + (0 if self.scale is None else self.scale.numel() * 4)


@runtime_checkable
class WeightSource(Protocol):
    """A file or folder of weights, asked by parameter path. `get` and `parts` may be called from several threads."""

    path: str
    metadata: dict[str, Any]
    total_bytes: int
    tensors: dict[str, TensorSpec]  # all that the files hold

    def spec(self, name: str) -> TensorSpec | None: ...
    def specs(self, name: str) -> list[TensorSpec]: ...
    def get(self, name: str) -> QuantizedTensor: ...
    def parts(self, name: str) -> list[QuantizedTensor]: ...
    def prefetch(self, names: Iterable[str]) -> None: ...
    def release(self, names: Iterable[str]) -> None: ...
    def differences(self, config: Any) -> list[str]: ...

    def behind(self, name: str) -> list[str]:
        """Keys of `tensors` that a parameter is made of, with scales that are tensors of their own."""

    def flaw(self, name: str) -> str:
        """What keeps a parameter that is there from being read, after its name; empty when nothing does."""

    def judge(self, key: str, reads: Reads) -> Verdict:
        """On a tensor that no module reads."""


def concat_rows(parts: Sequence[QuantizedTensor], shape: tuple[int, ...]) -> QuantizedTensor:
    """Parts whose rows follow each other as one tensor: packed when they have one type, dequantised to F32 otherwise."""
    first = parts[0]
    if len(parts) == 1:
        return first if first.shape == shape else first.reshape(*shape)
    if all(part.qtype is first.qtype and part.scale is None for part in parts):
        flat = [part.data.reshape(-1, part.data.shape[-1]) for part in parts]
        return QuantizedTensor(torch.cat(flat).reshape(*shape[:-1], -1), first.qtype, shape)
    return QuantizedTensor.of(torch.cat([part.dequantize().reshape(-1, shape[-1]) for part in parts]).reshape(shape))


def open_weights(path: str | Path, config: Any) -> WeightSource:
    """Opens a GGUF file (or the first of a split one), a folder of one model's GGUF, or safetensors (file, index or folder).

    Reads headers only. BadFile for anything missing, damaged or of an unknown kind.
    """
    from ktx.weights.gguf import GGUFSource
    from ktx.weights.packed import PackedSource, is_packed
    from ktx.weights.safetensors import SafetensorsSource

    where = Path(path).expanduser()
    if not where.exists():
        raise BadFile(f"{path}: no such file or folder; pass a GGUF file, a safetensors file, or a folder of either")
    if where.is_file() and is_gguf(where):
        return GGUFSource(where, config)
    files = sorted(where.iterdir()) if where.is_dir() else [where]
    ggufs = ggufs_in(where) if where.is_dir() else []
    tensors = [file for file in files if file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")]
    tensors = [file for file in tensors if file not in ggufs]
    if ggufs and tensors and where.is_dir():
        raise BadFile(
            f"{path}: holds both GGUF ({ggufs[0].name}) and safetensors ({tensors[0].name}); name the one to load"
        )
    if tensors:
        return PackedSource(where, config) if is_packed(where) else SafetensorsSource(where, config)
    if ggufs or where.is_file():
        return GGUFSource(where, config)
    raise BadFile(f"{path}: no .gguf and no .safetensors file in this folder")
