"""Speed of the kernels for one weight type, compared with the limits of this machine.

For one token the weights are read from memory once, so the limit is the read bandwidth, in GB/s of packed bytes. For
many tokens the limit is the peak rate of the dot product that multiplies the type. A limit is measured next to each
result because clocks and other load on the machine change.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ktx.hardware import last_level_cache, memory
from ktx.kernels import cpu
from ktx.quant.random_blocks import random_rows
from ktx.quant.types import BF16_EXACT_TYPES, QType
from ktx.weights.base import QuantizedTensor

COLUMNS, ROWS = 2048, 8192  # shape of a measured matrix: columns k, rows n
DEFAULT_PCIE_GB_S = 20.0  # assumed GB/s between two devices if the rate cannot be measured
# Smallest batch whose experts may be copied to a GPU, and tokens of a prompt that an expert computes on average.
MIN_STREAM_TOKENS, TOKENS_PER_EXPERT = 64, 32
MIN_PASS_BYTES = 1 << 28  # bytes that a pass reads at least
CACHE_MULTIPLE = 4  # a pass reads so many times the last-level caches, which then hold only a part of it


def median_seconds(call: Callable[[], object], repeat: int) -> float:
    """Returns the median time of a call, in seconds, after one warm-up call."""
    call()
    times_s = []
    for _ in range(repeat):
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


@dataclass(frozen=True)
class Bandwidth:
    """A measured read bandwidth.

    Attributes:
        gb_s: GB/s.
        nbytes: bytes that a pass read.
        cache: bytes of the last-level caches; 0 if unknown.
    """

    gb_s: float
    nbytes: int
    cache: int

    def __str__(self) -> str:
        return f"{self.gb_s:.1f} GB/s ({self.size})"

    @property
    def size(self) -> str:
        """What was read, compared with the caches, as text."""
        cache = f"last-level cache {self.cache / (1 << 20):.0f} MiB" if self.cache else "cache size unknown"
        note = (
            f"; less than {CACHE_MULTIPLE} times that because memory is short"
            if self.nbytes < CACHE_MULTIPLE * self.cache
            else ""
        )
        return f"{self.nbytes / (1 << 20):.0f} MiB read, {cache}{note}"


def pass_bytes(min_bytes: int = MIN_PASS_BYTES) -> int:
    """Returns the bytes that a pass must read so that it measures memory and not a cache, in whole MiB.

    That is CACHE_MULTIPLE times the last-level caches, but at least `min_bytes`, and above `min_bytes` at most a
    quarter of the free memory.
    """
    return max(min_bytes, min(CACHE_MULTIPLE * last_level_cache(), memory()[1] // 4)) >> 20 << 20


def read_bandwidth(threads: int, min_bytes: int = MIN_PASS_BYTES) -> Bandwidth:
    """Measures reads of `pass_bytes(min_bytes)` bytes from memory."""
    nbytes = pass_bytes(min_bytes)
    return Bandwidth(cpu.ops.probe_read(threads, nbytes >> 20), nbytes, last_level_cache())


def free_read_bandwidth(threads: int) -> Bandwidth | None:
    """Measures reads of at least 512 MiB, within seconds; None if less than 1 GiB is free."""
    return None if memory()[1] < 1 << 30 else read_bandwidth(threads, 1 << 29)


def gpu_read_bandwidth() -> float | None:
    """Returns the GB/s of reads from the memory of the first GPU; None if torch can use no GPU.

    `ktx plan` estimates the speed of decode steps on a GPU by it.
    """
    if not torch.cuda.is_available():
        return None
    values = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")  # larger than the caches of a GPU

    def read() -> None:
        values.sum()
        torch.cuda.synchronize()

    return values.nbytes / median_seconds(read, 5) / 1e9


def link_bandwidth(device: torch.device | str = "cuda") -> float | None:
    """Returns the GB/s from pinned memory to a GPU; None if torch can use no GPU.

    It decides from which batch size on experts are streamed, see `min_tokens_to_stream`.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    src, dst = (
        torch.empty(1 << 27, dtype=torch.uint8, pin_memory=True),
        torch.empty(1 << 27, dtype=torch.uint8, device=device),
    )

    def copy() -> None:
        dst.copy_(src, non_blocking=True)
        torch.cuda.synchronize(device)

    return src.numel() / median_seconds(copy, 3) / 1e9


def prompt_rate(qtype: QType) -> float:
    """Returns the GOPS of experts of a type in a prompt, with as many tokens at once as an expert gets on average.

    It decides, with `link_bandwidth`, from which batch size on experts are streamed.
    """
    packed = split_matrices(cpu.pack(random_matrices(qtype, 8, 512, COLUMNS)))  # 8 experts of 512 rows
    x = torch.randn(TOKENS_PER_EXPERT, COLUMNS, dtype=torch.float32)
    elapsed_s = median_seconds(lambda: [cpu.linear(x, matrix, all_bf16=True) for matrix in packed], 3)
    return 2 * TOKENS_PER_EXPERT * 512 * COLUMNS * len(packed) / elapsed_s / 1e9


