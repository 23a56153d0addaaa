"""What the bytes of a packed row mean on a GPU: a device function for each weight type, on the planes of planes.py.

A decoder takes `first` (a column, multiple of SPAN), SPAN columns (a power of two, multiple of the block and of 16) and rows, and gives
    codes f32 [rows, SPAN], scale f32 [rows, SPAN / 16], minimum f32 [rows, SPAN / 16]
so that a weight is code * scale - minimum, 16 columns sharing the latter two: products are summed up before they are scaled. An offset of all
codes (the 8 of Q4_0) is a minimum too. Types without one give their scale in its place (dequant.py tells which). Past the end of a row all are zero.

`row` int64 [rows] counts the rows of all matrices, `block_row` their rows of 128 x 128 scales (F8_E4M3); `blocks` are a row's. `book` is a code book.
With RAW the types that have a `run` in dequant.py give codes as they stand in their word, see streams.raw_nibbles; others take no notice.
Formats: ggml-quants.c of llama.cpp by way of gguf-py, own ones ktx.quant.types. The types with large code books are in code_books.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ktx.kernels.gpu.bit_unpack import (
    in_order,
    nibble_codes,
    nibbles,
    per_block,
    spread,
    stream,
    twice,
    two_per_block,
    with_high_bits,
)


@triton.jit
def floats(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    codes = stream(planes[0], row, first + tl.arange(0, SPAN), blocks).to(tl.float32)
    ones = tl.full([codes.shape[0], SPAN // 16], 1.0, tl.float32)
    return codes, ones, ones


@triton.jit
def f8_e4m3(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """By arithmetic, because cards before 8.9 convert no FP8: the seven bits are the upper ones of an f32 that is 2^120 times too small."""
    byte = stream(planes[0], row, first + tl.arange(0, SPAN), blocks).to(tl.int32)
    codes = (((byte & 128) << 24) | ((byte & 127) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    codes = tl.where((byte & 127) == 127, float("nan"), codes)
    scale = stream(planes[1], block_row, first // 128 + tl.arange(0, SPAN // 16) // 8, tl.cdiv(blocks, 128))
    return codes, scale, scale


@triton.jit
def eight_bits(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    codes = stream(planes[0], row, first + tl.arange(0, SPAN), blocks * BLOCK).to(tl.float32)
    scale = per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN)
    return codes, scale, scale


@triton.jit
def four_bits(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    codes = nibble_codes(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4, RAW)
    scale = per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN)
    return codes, scale, scale * 8


@triton.jit
def q4_1(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    codes = nibble_codes(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4, RAW)
    scale, least = two_per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN, 16)
    return codes, scale, -least


@triton.jit
def five_bits(planes, row, start, blocks, SPAN: tl.constexpr):
    """The codes of Q5_0 and Q5_1: bit c of a block's word is column c's fifth."""
    at = tl.arange(0, SPAN // 8)
    words = stream(planes[0], row, start * 4 + at, blocks * 4)
    high = stream(planes[1], row, start + at // 4, blocks) >> (at % 4 * 4)[None, :]
    place = tl.arange(0, 8)
    codes = (spread(words, place * 4) & 15) | ((spread(high, place // 2 + place % 2 * 16) & 1) << 4)
    return in_order(codes, 4).to(tl.float32)


@triton.jit
def q5_0(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    scale = per_block(planes[2], row, first // BLOCK, blocks, BLOCK, SPAN)
    return five_bits(planes, row, first // BLOCK, blocks, SPAN), scale, scale * 16


@triton.jit
def q5_1(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    scale, least = two_per_block(planes[2], row, first // BLOCK, blocks, BLOCK, SPAN, 16)
    return five_bits(planes, row, first // BLOCK, blocks, SPAN), scale, -least


@triton.jit
def two_bits(plane, row, start, blocks, SPAN: tl.constexpr):
    """The codes of Q2_K, Q3_K and TQ2_0, int32 [rows, W, 16] not yet in order."""
    words = stream(plane, row, start * 16 + tl.arange(0, SPAN // 16), blocks * 16)
    return spread(words, tl.arange(0, 16) * 2) & 3


@triton.jit
def q2_k(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    start = first // BLOCK
    codes = in_order(two_bits(planes[0], row, start, blocks, SPAN), 8).to(tl.float32)
    both = stream(planes[1], row, start * 16 + tl.arange(0, SPAN // 16), blocks * 16).to(tl.int32)
    scale, least = two_per_block(planes[2], row, start, blocks, BLOCK, SPAN, 16)
    return codes, scale * (both & 15).to(tl.float32), least * (both >> 4).to(tl.float32)


@triton.jit
def q3_k(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    start = first // BLOCK
    at = tl.arange(0, SPAN // 16)  # a word of codes; its half of the block says which bits of the mask are its
    mask = stream(planes[1], row, start * 8 + at // 16 * 8 + at % 8, blocks * 8) >> (at // 8 % 2 * 4)[None, :]
    place = tl.arange(0, 16)
    high = spread(mask, place // 4 * 8 + place % 4) & 1
    codes = in_order(two_bits(planes[0], row, start, blocks, SPAN) | (high << 2), 8).to(tl.float32)
    block, i = (
        start * 12 + at // 16 * 12,
        at % 16,
    )  # six bits a scale: the lower four of two scales, or the upper two of four, a byte
    low = stream(planes[2], row, block + i % 8, blocks * 12).to(tl.int32) >> (i // 8 * 4)[None, :]
    top = stream(planes[2], row, block + 8 + i % 4, blocks * 12).to(tl.int32) >> (i // 4 * 2)[None, :]
    factor = ((low & 15) | ((top & 3) << 4)) - 32
    scale = per_block(planes[3], row, start, blocks, BLOCK, SPAN) * factor.to(tl.float32)
    return codes, scale, scale * 4


@triton.jit
def six_bit_scales(scales, halves, row, start, blocks, SPAN: tl.constexpr):
    """Scale and minimum of Q4_K and Q5_K: eight of six bits each in twelve bytes, the upper bits of the last four above the first four."""
    part = tl.arange(0, SPAN // 32)
    block, i = start * 12 + part // 8 * 12, part % 8
    late = (i >= 4)[None, :]
    own = stream(scales, row, block + i, blocks * 12).to(tl.int32)
    later = stream(scales, row, block + i + 4, blocks * 12).to(tl.int32)
    above = stream(scales, row, block + i % 4, blocks * 12).to(tl.int32)
    factor = tl.where(late, (later & 15) | ((above >> 2) & 48), own & 63)
    lower = tl.where(late, (later >> 4) | ((own >> 2) & 48), later & 63)
    scale, least = two_per_block(halves, row, start, blocks, 256, SPAN, 32)
    return twice(scale * factor.to(tl.float32)), twice(least * lower.to(tl.float32))


@triton.jit
def q4_k(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    start = first // BLOCK
    codes = nibble_codes(planes[0], row, start, blocks, BLOCK, SPAN, 8, RAW)
    scale, minimum = six_bit_scales(planes[1], planes[2], row, start, blocks, SPAN)
    return codes, scale, minimum


@triton.jit
def q5_k(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    start = first // BLOCK
    at = tl.arange(0, SPAN // 8)
    words = stream(planes[0], row, start * 32 + at, blocks * 32)
    high = stream(planes[1], row, start * 8 + at // 32 * 8 + at % 8, blocks * 8) >> (at // 8 % 4 * 2)[None, :]
    codes = with_high_bits(words, high, 1, 1, 8, RAW)
    scale, minimum = six_bit_scales(planes[2], planes[3], row, start, blocks, SPAN)
    return codes, scale, minimum


@triton.jit
def q6_k(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    start = first // BLOCK
    at = tl.arange(0, SPAN // 8)  # 16 words of low bits go with 8 words of high bits, which are read twice
    words = stream(planes[0], row, start * 32 + at, blocks * 32)
    high = stream(planes[1], row, start * 16 + at // 16 * 8 + at % 8, blocks * 16) >> (at // 8 % 2 * 2)[None, :]
    codes = with_high_bits(words, high, 2, 4, 16, RAW)
    factor = stream(planes[2], row, start * 16 + tl.arange(0, SPAN // 16), blocks * 16).to(tl.float32)
    scale = per_block(planes[3], row, start, blocks, BLOCK, SPAN) * factor
    return codes, scale, scale * 32


@triton.jit
def tq1_0(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Five digits of base three a byte as a fixed-point fraction: 160 columns in 32 bytes, 80 in 16, 16 in 4 of four digits."""
    column = tl.arange(0, SPAN)
    c = column % 256
    byte = tl.where(c < 160, c % 32, tl.where(c < 240, 32 + c % 16, 48 + c % 4))
    digit = tl.where(c < 160, c // 32, tl.where(c < 240, (c - 160) // 16, (c - 240) // 4))
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    start = first // BLOCK
    value = stream(planes[0], row, start * 52 + column // 256 * 52 + byte, blocks * 52).to(tl.int32)
    codes = ((value * power[None, :]) & 255) * 3 >> 8
    scale = per_block(planes[1], row, start, blocks, BLOCK, SPAN)
    return codes.to(tl.float32), scale, scale


@triton.jit
def tq2_0(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    start = first // BLOCK
    codes = in_order(two_bits(planes[0], row, start, blocks, SPAN), 8).to(tl.float32)
    scale = per_block(planes[1], row, start, blocks, BLOCK, SPAN)
    return codes, scale, scale


@triton.jit
def iq4_nl(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    codes = tl.load(book + nibbles(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4)).to(tl.float32)
    scale = per_block(planes[1], row, first // BLOCK, blocks, BLOCK, SPAN)
    return codes, scale, scale


@triton.jit
def iq4_xs(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    start = first // BLOCK
    codes = tl.load(book + nibbles(planes[0], row, start, blocks, 256, SPAN, 4)).to(tl.float32)
    part = tl.arange(0, SPAN // 32)
    low = stream(planes[1], row, start * 4 + part // 2, blocks * 4).to(tl.int32) >> (part % 2 * 4)[None, :]
    top = stream(planes[3], row, start + part // 8, blocks).to(tl.int32) >> (part % 8 * 2)[None, :]
    factor = ((low & 15) | ((top & 3) << 4)) - 32
    scale = per_block(planes[2], row, start, blocks, BLOCK, SPAN) * twice(factor.to(tl.float32))
    return codes, scale, scale


@triton.jit
def mxfp4(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Codes are doubled, so the scale is 2^(e - 128); the two least of them are no normal f32."""
    codes = tl.load(book + nibbles(planes[0], row, first // BLOCK, blocks, BLOCK, SPAN, 4)).to(tl.float32)
    e = stream(planes[1], row, first // BLOCK + tl.arange(0, SPAN // 16) // 2, blocks).to(tl.int32)
    scale = tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23).to(tl.float32, bitcast=True)
    return codes, scale, scale
