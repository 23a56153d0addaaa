"""Decoders of the IQ types with large codebooks, as in dequant_blocks.py, on the codebooks of iq_codebooks.py.

A codebook index stands for four or eight weights. An entry of a codebook holds for each of these weights the index of
its value in a short list (8, 25, 43 for IQ2). The values are computed from these indices; signs are applied after that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ktx.kernels.gpu.bit_unpack import load_elements, load_per_block


@triton.jit
def load_indices(codebook, index, WIDTH: tl.constexpr):
    """Loads codebook entries [rows, E] and returns the value index of each weight: [rows, E, WIDTH]."""
    ROWS: tl.constexpr = index.shape[0]
    ENTRIES: tl.constexpr = index.shape[1]
    entry = tl.reshape(tl.load(codebook + index), [ROWS, ENTRIES, 1])
    return (entry >> (tl.arange(0, WIDTH) * (16 // WIDTH))[None, None, :]) & (3 if WIDTH == 8 else 15)


@triton.jit
def apply_signs(values, signs):
    """Applies signs [rows, E] (bit i for weight i) to int32 [rows, E, WIDTH] -> f32 [rows, E * WIDTH]."""
    ROWS: tl.constexpr = values.shape[0]
    ENTRIES: tl.constexpr = values.shape[1]
    WIDTH: tl.constexpr = values.shape[2]
    bit = (tl.reshape(signs, [ROWS, ENTRIES, 1]) >> tl.arange(0, WIDTH)[None, None, :]) & 1
    return tl.reshape(tl.where(bit == 1, -values, values).to(tl.float32), [ROWS, ENTRIES * WIDTH])


@triton.jit
def add_eighth_sign(signs):
    """Adds the eighth sign to seven signs, which the files omit: the number of negative signs is even.

    The XOR of the seven bits, folded in three steps, is the parity and so the eighth sign.
    """
    parity = signs ^ (signs >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return signs | ((parity & 1) << 7)


@triton.jit
def compute_iq2_values(index):
    """Returns the values of IQ2's codebooks: 8, 25, 43."""
    return 8 + 17 * index + (index >> 1)


