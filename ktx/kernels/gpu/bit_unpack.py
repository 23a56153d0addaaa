"""Reading planes of packed weights (soa_layout.py) in GPU kernels, and ordering codes of a few bits by column.

Words (32 bits of packed codes) are loaded in memory order, four to a lane, and unpacked in registers: `shift_right`
returns the codes of a word and `order_by_column` orders them by column, where a chunk of words holds the first codes of
all its bytes, then the second codes. Reshapes and permutations move nothing between lanes as long as the words of a
lane stay in that lane.

A span is the SPAN columns that one step decodes; it begins at block `start` of a row of `blocks` blocks. Addresses are
written as a multiple of `start` plus an offset that is equal for all spans: the offset is computed once, and the
compiler can see which power of two divides an address. W is the number of words of a span, CHUNK the number of words of
a chunk, RAW as in dequant_blocks.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_elements(plane, row, index, length):
    """Loads elements `index` [L] of rows of `length` elements: [rows, L], zero past the end of a row."""
    return tl.load(plane + (row[:, None] * length + index[None, :]), mask=(index < length)[None, :], other=0)


@triton.jit
def shift_right(words, shifts):
    """Shifts int32 [rows, W] right by each of `shifts` [S]: [rows, W, S]."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    return tl.reshape(words, [ROWS, WORDS, 1]) >> shifts[None, None, :]


@triton.jit
def order_by_column(codes, CHUNK: tl.constexpr):
    """Orders codes [rows, W, 4 bytes x codes of a byte] by column: [rows, columns].

    CHUNK words hold a run of columns: the first codes of all their bytes, then the second codes, and so on.
    """
    ROWS: tl.constexpr = codes.shape[0]
    WORDS: tl.constexpr = codes.shape[1]
    CODES_PER_BYTE: tl.constexpr = codes.shape[2] // 4
    by_column = tl.permute(tl.reshape(codes, [ROWS, WORDS // CHUNK, CHUNK, 4, CODES_PER_BYTE]), (0, 1, 4, 2, 3))
    return tl.reshape(by_column, [ROWS, WORDS * 4 * CODES_PER_BYTE])


@triton.jit
def load_nibbles(plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Loads four-bit codes in the order of the columns, int32 [rows, SPAN]."""
    WORDS_PER_BLOCK: tl.constexpr = BLOCK // 8
    words = load_elements(plane, row, start * WORDS_PER_BLOCK + tl.arange(0, SPAN // 8), blocks * WORDS_PER_BLOCK)
    return order_by_column(shift_right(words, tl.arange(0, 8) * 4) & 15, CHUNK)


@triton.jit
def mask_raw_nibbles(words):
    """Masks four-bit codes without shifting them: int32 [rows, W, 8].

    The first four codes are from the words, the others from the words shifted by 16; code i is at bit i % 4 * 4. Read
    as f32 they are subnormal numbers, the code times 2^(i % 4 * 4 - 149), which are multiplied exactly and as fast as
    normal numbers. This saves one instruction per weight, and its conversion. quant_matmul.make_raw_code_factors
    compensates the powers of two.
    """
    index = tl.arange(0, 8)
    return shift_right(words, index // 4 * 16) & (15 << index % 4 * 4)[None, None, :]


@triton.jit
def load_nibble_codes(
    plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, RAW: tl.constexpr
):
    """Loads four-bit codes as f32 [rows, SPAN], in the order of the columns.

    With RAW they are neither shifted nor converted, which saves instructions: see mask_raw_nibbles.
    """
    WORDS_PER_BLOCK: tl.constexpr = BLOCK // 8
    if RAW:
        words = load_elements(plane, row, start * WORDS_PER_BLOCK + tl.arange(0, SPAN // 8), blocks * WORDS_PER_BLOCK)
        codes = order_by_column(mask_raw_nibbles(words), CHUNK).to(tl.float32, bitcast=True)
    else:
        codes = load_nibbles(plane, row, start, blocks, BLOCK, SPAN, CHUNK).to(tl.float32)
    return codes


@triton.jit
def add_high_bits(words, high, BITS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, RAW: tl.constexpr):
    """Combines four-bit codes in `words` with BITS more bits each in `high`: f32 [rows, columns].

    Q5_K and Q6_K store their codes in these two parts. The high bits of the first code of byte b are at bit 8 * b of
    `high`, those of its second code STEP bits above.
    """
    index = tl.arange(0, 8)
    byte, second = index // 2, index % 2
    MASK: tl.constexpr = (1 << BITS) - 1
    if RAW:  # high bits of code s of byte b move from bit 8 b + STEP s to bit b % 2 * 8 + s * 4 + 4
        shift = ((4 - STEP) * second)[None, None, :]
        high_words = tl.reshape(high, [high.shape[0], high.shape[1], 1])
        aligned = tl.where((byte < 2)[None, None, :], high_words << (4 + shift), high_words >> (12 - shift))
        upper = aligned & (MASK << (byte % 2 * 8 + second * 4 + 4))[None, None, :]
        codes = order_by_column(mask_raw_nibbles(words) | upper, CHUNK).to(tl.float32, bitcast=True)
    else:
        upper = (shift_right(high, byte * 8 + second * STEP) & MASK) << 4
        codes = order_by_column((shift_right(words, index * 4) & 15) | upper, CHUNK).to(tl.float32)
    return codes


@triton.jit
def load_per_block(plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Loads one number per block as f32 [rows, SPAN / 16]."""
    return load_elements(plane, row, start + tl.arange(0, SPAN // 16) // (BLOCK // 16), blocks).to(tl.float32)


@triton.jit
def load_two_per_block(plane, row, start, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads two numbers per block, such as a scale and a minimum: each f32 [rows, SPAN / COLUMNS]."""
    index = start * 2 + tl.arange(0, SPAN // COLUMNS) // (BLOCK // COLUMNS) * 2
    first = load_elements(plane, row, index, blocks * 2).to(tl.float32)
    second = load_elements(plane, row, index + 1, blocks * 2).to(tl.float32)
    return first, second


@triton.jit
def repeat_scales(scale):
    """Repeats scales [rows, G] of 32 columns each to [rows, 2 G] of 16 columns each."""
    ROWS: tl.constexpr = scale.shape[0]
    GROUPS: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.broadcast_to(tl.reshape(scale, [ROWS, GROUPS, 1]), [ROWS, GROUPS, 2]), [ROWS, 2 * GROUPS])
