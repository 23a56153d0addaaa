"""Block-scaled FP8 weights times large batches in FP8 (DeepSeek): an activation scale per 128 columns of a token.

cuBLAS multiplies such blocks on GPUs of compute capability 9.0. Elsewhere, and for small batches, F8_E4M3 is handled
like other packed types (linear.py). Activations have four bits of mantissa, so the error of a product is 2.5 % instead
of the 0.3 % of bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ktx.kernels.gpu.soa_layout import SoAWeight
from ktx.quant.types import FP8_BLOCK

MAX_E4M3 = 448.0  # largest value of e4m3
REQUIRED_CAPABILITY, MIN_CUDA = (9, 0), (12, 9)  # to multiply 1 x 128 blocks by 128 x 128 blocks


def supports(x: torch.Tensor, w: SoAWeight) -> bool:
    """Whether `linear` supports the GPU, the dtypes and the shape."""
    full_blocks = w.n % FP8_BLOCK == 0 and w.k % FP8_BLOCK == 0 and w.matrices == 1
    return w.qtype.name == "F8_E4M3" and x.dtype is torch.bfloat16 and full_blocks and _has_block_scaled_mm(x.device)


def _has_block_scaled_mm(device: torch.device) -> bool:
    """Whether cuBLAS multiplies block-scaled FP8 on this device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return torch.cuda.get_device_capability(device) == REQUIRED_CAPABILITY and version >= MIN_CUDA


def linear(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies x bf16 [tokens, k] by w [n, k] transposed, plus bias -> bf16 [tokens, n].

    The activations are quantized to e4m3 first, because cuBLAS multiplies two matrices of FP8.
    """
    from torch.nn.functional import ScalingType

    assert w.scale is not None
    codes, scale = quantize(x)
    blocks = F.pad(w.scale[0], (0, -w.scale.shape[2] % 4))  # cuBLAS requires multiples of four columns of scales
    y = F.scaled_mm(
        codes,
        w.planes[0].view(torch.float8_e4m3fn).view(w.n, w.k).T,
        scale,
        ScalingType.BlockWise1x128,
        blocks.T,
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return y if bias is None else (y.float() + bias).to(y.dtype)


@triton.jit
def _quantize_tile(x, codes, scale, tokens, k, TOKENS: tl.constexpr, BLOCK: tl.constexpr, MAX_E4M3: tl.constexpr):
    """Quantizes TOKENS tokens of one block of columns, with the scale of a token that maps its largest value to 448."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (column < k)[None, :]
    offsets = token[:, None] * k + column[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    token_scale = tl.maximum(tl.max(tl.abs(values), 1), 1e-12) / MAX_E4M3
    tl.store(codes + offsets, (values / token_scale[:, None]).to(codes.dtype.element_ty), mask=mask)
    tl.store(scale + tl.program_id(1) * tokens + token, token_scale, mask=token < tokens)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes x [tokens, k] to e4m3 [tokens, k] and scales f32 [tokens, ceil(k/128)]; code * scale is x.

    The scales of a block of columns are contiguous over tokens, as cuBLAS takes them.
    """
    x = x.contiguous()
    tokens, k = x.shape
    columns = triton.cdiv(k, FP8_BLOCK)
    codes = torch.empty(tokens, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(columns, tokens, dtype=torch.float32, device=x.device)
    if tokens:
        grid = (triton.cdiv(tokens, 16), columns)
        _quantize_tile[grid](x, codes, scale, tokens, k, TOKENS=16, BLOCK=FP8_BLOCK, MAX_E4M3=MAX_E4M3)
    return codes, scale.T
