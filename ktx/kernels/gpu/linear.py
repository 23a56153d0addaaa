"""Linear on packed weights on a GPU, in Triton: the functions of ktx.kernels.cpu, on the planes of soa_layout.py.

Up to MAX_GEMV_TOKENS tokens a kernel unpacks weights in registers and multiplies (`quant_matmul.gemv`); up to
MAX_GEMM_TOKENS another rebuilds tiles for the tensor cores (`quant_matmul.gemm`); for larger batches the matrix is
dequantized, a chunk at a time, for cuBLAS. Weights of x's own float dtype go to cuBLAS for any batch size. FP8 weights
of large batches go to fp8.py where the GPU multiplies blocks of FP8. No launch reads a value on the device and grids
depend on shapes only, so a CUDA graph can capture any of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ktx.errors import KtxError
from ktx.kernels.gpu import fp8, quant_matmul
from ktx.kernels.gpu.dequant import codebook_of, decode_constants, dequantize, dequantize_rows
from ktx.kernels.gpu.soa_layout import DEQUANT_CHUNK_WEIGHTS, SoAWeight, pack, pack_experts
from ktx.kernels.gradients import refuse_gpu_gradient

__all__ = ["SoAWeight", "dequantize", "dequantize_rows", "linear", "linear_batched", "pack", "pack_experts"]

MAX_GEMV_TOKENS, MAX_GEMM_TOKENS = 4, 64  # largest batches of the GEMV and of the GEMM kernel
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@triton.jit
def _linear(
    x,
    planes,
    codebook,
    bias,
    out,
    tokens,
    n,
    k,
    blocks,
    split_columns,
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
    """Multiplies x [matrices, tokens, k] by [matrices, n, k] transposed -> out [splits, matrices, tokens, n].

    A program computes TOKENS tokens by ROWS rows of one matrix, and sums over the `split_columns` columns of its split.
    Columns are split where the rows alone are too few programs for the GPU; the caller adds up the splits.
    """
    group, split = tl.program_id(1), tl.program_id(2)  # a group: TOKENS tokens of one matrix
    groups = tl.cdiv(tokens, TOKENS)
    matrix = (group // groups).to(tl.int64)
    token = group % groups * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_mask = token < tokens
    x_row = matrix * tokens + token
    begin = split * split_columns
    weight_row = matrix * n + tl.minimum(row, n - 1)
    y = PRODUCT(
        x,
        x_row,
        token_mask,
        planes,
        codebook,
        weight_row,
        n,
        k,
        blocks,
        begin,
        tl.minimum(k, begin + split_columns),
        SPAN,
        BLOCK,
        DECODE,
        MINIMUM,
        RUN,
    )
    if HAS_BIAS:
        y += tl.load(bias + row, mask=row < n, other=0.0)[None, :]
    out_offsets = (split.to(tl.int64) * tl.num_programs(1) // groups * tokens + x_row)[:, None] * n + row[None, :]
    tl.store(out + out_offsets, y.to(out.dtype.element_ty), mask=token_mask[:, None] & (row < n)[None, :])


def linear(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies by a packed matrix: x [..., k] (f32, f16, bf16) times w [n, k] transposed, plus bias f32 [n].

    Returns:
        [..., n] in x's dtype.

    Raises:
        KtxError: if dtypes, shapes or devices do not fit.
        NoGradient: if autograd records x.
    """
    _check(x, w, bias)
    x_flat = x.reshape(1, -1, w.k)
    tokens = x_flat.shape[1]
    if DTYPES.get(w.qtype.name) is x.dtype:
        y = _linear_float(x_flat, w, bias)
    elif tokens <= MAX_GEMM_TOKENS:
        y = _linear_packed(x_flat, w, bias)
    elif fp8.supports(x, w):
        y = fp8.linear(x_flat[0], w, bias)
    else:
        y = _linear_dequantized(x_flat[0], w, bias)
    return y.view(*x.shape[:-1], w.n)


