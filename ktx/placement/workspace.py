"""Workspaces: bytes that forwards need on a device in addition to weights and caches.

The values are upper bounds: buffers that are never in use at the same time are added up nevertheless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from ktx.devices import CPU, Device
from ktx.injection.inject import layer_number
from ktx.kernels.gpu.repack_bits import PEAK_TEMPORARY_BYTES
from ktx.kernels.gpu.repack_from_cpu import STREAM_CHUNK_BYTES
from ktx.kernels.gpu.soa_layout import DEQUANT_CHUNK_WEIGHTS
from ktx.kernels.gpu.split_kv import AttentionSchedule, AttentionShape
from ktx.ops.mla import EXPAND_BYTES
from ktx.placement.memory_model import (
    BF16_BYTES,
    F32_BYTES,
    Footprint,
    KVMemory,
    ModuleMemory,
    activation_columns,
    group_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MULTIPROCESSORS = 132  # of an H100; attention's workspace grows with it
INT64_BYTES = 8  # of an expert's id
RESIDUALS = 4  # hidden states in flight: residual, normed, a module's result, their sum


def activation_bytes(model: Footprint, modules: Collection[ModuleMemory], tokens: int, gpu: bool) -> int:
    """Bytes of hidden states and of the activations of a layer's widest block: f32 on the CPU, bf16 on a GPU."""
    blocks: Counter[tuple[int | None, str]] = Counter()
    for module in modules:
        if module.layer is not None:  # logits are counted separately
            blocks[module.layer, module.group] += module.activation_columns
    columns = RESIDUALS * model.hidden_size + max(blocks.values(), default=0)
    return tokens * columns * (BF16_BYTES if gpu else F32_BYTES)


def decode_step_bytes(model: PreTrainedModel) -> dict[Device, int]:
    """Bytes of activations per token of a loaded model, by device: residuals, and those of the widest block.

    An engine limits the tokens of its steps by this number and the free memory.
    """
    blocks: Counter[tuple[Device, int, str]] = Counter()
    for path, module in model.named_modules():
        layer, columns = layer_number(path), activation_columns(module)
        if layer is not None and columns:
            blocks[getattr(module, "placement", CPU), layer, group_of(path)] += columns
    widest: dict[Device, int] = {}
    for (device, _, _), columns in blocks.items():
        widest[device] = max(widest.get(device, 0), columns)
    return {
        device: (RESIDUALS * model.config.hidden_size + columns) * (BF16_BYTES if device.gpu else F32_BYTES)
        for device, columns in widest.items()
    }


def logits_bytes(model: Footprint, rows: int) -> int:
    """Bytes of logits as they are computed, and of a copy for the sampler."""
    return 2 * rows * model.vocab_size * F32_BYTES


def transfer_bytes(model: Footprint, tokens: int) -> int:
    """Bytes of hidden states on the way to the CPU and back, with the selected experts and their weights."""
    return tokens * (2 * model.hidden_size * BF16_BYTES + model.top_k * (INT64_BYTES + F32_BYTES))


def streaming_bytes(modules: Collection[ModuleMemory]) -> int:
    """Bytes on a GPU for streaming experts to it in prefill: two buffers of the largest chunk of experts.

    One is for the copied CPU layout, one for the GPU layout that it is repacked to. A chunk holds at least one expert.
    Types with `needs_repacking` need temporary space too.
    """
    chunk_bytes = [
        sum(
            min(size, max(STREAM_CHUNK_BYTES, size // module.num_experts))
            for size in (module.cpu.held_bytes, module.gpu.held_bytes)
        )
        + module.needs_repacking * PEAK_TEMPORARY_BYTES
        for module in modules
        if module.num_experts and module.num_weights
    ]
    return max(chunk_bytes, default=0)


def mla_expansion_bytes(kv_layers: Collection[KVMemory], context: int) -> int:
    """Bytes that MLA's prefill needs for one layer, the largest one.

    These are the latents gathered from their pages, stored and converted, and the expanded keys and values.
    """
    sizes = [
        min(EXPAND_BYTES, context * layer.expanded * BF16_BYTES) + 2 * context * sum(layer.columns) * BF16_BYTES
        for layer in kv_layers
        if layer.is_mla
    ]
    return max(sizes, default=0)


def attention_bytes(kv_layers: Collection[KVMemory], tokens: int, batch: int) -> int:
    """Bytes of split-KV partial results of a GPU's attention, for a prefill chunk or for `batch` single tokens.

    Layers run one after another and share the memory, so the largest shape counts.
    """
    shapes = {  # with the columns of keys and of values, which for MLA are both the latent's
        AttentionShape(
            layer.num_heads, layer.num_kv_heads, layer.columns[0], layer.columns[0 if layer.is_mla else 1], layer.is_mla
        )
        for layer in kv_layers
        if layer.columns
    }
    sizes = [F32_BYTES * max(_scratch_floats([tokens], shape), _scratch_floats([1] * batch, shape)) for shape in shapes]
    return max(sizes, default=0)


def cuda_graph_bytes(
    model: Footprint, modules: Collection[ModuleMemory], kv_layers: Collection[KVMemory], batch: int
) -> int:
    """Bytes that CUDA graphs of decode steps with up to `batch` tokens retain.

    They hold activations, transfers to the CPU in each layer, attention's partial results and logits. Graphs of all
    sizes share this memory. Their buffers of row fields and page tables are some hundred kilobytes and are not counted.
    """
    layers = len({module.layer for module in modules if module.layer is not None})
    num_bytes = activation_bytes(model, modules, batch, gpu=True) + layers * transfer_bytes(model, batch)
    return num_bytes + attention_bytes(kv_layers, 1, batch) + batch * model.vocab_size * BF16_BYTES


def _scratch_floats(counts: Sequence[int], shape: AttentionShape) -> int:
    """Number of floats in attention's workspace.

    It is that of a real schedule, whose scratch memory is on the meta device so that none is allocated.
    """
    scratch = torch.empty(1 << 40, dtype=torch.float32, device="meta")
    return AttentionSchedule(counts, shape, "cpu", MULTIPROCESSORS, scratch=scratch).scratch_floats


def dequantized_bytes(modules: Collection[ModuleMemory]) -> int:
    """Bytes of the bf16 chunk of the largest matrix that a GPU dequantizes for a large batch."""
    return BF16_BYTES * min(DEQUANT_CHUNK_WEIGHTS, max((module.max_matrix_weights for module in modules), default=0))
