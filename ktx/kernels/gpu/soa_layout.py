"""Packed weights on a GPU: the bytes of the file as a structure of arrays, with a plane for each field of a block.

A ggml block has its scales next to its codes and an unaligned size (Q6_K 210 bytes, Q8_0 34), so a lane that loads 16
bytes would straddle blocks. Here one field of all blocks is a plane, uint8 [rows, blocks of a row, bytes of the
field], with the rows of all matrices one after another. The planes follow each other in the order of FIELDS, by
descending size. So a lane reads 16 bytes of codes at addresses that are multiples of 16, a warp reads full cache lines,
and every field is aligned to its own words. No bit changes and no byte is added: `SoAWeight.blocks` returns the blocks
of the file. A float type is one plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ktx.errors import KtxError
from ktx.quant.types import FP8_BLOCK, QType
from ktx.weights.base import QuantizedTensor


class Field(NamedTuple):
    """The bytes of a field in a block, and the dtype they are read as."""

    start: int
    nbytes: int
    dtype: torch.dtype


# Weights dequantized at once. It is defined here because a placement plan needs it where Triton is not installed.
DEQUANT_CHUNK_WEIGHTS = 1 << 26
BYTE, SIGNED, WORD, HALF = torch.uint8, torch.int8, torch.int32, torch.float16
# The fields of each type's block, in the order of their planes, by which decoders (dequant_blocks.py, dequant_iq.py)
# index them: `Field(start, nbytes, dtype)`. Fields of codes come before their scales.
FIELDS: dict[str, tuple[Field, ...]] = {
    "F32": (Field(0, 4, torch.float32),),
    "F16": (Field(0, 2, HALF),),
    "BF16": (Field(0, 2, torch.bfloat16),),
    "F8_E4M3": (Field(0, 1, BYTE),),
    "INT8_128": (Field(2, 128, SIGNED), Field(0, 2, HALF)),
    "INT4_64": (Field(2, 32, WORD), Field(0, 2, HALF)),
    "INT4_128": (Field(2, 64, WORD), Field(0, 2, HALF)),
    "Q4_0": (Field(2, 16, WORD), Field(0, 2, HALF)),
    "Q4_1": (Field(4, 16, WORD), Field(0, 4, HALF)),
    "Q5_0": (Field(6, 16, WORD), Field(2, 4, WORD), Field(0, 2, HALF)),
    "Q5_1": (Field(8, 16, WORD), Field(4, 4, WORD), Field(0, 4, HALF)),
    "Q8_0": (Field(2, 32, SIGNED), Field(0, 2, HALF)),
    "Q2_K": (Field(16, 64, WORD), Field(0, 16, BYTE), Field(80, 4, HALF)),
    "Q3_K": (Field(32, 64, WORD), Field(0, 32, WORD), Field(96, 12, BYTE), Field(108, 2, HALF)),
    "Q4_K": (Field(16, 128, WORD), Field(4, 12, BYTE), Field(0, 4, HALF)),
    "Q5_K": (Field(48, 128, WORD), Field(16, 32, WORD), Field(4, 12, BYTE), Field(0, 4, HALF)),
    "Q6_K": (Field(0, 128, WORD), Field(128, 64, WORD), Field(192, 16, SIGNED), Field(208, 2, HALF)),
    "IQ1_S": (Field(2, 32, BYTE), Field(34, 16, torch.int16), Field(0, 2, HALF)),
    "IQ1_M": (Field(0, 32, BYTE), Field(32, 16, BYTE), Field(48, 8, torch.int16)),
    "IQ2_XXS": (Field(2, 64, WORD), Field(0, 2, HALF)),
    "IQ2_XS": (Field(2, 64, torch.int16), Field(66, 8, BYTE), Field(0, 2, HALF)),
    "IQ2_S": (Field(2, 32, BYTE), Field(34, 32, BYTE), Field(66, 8, BYTE), Field(74, 8, BYTE), Field(0, 2, HALF)),
    "IQ3_XXS": (Field(2, 64, BYTE), Field(66, 32, WORD), Field(0, 2, HALF)),
    "IQ3_S": (Field(2, 64, BYTE), Field(74, 32, BYTE), Field(66, 8, BYTE), Field(106, 4, BYTE), Field(0, 2, HALF)),
    "IQ4_NL": (Field(2, 16, WORD), Field(0, 2, HALF)),
    "IQ4_XS": (Field(8, 128, WORD), Field(4, 4, BYTE), Field(0, 2, HALF), Field(2, 2, torch.int16)),
    "MXFP4": (Field(1, 16, WORD), Field(0, 1, BYTE)),
    "TQ1_0": (Field(0, 52, BYTE), Field(52, 2, HALF)),
    "TQ2_0": (Field(0, 64, WORD), Field(64, 2, HALF)),
}


@dataclass
class SoAWeight:
    """One or several matrices of equal shape in planes, on any device.

    Attributes:
        data: uint8, all planes.
        qtype: the weight type.
        n: rows of a matrix.
        k: columns of a matrix.
        matrices: number of matrices.
        scale: f32 [matrices, ceil(n/128), ceil(k/128)], for F8_E4M3 only.
        row_blocks: number of blocks of a row.
        planes: views of `data`, one per field.
    """

    data: torch.Tensor
    qtype: QType
    n: int
    k: int
    matrices: int = 1
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.row_blocks = self.k // self.qtype.block
        self.planes = _view_planes(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the planes and scales."""
        return self.data.numel() + (0 if self.scale is None else self.scale.numel() * 4)

    def to(self, device: torch.device | str) -> SoAWeight:
        """Copies the weights to a device."""
        scale = None if self.scale is None else self.scale.to(device)
        return SoAWeight(self.data.to(device), self.qtype, self.n, self.k, self.matrices, scale)

    def blocks(self) -> torch.Tensor:
        """Returns the rows as a weight file stores them, uint8 [matrices, n, row_bytes]."""
        out = self.data.new_empty(self.matrices * self.n * self.row_blocks, self.qtype.nbytes)
        for field, plane in zip(FIELDS[self.qtype.name], self.planes, strict=False):
            out[:, field.start : field.start + field.nbytes] = plane.view(torch.uint8).view(-1, field.nbytes)
        return out.view(self.matrices, self.n, -1)


