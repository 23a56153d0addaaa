"""Packed weights that are edited: `ktx.edit` gives a matrix in f32 and packs what was made of it, `ktx.dequantize` gives torch's own module back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError, nearest
from ktx.ops.floats import Dequantized, Floats
from ktx.qtypes import QTYPES, QType
from ktx.quantize import quantize
from ktx.weights.source import QuantizedTensor


def shown(module: Any, floats: Floats) -> torch.Tensor:
    """What a module with one matrix shows as its weight."""
    replace = lambda values: module.pack_again(values, "weight", None, "given")  # noqa: E731
    return Dequantized(floats, module.dtype, f"{module.path}.weight", module.home.torch, replace)


def quantized(values: torch.Tensor, before: Sequence[QType], path: str, dtype: str | None) -> QuantizedTensor:
    """Edited values [n, k] as they are packed: as `dtype` says, else as F32 where they were that, F16 where that holds them, F32 where it does not."""
    if dtype == "given":  # as the floats they are
        dtype = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(values.dtype, "F32")
    values = values.detach().to("cpu", torch.float32).contiguous()
    if dtype is None:
        half = all(qtype.name != "F32" for qtype in before) and bool(
            values.abs().max() < torch.finfo(torch.float16).max
        )
        dtype = "F16" if half else "F32"
    if dtype not in QTYPES:
        raise UsageError(f"{path}: {dtype!r} is no type of weights{nearest(dtype, QTYPES)}")
    return QuantizedTensor(quantize(values, QTYPES[dtype]), QTYPES[dtype], tuple(values.shape))


def fitting(path: str, values: Any, shape: Sequence[int]) -> torch.Tensor:
    """Values that take a weight's place; UsageError for others than a tensor of floats of its shape."""
    if not isinstance(values, torch.Tensor):
        raise UsageError(f"{path}.weight takes a tensor, not {type(values).__name__}")
    if tuple(values.shape) != tuple(shape) or not values.is_floating_point():
        raise UsageError(f"{path}.weight is {list(shape)}, it cannot be {list(values.shape)} of {values.dtype}")
    return values


def only_weight(module: Any, name: str, expert: int | None) -> None:
    """UsageError unless a module's one matrix is meant."""
    if name != "weight" or expert is not None:
        raise UsageError(f"{module.path}: a {type(module).__name__} has one matrix, `weight`, and no experts")


def alone(module: Any) -> None:
    """Has a module share its matrix with none."""
    module.ties[:] = [other for other in module.ties if other is not module]
    module.ties = []


def share(module: Any, packed: Any) -> None:
    """Gives a matrix to all modules that a module shares one with."""
    for other in module.ties:
        if hasattr(other, "parts"):
            other.parts = [packed]
        else:
            other.packed = packed


@contextmanager
def edit(
    module: nn.Module, name: str = "weight", *, expert: int | None = None, dtype: str | None = None
) -> Iterator[torch.Tensor]:
    """`with ktx.edit(module) as weight:` gives the matrix f32 [n, k]; at the end what was made of it in place is packed and counts from the next forward on.

    Of experts `name` is gate_proj, up_proj or down_proj and `expert` a number, of an MLA attention `name` is kv_b_proj. `dtype` is the type to pack as (F32, F16, BF16, Q8_0, Q4_K, ...); by default a matrix becomes
    F16 (F32 where it was that, or holds numbers that F16 does not), experts keep the type that all of a layer have in common. An embedding and the output
    layer that is tied to it change together. UsageError for a module that has no packed weights, or no such one. If the block raises, nothing changes.
    """
    take, put = getattr(module, "matrix_of", None), getattr(module, "pack_again", None)
    if take is None or put is None:
        raise UsageError(
            f"{type(module).__name__} has no packed weights: ktx.edit takes Linear, Embedding, Experts and MLA; other parameters are edited as torch's"
        )
    values: torch.Tensor = take(name, expert)
    yield values
    put(values, name, expert, dtype)


def dequantize(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """torch's own module with the weights of a Linear or an Embedding in floats (`dtype`: by default what the module computes in), to be put in its place."""
    plain = getattr(module, "plain", None)
    if plain is None:
        raise UsageError(f"{type(module).__name__} is no packed Linear or Embedding: there is nothing to dequantise")
    return plain(dtype)  # type: ignore[no-any-return]
