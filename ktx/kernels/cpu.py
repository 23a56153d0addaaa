"""The CPU kernels: `torch.ops.ktx.*` of ktx/_C.abi3.so, and the packed matrices they read.

C++ checks shapes, dtypes and errors (csrc/bindings*.cpp). Each operator has a plain-torch equivalent in reference.py,
gradients in gradients.py, and a fake implementation for torch.compile below.

Terms: a *packed* matrix has its bytes in the order in which the kernels read them (csrc/cpu/quant/layout.h). It
consists of *row groups* of 16 rows, because a SIMD register holds one column of 16 rows. On a machine with several
NUMA nodes the row groups of a matrix are divided among the nodes; the bytes on one node are its *share*.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
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
GROUP_ROWS = 16  # rows of a row group, which are packed side by side (csrc/cpu/quant/layout.h)
_thread = local()  # `bf16_rows` stores its arguments here, per thread
MAX_THREADS = 1024  # the limit of csrc/cpu/runtime/pool.h
SAMPLE_ROWS, SAMPLE_COLUMNS = 17, 256  # shape of the sample matrices of `fingerprint`
PACK_ROWS = 1 << 10  # rows that one call packs, so that loading threads share the work evenly


def num_threads() -> int:
    """Returns KTX_THREADS if it is set, else the number of usable physical cores within the cgroup's quota."""
    return int(str(environment("KTX_THREADS"))) or default_threads()