def linear_batched(x: torch.Tensor, w: SoAWeight) -> torch.Tensor:
    """Multiplies x [matrices, tokens, k] by each matrix of w transposed -> [matrices, tokens, n]."""
    _check(x, w, None)
    if x.dim() != 3 or x.shape[0] != w.matrices:
        raise KtxError(f"x has shape {list(x.shape)} for {w.matrices} matrices: it must be [matrices, tokens, columns]")
    if DTYPES.get(w.qtype.name) is x.dtype or x.shape[1] > MAX_GEMM_TOKENS:
        return torch.bmm(x, dequantize(w, x.dtype).view(w.matrices, w.n, w.k).transpose(1, 2))
    return _linear_packed(x, w, None)


def choose_tile(tokens: int, n: int, k: int, matrices: int = 1) -> dict[str, Any]:
    """Returns the product and its tile for a number of tokens, as keyword arguments of the kernel."""
    padded_tokens = triton.next_power_of_2(max(1, tokens))
    if tokens > MAX_GEMV_TOKENS:
        return {"TOKENS": min(quant_matmul.GEMM_TOKENS, max(16, padded_tokens)), **quant_matmul.gemm_tile()}
    return {"TOKENS": padded_tokens, **quant_matmul.gemv_tile(n, k, matrices)}


def _linear_packed(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiplies x [matrices, tokens, k] by packed weights with the GEMV or the GEMM kernel, which unpack in registers.

    If the rows alone would be too few programs to use the memory bandwidth, the columns are split among several
    programs, and torch sums the results of these splits, in the order of the columns; the bias is added after that.
    """
    matrices, tokens, _ = x.shape
    if not x.numel():
        return x.new_empty(matrices, tokens, w.n)
    x, shape = x.contiguous(), choose_tile(tokens, w.n, w.k, matrices)
    groups = matrices * triton.cdiv(tokens, shape["TOKENS"])
    num_programs, steps = triton.cdiv(w.n, shape["ROWS"]) * matrices, triton.cdiv(w.k, shape["SPAN"])
    num_splits = max(1, min(steps, quant_matmul.MIN_PROGRAMS // num_programs))
    split_columns = triton.cdiv(steps, num_splits) * shape["SPAN"]
    num_splits = triton.cdiv(w.k, split_columns)
    out = torch.empty(
        num_splits, matrices, tokens, w.n, dtype=x.dtype if num_splits == 1 else torch.float32, device=x.device
    )
    kernel_bias = bias if num_splits == 1 else None
    sizes = tokens, w.n, w.k, w.row_blocks, split_columns
    grid = (triton.cdiv(w.n, shape["ROWS"]), groups, num_splits)
    _linear[grid](
        x,
        w.planes,
        codebook_of(w),
        kernel_bias,
        out,
        *sizes,
        HAS_BIAS=kernel_bias is not None,
        **shape,
        **decode_constants(w),
    )
    if num_splits == 1:
        return out[0]
    y = out.sum(0)
    return (y if bias is None else y + bias).to(x.dtype)


def _linear_float(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiplies by cuBLAS: the weights have the dtype of x."""
    y = F.linear(x, w.planes[0].view(w.n, w.k))
    return y if bias is None else (y.float() + bias).to(x.dtype)


def _linear_dequantized(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiplies by cuBLAS, after dequantizing as many rows at a time as DEQUANT_CHUNK_WEIGHTS weights are."""
    chunk_rows = max(1, DEQUANT_CHUNK_WEIGHTS // w.k)
    y = torch.empty(len(x), w.n, dtype=x.dtype, device=x.device)
    for first_row in range(0, w.n, chunk_rows):
        chunk = dequantize(w, x.dtype, first_row, min(chunk_rows, w.n - first_row))
        y[:, first_row : first_row + chunk_rows] = x @ chunk.T
    return y if bias is None else (y.float() + bias).to(x.dtype)


def _check(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None) -> None:
    """Raises KtxError unless dtypes, shapes and devices fit, because the kernels check nothing; refuses gradients."""
    refuse_gpu_gradient("Linear", x)
    if x.dtype not in DTYPES.values():
        raise KtxError(f"activations have dtype {x.dtype}: it must be float32, float16 or bfloat16")
    if x.shape[-1] != w.k:
        raise KtxError(f"activations have {x.shape[-1]} columns, the weights {w.k}")
    if x.device != w.data.device:
        raise KtxError(f"activations are on {x.device}, the weights on {w.data.device}")
    if bias is not None and bias.shape != (w.n,):
        raise KtxError(f"the bias has shape {list(bias.shape)}, the weights {w.n} rows")
