"""The IQ types on a GPU: decoders as in decode.py, over the code books of books.py. The values that an entry names places of come of arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl

from ktx.kernels.gpu.bit_unpack import per_block, stream


@triton.jit
def places(book, index, EACH: tl.constexpr):
    """The entries of indices [rows, E] -> places of their weights [rows, E, EACH]."""
    ROWS: tl.constexpr = index.shape[0]
    ENTRIES: tl.constexpr = index.shape[1]
    entry = tl.reshape(tl.load(book + index), [ROWS, ENTRIES, 1])
    return (entry >> (tl.arange(0, EACH) * (16 // EACH))[None, None, :]) & (3 if EACH == 8 else 15)


@triton.jit
def signed(values, signs):
    """int32 [rows, E, EACH] with the signs of [rows, E] (bit i for weight i) -> f32 columns [rows, E x EACH]."""
    ROWS: tl.constexpr = values.shape[0]
    ENTRIES: tl.constexpr = values.shape[1]
    EACH: tl.constexpr = values.shape[2]
    bit = (tl.reshape(signs, [ROWS, ENTRIES, 1]) >> tl.arange(0, EACH)[None, None, :]) & 1
    return tl.reshape(tl.where(bit == 1, -values, values).to(tl.float32), [ROWS, ENTRIES * EACH])


@triton.jit
def eighth(seven):
    """Seven signs of eight; the eighth makes their number even."""
    odd = seven ^ (seven >> 4)
    odd = odd ^ (odd >> 2)
    odd = odd ^ (odd >> 1)
    return seven | ((odd & 1) << 7)


@triton.jit
def of_three(place):
    """The values of IQ2's books: 8, 25, 43."""
    return 8 + 17 * place + (place >> 1)


