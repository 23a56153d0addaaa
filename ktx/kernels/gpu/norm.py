"""RMSNorm on a GPU in one launch; see `reference.rms_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ktx.errors import KtxError
from ktx.kernels.gradients import refuse_gpu_gradient

MIN_ELEMENTS = 4096  # elements of a program if a row has fewer


@triton.jit
def _rms_norm(x, weight, out, rows, columns, eps, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Normalizes ROWS rows; BLOCK is `columns` rounded up to a power of two, so that a program holds complete rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    offsets = row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < columns, other=0.0)[None, :]
    y = values * tl.rsqrt(tl.sum(values * values, 1) / columns + eps)[:, None]
    if PLUS_ONE:
        y *= 1 + gain
    else:  # rounded before the multiplication by the weight, as in transformers
        y = gain * y.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """Normalizes x [..., columns] over its last dimension and multiplies by the weight, in x's dtype.

    Args:
        x: the activations.
        weight: f32 [columns].
        eps: added to the mean square.
        plus_one: whether the factor is 1 + weight.

    Raises:
        KtxError: if the weight has another shape or dtype.
        NoGradient: if autograd records x.
    """
    columns = x.shape[-1]
    if weight.shape != (columns,) or weight.dtype is not torch.float32:
        raise KtxError(
            f"the weight is {list(weight.shape)} {weight.dtype}: rows of {columns} columns need as many float32 values"
        )
    refuse_gpu_gradient("RMSNorm", x)
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // columns
    if rows:
        block = triton.next_power_of_2(columns)
        rows_per_program = min(max(1, MIN_ELEMENTS // block), triton.next_power_of_2(rows))
        warps = min(16, max(1, block * rows_per_program // 512))  # one per 512 elements
        sizes = rows, columns, eps
        _rms_norm[(triton.cdiv(rows, rows_per_program),)](
            x, weight, out, *sizes, PLUS_ONE=plus_one, ROWS=rows_per_program, BLOCK=block, num_warps=warps
        )
    return out
