"""Bytes that forwards need on a device beside weights and caches. Upper bounds: what is never in use at once is added up all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ktx.devices import CPU, Device
from ktx.injection.inject import layer_of
from ktx.kernels.gpu.repack_bits import UNDOING
from ktx.kernels.gpu.repack_from_cpu import STREAMED
from ktx.kernels.gpu.soa_layout import PIECE
from ktx.kernels.gpu.split_kv import AttentionSchedule, Shape
from ktx.ops.mla import EXPAND_BYTES
from ktx.placement.memory_model import FLOAT, HALF, Footprint, KVMemory, ModuleMemory, columns_of, group_of

MULTIPROCESSORS = 132  # of an H100: attention's scratch grows with them
RESIDUALS = 4  # hidden states in flight: residual, normed, a module's result, their sum


def activations(of: Footprint, parts: Collection[ModuleMemory], tokens: int, gpu: bool) -> int:
    """Hidden states, and all that the widest block of a layer makes of them: f32 on the CPU, bf16 on a GPU."""
    blocks: Counter[tuple[int | None, str]] = Counter()
    for part in parts:
        if part.layer is not None:  # logits are counted by themselves
            blocks[part.layer, part.group] += part.columns
    columns = RESIDUALS * of.hidden + max(blocks.values(), default=0)
    return tokens * columns * (HALF if gpu else FLOAT)


def step_bytes(model: Any) -> dict[Device, int]:
    """The same of one token, of a loaded model by device."""
    blocks: Counter[tuple[Device, int, str]] = Counter()
    for path, module in model.named_modules():
        layer, columns = layer_of(path), columns_of(module)
        if layer is not None and columns:
            blocks[getattr(module, "home", CPU), layer, group_of(path)] += columns
    widest: dict[Device, int] = {}
    for (device, _, _), columns in blocks.items():
        widest[device] = max(widest.get(device, 0), columns)
    return {
        device: (RESIDUALS * model.config.hidden_size + columns) * (HALF if device.gpu else FLOAT)
        for device, columns in widest.items()
    }


def logits(of: Footprint, rows: int) -> int:
    """As they are computed, and once more for whoever chooses."""
    return 2 * rows * of.vocabulary * FLOAT


def crossing(of: Footprint, tokens: int) -> int:
    """Hidden states on their way to the CPU and back, and the experts that were chosen with their weights."""
    return tokens * (2 * of.hidden * HALF + of.top * (8 + FLOAT))


def streamed(parts: Collection[ModuleMemory]) -> int:
    """A piece of the experts in the CPU's memory as they come to a GPU for prompts, and the same in planes; an expert is a piece at least.

    What puts bits back where packing found them has some room of its own.
    """
    found = [
        sum(min(size, max(STREAMED, size // part.experts)) for size in (part.cpu.held, part.gpu.held))
        + part.rearranged * UNDOING
        for part in parts
        if part.experts and part.weights
    ]
    return max(found, default=0)


def expanding(kept: Collection[KVMemory], context: int) -> int:
    """A latent gathered from its pages, as it is stored and as it is computed with, and the keys and values of the heads that MLA makes of it at once."""
    found = [
        min(EXPAND_BYTES, context * layer.expanded * HALF) + 2 * context * sum(layer.columns) * HALF
        for layer in kept
        if layer.latent
    ]
    return max(found, default=0)


def attention(kept: Collection[KVMemory], tokens: int, batch: int) -> int:
    """Parts of sums that several programs of a GPU make of one tile, of a chunk or of `batch` single tokens."""
    shapes = {
        Shape(layer.queries, layer.heads, layer.columns[0], layer.columns[0 if layer.latent else 1], layer.latent)
        for layer in kept
        if layer.columns
    }
    found = [FLOAT * max(_floats([tokens], shape), _floats([1] * batch, shape)) for shape in shapes]
    return max(found, default=0)


def captured(of: Footprint, parts: Collection[ModuleMemory], kept: Collection[KVMemory], batch: int) -> int:
    """What CUDA graphs of steps with up to `batch` tokens keep for themselves: activations, those on their way to the CPU in each layer, parts of attention's sums, logits.

    Sizes share it. Their buffers of numbers and page tables are some hundred kilobytes and not counted.
    """
    layers = len({part.layer for part in parts if part.layer is not None})
    need = activations(of, parts, batch, gpu=True) + layers * crossing(of, batch)
    return need + attention(kept, 1, batch) + batch * of.vocabulary * HALF


def _floats(counts: Sequence[int], shape: Shape) -> int:
    """Of scratch; the memory itself is not made."""
    endless = torch.empty(1 << 40, dtype=torch.float32, device="meta")
    return AttentionSchedule(counts, shape, "cpu", MULTIPROCESSORS, scratch=endless).floats


def dequantised(parts: Collection[ModuleMemory]) -> int:
    """The piece of the largest matrix that becomes bf16 for many tokens on a GPU."""
    return HALF * min(PIECE, max((part.largest for part in parts), default=0))
