"""Which kernels attend on a GPU: Triton's, or FlashInfer's where the package is installed and has one for the shape."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.kernels.gpu.split_kv import AttentionSchedule, Shape

BACKENDS = ("triton", "flashinfer", "auto")


@dataclass(frozen=True)
class Kernels:
    """One meaning under three names: `work` as ktx.kernels.gpu.split_kv.Work, `attention` and `mla_attention` as those of Triton."""

    name: str
    work: Callable[..., Any]
    attention: Callable[..., torch.Tensor]
    mla_attention: Callable[..., torch.Tensor]


def known_backend(name: str) -> str:
    """The name of a backend. UsageError for any other."""
    if name not in BACKENDS:
        raise UsageError(f"{name!r} is no attention backend; there are {' '.join(BACKENDS)}")
    return name


def plans_on_host(backend: str) -> bool:
    """Whether kernels of this backend may read lengths on the CPU, which a CUDA graph cannot hold."""
    return backend != "triton" and importlib.util.find_spec("flashinfer") is not None


@cache  # every layer asks at every step
def kernels_for(
    shape: Shape,
    backend: str = "triton",
    rope_columns: int = 0,
    sinks: bool = False,
    stored: torch.dtype = torch.bfloat16,
) -> Kernels:
    """The kernels for keys and values of a type and shape, chosen when a model is built. `auto` is FlashInfer if it is there and can.

    UsageError for a backend that is unknown, not installed, or has no kernel for it.
    """
    if known_backend(backend) != "triton":
        reason = _flashinfer_refuses(shape, rope_columns, sinks, stored)
        if not reason:
            other = importlib.import_module("ktx.kernels.gpu.flashinfer")
            return Kernels("flashinfer", other.Work, other.attention, other.mla_attention)
        if backend == "flashinfer":
            raise UsageError(f"attention by FlashInfer: {reason}; choose triton or auto")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("attention on a GPU needs Triton, which is not installed: pip install triton")
    paged, mla = (importlib.import_module(f"ktx.kernels.{name}") for name in ("paged", "mla"))
    return Kernels("triton", AttentionSchedule, paged.attention, mla.mla_attention)


def _flashinfer_refuses(shape: Shape, rope_columns: int, sinks: bool, stored: torch.dtype) -> str:
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return str(importlib.import_module("ktx.kernels.gpu.flashinfer").refusal(shape, rope_columns, sinks, stored))
