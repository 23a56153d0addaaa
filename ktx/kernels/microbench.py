"""How fast the kernels multiply one weight type, beside what this machine can do at most.

One token: weights come from memory once, so packed GB/s over the read bandwidth. Many tokens: operations over the peak of the dot product
that the type is multiplied with. A limit is measured next to each figure, because clocks and neighbours change.
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
from ktx.kernels.check import IN_BF16
from ktx.quant.quantize import random_rows
from ktx.quant.types import QType
from ktx.weights.base import QuantizedTensor

COLUMNS, ROWS = 2048, 8192
DEFAULT_PCIE_GB_S = 20.0  # GB/s between two devices where none can be measured
LEAST, EACH = 64, 32  # tokens from which on experts may be copied to a GPU, and that an expert gets of a prompt
STREAM = 1 << 28  # bytes that a pass reads at least
CACHES = 4  # and times the last-level caches: of so much they can hold a part only


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Median time of a call, after one that does not count."""
    call()
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@dataclass(frozen=True)
class Reading:
    """GB/s of reads, the bytes that were read in a pass, and those of the last-level caches (0: not known)."""

    gb_s: float
    nbytes: int
    cache: int

    def __str__(self) -> str:
        return f"{self.gb_s:.1f} GB/s ({self.size})"

    @property
    def size(self) -> str:
        """What was read, beside the caches."""
        cache = f"last-level cache {self.cache / (1 << 20):.0f} MiB" if self.cache else "cache size not known"
        short = f"; less than {CACHES} times that, for memory is short" if self.nbytes < CACHES * self.cache else ""
        return f"{self.nbytes / (1 << 20):.0f} MiB read, {cache}{short}"


def pass_bytes(least: int = STREAM) -> int:
    """Bytes that a pass has to read so that memory is measured and not a cache: CACHES times the caches, in whole MiB.

    At least `least`; at most a quarter of the free memory beyond that.
    """
    return max(least, min(CACHES * last_level_cache(), memory()[1] // 4)) >> 20 << 20


def read_bandwidth(threads: int, least: int = STREAM) -> Reading:
    """Reads from memory, as many bytes as `pass_bytes` says."""
    nbytes = pass_bytes(least)
    return Reading(cpu.ops.probe_read(threads, nbytes >> 20), nbytes, last_level_cache())


def free_read_bandwidth(threads: int) -> Reading | None:
    """The same on half a gigabyte at least, within seconds; None where a gigabyte is not free."""
    return None if memory()[1] < 1 << 30 else read_bandwidth(threads, 1 << 29)


def gpu_read_bandwidth() -> float | None:
    """GB/s of reads from the first GPU's memory; None where torch can use none."""
    if not torch.cuda.is_available():
        return None
    values = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")  # more than its caches hold

    def read() -> None:
        values.sum()
        torch.cuda.synchronize()

    return values.nbytes / seconds(read, 5) / 1e9


def link_bandwidth(device: torch.device | str = "cuda") -> float | None:
    """GB/s from pinned memory to a GPU; None where torch can use none."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    source, target = (
        torch.empty(1 << 27, dtype=torch.uint8, pin_memory=True),
        torch.empty(1 << 27, dtype=torch.uint8, device=device),
    )

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return source.numel() / seconds(copy, 3) / 1e9


def prompt_rate(qtype: QType) -> float:
    """GOPS at which experts of a type are multiplied with a prompt's tokens: as many at once as an expert gets of them."""
    packed = split(cpu.pack(matrices(qtype, 8, 512, COLUMNS)))
    x = torch.randn(EACH, COLUMNS, dtype=torch.float32)
    taken = seconds(lambda: [cpu.linear(x, matrix, wide=True) for matrix in packed], 3)
    return 2 * EACH * 512 * COLUMNS * len(packed) / taken / 1e9


def min_tokens_to_stream(nbytes: int, numbers: int, link: float, rate: float) -> int:
    """Tokens from which on copying nbytes at `link` GB/s takes less time than multiplying each token by so many numbers at `rate` GOPS.

    At least LEAST: the device needs time too, and so do its launches.
    """
    return max(LEAST, math.ceil(nbytes / link * rate / (2 * numbers)))


def matrices(qtype: QType, count: int, n: int, k: int) -> QuantizedTensor:
    """count x [n, k] of random rows; a few distinct rows are enough, speed does not depend on them."""
    few = random_rows(qtype, min(n, 64), k)
    data = few.repeat(-(-n // few.shape[0]), 1)[:n].expand(count, n, -1)
    scale = torch.ones(count, -(-n // 128), -(-k // 128), dtype=torch.float32) if qtype.name == "F8_E4M3" else None
    return QuantizedTensor(data, qtype, (count, n, k), scale)


def peak(qtype: QType, threads: int) -> float:
    """GOPS (a multiplication and an addition are two) of the dot product that many tokens of a prompt are multiplied with in this type."""
    if qtype.name in IN_BF16 or (not qtype.is_float and cpu.ops.has_wide()):
        return cpu.ops.probe_bf16(threads, 0.05)
    return (cpu.ops.probe_fma if qtype.is_float else cpu.ops.probe_int8)(threads, 0.05)


def split(packed: cpu.Packed, count: int | None = None) -> list[cpu.Packed]:
    """Each of the first `count` matrices (default: all) for itself."""
    size = packed.nbytes // packed.matrices
    return [
        cpu.Packed(packed.data[i * size : (i + 1) * size], packed.qtype, packed.n, packed.k)
        for i in range(packed.matrices if count is None else count)
    ]


def stacked(packed: cpu.Packed) -> cpu.Packed:
    """All matrices as one, which they are in memory: each has whole groups of rows."""
    return cpu.Packed(packed.data, packed.qtype, packed.n * packed.matrices, packed.k)


def measure(qtype: QType, threads: int, repeat: int = 5, tokens: Sequence[int] = (48, 512)) -> dict[str, float]:
    """gemv_gb_s and gemv_share of one token, gemm_T_gops and gemm_T_share of T tokens, all on matrices that come from memory."""
    one = cpu.packed_nbytes(qtype, ROWS, COLUMNS)
    packed = cpu.pack(matrices(qtype, max(2, pass_bytes() // one), ROWS, COLUMNS))
    whole, x = stacked(packed), torch.randn(1, COLUMNS, dtype=torch.float32)
    turns = []
    for _ in range(repeat):  # in turns: a machine's memory may be faster a moment later
        read = read_bandwidth(threads, STREAM // 2).gb_s
        rate = packed.nbytes / seconds(lambda: cpu.linear(x, whole), 1) / 1e9
        turns.append((rate / read, rate))
    share, rate = statistics.median_low(turns)
    found = {"gemv_gb_s": rate, "gemv_share": share}
    for count in tokens:
        some = split(packed, min(packed.matrices, max(1, 512 // count)))
        many = torch.randn(count, COLUMNS, dtype=torch.float32)
        limit = peak(qtype, threads)
        taken = seconds(lambda some=some, many=many: [cpu.linear(many, matrix, wide=True) for matrix in some], repeat)  # type: ignore[misc]
        rate = 2 * count * ROWS * COLUMNS * len(some) / taken / 1e9
        found |= {f"gemm_{count}_gops": rate, f"gemm_{count}_share": rate / limit}
    return found
