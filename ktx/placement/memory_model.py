"""What a model's modules take on a device, from headers alone: weights as they will lie there, keys and values, columns of activations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ktx.cache.kv import PLAIN, KVType, stored_row
from ktx.cache.page_pool import PAGE_TOKENS, SNAPSHOTS
from ktx.injection.inject import Plan, Step, layer_of
from ktx.kernels import cpu
from ktx.kernels.gpu.repack_bits import UNDO
from ktx.ops.base import target_qtype
from ktx.ops.experts import Experts
from ktx.ops.linear import Linear
from ktx.ops.mla import MLA
from ktx.ops.norm import RMSNorm
from ktx.ops.router import Router
from ktx.quant.types import FP8_BLOCK, QTYPES, QType
from ktx.weights.base import TensorSpec, WeightSource

GROUPS = (  # what a module is part of, by the first expression that its path holds
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
# Bytes of a number: parameters that are no matrices are f32; beside a GPU the model computes in bf16.
FLOAT, HALF = 4, 2
Matrix = tuple[QType, tuple[int, ...]]  # a type and [.., n, k]


@dataclass(frozen=True)
class Bytes:
    """Of a module's weights: `held`, and `read` for one token."""

    held: int
    read: int


@dataclass(frozen=True)
class ModuleMemory:
    """A module with weights: its bytes on the CPU and on a GPU. Of experts, `top` of `experts` are chosen for a token."""

    path: str
    group: str
    layer: int | None
    cpu: Bytes
    gpu: Bytes
    weights: int  # how many numbers
    largest: int  # numbers of its largest matrix; all matrices of a batched product count as one
    columns: int  # that a token's activations have while it computes
    experts: int = 0
    top: int = 0
    row: bool = False  # a token reads one row
    pinned: bool = False  # to the CPU, by a rule
    rearranged: bool = False  # on its way from the CPU's memory to a GPU, bit by bit

    def on(self, gpu: bool) -> Bytes:
        return self.gpu if gpu else self.cpu

    def of(self, count: int) -> ModuleMemory:
        """So many of the experts, of which a token chooses as many as their share is."""
        here, there = (
            (size.held * count // self.experts, size.read * count // self.experts) for size in (self.cpu, self.gpu)
        )
        return replace(self, cpu=Bytes(*here), gpu=Bytes(*there), weights=self.weights * count // self.experts)

    def read(self, tokens: int, gpu: bool) -> int:
        """Bytes that a forward over so many tokens reads; of experts as many as the tokens can choose, each another."""
        size = self.on(gpu)
        if self.experts:
            return size.held * min(self.experts, tokens * self.top) // self.experts
        return size.read * (tokens if self.row else 1)


@dataclass(frozen=True)
class KVMemory:
    """What a layer's attention keeps of sequences: pools of so many columns for a position and head, or a state of `state` bytes each.

    `queries` heads attend, of a latent to itself; MLA expands a position to `expanded` columns for a prompt.
    """

    path: str
    layer: int
    heads: int = 0
    columns: tuple[int, ...] = ()
    state: int = 0
    queries: int = 0
    latent: bool = False
    expanded: int = 0
    pinned: bool = False

    def row(self, store: KVType, gpu: bool) -> int:
        """Bytes of a position."""
        device = torch.device("cuda" if gpu else "cpu")
        rows = [stored_row(store, width, torch.float32, device) for width in self.columns]
        return self.heads * sum(width * dtype.itemsize for width, dtype in rows)

    def nbytes(self, context: int, batch: int, store: KVType, gpu: bool) -> int:
        """For `batch` sequences of `context` positions in whole pages; of states those kept for shared beginnings too."""
        pages = batch * -(-context // PAGE_TOKENS)
        return pages * PAGE_TOKENS * self.row(store, gpu) + (self.state * (batch + SNAPSHOTS) if self.state else 0)


@dataclass(frozen=True)
class Footprint:
    """A model as its headers and its configuration tell it."""

    parts: list[ModuleMemory]
    kept: list[KVMemory]
    hidden: int
    vocabulary: int

    @property
    def layers(self) -> int:
        return 1 + max((part.layer for part in self.parts if part.layer is not None), default=-1)

    @property
    def top(self) -> int:
        return max((part.top for part in self.parts), default=0)


def on_cpu(matrices: Sequence[Matrix]) -> int:
    """Bytes of packed matrices in the CPU's memory."""
    return sum(cpu.packed_nbytes(qtype, shape[-2], shape[-1], prod(shape[:-2])) for qtype, shape in matrices)


def on_gpu(matrices: Sequence[Matrix]) -> int:
    """Bytes of the same in planes on a GPU."""
    return sum(prod(shape[:-1]) * qtype.row_bytes(shape[-1]) + _scales(qtype, shape) for qtype, shape in matrices)


def _scales(qtype: QType, shape: tuple[int, ...]) -> int:
    blocks = -(-shape[-2] // FP8_BLOCK) * -(-shape[-1] // FP8_BLOCK)
    return 4 * prod(shape[:-2]) * blocks if qtype.name == "F8_E4M3" else 0


def footprint(model: Any, plan: Plan, source: WeightSource) -> Footprint:
    """Of a skeleton on which rules were put, all on the CPU."""
    config = model.config
    below = tuple(f"{step.path}." for step in plan if step.rule is not None and step.rule.device)
    found = [_part(step, model.get_submodule(step.path), plan, source) for step in plan]
    parts = [replace(part, pinned=f"{part.path}.".startswith(below)) for part in found if part is not None]
    stock = DynamicCache(config=config).layers
    named = [(path, module) for path, module in model.named_modules() if group_of(path) == ATTENTION]
    own = [(path, module) for path, module in named if hasattr(module, "layer_idx")]
    kept = [
        _pools(path, module, config) if type(stock[module.layer_idx]) in PLAIN else _state(path, module)
        for path, module in own
        if module.layer_idx < len(stock)
    ]
    kept = [replace(layer, pinned=f"{layer.path}.".startswith(below)) for layer in kept]
    return Footprint(parts, kept, int(config.hidden_size), int(config.vocab_size))


def group_of(path: str) -> str:
    return next(name for name, pattern in GROUPS if re.search(pattern, path))


# ---- weights


def _part(step: Step, module: nn.Module, plan: Plan, source: WeightSource) -> ModuleMemory | None:
    """None for a module without weights."""
    own = {f"{step.path}.{name}" for name, _ in _tensors(module)}
    floats = sum(prod(spec.shape) for spec in step.specs if _plain(spec, own, step))
    packed = [matrix for spec in step.specs if not _plain(spec, own, step) for matrix in _matrices(step, spec, source)]
    if isinstance(module, MLA):
        packed = _absorbed(module, packed, step, source)
    tied = _tied(module, plan, source)
    if not (floats or packed or tied):
        return None
    matrices = packed or tied
    here, there = floats * FLOAT + on_cpu(packed), floats * FLOAT + on_gpu(matrices)
    cpu_size, gpu_size = Bytes(here, here + on_cpu(tied)), Bytes(there, there)
    if isinstance(module, MLA):
        read = packed[:2]
        halves = floats * FLOAT + on_gpu(read)  # which expands by the matrix that absorbs
        cpu_size, gpu_size = Bytes(here, floats * FLOAT + on_cpu(read)), Bytes(halves, halves)
    if isinstance(module, Router | RMSNorm):  # the parameter itself, and what its kernel reads
        copied = on_cpu([(QTYPES["F32"], tuple(module.weight.shape))]) if isinstance(module, Router) else 0
        cpu_size = Bytes(here + copied, copied or here)
        gpu_size = Bytes(floats * (HALF + FLOAT), floats * FLOAT)
    row = group_of(step.path) == EMBEDDING
    if row and step.specs:
        rows = step.specs[0].shape[0]
        cpu_size, gpu_size = Bytes(here, here // rows), Bytes(there, there // rows)
    experts, top = (module.num_experts, min(module.top, module.num_experts)) if isinstance(module, Experts) else (0, 0)
    return ModuleMemory(
        step.path,
        group_of(step.path),
        layer_of(step.path),
        cpu_size,
        gpu_size,
        floats + sum(prod(shape) for _, shape in matrices),
        0 if experts else max((prod(shape) for _, shape in matrices), default=0),
        columns_of(module),
        experts,
        top,
        row,
        rearranged=any(qtype.name in UNDO for qtype, _ in packed),
    )


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _plain(spec: TensorSpec, own: set[str], step: Step) -> bool:
    """Whether a tensor becomes an ordinary one of floats: a parameter of the module itself, or a bias."""
    return not step.new or spec.name in own or len(spec.shape) < 2 or spec.name.endswith("bias")


def _matrices(step: Step, spec: TensorSpec, source: WeightSource) -> Iterator[Matrix]:
    """A tensor as it is packed: row-wise parts of different types stay apart in a Linear; elsewhere they become floats."""
    files = source.specs(spec.name)
    types = {file.qtype.name for file in files}
    if len(types) == 1:
        yield target_qtype(spec, step.target) or spec.qtype, spec.shape
    elif step.new == "Linear" and sum(file.shape[0] for file in files) == spec.shape[0]:
        yield from ((target_qtype(file, step.target) or file.qtype, file.shape) for file in files)
    else:
        yield QTYPES["F32"], spec.shape


def _absorbed(module: MLA, matrices: list[Matrix], step: Step, source: WeightSource) -> list[Matrix]:
    """W_UK transposed and W_UV, and W_UK for prompts, as MLA packs them: what it has to compute becomes f16, unless the file is f32."""
    half = QTYPES["F32" if matrices[0][0].name == "F32" else "F16"]
    found = []
    for (qtype, shape), name in zip(matrices, step.tensors, strict=True):
        transposed = name.endswith("k_b_proj.weight") and source.specs(name)[0].shape != shape
        scaled = qtype.name == "F8_E4M3"
        found.append((half if transposed or scaled or qtype.name == "F32" else qtype, shape))
    if not module.absorb_for_prefill:
        coarse = not matrices[0][0].is_float and module.kv_lora_rank % QTYPES["Q8_0"].block == 0
        rows = (module.num_heads * module.qk_nope_head_dim, module.kv_lora_rank)
        found.append((QTYPES["Q8_0"] if coarse else half, rows))
    return found


def _tied(module: nn.Module, plan: Plan, source: WeightSource) -> list[Matrix]:
    """The embedding's matrix, which an output layer without weights reads: on another device it needs its own."""
    if not (isinstance(module, Linear) and module.tied_to):
        return []
    step = next(step for step in plan if module.tied_to in step.tensors)
    spec = source.spec(module.tied_to)
    return [] if spec is None else list(_matrices(step, spec, source))


def columns_of(module: nn.Module) -> int:
    """That a token's activations have while the module computes."""
    if isinstance(module, Linear):
        return module.out_features
    if isinstance(module, Experts):
        return min(module.top, module.num_experts) * (3 * module.width + module.hidden)
    if isinstance(module, MLA):  # absorbed queries and contexts
        return module.num_heads * (2 * module.kv_lora_rank + module.v_head_dim)
    return 0


# ---- keys, values and states


def _pools(path: str, module: Any, config: Any) -> KVMemory:
    if isinstance(module, MLA):
        columns, expanded = (module.kv_lora_rank, module.qk_rope_head_dim), module.qk_nope_head_dim + module.v_head_dim
        return KVMemory(path, module.layer_idx, 1, columns, 0, module.num_heads, True, module.num_heads * expanded)
    queries = int(config.num_attention_heads)
    if hasattr(module, "kv_lora_rank"):  # transformers' own, which keeps every head
        return KVMemory(path, module.layer_idx, queries, (module.qk_head_dim, module.v_head_dim), 0, queries)
    width = int(getattr(module, "head_dim", None) or config.hidden_size // queries)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    return KVMemory(path, module.layer_idx, heads, (width, width), 0, queries)


def _state(path: str, module: Any) -> KVMemory:
    """A gated delta net's: the last inputs of its convolution, and a matrix a head, in f32."""
    last = getattr(module, "conv_dim", 0) * getattr(module, "conv_kernel_size", 0)
    heads = getattr(module, "num_v_heads", 0)
    matrix = heads * getattr(module, "head_k_dim", 0) * getattr(module, "head_v_dim", 0)
    return KVMemory(path, module.layer_idx, state=FLOAT * (last + matrix))
