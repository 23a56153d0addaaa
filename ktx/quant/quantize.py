"""Float rows -> the ggml types that can be made from the weights alone.

gguf-py has the legacy types and the ternary ones. Here are the k-quants and the code-book fours: for each sub-block a few
scales around the obvious one are tried and the one with the least squared error, weighted by the size of the weights, is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktx.errors import UsageError
from ktx.quant.types import QTYPES, QType

Array = NDArray[Any]  # of f32; numpy's newer stubs widen a division by an int
Bytes = NDArray[Any]  # of uint8; they widen every shift
STEPS = np.linspace(-0.12, 0.12, 9, dtype=np.float32)  # relative changes of the scale that are tried


def quantize(values: torch.Tensor, qtype: QType) -> torch.Tensor:
    """f32 [..., k] -> uint8 [..., row_bytes]. UsageError when the type cannot be made here or k is not whole blocks."""
    if values.shape[-1] % qtype.block:
        raise UsageError(
            f"{qtype.name} stores rows in blocks of {qtype.block} weights, a row of {values.shape[-1]} does not fit"
        )
    if qtype.is_float:
        from ktx.quant.types import _torch_dtype

        return values.to(_torch_dtype(qtype.name)).contiguous().view(torch.uint8).reshape(*values.shape[:-1], -1)
    rows = values.float().contiguous().numpy()
    if qtype.name in _MAKERS:
        blocks = np.ascontiguousarray(rows.reshape(-1, qtype.block))
        parts = [_MAKERS[qtype.name](blocks[i : i + 65536]) for i in range(0, len(blocks), 65536)]
        data = np.concatenate(parts)
    else:
        import gguf

        try:
            data = gguf.quants.quantize(rows.reshape(-1, rows.shape[-1]), gguf.GGMLQuantizationType(qtype.code))
        except NotImplementedError as error:
            raise UsageError(
                f"{qtype.name} cannot be made without an importance matrix: take a file that llama-quantize wrote"
            ) from error
    return torch.from_numpy(np.ascontiguousarray(data)).reshape(*values.shape[:-1], qtype.row_bytes(values.shape[-1]))


def random_rows(qtype: QType, n: int, k: int, seed: int = 0, std: float = 0.05) -> torch.Tensor:
    """uint8 [n, row_bytes] of valid random blocks whose weights have about the given spread; for every type, float or not."""
    rng = np.random.default_rng(seed)
    if qtype.name not in _SCALES_AT:
        return quantize(torch.from_numpy(rng.normal(0, std, (n, k)).astype(np.float32)), qtype)
    blocks = rng.integers(0, 256, (n, k // qtype.block, qtype.nbytes), dtype=np.uint8)
    d = (rng.random((n, k // qtype.block, 1)) * 0.5 + 0.75).astype(np.float32)
    _set_scale(blocks, qtype.name, d)
    unit = qtype.dequantize(torch.from_numpy(blocks.reshape(n, -1))).square().mean().sqrt().item()
    _set_scale(blocks, qtype.name, d * (std / unit))
    return torch.from_numpy(blocks.reshape(n, -1))


_SCALES_AT = {"IQ1_S": 0, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "IQ1_M": None}


def _set_scale(blocks: Bytes, name: str, d: Array) -> None:
    bits = d.astype(np.float16).view(np.uint16)
    at = _SCALES_AT[name]
    if at is not None:
        blocks[..., at : at + 2] = bits.view(np.uint8)
        return
    scales = blocks[..., 48:56].copy().view(np.uint16)  # IQ1_M spreads its f16 over the top nibbles of four words
    for i in range(4):
        scales[..., i] = (scales[..., i] & 0x0FFF) | (((bits[..., 0] >> (4 * i)) & 15) << 12)
    blocks[..., 48:56] = scales.view(np.uint8)


def _f16(x: Array) -> tuple[Array, Bytes]:
    """The value as stored, and its two bytes (last axis)."""
    half = x.astype(np.float16)
    return half.astype(np.float32), half[..., None].view(np.uint8)


def _inverse(x: Array) -> Array:
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def _best(x: Array, candidates: list[tuple[Array, Array]], reconstruct: object) -> tuple[Array, Array]:
    """Of (scale, minimum) candidates, per sub-block the pair with the least weighted squared error."""
    weight = x * x + (x * x).mean(-1, keepdims=True)
    best: tuple[Array, Array] | None = None
    least = np.full(x.shape[:-1], np.inf, np.float32)
    for scale, minimum in candidates:
        error = (weight * (reconstruct(scale, minimum) - x) ** 2).sum(-1)  # type: ignore[operator]
        better = error < least
        least = np.where(better, error, least)
        best = (
            (scale, minimum) if best is None else (np.where(better, scale, best[0]), np.where(better, minimum, best[1]))
        )
    assert best is not None
    return best


def _fit_offset(x: Array, top: int) -> tuple[Array, Array]:
    """Scale and minimum (>= 0) of sub-blocks [..., s] for codes 0..top: x ~ scale * code - minimum."""
    low = np.minimum(x.min(-1), 0)
    high = np.maximum(x.max(-1), 0)
    candidates = [((high - low) / top * (1 + step), -low * (1 + shift)) for step in STEPS for shift in (-0.08, 0.0)]

    def reconstruct(scale: Array, minimum: Array) -> Array:
        code = np.clip(np.rint((x + minimum[..., None]) * _inverse(scale)[..., None]), 0, top)
        return scale[..., None] * code - minimum[..., None]

    return _best(x, candidates, reconstruct)


def _fit_signed(x: Array, low: int, high: int) -> Array:
    """Scale of sub-blocks [..., s] for codes low..high: x ~ scale * code; the largest weight lies at `low`."""
    at = np.abs(x).argmax(-1)[..., None]
    extreme = np.take_along_axis(x, at, -1)[..., 0]
    candidates = [(extreme / low * (1 + step), extreme) for step in STEPS]

    def reconstruct(scale: Array, _: Array) -> Array:
        return scale[..., None] * np.clip(np.rint(x * _inverse(scale)[..., None]), low, high)

    return _best(x, candidates, reconstruct)[0]


def _codes(x: Array, scale: Array, minimum: Array, top: int) -> Bytes:
    return np.clip(np.rint((x + minimum[..., None]) * _inverse(scale)[..., None]), 0, top).astype(np.uint8)


def _k_offset(x: Array, sub: int, top: int, levels: int) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Codes [n, subs, sub], quantised scales and minimums [n, subs], and the bytes of d and dmin."""
    x = x.reshape(len(x), -1, sub)
    scale, minimum = _fit_offset(x, top)
    d, d_bytes = _f16(scale.max(-1) / levels)
    dmin, dmin_bytes = _f16(minimum.max(-1) / levels)
    qs = np.clip(np.rint(scale * _inverse(d)[:, None]), 0, levels)
    qm = np.clip(np.rint(minimum * _inverse(dmin)[:, None]), 0, levels)
    codes = _codes(x, d[:, None] * qs, dmin[:, None] * qm, top)
    return codes, qs.astype(np.uint8), qm.astype(np.uint8), np.concatenate([d_bytes, dmin_bytes], -1)


