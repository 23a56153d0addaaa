"""Conversion of words from the CPU's order to the file's order, on any device.

It is needed where experts packed for the CPU are streamed to a GPU, or written to a file. It reverses what packing did
to the bits of a type (csrc/cpu/quant/layout.cpp), which suits SIMD registers of 16 rows. Every function takes and
returns int32 [..., words of a block, 16 rows]. Nothing is rounded, and no step needs more than the words of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from ktx.kernels.gpu.iq_codebooks import make_codebook

Words = torch.Tensor
CHUNK_BYTES = 8 << 20  # bytes of words that are converted at once
PEAK_TEMPORARY_BYTES = 12 * CHUNK_BYTES  # bytes of temporary memory that this needs at most, in addition to the words


def _to_int32(bits: int) -> int:
    """Returns 32 bits as an int32."""
    return bits - (1 << 32) if bits >> 31 else bits


def _restore_bytes(x: Words) -> Words:
    """Reorders the bytes of words: 0 2 1 3 -> 0 1 2 3."""
    return (x & _to_int32(0xFF0000FF)) | ((x & 0xFF00) << 8) | ((x >> 8) & 0xFF00)


def _restore_fifth_bits(x: Words) -> Words:
    """Moves bit 8*b + i to bit 4*i + b: undoes `transpose_fifth_bits` of csrc/cpu/quant/layout.cpp.

    The index of a bit has five bits, and a perfect shuffle rotates it by one; two shuffles rotate it by two.
    """
    for _ in range(2):
        for mask, shift in ((0x0000FF00, 8), (0x00F000F0, 4), (0x0C0C0C0C, 2), (0x22222222, 1)):
            moved = (x ^ (x >> shift)) & mask
            x = x ^ moved ^ (moved << shift)
    return x


def _restore_signs(x: Words) -> Words:
    """Reorders sign bits from the CPU's order to a word of 32 signs per row.

    The CPU has eight vectors of 64 bits (two words each), one per four weights, in which bit 4 * row + i is the sign of
    weight i, because that is the form of an AVX-512 mask.
    """
    halves, out = x.unflatten(-1, (8, 2)), torch.zeros_like(x).unflatten(-1, (2, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)
    for vector in range(8):
        out |= ((halves[..., vector, :, None] >> shifts) & 15) << (4 * vector)
    return out.flatten(-2)


def _pack_seven_signs(signs: Words) -> Words:
    """Reorders four times seven signs and a spare bit to four times seven signs, followed by the spare bits.

    The eighth sign follows from seven, so the CPU's order has four bits of a scale in the spare bits.
    """
    out = torch.zeros_like(signs)
    for i in range(4):
        out |= ((signs >> (8 * i)) & 127) << (7 * i) | ((signs >> (8 * i + 7)) & 1) << (28 + i)
    return out


# Each `_restore_*` function takes the words of a block in the CPU's order and returns those of the file.


def _restore_q5(x: Words) -> Words:
    """Restores Q5_0 and Q5_1: four words of nibbles, then a word of fifth bits."""
    return torch.cat([x[..., :4, :], _restore_fifth_bits(x[..., 4:, :])], -2)


def _restore_iq2_xxs(x: Words) -> Words:
    """Restores pairs of a word of codebook indices and a word of seven-bit signs."""
    indices, signs = _restore_bytes(x[..., 0::2, :]), _pack_seven_signs(_restore_signs(x[..., 1::2, :]))
    return torch.stack([indices, signs], -2).flatten(-3, -2)


def _restore_iq2_xs(x: Words) -> Words:
    """Restores nine bits of index and seven signs, for four codebook entries in two words.

    The CPU's order has the low bytes of the indices, and the ninth bits in the spare bits of the signs.
    """
    indices, signs = _restore_bytes(x[..., 0:16:2, :]), _restore_signs(x[..., 1:16:2, :])
    pairs = [
        ((indices >> (8 * i)) & 255) | ((signs >> (8 * i + 7)) & 1) << 8 | ((signs >> (8 * i)) & 127) << 9
        for i in range(4)
    ]
    words = torch.stack([pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16], -2).flatten(-3, -2)
    return torch.cat([words, x[..., 16:, :]], -2)


def _restore_iq2_s(x: Words) -> Words:
    """Restores low index bytes and eight-bit signs; the words behind them are unchanged."""
    return torch.cat([_restore_bytes(x[..., :8, :]), _restore_signs(x[..., 8:16, :]), x[..., 16:, :]], -2)


def _restore_iq3_xxs(x: Words) -> Words:
    """Restores 16 words of indices and eight words of seven-bit signs."""
    return torch.cat([_restore_bytes(x[..., :16, :]), _pack_seven_signs(_restore_signs(x[..., 16:, :]))], -2)


def _restore_iq3_s(x: Words) -> Words:
    """Restores 16 words of low index bytes and eight words of signs; the words behind them are unchanged."""
    return torch.cat([_restore_bytes(x[..., :16, :]), _restore_signs(x[..., 16:24, :]), x[..., 24:, :]], -2)


@lru_cache(maxsize=16)
def _make_iq1_index_table(device: torch.device) -> torch.Tensor:
    """Returns a table from the digits of an IQ1 codebook entry, eight of two bits each, to its index: int32 [65536]."""
    out = torch.zeros(1 << 16, dtype=torch.int32)
    digits = make_codebook("IQ1", torch.device("cpu"))
    out[digits.long()] = torch.arange(len(digits), dtype=torch.int32)
    return out.to(device)


def _unpack_base3(x: Words) -> Words:
    """Unpacks 13 words of base-3 digits to the 64 groups of four digits of a block: uint8 [..., 64, 16].

    A digit has two bits. Packing for the CPU expands IQ1's codebook indices to digits (csrc/cpu/quant/layout.cpp).
    """
    even, odd, digits = x & 0x00FF00FF, (x >> 8) & 0x00FF00FF, []
    for _ in range(5):  # a byte is a fraction in base 3: the next digit is 3 * byte / 256
        even, odd = even * 3, odd * 3
        digit_group = ((even >> 8) & 0x00030003) | (odd & 0x03000300)  # a digit in each byte of the word
        digits.append(
            (
                (digit_group & 3) | ((digit_group >> 6) & 12) | ((digit_group >> 12) & 48) | ((digit_group >> 18) & 192)
            ).to(torch.uint8)
        )
        even, odd = even & 0x00FF00FF, odd & 0x00FF00FF
    groups = torch.stack(digits, -2)  # [..., 13, 5, 16]
    # Three words hold the first 15 of 16 groups that follow each other, word 12 the last group of each 16.
    main, last = groups[..., :12, :, :].unflatten(-3, (4, 3)).flatten(-3, -2), groups[..., 12, :4, None, :]
    return torch.cat([main, last], -2).flatten(-3, -2)


def _look_up_iq1_indices(x: Words) -> tuple[Words, Words]:
    """Looks up the codebook indices of an IQ1 block, of which the CPU stores the entries' base-3 digits instead.

    Returns:
        The words of low index bytes, and the upper three bits of each of the 32 indices.
    """
    digit_groups = _unpack_base3(x[..., :13, :])
    digits = digit_groups[..., 0::2, :].int() | digit_groups[..., 1::2, :].int() << 8
    entries = _make_iq1_index_table(x.device)[digits].unflatten(-2, (8, 4))
    return _join_bits(entries & 255, 8), entries >> 8


def _join_bits(parts: Words, bits: int) -> Words:
    """Joins [..., N, 16] of `bits` bits each -> [..., 16], the first in the lowest bits."""
    out = parts[..., 0, :].clone()
    for i in range(1, parts.shape[-2]):
        out |= parts[..., i, :] << (bits * i)
    return out


def _split_nibbles(x: Words, count: int) -> Words:
    """Splits [..., 16] into nibbles [..., count, 16]."""
    return torch.stack([(x >> (4 * i)) & 15 for i in range(count)], -2)


def _restore_iq1_s(x: Words) -> Words:
    """Restores IQ1_S: low index bytes, then per 32 weights 16 bits, twelve of indices and four of scale and offset."""
    low, upper = _look_up_iq1_indices(x)
    halves = _join_bits(upper, 3) | _split_nibbles(x[..., 13, :], 8) << 12
    return torch.cat([low, _join_bits(halves.unflatten(-2, (4, 2)), 16)], -2)


def _restore_iq1_m(x: Words) -> Words:
    """Restores IQ1_M: low index bytes, then per eight weights three index bits and a sign; scales are unchanged."""
    low, upper = _look_up_iq1_indices(x)
    signs = torch.stack([_split_nibbles(x[..., 13, :], 8) >> i & 1 for i in range(4)], -2)
    halves = _join_bits(upper | signs << 3, 4)
    return torch.cat([low, _join_bits(halves.unflatten(-2, (4, 2)), 16), x[..., 14:, :]], -2)


RESTORE: Mapping[str, Callable[[Words], Words]] = {
    "Q5_0": _restore_q5,
    "Q5_1": _restore_q5,
    "IQ1_S": _restore_iq1_s,
    "IQ1_M": _restore_iq1_m,
    "IQ2_XXS": _restore_iq2_xxs,
    "IQ2_XS": _restore_iq2_xs,
    "IQ2_S": _restore_iq2_s,
    "IQ3_XXS": _restore_iq3_xxs,
    "IQ3_S": _restore_iq3_s,
}
# Words of a block that the CPU's order has in addition to those of the file.
EXTRA_WORDS: Mapping[str, int] = {"IQ1_S": 2, "IQ1_M": 2}
