"""The CPU kernels: `torch.ops.ktx.*` of ktx/_C.abi3.so, with gradients (gradients.py), fake versions for torch.compile, and packed matrices.

Shapes, types and errors are checked in C++ (csrc/bindings*.cpp); each operator has a plain-torch twin in reference.py.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import Any

import torch

from ktx.environment import environment
from ktx.errors import KtxError, UsageError
from ktx.hardware import default_threads
from ktx.kernels import flops, gradients
from ktx.quant.types import FP8_BLOCK, QTYPES, QType
from ktx.utils.spawn_pickle import for_pickle
from ktx.weights.base import QuantizedTensor

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"
GROUP_ROWS = 16  # rows that are packed side by side (csrc/cpu/layout.h)
_told = local()  # what this thread has said by `wide_rows`
MOST_THREADS = 1024  # csrc/cpu/pool.h
ROWS, COLUMNS = 17, 256  # of the sample that tells one order of packing from another
PACK_ROWS = 1 << 10  # rows packed by one call, so that loading threads share the work evenly


def num_threads() -> int:
    """KTX_THREADS, or the usable physical cores within a cgroup's quota."""
    return int(str(environment("KTX_THREADS"))) or default_threads()


def pool_size(threads: int | None) -> int:
    """The size of the kernels' team: `threads`, by default the usual one. UsageError for one that cannot be."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}, it must be from 1 to {MOST_THREADS}")
    return threads or num_threads()


def _load() -> Any:
    if not LIBRARY.exists():
        raise KtxError(f"{LIBRARY} is missing: build it with `pip install --no-build-isolation -e .` (needs g++)")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise KtxError(
            f"{LIBRARY} does not load into torch {torch.__version__}: {error}; ktx needs torch 2.11 or newer"
        ) from error
    try:
        torch.ops.ktx.isa(), torch.ops.ktx.nodes(), torch.ops.ktx.fast_gemm()
    except RuntimeError as error:  # KTX_ISA, KTX_NUMA or KTX_GEMM holds a word that means nothing
        raise UsageError(str(error).splitlines()[0]) from error
    torch.ops.ktx.set_threads(num_threads())
    return torch.ops.ktx


ops = _load()


@dataclass
class Packed:
    """One matrix, or several of one shape, in the order the kernels read: `data` uint8, `matrices` x [n, k] of `qtype`."""

    data: torch.Tensor
    qtype: QType
    n: int
    k: int
    matrices: int = 1
    ends: tuple[int, ...] = ()  # of `data`, where the memory nodes' shares end; none when there is one node
    origin: Any = field(
        default=None, init=False, compare=False, repr=False
    )  # who can load it again, its name there and its number

    def __copy__(self) -> Packed:
        return self  # nobody writes to packed bytes: copies of a model share them

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    def __reduce__(self) -> Any:
        """Pickled as a reference to the files it was loaded from; what comes from none is written as it is packed."""
        if self.origin is not None:
            return _again, self.origin
        about = self.qtype.name, self.n, self.k, self.matrices, self.ends
        return _written, (for_pickle(self.data.clone()), *about, packing())

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """f32 [len(index), k]: rows of a single matrix, dequantised exactly. index int64."""
        return ops.unpack_rows(self.data, self.qtype.code, self.n, self.k, index)

    def matrix(self, number: int) -> Packed:
        """One of several that `pack_experts` made, a copy where memory nodes share them."""
        begin, parts = 0, []
        for end in self.ends or (self.nbytes,):
            size = (end - begin) // self.matrices
            parts.append(self.data[begin + number * size : begin + (number + 1) * size])
            begin = end
        return Packed(parts[0] if len(parts) == 1 else torch.cat(parts), self.qtype, self.n, self.k)


def _again(origin: Any, name: str, number: int) -> Packed:
    """What a pickle refers to."""
    packed: Packed = origin.taken(name, number)
    return packed


def _written(
    data: torch.Tensor, qtype: str, n: int, k: int, matrices: int, ends: tuple[int, ...], made: tuple[Any, ...]
) -> Packed:
    """Packed bytes from a pickle. KtxError where kernels read them in another order than they were written in."""
    if made != packing():
        raise KtxError(
            "a pickle holds weights that another version of ktx packed, or another processor (instruction set, memory nodes, order):"
            f" {made}, here {packing()}; load the model anew with ktx.load and pickle it here"
        )
    placed = ops.empty_packed(data.numel(), ends)
    placed.copy_(data)
    return Packed(placed, QTYPES[qtype], n, k, matrices, ends)


def packing() -> tuple[Any, ...]:
    """What decides the order of packed bytes."""
    return ops.isa(), ops.nodes(), fingerprint()


@functools.cache
def fingerprint() -> str:
    """A digest of packed samples of every type: it changes when the order of anything in a packed matrix does."""
    digest = hashlib.sha256()
    for qtype in QTYPES.values():
        k = max(COLUMNS, qtype.block)
        bytes_of_row = k // qtype.block * qtype.nbytes
        rows = (torch.arange(ROWS * bytes_of_row, dtype=torch.int64) * 2654435761 >> 13 & 255).to(torch.uint8)
        scale = torch.arange(-(-ROWS // 128) * -(-k // 128), dtype=torch.float32).view(-(-ROWS // 128), -1)
        weight = QuantizedTensor(
            rows.view(ROWS, bytes_of_row), qtype, (ROWS, k), scale if qtype.name == "F8_E4M3" else None
        )
        digest.update(pack(weight).data.numpy().data)
    return digest.hexdigest()


def packed_nbytes(qtype: QType, n: int, k: int, matrices: int = 1) -> int:
    """Bytes of packed matrices; RuntimeError when k is not whole blocks."""
    return matrices * ops.packed_nbytes(qtype.code, n, k)


def pack(weight: QuantizedTensor | Sequence[QuantizedTensor], to: QType | None = None) -> Packed:
    """Weights [n, k] or [matrices, n, k] (or one part a matrix, all of one type) -> packed, in memory of its own.

    `to` (INT8_128, INT4_64, INT4_128, Q4_0, Q8_0) quantises on the way. May run in several threads at once: the work is done outside Python's lock.
    Of one matrix each memory node holds a share of the rows, of several a share of the matrices.
    """
    matrices, n, k, qtype = _whole(weight, to)
    size, nodes = ops.packed_nbytes(qtype.code, n, k), ops.nodes()
    groups, count = -(-n // GROUP_ROWS), len(matrices)
    shares = [
        ops.share_of(groups, i + 1) * (size // groups) if count == 1 else count * (i + 1) // nodes * size
        for i in range(nodes)
    ]
    ends = tuple(shares) if nodes > 1 else ()
    data = ops.empty_packed(size * count, ends)
    for i, matrix in enumerate(matrices):
        _pack_rows(matrix, range(n), qtype if to is not None else None, data[i * size : (i + 1) * size])
    return Packed(data, qtype, n, k, count, ends)


def pack_experts(weight: QuantizedTensor | Sequence[QuantizedTensor], to: QType | None = None) -> Packed:
    """As `pack`, in the order that `experts` reads: of each memory node in turn, its share of the rows of every matrix."""
    matrices, n, k, qtype = _whole(weight, to)
    size, nodes, groups = ops.packed_nbytes(qtype.code, n, k), ops.nodes(), -(-n // GROUP_ROWS)
    group, count = size // groups, len(matrices)
    first = [ops.share_of(groups, node) for node in range(nodes + 1)]
    ends = tuple(end * group * count for end in first[1:]) if nodes > 1 else ()
    data = ops.empty_packed(size * count, ends)
    for begin, end in zip(first, first[1:], strict=False):
        share = (end - begin) * group
        for i, matrix in enumerate(matrices):
            at = begin * group * count + i * share
            if share:
                rows = range(begin * GROUP_ROWS, min(n, end * GROUP_ROWS))
                _pack_rows(matrix, rows, qtype if to is not None else None, data[at : at + share])
    return Packed(data, qtype, n, k, count, ends)


def _shares_of(w: Packed) -> Iterator[tuple[int, int, int]]:
    """Of a matrix among experts, each memory node's share: first byte in the matrix, bytes, and where those of the first matrix are in `data`."""
    size = packed_nbytes(w.qtype, w.n, w.k)
    groups = -(-w.n // GROUP_ROWS)
    for node in range(ops.nodes()):
        begin, end = (ops.share_of(groups, at) * (size // groups) for at in (node, node + 1))
        if end > begin:
            yield begin, end - begin, begin * w.matrices


def with_expert(w: Packed, index: int, one: Packed) -> Packed:
    """The same matrices but one, in memory of their own."""
    data = ops.empty_packed(w.nbytes, w.ends)
    data.copy_(w.data)
    for begin, size, at in _shares_of(w):
        data[at + index * size : at + (index + 1) * size] = one.data[begin : begin + size]
    return Packed(data, w.qtype, w.n, w.k, w.matrices, w.ends)


def _whole(
    weight: QuantizedTensor | Sequence[QuantizedTensor], to: QType | None
) -> tuple[list[QuantizedTensor], int, int, QType]:
    """The matrices, their shape, and the type they are packed as."""
    parts = [weight] if isinstance(weight, QuantizedTensor) else list(weight)
    matrices = [part[i] for part in parts for i in range(part.shape[0])] if len(parts[0].shape) == 3 else parts
    first = matrices[0]
    n, k = first.shape
    if any(m.shape != (n, k) or m.qtype is not first.qtype for m in matrices):
        raise KtxError(f"matrices of one packed tensor differ: {sorted({(m.shape, m.qtype.name) for m in matrices})}")
    return matrices, n, k, to or first.qtype


def _pack_rows(matrix: QuantizedTensor, rows: range, to: QType | None, data: torch.Tensor) -> None:
    """Some rows of a matrix, from a multiple of FP8_BLOCK on where it has scales, into the memory of as many rows."""
    n, k = matrix.shape
    scale = None if to is not None or matrix.scale is None else matrix.scale
    if scale is not None:
        scale = scale[rows.start // FP8_BLOCK : -(-rows.stop // FP8_BLOCK)].contiguous()
    for row in range(rows.start, rows.stop, PACK_ROWS):
        some = matrix.data.reshape(n, -1)[row : min(row + PACK_ROWS, rows.stop)]
        if to is not None:
            some = ops.quantise_rows(_values(matrix, some, row), to.code)
        ops.pack(some, (to or matrix.qtype).code, len(rows), k, data, row - rows.start, scale)


def _values(matrix: QuantizedTensor, rows: torch.Tensor, row: int) -> torch.Tensor:
    """f32 of some of a matrix's rows, which begin at a multiple of FP8_BLOCK."""
    scale = matrix.scale
    if scale is not None:
        scale = scale[row // FP8_BLOCK : -(-(row + len(rows)) // FP8_BLOCK)]
    return matrix.qtype.dequantize(rows, scale).reshape(len(rows), matrix.shape[-1]).contiguous()


@contextmanager
def bf16_rows(tokens: int, ranges: Sequence[int] = ()) -> Iterator[None]:
    """Inside, of this thread's calls with `tokens` rows the `ranges` (first, count, first, count, ...) are multiplied in bf16 over tile registers where
    there are some, and no other rows are. Outside it is the pages of 64 that a call's rows fill: see csrc/cpu/wide.h.
    """
    before = rows_told()
    _told.rows = (tokens, tuple(ranges))
    ops.wide_rows(tokens, ranges)
    try:
        yield
    finally:
        _told.rows = before
        ops.wide_rows(*before)


def rows_told() -> tuple[int, tuple[int, ...]]:
    """What `wide_rows` has said on this thread, for one that computes on its behalf."""
    tokens, ranges = getattr(_told, "rows", (-1, ()))
    return tokens, ranges


def wide_part(first: int, count: int) -> AbstractContextManager[None]:
    """The same for calls with `count` of the rows alone, from `first` on, which are wide if all of them were."""
    _, ranges = rows_told()
    inside = any(
        at <= first and first + count <= at + length for at, length in zip(ranges[::2], ranges[1::2], strict=True)
    )
    return bf16_rows(count, (0, count) if inside else ())


def linear(x: torch.Tensor, w: Packed, bias: torch.Tensor | None = None, wide: bool = False) -> torch.Tensor:
    """x [..., k] (f32, f16, bf16) times w [n, k] transposed plus bias f32 [n] -> [..., n] in x's dtype. `wide`: all rows are, see `wide_rows`."""
    gradients.backward_only(x)
    return ops.linear(x.contiguous(), w.data, w.qtype.code, w.n, w.k, bias, wide)


def linear_batched(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """x [matrices, tokens, k] times each matrix of w transposed -> [matrices, tokens, n]."""
    gradients.backward_only(x)
    return ops.linear_batched(x.contiguous(), w.data, w.qtype.code, w.n, w.k)


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: Packed,
    up: Packed,
    down: Packed,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    act: str = "silu",
    alpha: float = 0.0,
    limit: float = 0.0,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [tokens, hidden], ids int64 and weights f32 [tokens, top] -> [tokens, hidden] in x's dtype; see reference.experts. Adds to `counts`, see `Counted`."""
    return gradients.experts(
        x,
        ids,
        weights,
        gate.data,
        up.data,
        down.data,
        gate.qtype.code,
        up.qtype.code,
        down.qtype.code,
        gate.matrices,
        gate.n,
        gate_bias,
        up_bias,
        down_bias,
        act,
        alpha,
        limit,
        counts,
    )


@dataclass(frozen=True)
class ExpertStats:
    """What experts have done: choices of each, bytes of packed weights read, seconds from the calls' beginning to their end, and seconds
    that each memory node's members multiplied in, on average over these members.

    Every pass over the weights (of up to 2048 tokens) reads the experts that one of its tokens chose, once.
    """

    activations: tuple[int, ...]
    nbytes: int
    seconds: float
    node_seconds: tuple[float, ...]

    @classmethod
    def read(cls, counts: torch.Tensor) -> ExpertStats:
        """From a tensor of `new_counts`, also while kernels add to it."""
        numbers, others = counts.tolist(), 2 + ops.nodes()
        nbytes, nanoseconds, *of_nodes = numbers[-others:]
        return cls(tuple(numbers[:-others]), nbytes, nanoseconds / 1e9, tuple(n / 1e9 for n in of_nodes))


def new_stats(experts: int) -> torch.Tensor:
    """int64 zeros, what `experts` and the MoE block add to: activations, bytes, nanoseconds, and those of each node."""
    return torch.zeros(experts + 2 + ops.nodes(), dtype=torch.int64, device="cpu")


attention, mla_attention = ops.attention, ops.mla_attention
rms_norm, rope, route, gated = ops.rms_norm, ops.rope, ops.route, ops.gated


@torch.library.register_fake("ktx::linear")
def _(x, packed, code, n, k, bias=None, all_wide=False):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("ktx::linear_batched")
def _(x, packed, code, n, k):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("ktx::experts")
def _(x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.register_fake("ktx::unpack_rows")
def _(packed, code, n, k, rows):  # type: ignore[no-untyped-def]
    return packed.new_empty((rows.shape[0], k), dtype=torch.float32)


@torch.library.register_fake("ktx::attention")
def _(q, k, v, ranges, mask, scale, sinks=None, softcap=0.0, q_rope=None, k_rope=None, sequences=None, pages=None):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@torch.library.register_fake("ktx::mla_attention")
def _(q_nope, q_rope, ckv, kpe, ranges, mask, scale, sequences=None, pages=None):  # type: ignore[no-untyped-def]
    return q_nope.new_empty((q_nope.shape[0], q_nope.shape[2], q_nope.shape[1], q_nope.shape[3]))


@torch.library.register_fake("ktx::rms_norm")
def _(x, weight, eps, plus_one=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.register_fake("ktx::rope")
def _(x, cos, sin, interleaved=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("ktx::route")
def _(logits, top_k, *rest, **more):  # type: ignore[no-untyped-def]
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


@torch.library.register_fake("ktx::store_q8_0")
def _(x, to):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("ktx::load_q8_0")
def _(x):  # type: ignore[no-untyped-def]
    block = QTYPES["Q8_0"]
    shape = (*x.shape[:-1], x.shape[-1] // block.nbytes * block.block)
    return x.new_empty(shape, dtype=torch.float16)


@torch.library.register_fake("ktx::gated")
def _(gate, up, act):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate)


gradients.register()
if (
    "torch.utils.flop_counter" in sys.modules
):  # else ktx.integrations.experts_interface sees to it when that is imported, which imports triton
    flops.register()
