"""Products of activations with packed rows on a GPU: the inner part of the kernels in linear.py and moe.py.

`gemv` multiplies and adds on the CUDA cores: the cost of a weight is little more than its extraction from a word, so
the product for one token is limited by memory bandwidth. `gemm` rebuilds a tile of weights in the activations' dtype
for the tensor cores. Both sum over the columns [begin, end) in an order that other tokens do not change as long as the
tile has equally many of them (1, 2, 4 or 16, 32, 64); for another tile size the compiler may sum lanes in another
order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ktx.kernels.gpu.bit_unpack import repeat_scales
from ktx.kernels.gpu.dequant import apply_scales, scale_row_index

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # numpy cannot multiply bf16
# Factors for raw codes; their product is 2^149, the reciprocal of the smallest f32.
LIFT, LOWER = tl.constexpr(2.0**64), tl.constexpr(2.0**85)

# Weights of a step of `gemv`, 64 a lane, so that activations are read once for eight rows; and its possible columns.
GEMV_WEIGHTS, GEMV_SPANS = 8192, (1024, 512, 256)
GEMM_TOKENS, GEMM_ROWS, GEMM_SPAN = 64, 32, 256  # tile of a step of `gemm`, at most
MIN_PROGRAMS = 256  # enough programs to use the full memory bandwidth of any GPU


def gemv_tile(n: int, k: int, num_matrices: int = 1) -> dict[str, Any]:
    """Returns the tile of `gemv` for matrices [n, k], of which `num_matrices` are multiplied at once.

    It does not depend on the number of tokens, so the bits of a token's result do not either. The span is the one
    that pads a row of k columns least, the largest of equal ones. The rows are halved where that many programs would
    be too few to use the memory bandwidth.
    """
    span = min(GEMV_SPANS, key=lambda span: (-(-k // span) * span, -span))
    rows = GEMV_WEIGHTS // span
    if triton.cdiv(n, rows) * num_matrices < MIN_PROGRAMS:
        rows //= 2
    return {"PRODUCT": gemv, "ROWS": rows, "SPAN": span}


def gemm_tile() -> dict[str, Any]:
    """Returns the tile of `gemm`."""
    return {"PRODUCT": gemm, "ROWS": GEMM_ROWS, "SPAN": GEMM_SPAN, "num_stages": 1}


@triton.jit
def make_raw_code_factors(SPAN: tl.constexpr, RUN: tl.constexpr):
    """Returns the factors by which activations are multiplied so that raw codes count equally.

    The position of a raw code in its word determines its power of two, see bit_unpack.mask_raw_nibbles.
    """
    column = tl.arange(0, SPAN)
    return tl.where(column % 2 == 0, LIFT, LIFT / 256) * tl.where(column // RUN % 2 == 0, 1.0, 0.0625)


@triton.jit
def gemv(
    x,
    token,
    token_mask,
    planes,
    codebook,
    row,
    n,
    k,
    blocks,
    begin,
    end,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
    MINIMUM: tl.constexpr,
    RUN: tl.constexpr,
):
    """Multiplies activations by packed weights on the CUDA cores, for few tokens.

    `token` int64 [TOKENS] are rows of x [.., k], valid where `token_mask` is set; `row` int64 [ROWS] are rows of the
    weights; columns [begin, end) are summed. The other arguments describe the weights, as in dequant._dequantize and
    dequant.decode_constants. Returns f32 [TOKENS, ROWS].

    A step decodes SPAN columns. Products of eight columns are summed before they are multiplied by their scale, and
    minimums are multiplied by sums of activations, so that a weight costs one multiply-add.
    """
    TOKENS: tl.constexpr = token.shape[0]
    ROWS: tl.constexpr = row.shape[0]
    block_row = scale_row_index(row, n)
    total = tl.zeros([TOKENS, ROWS, SPAN // 8], tl.float32)
    for first in range(begin, end, SPAN):
        codes, scale, minimum = DECODE(planes, codebook, row, block_row, first, blocks, BLOCK, SPAN, RUN > 0)
        column = first + tl.arange(0, SPAN)
        mask = token_mask[:, None] & (column < k)[None, :]
        values = tl.load(x + token[:, None] * k + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if MINIMUM:
            sums = tl.sum(tl.reshape(values, [TOKENS, SPAN // 8, 8]), 2)
            total -= tl.reshape(sums, [TOKENS, 1, SPAN // 8]) * tl.reshape(repeat_scales(minimum), [1, ROWS, SPAN // 8])
        if RUN > 0:
            values, scale = values * make_raw_code_factors(SPAN, RUN)[None, :], scale * LOWER
        products = tl.reshape(values, [TOKENS, 1, SPAN]) * tl.reshape(codes, [1, ROWS, SPAN])
        dots = tl.sum(tl.reshape(products, [TOKENS, ROWS, SPAN // 8, 8]), 3)
        total += dots * tl.reshape(repeat_scales(scale), [1, ROWS, SPAN // 8])
    return tl.sum(total, 2)


@triton.jit
def gemm(
    x,
    token,
    token_mask,
    planes,
    codebook,
    row,
    n,
    k,
    blocks,
    begin,
    end,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
    MINIMUM: tl.constexpr,
    RUN: tl.constexpr,
):
    """Multiplies as `gemv` does, on the tensor cores, which need TOKENS and ROWS of at least 16.

    Arguments and result are those of `gemv`. A step decodes a tile [ROWS, SPAN] of weights and rounds it to the dtype
    of x, as the tensor cores take it.
    """
    block_row = scale_row_index(row, n)
    total = tl.zeros([token.shape[0], row.shape[0]], tl.float32)
    for first in range(begin, end, SPAN):
        codes, scale, minimum = DECODE(planes, codebook, row, block_row, first, blocks, BLOCK, SPAN, False)
        column = first + tl.arange(0, SPAN)
        mask = token_mask[:, None] & (column < k)[None, :]
        values = tl.load(x + token[:, None] * k + column[None, :], mask=mask, other=0.0)
        weights = apply_scales(codes, scale, minimum, MINIMUM).to(values.dtype)
        if INTERPRETED:
            values, weights = values.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(values, tl.trans(weights), total, input_precision="tf32x3")
    return total
