"""Products of activations with packed rows on a GPU, the inside of the kernels in gpu_linear.py and moe.py.

`few` multiplies and adds on the plain pipes: what a weight costs there is little more than taking it out of its word, so one token's product is limited by
memory. `many` rebuilds a tile of weights in the activations' type for the tensor cores. Both sum over the columns [begin, end) in one order whatever
stands beside a token, so its bits do not depend on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ktx.kernels.dequant import weights_of


@triton.jit
def few(
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
):
    """Rows `token` int64 [T] of x [.., k] where `known`, times weight rows `row` int64 [R]: f32 [T, R]."""
    TOKENS: tl.constexpr = token.shape[0]
    ROWS: tl.constexpr = row.shape[0]
    block_row = row // n * tl.cdiv(n, 128) + row % n // 128
    total = tl.zeros([TOKENS, ROWS, SPAN // 16], tl.float32)
    for first in range(begin, end, SPAN):
        codes, scale, minimum = DECODE(planes, book, row, block_row, first, blocks, BLOCK, SPAN)
        column = first + tl.arange(0, SPAN)
        some = known[:, None] & (column < k)[None, :]
        values = tl.load(x + token[:, None] * k + column[None, :], mask=some, other=0.0).to(tl.float32)
        products = tl.reshape(values, [TOKENS, 1, SPAN]) * tl.reshape(codes, [1, ROWS, SPAN])
        dots = tl.sum(tl.reshape(products, [TOKENS, ROWS, SPAN // 16, 16]), 3)
        total += dots * tl.reshape(scale, [1, ROWS, SPAN // 16])
        if MINIMUM:
            sums = tl.sum(tl.reshape(values, [TOKENS, SPAN // 16, 16]), 2)
            total -= tl.reshape(sums, [TOKENS, 1, SPAN // 16]) * tl.reshape(minimum, [1, ROWS, SPAN // 16])
    return tl.sum(total, 2)


@triton.jit
def many(
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
):
    """As `few` for T and R of 16 and more. Weights are rounded to x's type."""
    block_row = row // n * tl.cdiv(n, 128) + row % n // 128
    total = tl.zeros([token.shape[0], row.shape[0]], tl.float32)
    for first in range(begin, end, SPAN):
        codes, scale, minimum = DECODE(planes, book, row, block_row, first, blocks, BLOCK, SPAN)
        column = first + tl.arange(0, SPAN)
        some = known[:, None] & (column < k)[None, :]
        values = tl.load(x + token[:, None] * k + column[None, :], mask=some, other=0.0)
        weights = weights_of(codes, scale, minimum, MINIMUM).to(values.dtype)
        total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
    return total
