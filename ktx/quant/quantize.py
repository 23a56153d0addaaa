"""Quantization of float rows to the ggml types that need no importance matrix.

gguf-py quantizes the legacy and the ternary types. This module quantizes the k-quants and the four-bit codebook types:
for each sub-block it tries a few scales around the obvious one and selects the scale with the least squared error,
weighted by the magnitude of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # f32; Any because numpy's newer stubs widen a division by an int
Bytes = NDArray[Any]  # uint8; Any because these stubs widen every shift
SCALE_STEPS = np.linspace(-0.12, 0.12, 9, dtype=np.float32)  # relative changes of the scale to try
CHUNK_BLOCKS = 65536  # blocks that are quantized at once


def quantize_blocks(name: str, blocks: Array) -> Bytes | None:
    """Quantizes blocks: f32 [n, weights of a block] -> uint8 [n, bytes of a block].

    Returns None for a type without a quantizer in this module, which gguf-py quantizes. CHUNK_BLOCKS blocks at a time
    are quantized, to bound the memory for f32 intermediate results.
    """
    quantizer = _QUANTIZERS.get(name)
    if quantizer is None:
        return None
    return np.concatenate([quantizer(blocks[i : i + CHUNK_BLOCKS]) for i in range(0, len(blocks), CHUNK_BLOCKS)])


def _round_to_f16(x: Array) -> tuple[Array, Bytes]:
    """Returns x rounded to f16, as f32, and the two bytes of each value (last axis)."""
    half = x.astype(np.float16)
    return half.astype(np.float32), half[..., None].view(np.uint8)


def _inverse(x: Array) -> Array:
    """Returns 1 / x, or 0 where x is 0."""
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def _select_best(x: Array, candidates: list[tuple[Array, Array]], reconstruct: object) -> tuple[Array, Array]:
    """Selects for each sub-block the (scale, minimum) candidate with the least weighted squared error.

    Args:
        x: f32 [..., s], the weights.
        candidates: pairs of f32 [...].
        reconstruct: (scale, minimum) -> f32 [..., s], the weights after quantization with that pair.
    """
    weight = x * x + (x * x).mean(-1, keepdims=True)
    best: tuple[Array, Array] | None = None
    min_error = np.full(x.shape[:-1], np.inf, np.float32)
    for scale, minimum in candidates:
        error = (weight * (reconstruct(scale, minimum) - x) ** 2).sum(-1)  # type: ignore[operator]
        better = error < min_error
        min_error = np.where(better, error, min_error)
        best = (
            (scale, minimum) if best is None else (np.where(better, scale, best[0]), np.where(better, minimum, best[1]))
        )
    assert best is not None
    return best


def _fit_offset(x: Array, max_code: int) -> tuple[Array, Array]:
    """Fits scale and minimum (>= 0) of sub-blocks [..., s] for codes 0..max_code: x ~ scale * code - minimum.

    The low end is at most 0 because the formats store no negative minimum. Scales around the obvious one are tried,
    each with the obvious minimum and one that is 8 % smaller.
    """
    low = np.minimum(x.min(-1), 0)
    high = np.maximum(x.max(-1), 0)
    candidates = [
        ((high - low) / max_code * (1 + step), -low * (1 + shift)) for step in SCALE_STEPS for shift in (-0.08, 0.0)
    ]

    def reconstruct(scale: Array, minimum: Array) -> Array:
        code = np.clip(np.rint((x + minimum[..., None]) * _inverse(scale)[..., None]), 0, max_code)
        values: Array = scale[..., None] * code - minimum[..., None]
        return values

    return _select_best(x, candidates, reconstruct)


def _fit_signed(x: Array, low: int, high: int) -> Array:
    """Fits the scale of sub-blocks [..., s] for codes low..high: x ~ scale * code.

    The weight of the largest magnitude gets the code `low`.
    """
    max_index = np.abs(x).argmax(-1)[..., None]
    extreme = np.take_along_axis(x, max_index, -1)[..., 0]
    # `extreme` stands for a minimum, which these codes do not have: `reconstruct` does not read it.
    candidates = [(extreme / low * (1 + step), extreme) for step in SCALE_STEPS]

    def reconstruct(scale: Array, _: Array) -> Array:
        values: Array = scale[..., None] * np.clip(np.rint(x * _inverse(scale)[..., None]), low, high)
        return values

    return _select_best(x, candidates, reconstruct)[0]


def _to_codes(x: Array, scale: Array, minimum: Array, max_code: int) -> Bytes:
    """Returns the codes 0..max_code of x, given scale and minimum of each sub-block."""
    codes: Bytes = np.clip(np.rint((x + minimum[..., None]) * _inverse(scale)[..., None]), 0, max_code).astype(np.uint8)
    return codes


def _quantize_k_offset(x: Array, sub_size: int, max_code: int, max_scale: int) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Quantizes to codes with a minimum, as Q2_K, Q4_K and Q5_K do, with scales and minimums in units of d and dmin.

    Returns:
        Codes [n, subs, sub_size], quantized scales and minimums [n, subs], and the bytes of d and dmin [n, 4].
    """
    x = x.reshape(len(x), -1, sub_size)
    scale, minimum = _fit_offset(x, max_code)
    d, d_bytes = _round_to_f16(scale.max(-1) / max_scale)
    dmin, dmin_bytes = _round_to_f16(minimum.max(-1) / max_scale)
    scale_codes = np.clip(np.rint(scale * _inverse(d)[:, None]), 0, max_scale)
    min_codes = np.clip(np.rint(minimum * _inverse(dmin)[:, None]), 0, max_scale)
    codes = _to_codes(x, d[:, None] * scale_codes, dmin[:, None] * min_codes, max_code)
    return codes, scale_codes.astype(np.uint8), min_codes.astype(np.uint8), np.concatenate([d_bytes, dmin_bytes], -1)


