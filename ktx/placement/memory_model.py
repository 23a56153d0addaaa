"""Memory model: bytes of a model's modules on each device, from headers alone: weights, KV cache, activations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ktx.cache.kv import STANDARD_LAYERS, KVType, stored_row_format
from ktx.cache.page_pool import MAX_SNAPSHOTS, PAGE_TOKENS
from ktx.injection.inject import Plan, Step, layer_number
from ktx.kernels import cpu
from ktx.kernels.gpu.repack_bits import RESTORE
from ktx.ops.base import target_qtype
from ktx.ops.experts import Experts
from ktx.ops.linear import Linear
from ktx.ops.mla import MLA
from ktx.ops.norm import RMSNorm
from ktx.ops.router import Router
from ktx.quant.types import FP8_BLOCK, QTYPES, QType
from ktx.weights.base import TensorSpec, WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

GROUPS = (  # group of a module: the first pattern that matches its path
    ("routed experts", r"(?:^|\.)experts(?:\.|$)"),
    ("shared experts", r"\.shared_expert"),
    ("embedding", r"(?:^|\.)embed_tokens"),
    ("output", r"^lm_head"),
    ("attention", r"attn(?:\.|$)|\.attention(?:\.|$)"),
    ("router", r"\.(?:gate|router)(?:\.|$)"),
    ("dense layers", r"\.mlp(?:\.|$)|\.feed_forward(?:\.|$)"),
    ("norms and the rest", ""),
)
EXPERTS, EMBEDDING, OUTPUT, ATTENTION = GROUPS[0][0], GROUPS[2][0], GROUPS[3][0], GROUPS[4][0]
# Bytes per value: parameters that are not matrices are f32; with a GPU the model computes in bf16.
F32_BYTES, BF16_BYTES = 4, 2
Matrix = tuple[QType, tuple[int, ...]]  # quantization type and shape [..., n, k]


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a module's weights: `held_bytes` in memory, and `read` per decoded token."""

    held_bytes: int
    read: int