@triton.jit
def nibble_scale(plane, half, row, start, blocks, SPAN: tl.constexpr):
    """The scales of IQ2_XS and IQ2_S: four bits for 16 columns."""
    group = tl.arange(0, SPAN // 16)
    factor = (stream(plane, row, start * 8 + group // 2, blocks * 8).to(tl.int32) >> (group % 2 * 4)[None, :]) & 15
    return per_block(half, row, start, blocks, 256, SPAN) * (0.5 + factor.to(tl.float32)) * 0.25


@triton.jit
def iq2_xxs(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Pairs of words for 32 columns: four indices; four times seven signs below a scale of four bits."""
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    part, i = entry // 4, entry % 4
    index = (stream(planes[0], row, start * 16 + part * 2, blocks * 16) >> (i * 8)[None, :]) & 255
    seven = (stream(planes[0], row, start * 16 + part * 2 + 1, blocks * 16) >> (i * 7)[None, :]) & 127
    codes = signed(of_three(places(book, index, 8)), eighth(seven))
    factor = (stream(planes[0], row, start * 16 + tl.arange(0, SPAN // 16) // 2 * 2 + 1, blocks * 16) >> 28) & 15
    scale = per_block(planes[1], row, start, blocks, BLOCK, SPAN) * (0.5 + factor.to(tl.float32)) * 0.25
    return codes, scale, scale


@triton.jit
def iq2_xs(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Nine bits of index and seven signs for eight columns."""
    start = first // BLOCK
    word = stream(planes[0], row, start * 32 + tl.arange(0, SPAN // 8), blocks * 32).to(tl.int32)
    codes = signed(of_three(places(book, word & 511, 8)), eighth((word >> 9) & 127))
    scale = nibble_scale(planes[1], planes[2], row, start, blocks, SPAN)
    return codes, scale, scale


@triton.jit
def iq2_s(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Ten bits of index, two of them apart, and eight signs for eight columns."""
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    top = stream(planes[2], row, start * 8 + entry // 4, blocks * 8).to(tl.int32) >> (entry % 4 * 2)[None, :]
    index = stream(planes[0], row, start * 32 + entry, blocks * 32).to(tl.int32) | ((top & 3) << 8)
    signs = stream(planes[1], row, start * 32 + entry, blocks * 32).to(tl.int32)
    codes = signed(of_three(places(book, index, 8)), signs)
    scale = nibble_scale(planes[3], planes[4], row, start, blocks, SPAN)
    return codes, scale, scale


@triton.jit
def iq3_xxs(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """An index for four columns; a word for 32: four times seven signs below a scale of four bits. Values 4, 12, ... 52, 62."""
    start, entry = first // BLOCK, tl.arange(0, SPAN // 4)
    place = places(book, stream(planes[0], row, start * 64 + entry, blocks * 64).to(tl.int32), 4)
    seven = (stream(planes[1], row, start * 8 + entry // 8, blocks * 8) >> (entry // 2 % 4 * 7)[None, :]) & 127
    codes = signed(4 + 8 * place + tl.where(place == 7, 2, 0), eighth(seven) >> (entry % 2 * 4)[None, :])
    factor = (stream(planes[1], row, start * 8 + tl.arange(0, SPAN // 16) // 2, blocks * 8) >> 28) & 15
    scale = per_block(planes[2], row, start, blocks, BLOCK, SPAN) * (0.5 + factor.to(tl.float32)) * 0.5
    return codes, scale, scale


@triton.jit
def iq3_s(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Nine bits of index for four columns, one of them apart; a sign a column; four bits of scale for 32. Values 1, 3, ... 15."""
    start, entry = first // BLOCK, tl.arange(0, SPAN // 4)
    top = (stream(planes[2], row, start * 8 + entry // 8, blocks * 8).to(tl.int32) >> (entry % 8)[None, :]) & 1
    place = places(book, stream(planes[0], row, start * 64 + entry, blocks * 64).to(tl.int32) | (top << 8), 4)
    signs = stream(planes[1], row, start * 32 + entry // 2, blocks * 32).to(tl.int32) >> (entry % 2 * 4)[None, :]
    part = tl.arange(0, SPAN // 16) // 2
    factor = (stream(planes[3], row, start * 4 + part // 2, blocks * 4).to(tl.int32) >> (part % 2 * 4)[None, :]) & 15
    scale = per_block(planes[4], row, start, blocks, BLOCK, SPAN) * (1 + 2 * factor).to(tl.float32)
    return signed(1 + 2 * place, signs), scale, scale


@triton.jit
def iq1_s(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Places less one are -1, 0, 1. A half word for 32 columns: three upper bits of each of four indices, three of scale, and the sign of an eighth that all get."""
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    top = stream(planes[1], row, start * 8 + entry // 4, blocks * 8).to(tl.int32) >> (entry % 4 * 3)[None, :]
    index = stream(planes[0], row, start * 32 + entry, blocks * 32).to(tl.int32) | ((top & 7) << 8)
    codes = tl.reshape(places(book, index, 8).to(tl.float32), [row.shape[0], SPAN])
    about = stream(planes[1], row, start * 8 + tl.arange(0, SPAN // 16) // 2, blocks * 8).to(tl.int32)
    scale = per_block(planes[2], row, start, blocks, BLOCK, SPAN) * (2 * ((about >> 12) & 7) + 1).to(tl.float32)
    return codes, scale, scale * tl.where(about < 0, 1.125, 0.875)


@triton.jit
def iq1_m(planes, book, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """As IQ1_S, the upper bits and the eighth's sign in four bits for eight columns; a half float's nibbles stand above scales of three bits for 16."""
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    top = stream(planes[1], row, start * 16 + entry // 2, blocks * 16).to(tl.int32) >> (entry % 2 * 4)[None, :]
    place = places(book, stream(planes[0], row, start * 32 + entry, blocks * 32).to(tl.int32) | ((top & 7) << 8), 8)
    less = tl.where((top & 8) != 0, 1.125, 0.875)
    codes = tl.reshape(place.to(tl.float32) - tl.reshape(less, [row.shape[0], SPAN // 8, 1]), [row.shape[0], SPAN])
    group = tl.arange(0, SPAN // 16)
    block = start * 4 + group // 16 * 4
    factor = (stream(planes[2], row, block + group % 16 // 4, blocks * 4).to(tl.int32) >> (group % 4 * 3)[None, :]) & 7
    bits = nibble_of_half(planes[2], row, block, 0, blocks) | nibble_of_half(planes[2], row, block, 1, blocks)
    bits |= nibble_of_half(planes[2], row, block, 2, blocks) | nibble_of_half(planes[2], row, block, 3, blocks)
    scale = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (2 * factor + 1).to(tl.float32)
    return codes, scale, scale


@triton.jit
def nibble_of_half(plane, row, block, AT: tl.constexpr, blocks):
    """The top nibble of a block's half word AT, where it stands in the block's half float."""
    return ((stream(plane, row, block + AT, blocks * 4).to(tl.int32) >> 12) & 15) << (4 * AT)
