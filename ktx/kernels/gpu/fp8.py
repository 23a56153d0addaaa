"""Block-scaled FP8 weights times many tokens, in FP8 (DeepSeek's way): activations get a scale for each 128 columns of a token.

cuBLAS multiplies such blocks on cards of compute capability 9.0; elsewhere, and for few tokens, F8_E4M3 is a packed type like others (gpu_linear.py).
An activation keeps four bits of mantissa, so a product errs by 2.5 % and not by bf16's 0.3 %.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ktx.kernels.gpu.soa_layout import SoAWeight
from ktx.quant.types import FP8_BLOCK

LARGEST = 448.0  # of e4m3
CAPABILITY, CUDA = (9, 0), (12, 9)  # that multiply 1 x 128 blocks by 128 x 128 ones


def takes(x: torch.Tensor, w: SoAWeight) -> bool:
    """Whether `linear` does: by the card, the types and the shape."""
    whole = w.n % FP8_BLOCK == 0 and w.k % FP8_BLOCK == 0 and w.matrices == 1
    return w.qtype.name == "F8_E4M3" and x.dtype is torch.bfloat16 and whole and _multiplies(x.device)


def _multiplies(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return torch.cuda.get_device_capability(device) == CAPABILITY and version >= CUDA


def linear(x: torch.Tensor, w: SoAWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x bf16 [tokens, k] times w [n, k] transposed -> bf16 [tokens, n]."""
    from torch.nn.functional import ScalingType

    assert w.scale is not None
    codes, scale = quantize(x)
    blocks = F.pad(w.scale[0], (0, -w.scale.shape[2] % 4))  # cuBLAS wants columns of scales by four
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
def _quantize(x, codes, scale, tokens, k, TOKENS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = (token < tokens)[:, None] & (column < k)[None, :]
    at = token[:, None] * k + column[None, :]
    values = tl.load(x + at, mask=some, other=0.0).to(tl.float32)
    size = tl.maximum(tl.max(tl.abs(values), 1), 1e-12) / LARGEST
    tl.store(codes + at, (values / size[:, None]).to(codes.dtype.element_ty), mask=some)
    tl.store(scale + tl.program_id(1) * tokens + token, size, mask=token < tokens)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, k] -> e4m3 [tokens, k], f32 [tokens, ceil(k/128)] (tokens side by side in memory); code * scale is x."""
    x = x.contiguous()
    tokens, k = x.shape
    columns = triton.cdiv(k, FP8_BLOCK)
    codes = torch.empty(tokens, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(columns, tokens, dtype=torch.float32, device=x.device)
    if tokens:
        grid = (triton.cdiv(tokens, 16), columns)
        _quantize[grid](x, codes, scale, tokens, k, TOKENS=16, BLOCK=FP8_BLOCK, LARGEST=LARGEST)
    return codes, scale.T