def empty(qtype: QType, n: int, k: int, matrices: int, buffer: torch.Tensor) -> SoAWeight:
    """Returns planes in the first bytes of `buffer` (uint8), which are not initialized."""
    scale = None
    if qtype.name == "F8_E4M3":
        scale = buffer.new_empty((matrices, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)), dtype=torch.float32)
    return SoAWeight(buffer[: matrices * n * qtype.row_bytes(k)], qtype, n, k, matrices, scale)


def _view_planes(packed: SoAWeight) -> tuple[torch.Tensor, ...]:
    """Returns views of `data`, one per field of FIELDS and in its dtype, by whose index decoders read them.

    For F8_E4M3 the scales are the second plane.
    """
    count = packed.matrices * packed.n * packed.row_blocks
    if packed.data.numel() != count * packed.qtype.nbytes:
        raise KtxError(
            f"{packed.matrices} x [{packed.n}, {packed.k}] of {packed.qtype} are {count * packed.qtype.nbytes} bytes,"
            f" found {packed.data.numel()}"
        )
    views, offset = [], 0
    for field in FIELDS[packed.qtype.name]:
        views.append(packed.data[offset : offset + count * field.nbytes].view(field.dtype))
        offset += count * field.nbytes
    return tuple(views) if packed.scale is None else (*views, packed.scale)


def pack(
    weight: QuantizedTensor | Sequence[QuantizedTensor],
    to: QType | None = None,
    device: torch.device | str = "cuda",
) -> SoAWeight:
    """Packs weights into planes on a device.

    Args:
        weight: [n, k] or [matrices, n, k], or a sequence of such parts of one type and shape.
        to: quantizes to this type on the way, as ktx.quant.quantize does.
        device: where the planes are allocated.

    Raises:
        KtxError: if the parts differ in shape or type.
    """
    parts = [weight] if isinstance(weight, QuantizedTensor) else list(weight)
    if len({(part.shape, part.qtype.name) for part in parts}) != 1:
        raise KtxError(
            "the parts of a packed tensor differ in shape or type:"
            f" {sorted({(p.shape, p.qtype.name) for p in parts}, key=str)}"
        )
    if to is not None:
        parts = [QuantizedTensor(to.quantize(part.dequantize()), to, part.shape) for part in parts]
    first = parts[0]
    n, k = first.shape[-2:]
    qtype, matrices_per_part = first.qtype, 1 if len(first.shape) == 2 else first.shape[0]
    row_bytes, count = qtype.row_bytes(k), matrices_per_part * len(parts)
    data = torch.empty(count * n * row_bytes, dtype=torch.uint8, device=device)
    packed = SoAWeight(data, qtype, n, k, count, _collect_scales(parts, n, k, device))
    blocks = matrices_per_part * n * packed.row_blocks
    for i, part in enumerate(parts):
        raw = part.data.to(device).reshape(blocks, qtype.nbytes)
        for field, plane in zip(FIELDS[qtype.name], packed.planes, strict=False):
            dst = plane.view(torch.uint8).view(-1, field.nbytes)[i * blocks : (i + 1) * blocks]
            dst.copy_(raw[:, field.start : field.start + field.nbytes])
    return packed


pack_experts = pack  # a GPU has one memory, so experts have the same layout as other matrices


def _collect_scales(parts: list[QuantizedTensor], n: int, k: int, device: torch.device | str) -> torch.Tensor | None:
    """Returns the scales of F8_E4M3, f32 [matrices, ceil(n/128), ceil(k/128)]; ones if the file has none.

    Other types have no scales: None.
    """
    if parts[0].qtype.name != "F8_E4M3":
        return None
    shape = (-1, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    matrices_per_part = 1 if len(parts[0].shape) == 2 else parts[0].shape[0]
    scales = [
        torch.ones(matrices_per_part, *shape[1:], dtype=torch.float32)
        if p.scale is None
        else p.scale.float().reshape(shape)
        for p in parts
    ]
    return torch.cat(scales).contiguous().to(device)