@dataclass(frozen=True)
class ModuleMemory:
    """Memory of a module with weights, as packed for the CPU (`cpu`) and for a GPU (`gpu`).

    Of a module with routed experts, the router selects `top_k` of `num_experts` per token.
    """

    path: str
    group: str
    layer: int | None
    cpu: WeightBytes
    gpu: WeightBytes
    num_weights: int  # number of weights
    max_matrix_weights: int  # weights in its largest matrix; the matrices of a batched product count as one
    activation_columns: int  # activation values per token while it computes
    num_experts: int = 0
    top_k: int = 0
    is_row_lookup: bool = False  # a token reads a single row
    cpu_only: bool = False  # a rule places it on the CPU
    needs_repacking: bool = False  # its packed bits are repacked when streamed to a GPU

    def weight_bytes(self, gpu: bool) -> WeightBytes:
        """Bytes of the weights on a GPU or on the CPU."""
        return self.gpu if gpu else self.cpu

    def subset(self, count: int) -> ModuleMemory:
        """Returns the memory of `count` of the experts, for experts that are split between two devices.

        The bytes read per token are scaled too, as if tokens select all experts equally often.
        """
        cpu_bytes, gpu_bytes = (
            (size.held_bytes * count // self.num_experts, size.read * count // self.num_experts)
            for size in (self.cpu, self.gpu)
        )
        return replace(
            self,
            cpu=WeightBytes(*cpu_bytes),
            gpu=WeightBytes(*gpu_bytes),
            num_weights=self.num_weights * count // self.num_experts,
        )

    def read_bytes(self, tokens: int, gpu: bool) -> int:
        """Bytes that a forward over `tokens` tokens reads, if each token selects different experts."""
        size = self.weight_bytes(gpu)
        if self.num_experts:
            return size.held_bytes * min(self.num_experts, tokens * self.top_k) // self.num_experts
        return size.read * (tokens if self.is_row_lookup else 1)


@dataclass(frozen=True)
class KVMemory:
    """Cache of an attention layer: `columns` values per position and head in each pool, or `state_bytes` of state.

    `num_heads` is the number of query heads. `is_mla` marks MLA, which expands each position to `expanded` values in
    prefill.
    """

    path: str
    layer: int
    num_kv_heads: int = 0
    columns: tuple[int, ...] = ()
    state_bytes: int = 0
    num_heads: int = 0
    is_mla: bool = False
    expanded: int = 0
    cpu_only: bool = False

    def row_bytes(self, kv_dtype: KVType, gpu: bool) -> int:
        """Bytes of a position."""
        device = torch.device("cuda" if gpu else "cpu")
        rows = [stored_row_format(kv_dtype, width, torch.float32, device) for width in self.columns]
        return self.num_kv_heads * sum(width * dtype.itemsize for width, dtype in rows)

    def nbytes(self, context: int, batch: int, kv_dtype: KVType, gpu: bool) -> int:
        """Bytes for `batch` sequences of `context` positions, rounded up to full pages.

        A layer with a state adds the snapshots of the prefix cache.
        """
        pages = batch * -(-context // PAGE_TOKENS)
        return pages * PAGE_TOKENS * self.row_bytes(kv_dtype, gpu) + (
            self.state_bytes * (batch + MAX_SNAPSHOTS) if self.state_bytes else 0
        )


@dataclass(frozen=True)
class Footprint:
    """Memory of a model, from its headers and its configuration."""

    modules: list[ModuleMemory]
    kv_layers: list[KVMemory]
    hidden_size: int
    vocab_size: int

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return 1 + max((module.layer for module in self.modules if module.layer is not None), default=-1)

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        return max((module.top_k for module in self.modules), default=0)


def cpu_packed_bytes(matrices: Sequence[Matrix]) -> int:
    """Bytes of matrices packed for the CPU."""
    return sum(cpu.packed_nbytes(qtype, shape[-2], shape[-1], prod(shape[:-2])) for qtype, shape in matrices)


def gpu_packed_bytes(matrices: Sequence[Matrix]) -> int:
    """Bytes of the same matrices packed for a GPU (structure of arrays)."""
    return sum(
        prod(shape[:-1]) * qtype.row_bytes(shape[-1]) + _fp8_scale_bytes(qtype, shape) for qtype, shape in matrices
    )


def _fp8_scale_bytes(qtype: QType, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix's f32 block scales; 0 unless it is fp8."""
    blocks = -(-shape[-2] // FP8_BLOCK) * -(-shape[-1] // FP8_BLOCK)
    return 4 * prod(shape[:-2]) * blocks if qtype.name == "F8_E4M3" else 0


def compute_footprint(model: PreTrainedModel, plan: Plan, source: WeightSource) -> Footprint:
    """Returns the memory footprint of a meta-device model, from which the solver chooses a placement.

    Args:
        model: the model after injection.
        plan: its plan, with all modules on the CPU.
        source: the weight source.
    """
    config = model.config
    cpu_only_prefixes = tuple(f"{path}." for path in plan.pinned_paths)
    memory = [_module_memory(step, model.get_submodule(step.path), plan, source) for step in plan]
    modules = [
        replace(entry, cpu_only=f"{entry.path}.".startswith(cpu_only_prefixes)) for entry in memory if entry is not None
    ]
    hf_layers = DynamicCache(config=config).layers  # whose classes show which layers cache a state instead of keys
    attention_modules = [(path, module) for path, module in model.named_modules() if group_of(path) == ATTENTION]
    cached_modules = [(path, module) for path, module in attention_modules if hasattr(module, "layer_idx")]
    kv_layers = [
        _attention_cache(path, module, config)
        if type(hf_layers[module.layer_idx]) in STANDARD_LAYERS
        else _recurrent_state(path, module)
        for path, module in cached_modules
        if module.layer_idx < len(hf_layers)
    ]
    kv_layers = [replace(layer, cpu_only=f"{layer.path}.".startswith(cpu_only_prefixes)) for layer in kv_layers]
    return Footprint(modules, kv_layers, int(config.hidden_size), int(config.vocab_size))


def group_of(path: str) -> str:
    """Returns the group of a module by its path."""
    return next(name for name, pattern in GROUPS if re.search(pattern, path))


# ---- weights


def _module_memory(step: Step, module: nn.Module, plan: Plan, source: WeightSource) -> ModuleMemory | None:
    """Returns the memory of a module, or None if it has no weights.

    The tensors of a module are either plain floats, which stay f32, or matrices, which are packed. Four kinds of
    modules differ from the sum of these: MLA holds more matrices than it reads in decode; routers (and norms on a GPU)
    hold a copy for their kernels; an embedding reads one row per token; a tied output layer reads the embedding's
    matrix on the CPU but needs a copy on a GPU.
    """
    own_names = {f"{step.path}.{name}" for name, _ in _tensors(module)}
    num_floats = sum(prod(spec.shape) for spec in step.specs if _is_plain(spec, own_names, step))
    packed = [
        matrix
        for spec in step.specs
        if not _is_plain(spec, own_names, step)
        for matrix in _matrices(step, spec, source)
    ]
    if isinstance(module, MLA):
        packed = _absorbed_matrices(module, packed, step, source)
    tied = _tied_matrices(module, plan, source)
    if not (num_floats or packed or tied):
        return None
    matrices = packed or tied
    cpu_bytes = num_floats * F32_BYTES + cpu_packed_bytes(packed)
    gpu_bytes = num_floats * F32_BYTES + gpu_packed_bytes(matrices)
    cpu_size = WeightBytes(cpu_bytes, read=cpu_bytes + cpu_packed_bytes(tied))
    gpu_size = WeightBytes(gpu_bytes, read=gpu_bytes)
    if isinstance(module, MLA):
        decode_matrices = packed[:2]  # W_UK transposed and W_UV, without W_UK for prefill
        # A GPU expands latents with W_UK transposed (the absorbing matrix) in prefill, so it holds no third matrix.
        mla_gpu_bytes = num_floats * F32_BYTES + gpu_packed_bytes(decode_matrices)
        cpu_size = WeightBytes(cpu_bytes, read=num_floats * F32_BYTES + cpu_packed_bytes(decode_matrices))
        gpu_size = WeightBytes(mla_gpu_bytes, read=mla_gpu_bytes)
    if isinstance(module, Router | RMSNorm):  # the parameter itself, and the kernel's copy
        router_copy = (
            cpu_packed_bytes([(QTYPES["F32"], tuple(module.weight.shape))]) if isinstance(module, Router) else 0
        )
        cpu_size = WeightBytes(cpu_bytes + router_copy, read=router_copy or cpu_bytes)
        gpu_size = WeightBytes(num_floats * (BF16_BYTES + F32_BYTES), read=num_floats * F32_BYTES)
    is_embedding = group_of(step.path) == EMBEDDING
    if is_embedding and step.specs:  # a token reads one row
        num_rows = step.specs[0].shape[0]
        cpu_size = WeightBytes(cpu_bytes, read=cpu_bytes // num_rows)
        gpu_size = WeightBytes(gpu_bytes, read=gpu_bytes // num_rows)
    num_experts, top_k = (
        (module.num_experts, min(module.top_k, module.num_experts)) if isinstance(module, Experts) else (0, 0)
    )
    return ModuleMemory(
        step.path,
        group_of(step.path),
        layer_number(step.path),
        cpu_size,
        gpu_size,
        num_floats + sum(prod(shape) for _, shape in matrices),
        0 if num_experts else max((prod(shape) for _, shape in matrices), default=0),
        activation_columns(module),
        num_experts=num_experts,
        top_k=top_k,
        is_row_lookup=is_embedding,
        needs_repacking=any(qtype.name in RESTORE for qtype, _ in packed),
    )


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _is_plain(spec: TensorSpec, own: set[str], step: Step) -> bool:
    """Whether a tensor becomes a plain float tensor, and is not packed.

    That holds for parameters of the module itself (`own`), biases and vectors, and everything in a module without an
    operator of ktx.
    """
    return not step.operator or spec.name in own or len(spec.shape) < 2 or spec.name.endswith("bias")


def _matrices(step: Step, spec: TensorSpec, source: WeightSource) -> Iterator[Matrix]:
    """Yields type and shape of the matrices that a tensor is packed into, from which its bytes in memory follow.

    Row-wise parts of different types stay separate in a Linear; elsewhere they become one f32 matrix.
    """
    parts = source.specs(spec.name)
    types = {part.qtype.name for part in parts}
    if len(types) == 1:
        yield target_qtype(spec, step.quant_target) or spec.qtype, spec.shape
    elif step.operator == "Linear" and sum(part.shape[0] for part in parts) == spec.shape[0]:
        yield from ((target_qtype(part, step.quant_target) or part.qtype, part.shape) for part in parts)
    else:
        yield QTYPES["F32"], spec.shape


def _absorbed_matrices(module: MLA, matrices: list[Matrix], step: Step, source: WeightSource) -> list[Matrix]:
    """Returns type and shape of the matrices that MLA packs: W_UK transposed, W_UV, and W_UK for prefill.

    MLA computes some of these from the file's matrices (by transposing or dequantizing), so they do not have the file's
    type: they are f16, or f32 if the file is f32. W_UK for prefill is Q8_0 if the file is quantized.
    """
    float_type = QTYPES["F32" if matrices[0][0].name == "F32" else "F16"]
    packed = []
    for (qtype, shape), name in zip(matrices, step.tensors, strict=True):
        transposed = name.endswith("k_b_proj.weight") and source.specs(name)[0].shape != shape
        is_fp8 = qtype.name == "F8_E4M3"
        packed.append((float_type if transposed or is_fp8 or qtype.name == "F32" else qtype, shape))
    if not module.absorb_for_prefill:
        is_quantized = not matrices[0][0].is_float and module.kv_lora_rank % QTYPES["Q8_0"].block == 0
        expand_shape = (module.num_heads * module.qk_nope_head_dim, module.kv_lora_rank)
        packed.append((QTYPES["Q8_0"] if is_quantized else float_type, expand_shape))
    return packed


def _tied_matrices(module: nn.Module, plan: Plan, source: WeightSource) -> list[Matrix]:
    """Returns the embedding's matrix, which a tied output layer needs as its own copy on another device."""
    if not (isinstance(module, Linear) and module.tied_to):
        return []
    step = next(step for step in plan if module.tied_to in step.tensors)
    spec = source.spec(module.tied_to)
    return [] if spec is None else list(_matrices(step, spec, source))


def activation_columns(module: nn.Module) -> int:
    """Returns how many activation values per token a module holds while it computes, for the size of workspaces."""
    if isinstance(module, Linear):
        return module.out_features
    if isinstance(module, Experts):
        return int(min(module.top_k, module.num_experts) * (3 * module.intermediate_size + module.hidden_size))
    if isinstance(module, MLA):  # absorbed queries and attention outputs
        return int(module.num_heads * (2 * module.kv_lora_rank + module.v_head_dim))
    return 0


# ---- keys, values and states


def _attention_cache(path: str, module: Any, config: PreTrainedConfig) -> KVMemory:
    """Returns the dimensions of an attention module's KV cache: MLA's latent, or keys and values per key/value head."""
    if isinstance(module, MLA):
        columns, expanded = (module.kv_lora_rank, module.qk_rope_head_dim), module.qk_nope_head_dim + module.v_head_dim
        return KVMemory(
            path,
            module.layer_idx,
            num_kv_heads=1,
            columns=columns,
            num_heads=module.num_heads,
            is_mla=True,
            expanded=module.num_heads * expanded,
        )
    num_heads = int(config.num_attention_heads)
    if hasattr(module, "kv_lora_rank"):  # transformers' own MLA, which caches every head
        columns = module.qk_head_dim, module.v_head_dim
        return KVMemory(path, module.layer_idx, num_heads, columns, num_heads=num_heads)
    head_dim = int(getattr(module, "head_dim", None) or config.hidden_size // num_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    return KVMemory(path, module.layer_idx, num_kv_heads, (head_dim, head_dim), num_heads=num_heads)


def _recurrent_state(path: str, module: Any) -> KVMemory:
    """Returns the state of a gated delta net: its convolution's last inputs and a matrix per head, in f32."""
    conv_values = getattr(module, "conv_dim", 0) * getattr(module, "conv_kernel_size", 0)
    num_heads = getattr(module, "num_v_heads", 0)
    state_values = num_heads * getattr(module, "head_k_dim", 0) * getattr(module, "head_v_dim", 0)
    return KVMemory(path, module.layer_idx, state_bytes=F32_BYTES * (conv_values + state_values))