def _pack_six_bit_pairs(scales: Bytes, minimums: Bytes) -> Bytes:
    """Packs eight six-bit scales and minimums into twelve bytes, in the order of Q4_K and Q5_K."""
    out = np.empty((len(scales), 12), np.uint8)
    out[:, 0:4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    out[:, 4:8] = minimums[:, :4] | (minimums[:, 4:] >> 4) << 6
    out[:, 8:12] = (scales[:, 4:] & 15) | (minimums[:, 4:] & 15) << 4
    return out


def _pack_nibbles(codes: Bytes) -> Bytes:
    """Packs four-bit codes [n, 8, 32] into [n, 128]: sub-blocks 2i and 2i+1 share 32 bytes."""
    pairs = codes.reshape(len(codes), 4, 2, 32)
    return (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(len(codes), 128)


# A quantizer takes f32 [n, block] and returns the bytes of the blocks, uint8 [n, nbytes], with the fields in ggml's
# order. In its body s and m are the integer scales and minimums of the sub-blocks, d the bytes of the f16 factors.


def _q4_k(x: Array) -> Bytes:
    codes, s, m, d = _quantize_k_offset(x, 32, 15, 63)
    return np.concatenate([d, _pack_six_bit_pairs(s, m), _pack_nibbles(codes)], 1)


def _q5_k(x: Array) -> Bytes:
    """Quantizes as _q4_k does, with the fifth bits in 32 bytes of their own: bit i of byte j is for weight 32 i + j."""
    codes, s, m, d = _quantize_k_offset(x, 32, 31, 63)
    fifth = np.zeros((len(x), 32), np.uint8)
    for i in range(8):
        fifth |= (codes[:, i] >> 4) << i
    return np.concatenate([d, _pack_six_bit_pairs(s, m), fifth, _pack_nibbles(codes)], 1)


def _pack_two_bits(codes: Bytes, shift: int) -> Bytes:
    """Packs codes [n, 256] of two bits into [n, 64].

    In each half of the block, byte i holds the codes of weights i, i + 32, i + 64 and i + 96.
    """
    halves = codes.reshape(len(codes), 2, 4, 32) & 3
    return sum((halves[:, :, j] << (2 * j) for j in range(1, 4)), halves[:, :, 0]).reshape(len(codes), 64) << shift


def _q2_k(x: Array) -> Bytes:
    codes, s, m, d = _quantize_k_offset(x, 16, 3, 15)
    return np.concatenate([s | m << 4, _pack_two_bits(codes.reshape(len(x), 256), 0), d], 1)


def _quantize_k_signed(x: Array, low: int, high: int, max_scale: int) -> tuple[Bytes, NDArray[np.int64], Bytes]:
    """Quantizes to codes low..high without a minimum, as Q3_K and Q6_K do, with 16 scales in units of d per block.

    Returns:
        Codes minus `low` [n, 256], signed scales [n, 16] in -max_scale..max_scale, and the bytes of d [n, 2].
    """
    subs = x.reshape(len(x), 16, 16)
    scale = _fit_signed(subs, low, high)
    d, d_bytes = _round_to_f16(np.abs(scale).max(-1) / max_scale)
    scale_codes = np.clip(np.rint(scale * _inverse(d)[:, None]), -max_scale, max_scale)
    scales = d[:, None] * scale_codes
    codes = np.clip(np.rint(subs * _inverse(scales)[..., None]), low, high) - low
    return codes.astype(np.uint8).reshape(len(x), 256), scale_codes.astype(np.int64), d_bytes


def _q6_k(x: Array) -> Bytes:
    """Quantizes to Q6_K, whose blocks have the lower four bits of the codes and the upper two in separate fields."""
    codes, s, d = _quantize_k_signed(x, -32, 31, 127)
    halves = codes.reshape(len(x), 2, 4, 32)
    low_bits = halves & 15
    packed_low = np.concatenate(
        [low_bits[:, :, 0] | low_bits[:, :, 2] << 4, low_bits[:, :, 1] | low_bits[:, :, 3] << 4], -1
    ).reshape(len(x), 128)
    return np.concatenate([packed_low, _pack_two_bits(codes >> 4, 0), s.astype(np.int8).view(np.uint8), d], 1)


def _q3_k(x: Array) -> Bytes:
    """Quantizes to Q3_K, whose blocks have the lower two bits of the codes and the third ones (`high`) apart.

    The lower four bits of the 16 scales are in eight bytes, two in each; the upper two in four bytes, four in each.
    """
    codes, s, d = _quantize_k_signed(x, -4, 3, 31)
    high = np.zeros((len(x), 32), np.uint8)
    groups = codes.reshape(len(x), 8, 32)
    for i in range(8):
        high |= (groups[:, i] >> 2) << i
    six_bit = (s + 32).astype(np.uint8)
    scales = np.empty((len(x), 12), np.uint8)
    scales[:, :8] = six_bit[:, :8] & 15 | (six_bit[:, 8:] & 15) << 4
    scales[:, 8:] = sum((six_bit[:, 4 * i : 4 * i + 4] >> 4 << (2 * i) for i in range(1, 4)), six_bit[:, :4] >> 4)
    return np.concatenate([high, _pack_two_bits(codes, 0), scales, d], 1)


_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
MAX_FP4 = 6  # largest value of FP4 (e2m1)
_FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _nearest(x: Array, codebook: Array) -> Bytes:
    """Returns the index of the codebook value nearest to each x; codebooks need not be sorted."""
    order = np.argsort(codebook, kind="stable")
    midpoints = (codebook[order][1:] + codebook[order][:-1]) / 2
    return order[np.searchsorted(midpoints, x)].astype(np.uint8)


def _fit_codebook(x: Array, codebook: Array) -> Array:
    """Fits the scale of sub-blocks [..., s] for a codebook of 16 values: x ~ scale * value.

    The scales tried map the weight of the largest magnitude near an end of the codebook. IQ4's codebook is not
    symmetric, so both ends are tried for it; MXFP4's is symmetric, with 6 as its largest value.
    """
    max_index = np.abs(x).argmax(-1)[..., None]
    extreme = np.take_along_axis(x, max_index, -1)[..., 0]
    end_scales = (
        (extreme / codebook[0], extreme / codebook[-1]) if codebook is _IQ4_VALUES else (np.abs(extreme) / MAX_FP4,)
    )
    # `extreme` stands for a minimum, which these codes do not have: `reconstruct` does not read it.
    candidates = [(end_scale * (1 + step), extreme) for end_scale in end_scales for step in SCALE_STEPS]

    def reconstruct(scale: Array, _: Array) -> Array:
        return scale[..., None] * codebook[_nearest(x * _inverse(scale)[..., None], codebook)]

    return _select_best(x, candidates, reconstruct)[0]


def _pack_halves(codes: Bytes) -> Bytes:
    """Packs codes [..., 32] into 16 bytes: byte i holds the codes of weights i and i + 16."""
    packed: Bytes = codes[..., :16] | codes[..., 16:] << 4
    return packed


def _iq4_nl(x: Array) -> Bytes:
    d, d_bytes = _round_to_f16(_fit_codebook(x, _IQ4_VALUES))
    return np.concatenate([d_bytes, _pack_halves(_nearest(x * _inverse(d)[:, None], _IQ4_VALUES))], 1)


def _iq4_xs(x: Array) -> Bytes:
    """Quantizes to IQ4's codebook, with eight six-bit scales.

    A 16-bit word holds the upper two bits of each scale, four bytes hold the lower four bits.
    """
    subs = x.reshape(len(x), 8, 32)
    scale = _fit_codebook(subs, _IQ4_VALUES)
    d, d_bytes = _round_to_f16(np.abs(scale).max(-1) / 31)
    s = np.clip(np.rint(scale * _inverse(d)[:, None]), -32, 31)
    codes = _pack_halves(_nearest(subs * _inverse(d[:, None] * s)[..., None], _IQ4_VALUES)).reshape(len(x), 128)
    six_bit = (s + 32).astype(np.uint16)
    high = sum((six_bit[:, i] >> 4 << (2 * i) for i in range(8)), np.zeros(len(x), np.uint16)).astype("<u2")
    low = (six_bit[:, 0::2] & 15 | (six_bit[:, 1::2] & 15) << 4).astype(np.uint8)
    return np.concatenate([d_bytes, high[:, None].view(np.uint8), low, codes], 1)


def _mxfp4(x: Array) -> Bytes:
    """Quantizes to MXFP4: FP4 codes with a power of two as scale, whose exponent plus 127 is stored in a byte.

    Of two exponents the one with the smaller squared error is taken.
    """
    max_abs = np.abs(x).max(-1)
    first_exponent = np.where(max_abs > 0, np.floor(np.log2(np.maximum(max_abs, 1e-38))) - 2, -127)
    best_exponent, min_error = first_exponent, np.full(len(x), np.inf, np.float32)
    # The first exponent maps the largest weight to [4, 8). With step 0 it may saturate at 6; with step 1 the grid is
    # coarser.
    for step in (0, 1):
        exponent = np.clip(first_exponent + step, -126, 127)
        scale = np.exp2(exponent).astype(np.float32)[:, None]
        error = ((scale * _FP4_VALUES[_nearest(x / scale, _FP4_VALUES)] - x) ** 2).sum(-1)
        best_exponent, min_error = np.where(error < min_error, exponent, best_exponent), np.minimum(error, min_error)
    scale = np.exp2(best_exponent).astype(np.float32)[:, None]
    return np.concatenate(
        [(best_exponent + 127).astype(np.uint8)[:, None], _pack_halves(_nearest(x / scale, _FP4_VALUES))], 1
    )


def _int4(x: Array) -> Bytes:
    d, d_bytes = _round_to_f16(_fit_signed(x, -8, 7))
    codes = (np.clip(np.rint(x * _inverse(d)[:, None]), -8, 7) + 8).astype(np.uint8)
    return np.concatenate([d_bytes, _pack_halves(codes.reshape(len(x), -1, 32)).reshape(len(x), -1)], 1)


def _int8(x: Array) -> Bytes:
    """Quantizes to INT8_128 without a search for the best scale; the weight of the largest magnitude gets -127."""
    max_index = np.abs(x).argmax(-1)[:, None]
    d, d_bytes = _round_to_f16(np.take_along_axis(x, max_index, -1)[:, 0] / np.float32(-127))
    codes = np.clip(np.rint(x * _inverse(d)[:, None]), -127, 127).astype(np.int8)
    return np.concatenate([d_bytes, codes.view(np.uint8)], 1)


_QUANTIZERS = {
    "INT8_128": _int8,
    "INT4_64": _int4,
    "INT4_128": _int4,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
