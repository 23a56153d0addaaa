"""The format table: every weight type, its block size, and the meaning of its bytes.

`QType.dequantize` is the definition that all kernels are tested against. gguf-py's numpy code dequantizes the ggml
types and torch converts the float types, so neither depends on the packed layout of ktx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktx.errors import UsageError

if TYPE_CHECKING:
    import torch

F8_CODE = 1000  # first code that ktx assigns itself; ggml's codes are below it
BF16_EXACT_TYPES = ("BF16", "F8_E4M3")  # types that bf16 represents exactly; multiplied in bf16 where the CPU can
FP8_BLOCK = 128  # DeepSeek's weight_scale_inv: one f32 scale per 128 x 128 block of the matrix


@dataclass(frozen=True)
class QType:
    """A weight type.

    Attributes:
        name: the type's name, as in GGUF files.
        code: ggml's type code, or ktx's own from 1000 on.
        block: number of weights of a block.
        nbytes: bytes of a block.
        is_float: whether a weight is stored as a plain float.
    """

    name: str
    code: int
    block: int
    nbytes: int
    is_float: bool = False

    def row_bytes(self, k: int) -> int:
        """Returns the bytes of a row of k weights.

        Raises:
            ValueError: if k is not a multiple of the block size.
        """
        if k % self.block:
            raise ValueError(
                f"{self.name} stores rows in blocks of {self.block} weights: a row of {k} weights is not a multiple"
                " of that"
            )
        return k // self.block * self.nbytes

    def dequantize(self, data: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantizes rows: uint8 [..., row_bytes] -> f32 [..., k].

        Args:
            data: the rows.
            scale: f32 [ceil(n/128), ceil(k/128)], for F8_E4M3 only.
        """
        import torch

        if self.is_float:
            values = data.contiguous().view(_torch_dtype(self.name)).float()
            return values if scale is None else values * expand_scale(scale, *values.shape[-2:])
        if self.code > F8_CODE:
            return _dequantize_own(self, data)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = data.contiguous().numpy().reshape(-1, data.shape[-1])
        values = torch.from_numpy(dequantize(rows, GGMLQuantizationType(self.code)))
        return values.reshape(*data.shape[:-1], data.shape[-1] // self.nbytes * self.block)

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """Quantizes rows: f32 [..., k] -> uint8 [..., row_bytes].

        ktx.quant.quantize quantizes the types that it has a quantizer for, gguf-py the others.

        Raises:
            UsageError: if the type needs an importance matrix, or k is not a multiple of the block size.
        """
        import torch

        k = values.shape[-1]
        if k % self.block:
            raise UsageError(
                f"{self.name} stores rows in blocks of {self.block} weights: a row of {k} weights is not a multiple of"
                " that"
            )
        if self.is_float:
            data = values.to(_torch_dtype(self.name)).contiguous().view(torch.uint8)
            return data.reshape(*values.shape[:-1], -1)
        import numpy as np

        from ktx.quant.quantize import quantize_blocks

        rows = values.float().contiguous().numpy()
        rows_data = quantize_blocks(self.name, np.ascontiguousarray(rows.reshape(-1, self.block)))
        if rows_data is None:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import quantize

            try:
                rows_data = quantize(rows.reshape(-1, k), GGMLQuantizationType(self.code))
            except NotImplementedError as error:
                raise UsageError(
                    f"{self.name} cannot be quantized without an importance matrix: use a file that llama-quantize"
                    " wrote"
                ) from error
        return torch.from_numpy(np.ascontiguousarray(rows_data)).reshape(*values.shape[:-1], self.row_bytes(k))

    def __str__(self) -> str:
        return self.name


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[name]


def expand_scale(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Repeats block scales [ceil(n/128), ceil(k/128)] to one scale per weight, f32 [n, k]."""
    return scale.float().repeat_interleave(FP8_BLOCK, -2)[..., :n, :].repeat_interleave(FP8_BLOCK, -1)[..., :k]


def _dequantize_own(qtype: QType, data: torch.Tensor) -> torch.Tensor:
    """Dequantizes the INT8 and INT4 types, which ktx makes when it loads weights.

    A block is an f16 scale, then either int8 codes, or 16 bytes for each 32 weights, of which byte i holds the codes
    of weights i and i + 16, each plus 8.
    """
    import torch

    blocks = data.contiguous().view(-1, qtype.nbytes)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = blocks[:, 2:]
    if qtype.name.startswith("INT4"):
        halves = codes.reshape(len(blocks), -1, 1, 16)
        codes = torch.cat([halves & 15, halves >> 4], 2).reshape(len(blocks), qtype.block).to(torch.int8) - 8
    else:
        codes = codes.contiguous().view(torch.int8)
    return (scale * codes).reshape(*data.shape[:-1], -1)


_TABLE = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("BF16", 30, 1, 2),
    ("F8_E4M3", F8_CODE, 1, 1),
    ("INT8_128", 1001, 128, 130),
    ("INT4_64", 1002, 64, 34),
    ("INT4_128", 1003, 128, 66),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ1_S", 19, 256, 50),
    ("IQ1_M", 29, 256, 56),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ2_S", 22, 256, 82),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ3_S", 21, 256, 110),
    ("IQ4_NL", 20, 32, 18),
    ("IQ4_XS", 23, 256, 136),
    ("MXFP4", 39, 32, 17),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
)
QTYPES: Mapping[str, QType] = {row[0]: QType(*row, is_float=row[2] == 1) for row in _TABLE}
BY_CODE: Mapping[int, QType] = {qtype.code: qtype for qtype in QTYPES.values()}
