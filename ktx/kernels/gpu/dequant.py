"""Dequantization on a GPU: decoder table, whole matrices (for cuBLAS in prefill), rows (for an embedding)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ktx.kernels.gpu import dequant_blocks, dequant_iq, iq_codebooks
from ktx.kernels.gpu.soa_layout import SoAWeight

ROWS, SPAN = 16, 256  # tile of a program: rows, columns


class Decoder(NamedTuple):
    """How a weight type is dequantized.

    Attributes:
        function: the device function, see dequant_blocks.py.
        minimum: whether weights have a minimum.
        codebook: its name, see iq_codebooks.make_codebook; "" for none.
        run: number of consecutive columns that come from the low nibbles of a chunk of words, before those from its
            high nibbles; 0 if the function cannot return raw codes, see bit_unpack.mask_raw_nibbles.
    """

    function: Any
    minimum: bool = False
    codebook: str = ""
    run: int = 0


DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(("F32", "F16", "BF16"), Decoder(dequant_blocks.floats)),
    "F8_E4M3": Decoder(dequant_blocks.f8_e4m3),
    **dict.fromkeys(("Q8_0", "INT8_128"), Decoder(dequant_blocks.eight_bits)),
    **dict.fromkeys(("Q4_0", "INT4_64", "INT4_128"), Decoder(dequant_blocks.four_bits, True, run=16)),
    "Q4_1": Decoder(dequant_blocks.q4_1, True, run=16),
    "Q5_0": Decoder(dequant_blocks.q5_0, True),
    "Q5_1": Decoder(dequant_blocks.q5_1, True),
    "Q2_K": Decoder(dequant_blocks.q2_k, True),
    "Q3_K": Decoder(dequant_blocks.q3_k, True),
    "Q4_K": Decoder(dequant_blocks.q4_k, True, run=32),
    "Q5_K": Decoder(dequant_blocks.q5_k, True, run=32),
    "Q6_K": Decoder(dequant_blocks.q6_k, True, run=64),
    "TQ1_0": Decoder(dequant_blocks.tq1_0, True),
    "TQ2_0": Decoder(dequant_blocks.tq2_0, True),
    "IQ4_NL": Decoder(dequant_blocks.iq4_nl, codebook="IQ4"),
    "IQ4_XS": Decoder(dequant_blocks.iq4_xs, codebook="IQ4"),
    "MXFP4": Decoder(dequant_blocks.mxfp4, codebook="MXFP4"),
    "IQ1_S": Decoder(dequant_iq.iq1_s, True, "IQ1"),
    "IQ1_M": Decoder(dequant_iq.iq1_m, codebook="IQ1"),
    "IQ2_XXS": Decoder(dequant_iq.iq2_xxs, codebook="IQ2_XXS"),
    "IQ2_XS": Decoder(dequant_iq.iq2_xs, codebook="IQ2_XS"),
    "IQ2_S": Decoder(dequant_iq.iq2_s, codebook="IQ2_S"),
    "IQ3_XXS": Decoder(dequant_iq.iq3_xxs, codebook="IQ3_XXS"),
    "IQ3_S": Decoder(dequant_iq.iq3_s, codebook="IQ3_S"),
}


def decode_constants(packed: SoAWeight, prefix: str = "") -> dict[str, Any]:
    """Returns the constants with which kernels decode these weights, as keyword arguments with a prefix.

    Kernels are compiled per weight type: the decoder is a constant, so that Triton inlines it. The prefix tells apart
    the weights of a kernel that reads several.
    """
    decoder = DECODERS[packed.qtype.name]
    kwargs = {"BLOCK": packed.qtype.block, "DECODE": decoder.function, "MINIMUM": decoder.minimum, "RUN": decoder.run}
    return {prefix + name: value for name, value in kwargs.items()}


def codebook_of(packed: SoAWeight) -> torch.Tensor:
    """Returns the codebook of these weights; for types without one, a tensor that is never read."""
    name = DECODERS[packed.qtype.name].codebook
    return iq_codebooks.make_codebook(name, packed.data.device) if name else packed.data


@triton.jit
def apply_scales(codes, scale, minimum, MINIMUM: tl.constexpr):
    """Returns code * scale - minimum as f32 [rows, SPAN], from the results of a decoder."""
    ROWS: tl.constexpr = codes.shape[0]
    SPAN: tl.constexpr = codes.shape[1]
    values = tl.reshape(codes, [ROWS, SPAN // 16, 16]) * tl.reshape(scale, [ROWS, SPAN // 16, 1])
    if MINIMUM:
        values -= tl.reshape(minimum, [ROWS, SPAN // 16, 1])
    return tl.reshape(values, [ROWS, SPAN])


@triton.jit
def scale_row_index(row, n):
    """Returns the row of F8_E4M3's scales for a weight row; one row of scales is for 128 weight rows.

    Weight rows count the rows of all matrices, of n rows each.
    """
    return row // n * tl.cdiv(n, 128) + row % n // 128


@triton.jit
def _dequantize(
    planes,
    codebook,
    index,
    out,
    first,
    count,
    n,
    k,
    blocks,
    INDEXED: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
    MINIMUM: tl.constexpr,
    RUN: tl.constexpr,
):
    """Dequantizes `count` rows from `first` on, or the rows that `index` names (INDEXED).

    A program dequantizes a tile of ROWS rows and SPAN columns with DECODE, a decoder of dequant_blocks. A matrix has n
    rows of k columns, a row `blocks` blocks.
    """
    out_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = out_row < count
    row = tl.load(index + out_row, mask=row_mask, other=0) if INDEXED else first + tl.minimum(out_row, count - 1)
    block_row = scale_row_index(row, n)
    codes, scale, minimum = DECODE(
        planes, codebook, row, block_row, tl.program_id(1) * SPAN, blocks, BLOCK, SPAN, False
    )
    column = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    values = apply_scales(codes, scale, minimum, MINIMUM).to(out.dtype.element_ty)
    tl.store(out + out_row[:, None] * k + column[None, :], values, mask=row_mask[:, None] & (column < k)[None, :])


def dequantize(packed: SoAWeight, dtype: torch.dtype, first: int = 0, count: int | None = None) -> torch.Tensor:
    """Dequantizes `count` rows of all matrices from `first` on (default: to the end) -> `dtype` [count, k]."""
    count = packed.matrices * packed.n - first if count is None else count
    return _launch_dequantize(packed, packed.data, first, count, dtype, False)


def dequantize_rows(packed: SoAWeight, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Dequantizes rows by index -> `dtype` [count, k].

    Args:
        packed: the weights.
        index: int64 [count], on the weights' device; an index out of range is not detected.
        dtype: dtype of the result.
    """
    return _launch_dequantize(packed, index.contiguous(), 0, index.numel(), dtype, True)


def _launch_dequantize(
    packed: SoAWeight, index: torch.Tensor, first: int, count: int, dtype: torch.dtype, indexed: bool
) -> torch.Tensor:
    """Launches `_dequantize` for `count` rows: those that `index` names if `indexed`, else those from `first` on.

    Without `indexed`, `index` is any tensor, which the kernel does not read.
    """
    out = torch.empty(count, packed.k, dtype=dtype, device=packed.data.device)
    if count:
        grid = (triton.cdiv(count, ROWS), triton.cdiv(packed.k, SPAN))
        sizes = first, count, packed.n, packed.k, packed.row_blocks
        _dequantize[grid](
            packed.planes,
            codebook_of(packed),
            index,
            out,
            *sizes,
            INDEXED=indexed,
            ROWS=ROWS,
            SPAN=SPAN,
            **decode_constants(packed),
        )
    return out