def pool_size(threads: int | None) -> int:
    """Returns the number of threads of the kernels' thread pool.

    Args:
        threads: the requested number; None for `num_threads()`.

    Raises:
        UsageError: if `threads` is not from 1 to 1024.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {threads}, it must be from 1 to {MAX_THREADS}")
    return threads or num_threads()


def _load() -> Any:
    """Loads the kernels' library, checks the KTX_* variables that it reads, and starts the thread pool.

    Raises:
        KtxError: if the library is missing or does not load.
        UsageError: if KTX_ISA or KTX_NUMA has an unknown value.
    """
    if not LIBRARY.exists():
        raise KtxError(f"{LIBRARY} is missing: build it with `pip install --no-build-isolation -e .` (needs g++)")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise KtxError(
            f"{LIBRARY} does not load into torch {torch.__version__}: {error}; ktx needs torch 2.11 or newer"
        ) from error
    try:
        torch.ops.ktx.isa(), torch.ops.ktx.nodes()
    except RuntimeError as error:  # KTX_ISA or KTX_NUMA has an unknown value
        raise UsageError(str(error).splitlines()[0]) from error
    torch.ops.ktx.set_threads(num_threads())
    return torch.ops.ktx


ops = _load()


@dataclass
class Packed:
    """One or several matrices of equal shape, packed in the order that the kernels read.

    Attributes:
        data: uint8, the packed bytes.
        qtype: the weight type.
        n: rows of a matrix.
        k: columns of a matrix.
        matrices: number of matrices.
        numa_ends: offsets in `data` at which the share of each NUMA node ends; empty on a machine with one node.
        origin: arguments of `_load_again`, so that a pickle refers to the weight files; None if the matrix comes from
            no file.
    """

    data: torch.Tensor
    qtype: QType
    n: int
    k: int
    matrices: int = 1
    numa_ends: tuple[int, ...] = ()
    origin: Any = field(default=None, init=False, compare=False, repr=False)

    def __copy__(self) -> Packed:
        return self  # packed bytes are never written to, so copies of a model share them

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    def __reduce__(self) -> Any:
        """Pickles a reference to the weight files; packed bytes are pickled only if the matrix comes from no file."""
        if self.origin is not None:
            return _load_again, self.origin
        metadata = self.qtype.name, self.n, self.k, self.matrices, self.numa_ends
        return _from_bytes, (for_pickle(self.data.clone()), *metadata, packing_key())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed data."""
        return self.data.numel()

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Returns rows of a single matrix, dequantized exactly: index int64 [count] -> f32 [count, k]."""
        return ops.unpack_rows(self.data, self.qtype.code, self.n, self.k, index)

    def matrix(self, index: int) -> Packed:
        """Returns one of the matrices that `pack_experts` packed, for callers that need a single expert.

        It is a view where there is one NUMA node, and a copy where several nodes hold shares of the matrix: each node
        holds its rows of all matrices, one after another.
        """
        start, shares = 0, []
        for end in self.numa_ends or (self.nbytes,):
            size = (end - start) // self.matrices
            shares.append(self.data[start + index * size : start + (index + 1) * size])
            start = end
        return Packed(shares[0] if len(shares) == 1 else torch.cat(shares), self.qtype, self.n, self.k)


def _load_again(origin: Any, name: str, number: int) -> Packed:
    """Unpickles a matrix from the weight files that its origin names."""
    packed: Packed = origin.take(name, number)
    return packed


def _from_bytes(
    data: torch.Tensor, qtype: str, n: int, k: int, matrices: int, ends: tuple[int, ...], packed_with: tuple[Any, ...]
) -> Packed:
    """Unpickles a matrix from packed bytes, into memory on the NUMA nodes of this process.

    Raises:
        KtxError: if the kernels of this process read another order than the bytes were packed in.
    """
    if packed_with != packing_key():
        raise KtxError(
            "the pickle holds weights that another version of ktx, or ktx on another processor, packed (instruction"
            f" set, NUMA nodes, digest): {packed_with}, here {packing_key()}; load the model again with ktx.load and"
            " pickle it here"
        )
    placed = ops.empty_packed(data.numel(), ends)
    placed.copy_(data)
    return Packed(placed, QTYPES[qtype], n, k, matrices, ends)


def packing_key() -> tuple[Any, ...]:
    """Returns what determines the order of packed bytes: instruction set, number of NUMA nodes, digest.

    Packed bytes from a pickle or a cache folder are valid only in a process where this is equal.
    """
    return ops.isa(), ops.nodes(), fingerprint()


@functools.cache
def fingerprint() -> str:
    """Returns a digest of packed samples of every type, which changes when the packed order of any type changes.

    The disk cache and pickles compare it, so that no process reads bytes in an order that it does not know. The
    samples are pseudo-random bytes, with a row more than a row group, so that padding is covered.
    """
    digest = hashlib.sha256()
    for qtype in QTYPES.values():
        k = max(SAMPLE_COLUMNS, qtype.block)
        row_bytes = k // qtype.block * qtype.nbytes
        rows = (torch.arange(SAMPLE_ROWS * row_bytes, dtype=torch.int64) * 2654435761 >> 13 & 255).to(torch.uint8)
        scale = torch.arange(-(-SAMPLE_ROWS // 128) * -(-k // 128), dtype=torch.float32).view(
            -(-SAMPLE_ROWS // 128), -1
        )
        weight = QuantizedTensor(
            rows.view(SAMPLE_ROWS, row_bytes), qtype, (SAMPLE_ROWS, k), scale if qtype.name == "F8_E4M3" else None
        )
        digest.update(pack(weight).data.numpy().data)
    return digest.hexdigest()


def packed_nbytes(qtype: QType, n: int, k: int, matrices: int = 1) -> int:
    """Returns the bytes of packed matrices [n, k].

    Raises:
        RuntimeError: if k is not a multiple of the block size.
    """
    return matrices * ops.packed_nbytes(qtype.code, n, k)


def pack(weight: QuantizedTensor | Sequence[QuantizedTensor], to: QType | None = None) -> Packed:
    """Packs weights in the order that `linear` and `linear_batched` read, into memory of their own.

    Several threads may call it at once because the work is done outside the GIL. The rows of a single matrix are
    divided among the NUMA nodes; of several matrices each node holds some complete ones.

    Args:
        weight: [n, k] or [matrices, n, k], or a sequence of such parts of one type and shape.
        to: quantizes to this type on the way (INT8_128, INT4_64, INT4_128, Q4_0, Q8_0).

    Raises:
        KtxError: if the matrices differ in shape or type.
    """
    matrices, n, k, qtype = _list_matrices(weight, to)
    matrix_bytes, nodes = ops.packed_nbytes(qtype.code, n, k), ops.nodes()
    groups, num_matrices = -(-n // GROUP_ROWS), len(matrices)
    node_ends = [
        ops.node_begin(groups, i + 1) * (matrix_bytes // groups)
        if num_matrices == 1
        else num_matrices * (i + 1) // nodes * matrix_bytes
        for i in range(nodes)
    ]
    ends = tuple(node_ends) if nodes > 1 else ()
    data = ops.empty_packed(matrix_bytes * num_matrices, ends)
    for i, matrix in enumerate(matrices):
        _pack_rows(matrix, range(n), qtype if to is not None else None, data[i * matrix_bytes : (i + 1) * matrix_bytes])
    return Packed(data, qtype, n, k, num_matrices, ends)


def pack_experts(weight: QuantizedTensor | Sequence[QuantizedTensor], to: QType | None = None) -> Packed:
    """Packs as `pack` does, in the order that `experts` reads.

    `data` holds one byte range per NUMA node, which consists of that node's rows of every matrix. So each node computes
    its rows of every expert from local memory, whichever experts the tokens select.
    """
    matrices, n, k, qtype = _list_matrices(weight, to)
    matrix_bytes, nodes, groups = ops.packed_nbytes(qtype.code, n, k), ops.nodes(), -(-n // GROUP_ROWS)
    group_bytes, num_matrices = matrix_bytes // groups, len(matrices)
    first_groups = [ops.node_begin(groups, node) for node in range(nodes + 1)]
    ends = tuple(end * group_bytes * num_matrices for end in first_groups[1:]) if nodes > 1 else ()
    data = ops.empty_packed(matrix_bytes * num_matrices, ends)
    for start, end in pairwise(first_groups):
        rows_bytes = (end - start) * group_bytes  # of the node's rows of one matrix
        for i, matrix in enumerate(matrices):
            offset = start * group_bytes * num_matrices + i * rows_bytes
            if rows_bytes:
                rows = range(start * GROUP_ROWS, min(n, end * GROUP_ROWS))
                _pack_rows(matrix, rows, qtype if to is not None else None, data[offset : offset + rows_bytes])
    return Packed(data, qtype, n, k, num_matrices, ends)


def _node_byte_ranges(w: Packed) -> Iterator[tuple[int, int, int]]:
    """Yields where each NUMA node's rows are in `data` of matrices that `pack_experts` packed, to replace one matrix.

    Yields:
        (start, size, offset): first byte and number of bytes of the node's rows in a matrix that is packed alone;
        offset in `data` of these rows of matrix 0, which those of the other matrices follow.
    """
    matrix_bytes = packed_nbytes(w.qtype, w.n, w.k)
    groups = -(-w.n // GROUP_ROWS)
    for node in range(ops.nodes()):
        start, end = (ops.node_begin(groups, index) * (matrix_bytes // groups) for index in (node, node + 1))
        if end > start:
            yield start, end - start, start * w.matrices


def with_expert(w: Packed, index: int, expert: Packed) -> Packed:
    """Returns a copy of the matrices in which the matrix `index` is replaced by a single packed one.

    It serves edits of an expert's weights: packed bytes are never written to, because copies of a model share them.
    """
    data = ops.empty_packed(w.nbytes, w.numa_ends)
    data.copy_(w.data)
    for start, size, offset in _node_byte_ranges(w):
        data[offset + index * size : offset + (index + 1) * size] = expert.data[start : start + size]
    return Packed(data, w.qtype, w.n, w.k, w.matrices, w.numa_ends)


def _list_matrices(
    weight: QuantizedTensor | Sequence[QuantizedTensor], to: QType | None
) -> tuple[list[QuantizedTensor], int, int, QType]:
    """Returns the matrices one by one (a list), their rows, their columns, and the type they are packed as.

    Experts come stacked or as one tensor each; both packing functions take either form.
    """
    parts = [weight] if isinstance(weight, QuantizedTensor) else list(weight)
    matrices = [part[i] for part in parts for i in range(part.shape[0])] if len(parts[0].shape) == 3 else parts
    first = matrices[0]
    n, k = first.shape
    if any(m.shape != (n, k) or m.qtype is not first.qtype for m in matrices):
        raise KtxError(
            "the matrices of a packed tensor differ in shape or type:"
            f" {sorted({(m.shape, m.qtype.name) for m in matrices})}"
        )
    return matrices, n, k, to or first.qtype


def _pack_rows(matrix: QuantizedTensor, rows: range, target: QType | None, data: torch.Tensor) -> None:
    """Packs some rows of a matrix into `data`, which holds as many rows, PACK_ROWS rows at a time.

    The rows are quantized to `target` first, if given. The first row must be a multiple of FP8_BLOCK if the matrix has
    scales, because FP8_BLOCK rows share one.
    """
    n, k = matrix.shape
    scale = None if target is not None or matrix.scale is None else matrix.scale  # quantized rows have no block scales
    if scale is not None:
        scale = scale[rows.start // FP8_BLOCK : -(-rows.stop // FP8_BLOCK)].contiguous()
    for row in range(rows.start, rows.stop, PACK_ROWS):
        chunk = matrix.data.reshape(n, -1)[row : min(row + PACK_ROWS, rows.stop)]
        if target is not None:
            chunk = ops.quantize_rows(_dequantize_rows(matrix, chunk, row), target.code)
        ops.pack(chunk, (target or matrix.qtype).code, len(rows), k, data, row - rows.start, scale)


def _dequantize_rows(matrix: QuantizedTensor, rows: torch.Tensor, first_row: int) -> torch.Tensor:
    """Dequantizes `rows`, the rows of a matrix from `first_row` on, to f32 [rows, k], to quantize them to another type.

    The first row must be a multiple of FP8_BLOCK if the matrix has scales.
    """
    scale = matrix.scale
    if scale is not None:
        scale = scale[first_row // FP8_BLOCK : -(-(first_row + len(rows)) // FP8_BLOCK)]
    return matrix.qtype.dequantize(rows, scale).reshape(len(rows), matrix.shape[-1]).contiguous()


@contextmanager
def bf16_rows(tokens: int, ranges: Sequence[int] = ()) -> Iterator[None]:
    """Selects the rows that this thread's next calls multiply in bf16, where the CPU has tile registers for that.

    Inside the context, calls with `tokens` rows multiply the `ranges` in bf16, and no other rows. Outside it, the
    kernels multiply in bf16 the rows that fill pages of 64 tokens: see csrc/cpu/driver/bf16_rows.h.

    Args:
        tokens: number of rows of the calls that this applies to.
        ranges: first, count, first, count, ...
    """
    previous = current_bf16_rows()
    _thread.rows = (tokens, tuple(ranges))
    ops.bf16_rows(tokens, ranges)
    try:
        yield
    finally:
        _thread.rows = previous
        ops.bf16_rows(*previous)


def current_bf16_rows() -> tuple[int, tuple[int, ...]]:
    """Returns the arguments of the current `bf16_rows` of this thread, for a thread that computes on its behalf."""
    tokens, ranges = getattr(_thread, "rows", (-1, ()))
    return tokens, ranges


def bf16_rows_part(first: int, count: int) -> AbstractContextManager[None]:
    """Translates the current `bf16_rows` for calls that get only the rows `first` to `first + count` of a batch.

    Callers that split a batch need this, so that each row is computed as in the complete batch: in such calls all rows
    are multiplied in bf16 if the current `bf16_rows` selects all of them, else none.
    """
    _, ranges = current_bf16_rows()
    inside = any(
        start <= first and first + count <= start + length
        for start, length in zip(ranges[::2], ranges[1::2], strict=True)
    )
    return bf16_rows(count, (0, count) if inside else ())


def linear(x: torch.Tensor, w: Packed, bias: torch.Tensor | None = None, all_bf16: bool = False) -> torch.Tensor:
    """Multiplies by a packed matrix: x [..., k] (f32, f16, bf16) times w [n, k] transposed, plus bias f32 [n].

    Args:
        x: the activations.
        w: the packed matrix.
        bias: f32 [n].
        all_bf16: whether all rows are multiplied in bf16, see `bf16_rows`.

    Returns:
        [..., n] in x's dtype.
    """
    gradients.refuse_forward_mode(x)
    return ops.linear(x.contiguous(), w.data, w.qtype.code, w.n, w.k, bias, all_bf16)


def linear_batched(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """Multiplies x [matrices, tokens, k] by each matrix of w transposed -> [matrices, tokens, n]."""
    gradients.refuse_forward_mode(x)
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
    """Computes routed experts on packed weights; see reference.experts.

    Args:
        x: [tokens, hidden].
        ids: int64 [tokens, top].
        weights: f32 [tokens, top].
        gate, up, down: the experts' matrices, packed by `pack_experts`.
        gate_bias, up_bias, down_bias: f32.
        act: the activation; `alpha` and `limit` are its parameters.
        counts: a tensor of `new_stats` to which the kernel adds its statistics, see `ExpertStats`.

    Returns:
        [tokens, hidden] in x's dtype.
    """
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
    """Statistics of routed experts.

    A pass over the weights (of up to 2048 tokens) reads each expert that one of its tokens selected once.

    Attributes:
        activations: how often each expert was selected.
        nbytes: bytes of packed weights read.
        seconds: time from the start of the calls to their end.
        node_seconds: for each NUMA node, the time that its workers spent multiplying, averaged over these workers.
    """

    activations: tuple[int, ...]
    nbytes: int
    seconds: float
    node_seconds: tuple[float, ...]

    @classmethod
    def read(cls, counts: torch.Tensor) -> ExpertStats:
        """Reads a tensor of `new_stats`; kernels may add to it at the same time."""
        values, num_totals = counts.tolist(), 2 + ops.nodes()
        nbytes, nanoseconds, *node_nanoseconds = values[-num_totals:]
        return cls(tuple(values[:-num_totals]), nbytes, nanoseconds / 1e9, tuple(n / 1e9 for n in node_nanoseconds))


def new_stats(experts: int) -> torch.Tensor:
    """Returns int64 zeros, to which `experts` and the MoE block add their statistics.

    The elements are the activations of each expert, bytes, nanoseconds, and nanoseconds of each NUMA node.
    """
    return torch.zeros(experts + 2 + ops.nodes(), dtype=torch.int64, device="cpu")


attention, mla_attention = ops.attention, ops.mla_attention
rms_norm, rope, route, gated = ops.rms_norm, ops.rope, ops.route, ops.gated


@torch.library.register_fake("ktx::linear")
def _(x, packed, code, n, k, bias=None, all_bf16=False):  # type: ignore[no-untyped-def]
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
def _(  # type: ignore[no-untyped-def]
    q, k, v, ranges, mask, scale, sinks=None, softcap=0.0, q_rope=None, k_rope=None, sequences=None, pages=None
):
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
# torch.utils.flop_counter is not imported here because it imports triton. If it is imported later,
# ktx.integrations.experts_interface registers the formulas then.
if "torch.utils.flop_counter" in sys.modules:
    flops.register()
