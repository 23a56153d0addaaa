"""Choice of the attention kernels on a GPU: Triton's, or FlashInfer's where it is installed and supports the shape."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels.gpu.split_kv import AttentionSchedule, AttentionShape

BACKENDS = ("triton", "flashinfer", "auto")


@dataclass(frozen=True)
class AttentionKernels:
    """The attention kernels of a backend, which all have the same interface.

    Attributes:
        name: "triton" or "flashinfer".
        schedule: creates the schedule, as ktx.kernels.gpu.split_kv.AttentionSchedule.
        attention: as ktx.kernels.gpu.paged_attention.attention.
        mla_attention: as ktx.kernels.gpu.mla_decode.mla_attention.
    """

    name: str
    schedule: Callable[..., Any]
    attention: Callable[..., torch.Tensor]
    mla_attention: Callable[..., torch.Tensor]


def known_backend(name: str) -> str:
    """Checks that a backend exists and returns its name, so that operators reject a wrong option on creation.

    Raises:
        UsageError: if the name is unknown.
    """
    if name not in BACKENDS:
        raise UsageError(f"{name!r} is not an attention backend; available: {' '.join(BACKENDS)}")
    return name


def plans_on_host(backend: str) -> bool:
    """Whether kernels of this backend may read sequence lengths on the CPU, which a CUDA graph cannot capture."""
    return backend != "triton" and importlib.util.find_spec("flashinfer") is not None


@cache  # every layer calls it at every step
def kernels_for(
    shape: AttentionShape,
    backend: str = "triton",
    rope_columns: int = 0,
    sinks: bool = False,
    cache_dtype: torch.dtype = torch.bfloat16,
) -> AttentionKernels:
    """Selects the attention kernels for a shape of heads and an option of the user.

    Args:
        shape: heads and columns.
        backend: "triton", "flashinfer", or "auto" for FlashInfer where it is installed and supports the shape.
        rope_columns: columns of q_rope and k_rope; 0 for none.
        sinks: whether attention has sinks.
        cache_dtype: dtype of the KV cache.

    Raises:
        UsageError: if the backend is unknown, not installed, or does not support the shape.
    """
    if known_backend(backend) != "triton":
        reason = _flashinfer_unsupported_reason(shape, rope_columns, sinks, cache_dtype)
        if not reason:
            flashinfer = importlib.import_module("ktx.kernels.gpu.flashinfer")
            return AttentionKernels(
                "flashinfer", flashinfer.AttentionSchedule, flashinfer.attention, flashinfer.mla_attention
            )
        if backend == "flashinfer":
            raise UsageError(f"attention backend FlashInfer: {reason}; use triton or auto")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("attention on a GPU needs Triton, which is not installed: run pip install triton")
    paged_attention, mla_decode = (
        importlib.import_module(f"ktx.kernels.gpu.{module}") for module in ("paged_attention", "mla_decode")
    )
    return AttentionKernels("triton", AttentionSchedule, paged_attention.attention, mla_decode.mla_attention)


def _flashinfer_unsupported_reason(shape: AttentionShape, rope_columns: int, sinks: bool, stored: torch.dtype) -> str:
    """Returns why FlashInfer cannot be used; "" if it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return str(
        importlib.import_module("ktx.kernels.gpu.flashinfer").unsupported_reason(shape, rope_columns, sinks, stored)
    )
