"""RMSNorm on a GPU, in one launch: `reference.rms_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.errors import KtxError
from ktx.kernels.gradients import none_on_gpu

AT_ONCE = 4096  # numbers of a program, if a row has fewer


@triton.jit
def _rms_norm(x, weight, out, rows, columns, eps, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < columns, other=0.0)[None, :]
    y = values * tl.rsqrt(tl.sum(values * values, 1) / columns + eps)[:, None]
    if PLUS_ONE:
        y *= 1 + gain
    else:  # as transformers does: rounded before it is weighed
        y = gain * y.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """x [..., columns] normalised over its last dimension, times weight f32 [columns] (or one more than that), in x's dtype."""
    columns = x.shape[-1]
    if weight.shape != (columns,) or weight.dtype is not torch.float32:
        raise KtxError(f"the weight is {list(weight.shape)} {weight.dtype}, rows of {columns} need as many f32")
    none_on_gpu("RMSNorm", x)
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // columns
    if rows:
        block = triton.next_power_of_2(columns)
        each = min(max(1, AT_ONCE // block), triton.next_power_of_2(rows))
        warps = min(16, max(1, block * each // 512))
        sizes = rows, columns, eps
        _rms_norm[(triton.cdiv(rows, each),)](
            x, weight, out, *sizes, PLUS_ONE=plus_one, ROWS=each, BLOCK=block, num_warps=warps
        )
    return out
