"""Device functions that decode each weight type on a GPU, on the planes of soa_layout.py.

All decoders have the same signature, so that a kernel takes one as its constant DECODE. A decoder decodes rows from the
column `first` on (a multiple of SPAN), SPAN columns (a power of two, and a multiple of the block and of 16). It returns
codes f32 [rows, SPAN], scale f32 [rows, SPAN / 16] and minimum f32 [rows, SPAN / 16].

A weight is code * scale - minimum. Scale and minimum are shared by 16 columns, so products are summed before they are
scaled. An offset of all codes (the 8 of Q4_0) is a minimum too. Types without a minimum return their scale in its
place (`dequant.Decoder.minimum` is False). Past the end of a row everything is zero.

`planes` are the fields of the type in the order of soa_layout.FIELDS. `row` int64 [rows] counts the rows of all
matrices, `block_row` their rows of 128 x 128 scales (F8_E4M3); `blocks` is the number of blocks of a row; `codebook` is
the table of values that codes index. With RAW, the types with a `run` in dequant.py return codes in the bit position of
their word, see bit_unpack.mask_raw_nibbles; others ignore it.

In the bodies `start` is the first block of the span; words, groups and entries are counted from there. A group is the
columns that share a scale, an entry the columns that one codebook index stands for.

Formats: ggml-quants.c of llama.cpp by way of gguf-py; ktx.quant.types for ktx's own types. dequant_iq.py has the types
with large codebooks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ktx.kernels.gpu.bit_unpack import (
    add_high_bits,
    load_elements,
    load_nibble_codes,
    load_nibbles,
    load_per_block,
    load_two_per_block,
    order_by_column,
    repeat_scales,
    shift_right,
)


@triton.jit
def floats(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes F32, F16 and BF16: the values are the codes, with scale 1."""
    codes = load_elements(planes[0], row, first + tl.arange(0, SPAN), blocks).to(tl.float32)
    ones = tl.full([codes.shape[0], SPAN // 16], 1.0, tl.float32)
    return codes, ones, ones


@triton.jit
def f8_e4m3(
    planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr
):
    """Decodes F8_E4M3 by arithmetic because GPUs before compute capability 8.9 cannot convert FP8.

    The seven bits are the upper ones of an f32 that is too small by a factor of 2^120. Arguments: see the module's
    docstring; `codebook` and RAW are not used.
    """
    bits = load_elements(planes[0], row, first + tl.arange(0, SPAN), blocks).to(tl.int32)
    codes = (((bits & 128) << 24) | ((bits & 127) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    codes = tl.where((bits & 127) == 127, float("nan"), codes)
    # one scale per 128 x 128 block, returned once per 16 columns; `block_row`: the scales' row
    scale = load_elements(planes[1], block_row, first // 128 + tl.arange(0, SPAN // 16) // 8, tl.cdiv(blocks, 128))
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def eight_bits(
    planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr
):
    """Decodes Q8_0 and INT8_128: signed bytes, and a scale per block."""
    codes = load_elements(planes[0], row, first + tl.arange(0, SPAN), blocks * BLOCK).to(tl.float32)
    scale = load_per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN)
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def four_bits(
    planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr
):
    """Decodes Q4_0, INT4_64 and INT4_128: nibbles with offset 8, and a scale per block."""
    codes = load_nibble_codes(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4, RAW)
    scale = load_per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN)
    return codes, scale, scale * 8


@triton.jit
def q4_1(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q4_1: nibbles, and a scale and a minimum per block.

    The file stores the minimum to add, so its sign changes.
    """
    codes = load_nibble_codes(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4, RAW)
    scale, minimum = load_two_per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN, 16)
    return codes, scale, -minimum


@triton.jit
def load_five_bit_codes(planes, row, start, blocks, SPAN: tl.constexpr):
    """Loads the codes of Q5_0 and Q5_1: bit c of a block's word of high bits is the fifth bit of column c."""
    word = tl.arange(0, SPAN // 8)
    words = load_elements(planes[0], row, start * 4 + word, blocks * 4)
    high = load_elements(planes[1], row, start + word // 4, blocks) >> (word % 4 * 4)[None, :]
    code = tl.arange(0, 8)
    codes = (shift_right(words, code * 4) & 15) | ((shift_right(high, code // 2 + code % 2 * 16) & 1) << 4)
    return order_by_column(codes, 4).to(tl.float32)


@triton.jit
def q5_0(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q5_0: five-bit codes with offset 16, and a scale per block."""
    scale = load_per_block(planes[2], row, first // BLOCK, blocks, BLOCK, SPAN)
    return load_five_bit_codes(planes, row, first // BLOCK, blocks, SPAN), scale, scale * 16


@triton.jit
def q5_1(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q5_1: five-bit codes, and a scale and a minimum per block (to add, so its sign changes)."""
    scale, minimum = load_two_per_block(planes[2], row, first // BLOCK, blocks, BLOCK, SPAN, 16)
    return load_five_bit_codes(planes, row, first // BLOCK, blocks, SPAN), scale, -minimum


@triton.jit
def load_two_bit_codes(plane, row, start, blocks, SPAN: tl.constexpr):
    """Loads the codes of Q2_K, Q3_K and TQ2_0, int32 [rows, W, 16], not yet ordered by column."""
    words = load_elements(plane, row, start * 16 + tl.arange(0, SPAN // 16), blocks * 16)
    return shift_right(words, tl.arange(0, 16) * 2) & 3


@triton.jit
def q2_k(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q2_K: two-bit codes; per 16 columns a byte with four bits of scale and four of minimum."""
    start = first // BLOCK
    codes = order_by_column(load_two_bit_codes(planes[0], row, start, blocks, SPAN), 8).to(tl.float32)
    packed_scales = load_elements(planes[1], row, start * 16 + tl.arange(0, SPAN // 16), blocks * 16).to(tl.int32)
    scale, minimum = load_two_per_block(planes[2], row, start, blocks, BLOCK, SPAN, 16)
    return codes, scale * (packed_scales & 15).to(tl.float32), minimum * (packed_scales >> 4).to(tl.float32)


@triton.jit
def q3_k(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q3_K: codes of two bits and a third one from a mask, with offset 4; 16 six-bit scales."""
    # planes: low codes, mask of third bits, scales, f16 scale of the block
    start = first // BLOCK
    word = tl.arange(0, SPAN // 16)  # a word of codes; its half of the block determines its bits of the mask
    mask = (
        load_elements(planes[1], row, start * 8 + word // 16 * 8 + word % 8, blocks * 8) >> (word // 8 % 2 * 4)[None, :]
    )
    code = tl.arange(0, 16)
    high = shift_right(mask, code // 4 * 8 + code % 4) & 1
    codes = order_by_column(load_two_bit_codes(planes[0], row, start, blocks, SPAN) | (high << 2), 8).to(tl.float32)
    # Scales have six bits: a byte holds the lower four bits of two scales, or the upper two bits of four.
    block, i = start * 12 + word // 16 * 12, word % 16
    low = load_elements(planes[2], row, block + i % 8, blocks * 12).to(tl.int32) >> (i // 8 * 4)[None, :]
    top = load_elements(planes[2], row, block + 8 + i % 4, blocks * 12).to(tl.int32) >> (i // 4 * 2)[None, :]
    factor = ((low & 15) | ((top & 3) << 4)) - 32
    scale = load_per_block(planes[3], row, start, blocks, BLOCK, SPAN) * factor.to(tl.float32)
    return codes, scale, scale * 4


@triton.jit
def load_six_bit_scales(scales, halves, row, start, blocks, SPAN: tl.constexpr):
    """Loads scale and minimum of Q4_K and Q5_K: eight of six bits each in twelve bytes.

    The first four bytes hold scales 0 to 3, the next four minimums 0 to 3, each with the upper two bits of scale or
    minimum i + 4 above its six bits. The last four bytes hold the lower four bits of scale and minimum 4 to 7.
    """
    group = tl.arange(0, SPAN // 32)
    block, i = start * 12 + group // 8 * 12, group % 8
    is_upper_half = (i >= 4)[None, :]
    at_i = load_elements(scales, row, block + i, blocks * 12).to(tl.int32)
    at_i_plus_4 = load_elements(scales, row, block + i + 4, blocks * 12).to(tl.int32)
    at_i_mod_4 = load_elements(scales, row, block + i % 4, blocks * 12).to(tl.int32)
    factor = tl.where(is_upper_half, (at_i_plus_4 & 15) | ((at_i_mod_4 >> 2) & 48), at_i & 63)
    min_factor = tl.where(is_upper_half, (at_i_plus_4 >> 4) | ((at_i >> 2) & 48), at_i_plus_4 & 63)
    scale, minimum = load_two_per_block(halves, row, start, blocks, 256, SPAN, 32)
    return repeat_scales(scale * factor.to(tl.float32)), repeat_scales(minimum * min_factor.to(tl.float32))


@triton.jit
def q4_k(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q4_K: nibbles, and a six-bit scale and minimum per 32 columns."""
    start = first // BLOCK
    codes = load_nibble_codes(planes[0], row, start, blocks, BLOCK, SPAN, 8, RAW)
    scale, minimum = load_six_bit_scales(planes[1], planes[2], row, start, blocks, SPAN)
    return codes, scale, minimum


@triton.jit
def q5_k(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q5_K: as Q4_K, with the fifth bits of the codes in a plane of their own."""
    # planes: low codes, fifth bits, scales and minimums, their f16 factors
    start = first // BLOCK
    word = tl.arange(0, SPAN // 8)
    words = load_elements(planes[0], row, start * 32 + word, blocks * 32)
    high = (
        load_elements(planes[1], row, start * 8 + word // 32 * 8 + word % 8, blocks * 8) >> (word // 8 % 4 * 2)[None, :]
    )
    codes = add_high_bits(words, high, 1, 1, 8, RAW)  # BITS, STEP, CHUNK
    scale, minimum = load_six_bit_scales(planes[2], planes[3], row, start, blocks, SPAN)
    return codes, scale, minimum


@triton.jit
def q6_k(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes Q6_K: codes of four and two bits with offset 32, and a signed scale per 16 columns."""
    # planes: lower bits of codes, upper bits of codes, scales, f16 scale of the block
    start = first // BLOCK
    word = tl.arange(0, SPAN // 8)  # 8 words of high bits belong to 16 words of low bits, and are read twice
    words = load_elements(planes[0], row, start * 32 + word, blocks * 32)
    high = (
        load_elements(planes[1], row, start * 16 + word // 16 * 8 + word % 8, blocks * 16)
        >> (word // 8 % 2 * 2)[None, :]
    )
    codes = add_high_bits(words, high, 2, 4, 16, RAW)  # BITS, STEP, CHUNK
    factor = load_elements(planes[2], row, start * 16 + tl.arange(0, SPAN // 16), blocks * 16).to(tl.float32)
    scale = load_per_block(planes[3], row, start, blocks, BLOCK, SPAN) * factor
    return codes, scale, scale * 32


@triton.jit
def tq1_0(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes TQ1_0: five base-3 digits per byte, stored as a fixed-point fraction; codes have offset 1.

    160 columns are in 32 bytes, 80 in 16 bytes, and 16 in 4 bytes of four digits. A byte is digits / 3^5 in units of
    1/256: multiplying by 3^digit and dropping the integer part brings that digit to the front.
    """
    column = tl.arange(0, SPAN)
    c = column % 256
    byte = tl.where(c < 160, c % 32, tl.where(c < 240, 32 + c % 16, 48 + c % 4))
    digit = tl.where(c < 160, c // 32, tl.where(c < 240, (c - 160) // 16, (c - 240) // 4))
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    start = first // BLOCK
    value = load_elements(planes[0], row, start * 52 + column // 256 * 52 + byte, blocks * 52).to(tl.int32)
    codes = ((value * power[None, :]) & 255) * 3 >> 8
    scale = load_per_block(planes[1], row, start, blocks, BLOCK, SPAN)
    return codes.to(tl.float32), scale, scale


@triton.jit
def tq2_0(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes TQ2_0: two-bit codes 0, 1, 2 with offset 1, so the minimum is the scale."""
    start = first // BLOCK
    codes = order_by_column(load_two_bit_codes(planes[0], row, start, blocks, SPAN), 8).to(tl.float32)
    scale = load_per_block(planes[1], row, start, blocks, BLOCK, SPAN)
    return codes, scale, scale


@triton.jit
def iq4_nl(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes IQ4_NL: nibbles that index a codebook of 16 values, and a scale per block."""
    codes = tl.load(codebook + load_nibbles(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4)).to(tl.float32)
    scale = load_per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN)
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def iq4_xs(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes IQ4_XS: as IQ4_NL, with a six-bit scale per 32 columns, stored as four and two bits."""
    # planes: codes, lower bits of scales, f16 scale of the block, upper bits of scales
    start = first // BLOCK
    codes = tl.load(codebook + load_nibbles(planes[0], row, start, blocks, 256, SPAN, 4)).to(tl.float32)
    group = tl.arange(0, SPAN // 32)
    low = load_elements(planes[1], row, start * 4 + group // 2, blocks * 4).to(tl.int32) >> (group % 2 * 4)[None, :]
    top = load_elements(planes[3], row, start + group // 8, blocks).to(tl.int32) >> (group % 8 * 2)[None, :]
    factor = ((low & 15) | ((top & 3) << 4)) - 32
    scale = load_per_block(planes[2], row, start, blocks, BLOCK, SPAN) * repeat_scales(factor.to(tl.float32))
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def mxfp4(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes MXFP4: nibbles that index the FP4 values, and the exponent e of a power of two per block.

    The codebook has the doubled values, so the scale is 2^(e - 128); for the two smallest exponents it is a subnormal
    f32.
    """
    codes = tl.load(codebook + load_nibbles(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4)).to(tl.float32)
    exponent = load_elements(planes[1], row, first // BLOCK + tl.arange(0, SPAN // 16) // 2, blocks).to(tl.int32)
    scale = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23).to(tl.float32, bitcast=True)
    return codes, scale, scale  # no minimum: the third result is not read
