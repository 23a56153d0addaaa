"""Linear on packed weights on a GPU, in Triton: ktx.kernels.cpu's functions, on the planes of planes.py.

Up to FEW tokens one kernel takes weights apart in registers and multiplies (`products.few`), up to MANY another rebuilds tiles for the tensor cores
(`products.many`), beyond that the matrix is dequantised, a piece at a time, for cuBLAS. Weights in x's own float type go to cuBLAS at any number; FP8 ones of
many tokens to fp8.py where the card multiplies blocks of FP8. No launch looks at a value on the device and grids depend on shapes only, so a CUDA graph may hold any of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ktx.errors import KtxError
from ktx.kernels.gpu import fp8, quant_matmul
from ktx.kernels.gpu.dequant import book, decoding, dequantize, rows
from ktx.kernels.gpu.soa_layout import PIECE, SoAWeight, pack, pack_experts
from ktx.kernels.gradients import none_on_gpu

__all__ = ["SoAWeight", "dequantize", "linear", "linear_batched", "pack", "pack_experts", "rows"]

FEW, MANY = 4, 64  # most tokens of the one kernel and of the other
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@triton.jit
def _linear(
    x,
    planes,
    book,
    bias,
    out,
    tokens,
    n,
    k,
    blocks,
    part,
    HAS_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
    MINIMUM: tl.constexpr,
    RUN: tl.constexpr,
):
    """x [matrices, tokens, k] by [matrices, n, k] -> out [parts, matrices, tokens, n], each part `part` columns."""
    group, split = tl.program_id(1), tl.program_id(2)
    groups = tl.cdiv(tokens, TOKENS)
    matrix = (group // groups).to(tl.int64)
    token = group % groups * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = token < tokens
    place = matrix * tokens + token
    begin = split * part
    inside = matrix * n + tl.minimum(row, n - 1)
    y = PRODUCT(
        x,
        place,
        known,
        planes,
        book,
        inside,
        n,
        k,
        blocks,
        begin,
        tl.minimum(k, begin + part),
        SPAN,
        BLOCK,
        DECODE,
        MINIMUM,
        RUN,
    )
    if HAS_BIAS:
        y += tl.load(bias + row, mask=row < n, other=0.0)[None, :]
    at = (split.to(tl.int64) * tl.num_programs(1) // groups * tokens + place)[:, None] * n + row[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=known[:, None] & (row < n)[None, :])


def linear(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., k] (f32, f16, bf16) times w [n, k] transposed plus bias f32 [n] -> [..., n] in x's dtype."""
    _check(x, w, bias)
    flat = x.reshape(1, -1, w.k)
    tokens = flat.shape[1]
    if DTYPES.get(w.qtype.name) is x.dtype:
        y = _in_floats(flat, w, bias)
    elif tokens <= MANY:
        y = _multiply(flat, w, bias)
    elif fp8.takes(x, w):
        y = fp8.linear(flat[0], w, bias)
    else:
        y = _dequantized(flat[0], w, bias)
    return y.view(*x.shape[:-1], w.n)


def linear_batched(x: torch.Tensor, w: SoAWeight) -> torch.Tensor:
    """x [matrices, tokens, k] times each matrix of w transposed -> [matrices, tokens, n]."""
    _check(x, w, None)
    if x.dim() != 3 or x.shape[0] != w.matrices:
        raise KtxError(f"x {list(x.shape)} for {w.matrices} matrices: it must be [matrices, tokens, columns]")
    if DTYPES.get(w.qtype.name) is x.dtype or x.shape[1] > MANY:
        return torch.bmm(x, dequantize(w, x.dtype).view(w.matrices, w.n, w.k).transpose(1, 2))
    return _multiply(x, w, None)


def shape_of(tokens: int, n: int, k: int, matrices: int = 1) -> dict[str, Any]:
    """The product and its tile for that many tokens, as keyword arguments."""
    size = triton.next_power_of_2(max(1, tokens))
    if tokens > FEW:
        return {"TOKENS": min(quant_matmul.MANY_TOKENS, max(16, size)), **quant_matmul.many_tile()}
    return {"TOKENS": size, **quant_matmul.few_tile(n, k, matrices)}


def _multiply(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Either kernel; what several programs made of different columns is added up by torch, in their order."""
    matrices, tokens, _ = x.shape
    if not x.numel():
        return x.new_empty(matrices, tokens, w.n)
    x, shape = x.contiguous(), shape_of(tokens, w.n, w.k, matrices)
    groups = matrices * triton.cdiv(tokens, shape["TOKENS"])
    programs, steps = triton.cdiv(w.n, shape["ROWS"]) * matrices, triton.cdiv(w.k, shape["SPAN"])
    parts = max(1, min(steps, quant_matmul.PROGRAMS // programs))
    part = triton.cdiv(steps, parts) * shape["SPAN"]
    parts = triton.cdiv(w.k, part)
    out = torch.empty(parts, matrices, tokens, w.n, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    own = bias if parts == 1 else None
    sizes = tokens, w.n, w.k, w.row_blocks, part
    grid = (triton.cdiv(w.n, shape["ROWS"]), groups, parts)
    _linear[grid](x, w.planes, book(w), own, out, *sizes, HAS_BIAS=own is not None, **shape, **decoding(w))
    if parts == 1:
        return out[0]
    y = out.sum(0)
    return (y if bias is None else y + bias).to(x.dtype)


def _in_floats(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> torch.Tensor:
    y = F.linear(x, w.planes[0].view(w.n, w.k))
    return y if bias is None else (y.float() + bias).to(x.dtype)


def _dequantized(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """By cuBLAS, on as many rows at a time as PIECE weights are."""
    step = max(1, PIECE // w.k)
    y = torch.empty(len(x), w.n, dtype=x.dtype, device=x.device)
    for first in range(0, w.n, step):
        piece = dequantize(w, x.dtype, first, min(step, w.n - first))
        y[:, first : first + step] = x @ piece.T
    return y if bias is None else (y.float() + bias).to(x.dtype)


def _check(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> None:
    none_on_gpu("Linear", x)
    if x.dtype not in DTYPES.values():
        raise KtxError(f"activations are {x.dtype}: f32, f16 and bf16 are multiplied")
    if x.shape[-1] != w.k:
        raise KtxError(f"activations have {x.shape[-1]} columns, the weights {w.k}")
    if x.device != w.data.device:
        raise KtxError(f"activations are on {x.device}, the weights on {w.data.device}")
    if bias is not None and bias.shape != (w.n,):
        raise KtxError(f"the bias has shape {list(bias.shape)}, the weights {w.n} rows")
