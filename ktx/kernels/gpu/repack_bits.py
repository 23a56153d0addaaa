"""Words of a block as the file has them, out of the CPU's order (`arrange` in csrc/cpu/layout.cpp): what packing did to a type's bits, undone on any device.

Every function takes and gives int32 [..., words of a block, 16 rows]. Nothing is rounded, and no step needs more than the words of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from ktx.kernels.gpu.iq_codebooks import book

Words = torch.Tensor
AT_ONCE = 8 << 20  # bytes of words that are undone at once
UNDOING = 12 * AT_ONCE  # bytes that this takes beside them, at most


def _mask(bits: int) -> int:
    """As an int32."""
    return bits - (1 << 32) if bits >> 31 else bits


def _bytes_in_order(x: Words) -> Words:
    """Bytes 0 2 1 3 -> 0 1 2 3."""
    return (x & _mask(0xFF0000FF)) | ((x & 0xFF00) << 8) | ((x >> 8) & 0xFF00)


def _fifth_bits(x: Words) -> Words:
    """Bit 8*b + i -> bit 4*i + b: the index of a bit has five bits, which a perfect shuffle turns by one; here by two."""
    for _ in range(2):
        for mask, by in ((0x0000FF00, 8), (0x00F000F0, 4), (0x0C0C0C0C, 2), (0x22222222, 1)):
            moved = (x ^ (x >> by)) & mask
            x = x ^ moved ^ (moved << by)
    return x


def _signs_by_row(x: Words) -> Words:
    """Eight times 64 bits, bit 4*row + i for weight i of four -> the 32 signs of each row."""
    halves, out = x.unflatten(-1, (8, 2)), torch.zeros_like(x).unflatten(-1, (2, 8))
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)
    for vector in range(8):
        out |= ((halves[..., vector, :, None] >> places) & 15) << (4 * vector)
    return out.flatten(-2)


def _sevens(signs: Words) -> Words:
    """Four times seven signs and a spare bit -> four times seven signs, then the spare bits."""
    out = torch.zeros_like(signs)
    for i in range(4):
        out |= ((signs >> (8 * i)) & 127) << (7 * i) | ((signs >> (8 * i + 7)) & 1) << (28 + i)
    return out


def _q5(x: Words) -> Words:
    return torch.cat([x[..., :4, :], _fifth_bits(x[..., 4:, :])], -2)


def _iq2_xxs(x: Words) -> Words:
    indices, signs = _bytes_in_order(x[..., 0::2, :]), _sevens(_signs_by_row(x[..., 1::2, :]))
    return torch.stack([indices, signs], -2).flatten(-3, -2)


def _iq2_xs(x: Words) -> Words:
    """Low bytes of indices, and signs with the ninth bits in the spare places -> nine bits of index and seven signs, four times."""
    indices, signs = _bytes_in_order(x[..., 0:16:2, :]), _signs_by_row(x[..., 1:16:2, :])
    pairs = [
        ((indices >> (8 * i)) & 255) | ((signs >> (8 * i + 7)) & 1) << 8 | ((signs >> (8 * i)) & 127) << 9
        for i in range(4)
    ]
    words = torch.stack([pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16], -2).flatten(-3, -2)
    return torch.cat([words, x[..., 16:, :]], -2)


def _iq2_s(x: Words) -> Words:
    return torch.cat([_bytes_in_order(x[..., :8, :]), _signs_by_row(x[..., 8:16, :]), x[..., 16:, :]], -2)


def _iq3_xxs(x: Words) -> Words:
    return torch.cat([_bytes_in_order(x[..., :16, :]), _sevens(_signs_by_row(x[..., 16:, :]))], -2)


def _iq3_s(x: Words) -> Words:
    return torch.cat([_bytes_in_order(x[..., :16, :]), _signs_by_row(x[..., 16:24, :]), x[..., 24:, :]], -2)


@lru_cache(maxsize=16)
def _entries(device: torch.device) -> torch.Tensor:
    """Of IQ1's book: the entry whose eight digits, two bits each, make an index. int32 [65536]."""
    out = torch.zeros(1 << 16, dtype=torch.int32)
    digits = book("IQ1", torch.device("cpu"))
    out[digits.long()] = torch.arange(len(digits), dtype=torch.int32)
    return out.to(device)


def _fours(x: Words) -> Words:
    """13 words of digits -> the 64 fours of a block, two bits for each column: uint8 [..., 64, 16]."""
    even, odd, digits = x & 0x00FF00FF, (x >> 8) & 0x00FF00FF, []
    for _ in range(5):  # a byte is a fraction in base 3: three times it, over 256, is the next digit
        even, odd = even * 3, odd * 3
        four = ((even >> 8) & 0x00030003) | (odd & 0x03000300)
        digits.append(((four & 3) | ((four >> 6) & 12) | ((four >> 12) & 48) | ((four >> 18) & 192)).to(torch.uint8))
        even, odd = even & 0x00FF00FF, odd & 0x00FF00FF
    each = torch.stack(digits, -2)  # [..., 13, 5, 16]
    main, last = each[..., :12, :, :].unflatten(-3, (4, 3)).flatten(-3, -2), each[..., 12, :4, None, :]
    return torch.cat([main, last], -2).flatten(-3, -2)


def _iq1(x: Words) -> tuple[Words, Words]:
    """The words of low index bytes, and the upper three bits of each of the 32 indices."""
    fours = _fours(x[..., :13, :])
    digits = fours[..., 0::2, :].int() | fours[..., 1::2, :].int() << 8
    entries = _entries(x.device)[digits].unflatten(-2, (8, 4))
    return _joined(entries & 255, 8), entries >> 8


def _joined(parts: Words, bits: int) -> Words:
    """[..., N, 16] of so many bits each -> [..., 16], the first lowest."""
    out = parts[..., 0, :].clone()
    for i in range(1, parts.shape[-2]):
        out |= parts[..., i, :] << (bits * i)
    return out


def _nibbles(x: Words, count: int) -> Words:
    """[..., 16] -> [..., count, 16]"""
    return torch.stack([(x >> (4 * i)) & 15 for i in range(count)], -2)


def _iq1_s(x: Words) -> Words:
    low, upper = _iq1(x)
    halves = _joined(upper, 3) | _nibbles(x[..., 13, :], 8) << 12
    return torch.cat([low, _joined(halves.unflatten(-2, (4, 2)), 16)], -2)


def _iq1_m(x: Words) -> Words:
    low, upper = _iq1(x)
    signs = torch.stack([_nibbles(x[..., 13, :], 8) >> i & 1 for i in range(4)], -2)
    halves = _joined(upper | signs << 3, 4)
    return torch.cat([low, _joined(halves.unflatten(-2, (4, 2)), 16), x[..., 14:, :]], -2)


UNDO: Mapping[str, Callable[[Words], Words]] = {
    "Q5_0": _q5,
    "Q5_1": _q5,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
MORE: Mapping[str, int] = {"IQ1_S": 2, "IQ1_M": 2}  # words of a block that the file does not have
