"""Products of activations with packed rows on a GPU, the inside of the kernels in gpu_linear.py and moe.py.

`few` multiplies and adds on the plain pipes: what a weight costs there is little more than taking it out of its word, so one token's product is limited by
memory. `many` rebuilds a tile of weights in the activations' type for the tensor cores. Both sum over the columns [begin, end) in an order that other tokens do not
change as long as the tile has as many of them (1, 2, 4 or 16, 32, 64); between two tiles the compiler may add up lanes in another one.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ktx.kernels.gpu.bit_unpack import twice
from ktx.kernels.gpu.dequant import scale_row_of, weights_of

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # numpy multiplies no bf16
LIFT, LOWER = (
    tl.constexpr(2.0**64),
    tl.constexpr(2.0**85),
)  # what raw codes take: together 2^149, one over the least f32


FEW_WEIGHTS, SPANS = (
    8192,
    (1024, 512, 256),
)  # rows x columns of a step of `few`: 64 weights a lane, so that activations are read once for eight rows
MANY_TOKENS, MANY_ROWS, MANY_SPAN = 64, 32, 256  # of a step of `many`, at most
PROGRAMS = 256  # that keep any card's memory busy


def few_tile(n: int, k: int, products: int = 1) -> dict[str, Any]:
    """The tile of `few` for matrices [n, k], so many at a time; it does not depend on tokens, so their bits do not."""
    span = min(SPANS, key=lambda span: (-(-k // span) * span, -span))
    rows = FEW_WEIGHTS // span
    if triton.cdiv(n, rows) * products < PROGRAMS:
        rows //= 2
    return {"PRODUCT": gemv, "ROWS": rows, "SPAN": span}


def many_tile() -> dict[str, Any]:
    return {"PRODUCT": gemm, "ROWS": MANY_ROWS, "SPAN": MANY_SPAN, "num_stages": 1}


@triton.jit
def lift_of(SPAN: tl.constexpr, RUN: tl.constexpr):
    """What activations are multiplied with so that raw codes (streams.raw_nibbles), whose place in a word is their power of two, weigh the same."""
    column = tl.arange(0, SPAN)
    return tl.where(column % 2 == 0, LIFT, LIFT / 256) * tl.where(column // RUN % 2 == 0, 1.0, 0.0625)


@triton.jit
def gemv(
    x,
    token,
    known,
    planes,
    book,
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
    """Rows `token` int64 [T] of x [.., k] where `known`, times weight rows `row` int64 [R]: f32 [T, R]."""
    TOKENS: tl.constexpr = token.shape[0]
    ROWS: tl.constexpr = row.shape[0]
    block_row = scale_row_of(row, n)
    total = tl.zeros([TOKENS, ROWS, SPAN // 8], tl.float32)
    for first in range(begin, end, SPAN):
        codes, scale, minimum = DECODE(planes, book, row, block_row, first, blocks, BLOCK, SPAN, RUN > 0)
        column = first + tl.arange(0, SPAN)
        some = known[:, None] & (column < k)[None, :]
        values = tl.load(x + token[:, None] * k + column[None, :], mask=some, other=0.0).to(tl.float32)
        if MINIMUM:
            sums = tl.sum(tl.reshape(values, [TOKENS, SPAN // 8, 8]), 2)
            total -= tl.reshape(sums, [TOKENS, 1, SPAN // 8]) * tl.reshape(twice(minimum), [1, ROWS, SPAN // 8])
        if RUN > 0:
            values, scale = values * lift_of(SPAN, RUN)[None, :], scale * LOWER
        products = tl.reshape(values, [TOKENS, 1, SPAN]) * tl.reshape(codes, [1, ROWS, SPAN])
        dots = tl.sum(tl.reshape(products, [TOKENS, ROWS, SPAN // 8, 8]), 3)
        total += dots * tl.reshape(twice(scale), [1, ROWS, SPAN // 8])
    return tl.sum(total, 2)


@triton.jit
def gemm(
    x,
    token,
    known,
    planes,
    book,
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
    """As `few` for T and R of 16 and more. Weights are rounded to x's type."""
    block_row = scale_row_of(row, n)
    total = tl.zeros([token.shape[0], row.shape[0]], tl.float32)
    for first in range(begin, end, SPAN):
        codes, scale, minimum = DECODE(planes, book, row, block_row, first, blocks, BLOCK, SPAN, False)
        column = first + tl.arange(0, SPAN)
        some = known[:, None] & (column < k)[None, :]
        values = tl.load(x + token[:, None] * k + column[None, :], mask=some, other=0.0)
        weights = weights_of(codes, scale, minimum, MINIMUM).to(values.dtype)
        if INTERPRETED:
            values, weights = values.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(values, tl.trans(weights), total, input_precision="tf32x3")
    return total
