"""Random weights of any quant type, for tests and measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktx.quant.types import QType


def random_rows(qtype: QType, n: int, k: int, seed: int = 0, std: float = 0.05) -> torch.Tensor:
    """Returns uint8 [n, row_bytes] of valid random blocks whose weights have about the standard deviation `std`.

    Works for every type, float or quantized. Types with a quantizer quantize normal numbers. The IQ types need an
    importance matrix, so their bytes are random, and the f16 scales of the blocks are set so that `std` comes out:
    first to numbers around 1, to measure the deviation that they give, then in proportion.
    """
    rng = np.random.default_rng(seed)
    if qtype.name not in _SCALE_OFFSETS:
        return qtype.quantize(torch.from_numpy(rng.normal(0, std, (n, k)).astype(np.float32)))
    blocks = rng.integers(0, 256, (n, k // qtype.block, qtype.nbytes), dtype=np.uint8)
    d = (rng.random((n, k // qtype.block, 1)) * 0.5 + 0.75).astype(np.float32)
    _set_scale(blocks, qtype.name, d)
    unit = qtype.dequantize(torch.from_numpy(blocks.reshape(n, -1))).square().mean().sqrt().item()
    _set_scale(blocks, qtype.name, d * (std / unit))
    return torch.from_numpy(blocks.reshape(n, -1))


# IQ types without a quantizer: offset in a block of its f16 scale; None where its bits are scattered.
_SCALE_OFFSETS = {"IQ1_S": 0, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "IQ1_M": None}


def _set_scale(blocks: NDArray[Any], name: str, d: NDArray[Any]) -> None:
    """Writes f16 scales `d` [n, blocks, 1] into blocks of the IQ type `name`, where random bits might be infinite."""
    bits = d.astype(np.float16).view(np.uint16)
    offset = _SCALE_OFFSETS[name]
    if offset is not None:
        blocks[..., offset : offset + 2] = bits.view(np.uint8)
        return
    # IQ1_M spreads the bits of its f16 scale over the top nibbles of four 16-bit words.
    scales = blocks[..., 48:56].copy().view(np.uint16)
    for i in range(4):
        scales[..., i] = (scales[..., i] & 0x0FFF) | (((bits[..., 0] >> (4 * i)) & 15) << 12)
    blocks[..., 48:56] = scales.view(np.uint8)
