"""Packed weights on a GPU: the bytes of the file, each field of a block in a plane of its own.

A ggml block has its scales beside its codes and an odd size (Q6_K 210 bytes, Q8_0 34), so a lane that loads 16 bytes would straddle blocks.
Here a field of all blocks lies in one plane, uint8 [rows, blocks of a row, bytes of the field], rows of all matrices one after another,
and planes follow each other by falling size: codes are read 16 bytes a lane from addresses that 16 divides, a warp whole lines, and every
field is aligned to its own words. Not a bit changes and no byte is added: `Packed.blocks` gives the file's blocks back. A float type is one plane.
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
    """Bytes of a block, and the words they are read in."""

    start: int
    nbytes: int
    dtype: torch.dtype


PIECE = 1 << 26  # weights that are dequantised at once; a plan counts it where there is no Triton
BYTE, SIGNED, WORD, HALF = torch.uint8, torch.int8, torch.int32, torch.float16
FIELDS: dict[str, tuple[Field, ...]] = {  # planes in their order; what a field holds is told in decode.py
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
    """One matrix, or several of one shape: `data` uint8, `matrices` x [n, k] of `qtype`, in planes. May lie on any device."""

    data: torch.Tensor
    qtype: QType
    n: int
    k: int
    matrices: int = 1
    scale: torch.Tensor | None = None  # F8_E4M3: f32 [matrices, ceil(n/128), ceil(k/128)]

    def __post_init__(self) -> None:
        self.row_blocks = self.k // self.qtype.block
        self.planes = _planes(self)

    @property
    def nbytes(self) -> int:
        return self.data.numel() + (0 if self.scale is None else self.scale.numel() * 4)

    def to(self, device: torch.device | str) -> SoAWeight:
        scale = None if self.scale is None else self.scale.to(device)
        return SoAWeight(self.data.to(device), self.qtype, self.n, self.k, self.matrices, scale)

    def blocks(self) -> torch.Tensor:
        """The rows as the file has them, uint8 [matrices, n, row_bytes]."""
        out = self.data.new_empty(self.matrices * self.n * self.row_blocks, self.qtype.nbytes)
        for field, plane in zip(FIELDS[self.qtype.name], self.planes, strict=False):
            out[:, field.start : field.start + field.nbytes] = plane.view(torch.uint8).view(-1, field.nbytes)
        return out.view(self.matrices, self.n, -1)


def empty(qtype: QType, n: int, k: int, matrices: int, memory: torch.Tensor) -> SoAWeight:
    """Planes in the first bytes of some memory, uint8, whatever these hold."""
    scale = None
    if qtype.name == "F8_E4M3":
        scale = memory.new_empty((matrices, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)), dtype=torch.float32)
    return SoAWeight(memory[: matrices * n * qtype.row_bytes(k)], qtype, n, k, matrices, scale)


def _planes(packed: SoAWeight) -> tuple[torch.Tensor, ...]:
    """Views of the fields; for F8_E4M3 its scales are the second one."""
    count = packed.matrices * packed.n * packed.row_blocks
    if packed.data.numel() != count * packed.qtype.nbytes:
        raise KtxError(
            f"{packed.matrices} x [{packed.n}, {packed.k}] of {packed.qtype} are {count * packed.qtype.nbytes} bytes, not {packed.data.numel()}"
        )
    views, at = [], 0
    for field in FIELDS[packed.qtype.name]:
        views.append(packed.data[at : at + count * field.nbytes].view(field.dtype))
        at += count * field.nbytes
    return tuple(views) if packed.scale is None else (*views, packed.scale)


def pack(
    weight: QuantizedTensor | Sequence[QuantizedTensor],
    to: QType | None = None,
    device: torch.device | str = "cuda",
) -> SoAWeight:
    """Weights [n, k] or [matrices, n, k] (or one part a matrix, all of one type) -> planes on `device`.

    `to` quantises on the way, as ktx.quant.quantize does. KtxError where the parts differ.
    """
    parts = [weight] if isinstance(weight, QuantizedTensor) else list(weight)
    if len({(part.shape, part.qtype.name) for part in parts}) != 1:
        raise KtxError(
            f"matrices of one packed tensor differ: {sorted({(p.shape, p.qtype.name) for p in parts}, key=str)}"
        )
    if to is not None:
        parts = [QuantizedTensor(to.quantize(part.dequantize()), to, part.shape) for part in parts]
    first = parts[0]
    n, k = first.shape[-2:]
    qtype, each = first.qtype, 1 if len(first.shape) == 2 else first.shape[0]
    row_bytes, count = qtype.row_bytes(k), each * len(parts)
    data = torch.empty(count * n * row_bytes, dtype=torch.uint8, device=device)
    packed = SoAWeight(data, qtype, n, k, count, _scales(parts, n, k, device))
    blocks = each * n * packed.row_blocks
    for i, part in enumerate(parts):
        raw = part.data.to(device).reshape(blocks, qtype.nbytes)
        for field, plane in zip(FIELDS[qtype.name], packed.planes, strict=False):
            place = plane.view(torch.uint8).view(-1, field.nbytes)[i * blocks : (i + 1) * blocks]
            place.copy_(raw[:, field.start : field.start + field.nbytes])
    return packed


pack_experts = pack  # a GPU has one memory: rows of all experts lie as those of other matrices


def _scales(parts: list[QuantizedTensor], n: int, k: int, device: torch.device | str) -> torch.Tensor | None:
    """f32 [matrices, ceil(n/128), ceil(k/128)] of F8_E4M3, ones where the file has none; None for other types."""
    if parts[0].qtype.name != "F8_E4M3":
        return None
    shape = (-1, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    each = 1 if len(parts[0].shape) == 2 else parts[0].shape[0]
    given = [
        torch.ones(each, *shape[1:], dtype=torch.float32) if p.scale is None else p.scale.float().reshape(shape)
        for p in parts
    ]
    return torch.cat(given).contiguous().to(device)
