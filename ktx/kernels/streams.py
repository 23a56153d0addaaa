"""How a GPU kernel reads planes of packed weights (planes.py), and brings codes of a few bits into the order of columns.

Words are loaded as they lie, four to a lane, and spread in registers: `spread` gives a word's codes, `in_order` lays them out by columns, where a chunk of
words holds the first codes of all its bytes, then the second ones. Reshapes and permutations move nothing between lanes as long as a lane's words stay its own.
A span begins at a block, `start`; what is added to start times a constant is the same for every span, so it is computed once and the compiler sees what divides an address.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stream(plane, row, at, length):
    """Elements `at` [L] of rows of `length` elements: [rows, L], zero from the end on."""
    return tl.load(plane + (row[:, None] * length + at[None, :]), mask=(at < length)[None, :], other=0)


@triton.jit
def spread(words, shifts):
    """int32 [rows, W] shifted right by each of [S]: [rows, W, S]."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    return tl.reshape(words, [ROWS, WORDS, 1]) >> shifts[None, None, :]


@triton.jit
def in_order(codes, CHUNK: tl.constexpr):
    """[rows, W, 4 bytes x codes of a byte] -> columns [rows, ...]; CHUNK words hold a run of columns."""
    ROWS: tl.constexpr = codes.shape[0]
    WORDS: tl.constexpr = codes.shape[1]
    EACH: tl.constexpr = codes.shape[2] // 4
    apart = tl.permute(tl.reshape(codes, [ROWS, WORDS // CHUNK, CHUNK, 4, EACH]), (0, 1, 4, 2, 3))
    return tl.reshape(apart, [ROWS, WORDS * 4 * EACH])


@triton.jit
def nibbles(plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Four-bit codes int32 [rows, SPAN]."""
    EACH: tl.constexpr = BLOCK // 8
    words = stream(plane, row, start * EACH + tl.arange(0, SPAN // 8), blocks * EACH)
    return in_order(spread(words, tl.arange(0, 8) * 4) & 15, CHUNK)


@triton.jit
def per_block(plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """One number a block as f32 [rows, SPAN / 16]."""
    return stream(plane, row, start + tl.arange(0, SPAN // 16) // (BLOCK // 16), blocks).to(tl.float32)


@triton.jit
def two_per_block(plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, SHARE: tl.constexpr):
    """Two numbers a block, each f32 [rows, SPAN / SHARE]."""
    at = start * 2 + tl.arange(0, SPAN // SHARE) // (BLOCK // SHARE) * 2
    return stream(plane, row, at, blocks * 2).to(tl.float32), stream(plane, row, at + 1, blocks * 2).to(tl.float32)


@triton.jit
def twice(scale):
    """[rows, G] of 32 columns each -> [rows, 2 G] of 16."""
    ROWS: tl.constexpr = scale.shape[0]
    GROUPS: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.broadcast_to(tl.reshape(scale, [ROWS, GROUPS, 1]), [ROWS, GROUPS, 2]), [ROWS, 2 * GROUPS])