def _six_bit_pairs(s: Bytes, m: Bytes) -> Bytes:
    """Eight six-bit scales and minimums in twelve bytes, as Q4_K and Q5_K lay them."""
    out = np.empty((len(s), 12), np.uint8)
    out[:, 0:4] = s[:, :4] | (s[:, 4:] >> 4) << 6
    out[:, 4:8] = m[:, :4] | (m[:, 4:] >> 4) << 6
    out[:, 8:12] = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return out


def _nibbles(codes: Bytes) -> Bytes:
    """Codes [n, 8, 32]: sub-blocks 2i and 2i+1 share 32 bytes."""
    pairs = codes.reshape(len(codes), 4, 2, 32)
    return (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(len(codes), 128)


def _q4_k(x: Array) -> Bytes:
    codes, s, m, d = _k_offset(x, 32, 15, 63)
    return np.concatenate([d, _six_bit_pairs(s, m), _nibbles(codes)], 1)


def _q5_k(x: Array) -> Bytes:
    codes, s, m, d = _k_offset(x, 32, 31, 63)
    fifth = np.zeros((len(x), 32), np.uint8)
    for i in range(8):
        fifth |= (codes[:, i] >> 4) << i
    return np.concatenate([d, _six_bit_pairs(s, m), fifth, _nibbles(codes)], 1)


def _quarters(codes: Bytes, shift: int) -> Bytes:
    """Codes [n, 256] of two bits each: in each half, byte l holds l, l+32, l+64, l+96."""
    halves = codes.reshape(len(codes), 2, 4, 32) & 3
    return sum((halves[:, :, j] << (2 * j) for j in range(1, 4)), halves[:, :, 0]).reshape(len(codes), 64) << shift


def _q2_k(x: Array) -> Bytes:
    codes, s, m, d = _k_offset(x, 16, 3, 15)
    return np.concatenate([s | m << 4, _quarters(codes.reshape(len(x), 256), 0), d], 1)


def _k_signed(x: Array, low: int, high: int, levels: int) -> tuple[Bytes, NDArray[np.int64], Bytes]:
    """Codes minus `low` [n, 256], signed scales [n, 16] in -levels..levels, bytes of d."""
    subs = x.reshape(len(x), 16, 16)
    scale = _fit_signed(subs, low, high)
    d, d_bytes = _f16(np.abs(scale).max(-1) / levels)
    qs = np.clip(np.rint(scale * _inverse(d)[:, None]), -levels, levels)
    used = d[:, None] * qs
    codes = np.clip(np.rint(subs * _inverse(used)[..., None]), low, high) - low
    return codes.astype(np.uint8).reshape(len(x), 256), qs.astype(np.int64), d_bytes


def _q6_k(x: Array) -> Bytes:
    codes, s, d = _k_signed(x, -32, 31, 127)
    halves = codes.reshape(len(x), 2, 4, 32)  # g = 0..3 along the third axis
    low = halves & 15
    lows = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], -1).reshape(len(x), 128)
    return np.concatenate([lows, _quarters(codes >> 4, 0), s.astype(np.int8).view(np.uint8), d], 1)


