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
def raw_nibbles(words):
    """Four-bit codes that were masked but not moved: [rows, W, 8] of words and of words shifted by 16, code i at bit i % 4 * 4.

    Read as f32 they are no normal numbers, the code times 2^(i % 4 * 4 - 149), which multiply exactly and as fast as others: one instruction a weight is
    saved, and its conversion. products.lift_of makes up for the powers.
    """
    place = tl.arange(0, 8)
    return spread(words, place // 4 * 16) & (15 << place % 4 * 4)[None, None, :]


@triton.jit
def nibble_codes(
    plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, RAW: tl.constexpr
):
    """Four-bit codes f32 [rows, SPAN]."""
    EACH: tl.constexpr = BLOCK // 8
    if RAW:
        words = stream(plane, row, start * EACH + tl.arange(0, SPAN // 8), blocks * EACH)
        codes = in_order(raw_nibbles(words), CHUNK).to(tl.float32, bitcast=True)
    else:
        codes = nibbles(plane, row, start, blocks, BLOCK, SPAN, CHUNK).to(tl.float32)
    return codes


@triton.jit
def with_high_bits(words, high, BITS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, RAW: tl.constexpr):
    """Codes f32 of four bits in `words` and BITS more in `high`: those of byte b at bit 8 b, of its second code STEP above."""
    place = tl.arange(0, 8)
    byte, second = place // 2, place % 2
    MASK: tl.constexpr = (1 << BITS) - 1
    if RAW:  # to the four bits above: from bit 8 b + STEP s to b % 2 * 8 + s * 4 + 4
        shift = ((4 - STEP) * second)[None, None, :]
        whole = tl.reshape(high, [high.shape[0], high.shape[1], 1])
        moved = tl.where((byte < 2)[None, None, :], whole << (4 + shift), whole >> (12 - shift))
        upper = moved & (MASK << (byte % 2 * 8 + second * 4 + 4))[None, None, :]
        codes = in_order(raw_nibbles(words) | upper, CHUNK).to(tl.float32, bitcast=True)
    else:
        upper = (spread(high, byte * 8 + second * STEP) & MASK) << 4
        codes = in_order((spread(words, place * 4) & 15) | upper, CHUNK).to(tl.float32)
    return codes


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