@triton.jit
def load_nibble_scales(plane, half, row, start, blocks, SPAN: tl.constexpr):
    """Loads the scales of IQ2_XS and IQ2_S: four bits per 16 columns."""
    group = tl.arange(0, SPAN // 16)
    factor = (
        load_elements(plane, row, start * 8 + group // 2, blocks * 8).to(tl.int32) >> (group % 2 * 4)[None, :]
    ) & 15
    return load_per_block(half, row, start, blocks, 256, SPAN) * (0.5 + factor.to(tl.float32)) * 0.25


@triton.jit
def iq2_xxs(
    planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr
):
    """Decodes IQ2_XXS: two words per 32 columns.

    The first word holds four codebook indices, the second four times seven signs below a scale of four bits.
    """
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    group, i = entry // 4, entry % 4
    index = (load_elements(planes[0], row, start * 16 + group * 2, blocks * 16) >> (i * 8)[None, :]) & 255
    signs = (load_elements(planes[0], row, start * 16 + group * 2 + 1, blocks * 16) >> (i * 7)[None, :]) & 127
    codes = apply_signs(compute_iq2_values(load_indices(codebook, index, 8)), add_eighth_sign(signs))
    factor = (load_elements(planes[0], row, start * 16 + tl.arange(0, SPAN // 16) // 2 * 2 + 1, blocks * 16) >> 28) & 15
    scale = load_per_block(planes[1], row, start, blocks, BLOCK, SPAN) * (0.5 + factor.to(tl.float32)) * 0.25
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def iq2_xs(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes IQ2_XS: nine bits of codebook index and seven signs per eight columns."""
    start = first // BLOCK
    word = load_elements(planes[0], row, start * 32 + tl.arange(0, SPAN // 8), blocks * 32).to(tl.int32)
    codes = apply_signs(compute_iq2_values(load_indices(codebook, word & 511, 8)), add_eighth_sign((word >> 9) & 127))
    scale = load_nibble_scales(planes[1], planes[2], row, start, blocks, SPAN)
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def iq2_s(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes IQ2_S: ten bits of codebook index, two of them stored separately, and eight signs per eight columns."""
    # planes: low index bytes, signs, high index bits, scales, f16 scale of the block
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    high_bits = (
        load_elements(planes[2], row, start * 8 + entry // 4, blocks * 8).to(tl.int32) >> (entry % 4 * 2)[None, :]
    )
    index = load_elements(planes[0], row, start * 32 + entry, blocks * 32).to(tl.int32) | ((high_bits & 3) << 8)
    signs = load_elements(planes[1], row, start * 32 + entry, blocks * 32).to(tl.int32)
    codes = apply_signs(compute_iq2_values(load_indices(codebook, index, 8)), signs)
    scale = load_nibble_scales(planes[3], planes[4], row, start, blocks, SPAN)
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def iq3_xxs(
    planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr
):
    """Decodes IQ3_XXS: a codebook index per four columns, and a word per 32 columns.

    The word holds four times seven signs below a scale of four bits. The values are 4, 12, ... 52, 62.
    """
    # planes: indices, words of signs and scales, f16 scale of the block
    start, entry = first // BLOCK, tl.arange(0, SPAN // 4)
    value_index = load_indices(codebook, load_elements(planes[0], row, start * 64 + entry, blocks * 64).to(tl.int32), 4)
    signs = (load_elements(planes[1], row, start * 8 + entry // 8, blocks * 8) >> (entry // 2 % 4 * 7)[None, :]) & 127
    codes = apply_signs(
        4 + 8 * value_index + tl.where(value_index == 7, 2, 0), add_eighth_sign(signs) >> (entry % 2 * 4)[None, :]
    )
    factor = (load_elements(planes[1], row, start * 8 + tl.arange(0, SPAN // 16) // 2, blocks * 8) >> 28) & 15
    scale = load_per_block(planes[2], row, start, blocks, BLOCK, SPAN) * (0.5 + factor.to(tl.float32)) * 0.5
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def iq3_s(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes IQ3_S: nine bits of codebook index per four columns, one of them stored separately.

    Each column has a sign, and 32 columns a scale of four bits. The values are 1, 3, ... 15.
    """
    # planes: low index bytes, signs, ninth index bits, scales, f16 scale of the block
    start, entry = first // BLOCK, tl.arange(0, SPAN // 4)
    high_bits = (
        load_elements(planes[2], row, start * 8 + entry // 8, blocks * 8).to(tl.int32) >> (entry % 8)[None, :]
    ) & 1
    value_index = load_indices(
        codebook, load_elements(planes[0], row, start * 64 + entry, blocks * 64).to(tl.int32) | (high_bits << 8), 4
    )
    signs = load_elements(planes[1], row, start * 32 + entry // 2, blocks * 32).to(tl.int32) >> (entry % 2 * 4)[None, :]
    group = tl.arange(0, SPAN // 16) // 2
    factor = (
        load_elements(planes[3], row, start * 4 + group // 2, blocks * 4).to(tl.int32) >> (group % 2 * 4)[None, :]
    ) & 15
    scale = load_per_block(planes[4], row, start, blocks, BLOCK, SPAN) * (1 + 2 * factor).to(tl.float32)
    return apply_signs(1 + 2 * value_index, signs), scale, scale  # no minimum: the third result is not read


@triton.jit
def iq1_s(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes IQ1_S: eleven bits of codebook index per eight columns; indices minus one are the values -1, 0, 1.

    A 16-bit word per 32 columns holds the upper three bits of each of four codebook indices, three bits of scale, and
    the sign of an offset of one eighth that is added to all 32 values.
    """
    # planes: low index bytes, 16-bit words, f16 scale of the block
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    high_bits = (
        load_elements(planes[1], row, start * 8 + entry // 4, blocks * 8).to(tl.int32) >> (entry % 4 * 3)[None, :]
    )
    index = load_elements(planes[0], row, start * 32 + entry, blocks * 32).to(tl.int32) | ((high_bits & 7) << 8)
    codes = tl.reshape(load_indices(codebook, index, 8).to(tl.float32), [row.shape[0], SPAN])
    header = load_elements(planes[1], row, start * 8 + tl.arange(0, SPAN // 16) // 2, blocks * 8).to(tl.int32)
    scale = load_per_block(planes[2], row, start, blocks, BLOCK, SPAN) * (2 * ((header >> 12) & 7) + 1).to(tl.float32)
    return codes, scale, scale * tl.where(header < 0, 1.125, 0.875)


@triton.jit
def iq1_m(planes, codebook, row, block_row, first, blocks, BLOCK: tl.constexpr, SPAN: tl.constexpr, RAW: tl.constexpr):
    """Decodes IQ1_M: as IQ1_S, with four bits per eight columns: upper bits of the index, and the sign of the offset.

    Scales have three bits per 16 columns; the nibbles of an f16 scale of the block are stored above them. The offset
    changes within 16 columns, so it is subtracted from the codes here and is no minimum as in IQ1_S.
    """
    # planes: low index bytes, high index bits with signs, scales
    start, entry = first // BLOCK, tl.arange(0, SPAN // 8)
    high_bits = (
        load_elements(planes[1], row, start * 16 + entry // 2, blocks * 16).to(tl.int32) >> (entry % 2 * 4)[None, :]
    )
    value_index = load_indices(
        codebook,
        load_elements(planes[0], row, start * 32 + entry, blocks * 32).to(tl.int32) | ((high_bits & 7) << 8),
        8,
    )
    offset = tl.where((high_bits & 8) != 0, 1.125, 0.875)
    codes = tl.reshape(
        value_index.to(tl.float32) - tl.reshape(offset, [row.shape[0], SPAN // 8, 1]), [row.shape[0], SPAN]
    )
    group = tl.arange(0, SPAN // 16)
    block = start * 4 + group // 16 * 4
    factor = (
        load_elements(planes[2], row, block + group % 16 // 4, blocks * 4).to(tl.int32) >> (group % 4 * 3)[None, :]
    ) & 7
    bits = extract_scale_nibble(planes[2], row, block, 0, blocks) | extract_scale_nibble(
        planes[2], row, block, 1, blocks
    )
    bits |= extract_scale_nibble(planes[2], row, block, 2, blocks) | extract_scale_nibble(
        planes[2], row, block, 3, blocks
    )
    scale = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (2 * factor + 1).to(tl.float32)
    return codes, scale, scale  # no minimum: the third result is not read


@triton.jit
def extract_scale_nibble(plane, row, block, INDEX: tl.constexpr, blocks):
    """Returns the top nibble of a block's 16-bit word INDEX, in its position in the block's f16 scale."""
    return ((load_elements(plane, row, block + INDEX, blocks * 4).to(tl.int32) >> 12) & 15) << (4 * INDEX)