def min_tokens_to_stream(nbytes: int, num_weights: int, link_gb_s: float, cpu_gops: float) -> int:
    """Returns the batch size from which copying weights to a GPU is faster than computing on the CPU.

    Args:
        nbytes: bytes to copy.
        num_weights: weights that a token is multiplied by.
        link_gb_s: GB/s of the copy.
        cpu_gops: GOPS of the CPU.

    Returns:
        Number of tokens, at least MIN_STREAM_TOKENS because the GPU needs time to launch and compute as well.
    """
    # tokens that the CPU computes while the weights are copied
    return max(MIN_STREAM_TOKENS, math.ceil(nbytes / link_gb_s * cpu_gops / (2 * num_weights)))


def random_matrices(qtype: QType, count: int, n: int, k: int) -> QuantizedTensor:
    """Returns count x [n, k] of random rows.

    At most 64 rows are distinct, which is enough because the speed does not depend on the values.
    """
    distinct = random_rows(qtype, min(n, 64), k)
    data = distinct.repeat(-(-n // distinct.shape[0]), 1)[:n].expand(count, n, -1)
    scale = torch.ones(count, -(-n // 128), -(-k // 128), dtype=torch.float32) if qtype.name == "F8_E4M3" else None
    return QuantizedTensor(data, qtype, (count, n, k), scale)


def peak_gops(qtype: QType, threads: int) -> float:
    """Returns the peak GOPS of the dot product that multiplies a prompt's tokens by weights of this type, within 50 ms.

    A multiplication and an addition count as two operations.
    """
    if qtype.name in BF16_EXACT_TYPES or (not qtype.is_float and cpu.ops.has_bf16_tiles()):
        return cpu.ops.probe_bf16(threads, 0.05)
    return (cpu.ops.probe_fma if qtype.is_float else cpu.ops.probe_int8)(threads, 0.05)


def split_matrices(packed: cpu.Packed, count: int | None = None) -> list[cpu.Packed]:
    """Returns each of the first `count` matrices (default: all) as a `Packed` of its own, which `cpu.linear` takes."""
    size = packed.nbytes // packed.matrices
    return [
        cpu.Packed(packed.data[i * size : (i + 1) * size], packed.qtype, packed.n, packed.k)
        for i in range(packed.matrices if count is None else count)
    ]


def as_one_matrix(packed: cpu.Packed) -> cpu.Packed:
    """Returns all matrices as one, without a copy because each consists of complete groups of rows."""
    return cpu.Packed(packed.data, packed.qtype, packed.n * packed.matrices, packed.k)


def measure(qtype: QType, threads: int, repeat: int = 5, tokens: Sequence[int] = (48, 512)) -> dict[str, float]:
    """Measures the products of a weight type on matrices that are read from memory, next to the machine's limits.

    Many tokens are multiplied as a prompt's are, in bf16 where the CPU has tile registers for that.

    Returns:
        gemv_gb_s and gemv_share of one token, gemm_T_gops and gemm_T_share for each T of `tokens`; a share is relative
        to the measured limit.
    """
    matrix_bytes = cpu.packed_nbytes(qtype, ROWS, COLUMNS)
    packed = cpu.pack(random_matrices(qtype, max(2, pass_bytes() // matrix_bytes), ROWS, COLUMNS))
    all_rows, x = as_one_matrix(packed), torch.randn(1, COLUMNS, dtype=torch.float32)
    rounds = []
    for _ in range(repeat):  # limit and result alternate because memory bandwidth changes over time
        read_gb_s = read_bandwidth(threads, MIN_PASS_BYTES // 2).gb_s
        rate = packed.nbytes / median_seconds(lambda: cpu.linear(x, all_rows), 1) / 1e9
        rounds.append((rate / read_gb_s, rate))
    share, rate = statistics.median_low(rounds)  # the round with the median share
    results = {"gemv_gb_s": rate, "gemv_share": share}
    for num_tokens in tokens:
        # fewer matrices for more tokens, so that each size takes about as long
        packs = split_matrices(packed, min(packed.matrices, max(1, 512 // num_tokens)))
        batch = torch.randn(num_tokens, COLUMNS, dtype=torch.float32)
        limit_gops = peak_gops(qtype, threads)
        elapsed_s = median_seconds(
            lambda packs=packs, batch=batch: [cpu.linear(batch, w, all_bf16=True) for w in packs],  # type: ignore[misc]
            repeat,
        )
        rate = 2 * num_tokens * ROWS * COLUMNS * len(packs) / elapsed_s / 1e9
        results |= {f"gemm_{num_tokens}_gops": rate, f"gemm_{num_tokens}_share": rate / limit_gops}
    return results