def _q3_k(x: Array) -> Bytes:
    codes, s, d = _k_signed(x, -4, 3, 31)
    high = np.zeros((len(x), 32), np.uint8)
    groups = codes.reshape(len(x), 8, 32)
    for i in range(8):
        high |= (groups[:, i] >> 2) << i
    six = (s + 32).astype(np.uint8)
    scales = np.empty((len(x), 12), np.uint8)
    scales[:, :8] = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    scales[:, 8:] = sum((six[:, 4 * i : 4 * i + 4] >> 4 << (2 * i) for i in range(1, 4)), six[:, :4] >> 4)
    return np.concatenate([high, _quarters(codes, 0), scales, d], 1)


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _nearest(x: Array, book: Array) -> Bytes:
    order = np.argsort(book, kind="stable")
    middles = (book[order][1:] + book[order][:-1]) / 2
    return order[np.searchsorted(middles, x)].astype(np.uint8)


def _fit_book(x: Array, book: Array) -> Array:
    at = np.abs(x).argmax(-1)[..., None]
    extreme = np.take_along_axis(x, at, -1)[..., 0]
    ends = (extreme / book[0], extreme / book[-1]) if book is _IQ4 else (np.abs(extreme) / 6,)
    candidates = [(end * (1 + step), extreme) for end in ends for step in STEPS]

    def reconstruct(scale: Array, _: Array) -> Array:
        return scale[..., None] * book[_nearest(x * _inverse(scale)[..., None], book)]

    return _best(x, candidates, reconstruct)[0]


def _halves(codes: Bytes) -> Bytes:
    """Codes [..., 32] -> 16 bytes: byte l holds l and l+16."""
    return codes[..., :16] | codes[..., 16:] << 4


def _iq4_nl(x: Array) -> Bytes:
    d, d_bytes = _f16(_fit_book(x, _IQ4))
    return np.concatenate([d_bytes, _halves(_nearest(x * _inverse(d)[:, None], _IQ4))], 1)


def _iq4_xs(x: Array) -> Bytes:
    subs = x.reshape(len(x), 8, 32)
    scale = _fit_book(subs, _IQ4)
    d, d_bytes = _f16(np.abs(scale).max(-1) / 31)
    s = np.clip(np.rint(scale * _inverse(d)[:, None]), -32, 31)
    codes = _halves(_nearest(subs * _inverse(d[:, None] * s)[..., None], _IQ4)).reshape(len(x), 128)
    six = (s + 32).astype(np.uint16)
    high = sum((six[:, i] >> 4 << (2 * i) for i in range(8)), np.zeros(len(x), np.uint16)).astype("<u2")
    low = (six[:, 0::2] & 15 | (six[:, 1::2] & 15) << 4).astype(np.uint8)
    return np.concatenate([d_bytes, high[:, None].view(np.uint8), low, codes], 1)


def _mxfp4(x: Array) -> Bytes:
    most = np.abs(x).max(-1)
    guess = np.where(most > 0, np.floor(np.log2(np.maximum(most, 1e-38))) - 2, -127)
    best_e, least = guess, np.full(len(x), np.inf, np.float32)
    for step in (0, 1):  # the largest weight saturates at 6, or gets a coarser grid
        e = np.clip(guess + step, -126, 127)
        scale = np.exp2(e).astype(np.float32)[:, None]
        error = ((scale * _FP4[_nearest(x / scale, _FP4)] - x) ** 2).sum(-1)
        best_e, least = np.where(error < least, e, best_e), np.minimum(error, least)
    scale = np.exp2(best_e).astype(np.float32)[:, None]
    return np.concatenate([(best_e + 127).astype(np.uint8)[:, None], _halves(_nearest(x / scale, _FP4))], 1)


def _int4(x: Array) -> Bytes:
    d, d_bytes = _f16(_fit_signed(x, -8, 7))
    codes = (np.clip(np.rint(x * _inverse(d)[:, None]), -8, 7) + 8).astype(np.uint8)
    return np.concatenate([d_bytes, _halves(codes.reshape(len(x), -1, 32)).reshape(len(x), -1)], 1)


def _int8(x: Array) -> Bytes:
    at = np.abs(x).argmax(-1)[:, None]
    d, d_bytes = _f16(np.take_along_axis(x, at, -1)[:, 0] / np.float32(-127))
    codes = np.clip(np.rint(x * _inverse(d)[:, None]), -127, 127).astype(np.int8)
    return np.concatenate([d_bytes, codes.view(np.uint8)], 1)


_MAKERS = {
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
assert set(_MAKERS) <= set(QTYPES)
