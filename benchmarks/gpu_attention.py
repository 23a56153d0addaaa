"""Paged attention on a CUDA device against the device's limits: MLA and GQA, decode and prefill.

A row is a batch of sequences of one context length: GB/s of keys and values over the bandwidth of a large copy,
TFLOP/s over a large bf16 matrix product (both measured here), the error against float64 next to that of torch's
attention in the same type, and the time of FlashInfer if it is installed. Calls are replayed from a CUDA graph over
more pages than the L2 cache holds. Exit status 1 if an error is more than twice torch's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

PAGE_TOKENS, ROTATION_BYTES = 64, 256 << 20  # the bytes of keys that calls read before they return to the first pages
LATENT_DIM, ROPE_DIM = 512, 64
MIN_SHARES = {16: 0.80, 32: 0.80, 128: 0.60}  # MLA decode: query heads -> minimum fraction of the nearer limit
HALF = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """A batch of sequences of `context` tokens, of which the last `new` are queries.

    The kind is absorbed MLA, expanded MLA, or GQA.
    """

    kind: str  # mla, expanded, gqa
    context: int
    batch: int
    heads: int
    kv_heads: int = 1
    new: int = 1
    stored: torch.dtype = HALF

    @property
    def columns(self) -> tuple[int, int, int]:
        """Columns of keys, of their separately stored RoPE part, and of values."""
        return {"mla": (LATENT_DIM, ROPE_DIM, LATENT_DIM), "expanded": (128, ROPE_DIM, 128), "gqa": (128, 0, 128)}[
            self.kind
        ]

    @property
    def nbytes(self) -> int:
        """Bytes that a call moves: keys and values once, queries and results."""
        keys, rope, values = self.columns
        stored = self.batch * self.context * self.stored.itemsize
        cached = keys + rope if self.kind == "mla" else self.kv_heads * (keys + values) + rope
        return stored * cached + self.batch * self.new * self.heads * (keys + rope + values) * HALF.itemsize

    @property
    def operations(self) -> int:
        """Multiplications and additions of a call, under the causal mask."""
        pairs = self.new * (self.context - self.new) + self.new * (self.new + 1) // 2
        return 2 * self.batch * self.heads * pairs * sum(self.columns)


def rows(quick: bool) -> list[Row]:
    """Returns the rows to measure."""
    contexts, batches = ((4096, 32768), (1, 32)) if quick else ((4096, 16384, 65536, 131072), (1, 4, 8, 32))
    decode = [Row("mla", context, batch, heads) for heads in (16, 32, 128) for context in contexts for batch in batches]
    fp8 = [Row("mla", contexts[1], 32, heads, stored=torch.float8_e4m3fn) for heads in (16, 128)]
    gqa = [Row("gqa", context, batch, 32, 8) for context in contexts[:3] for batch in (1, 32)]
    chunks = [Row("mla", 8192, 1, 128, new=512), Row("mla", 8192, 1, 16, new=2048)]
    prompts = [Row("expanded", 8192, 1, 128, 128, new=4096), Row("gqa", 8192, 1, 32, 8, new=4096)]
    return decode + fp8 + gqa + chunks + prompts


class Case:
    """The tensors of a row: page pools larger than the L2 cache, and a page table for each of `num_rotations` parts."""

    def __init__(self, row: Row):
        self.row, self.scale = row, (192 if row.kind != "gqa" else 128) ** -0.5
        keys, rope, values = row.columns
        pages_per_call = math.ceil(row.context / PAGE_TOKENS) * row.batch
        self.num_rotations = max(
            1,
            min(64, ROTATION_BYTES // max(1, pages_per_call * PAGE_TOKENS * (row.nbytes // (row.batch * row.context)))),
        )
        num_pages = pages_per_call * self.num_rotations
        self.pages = torch.randperm(num_pages, device="cuda").int().view(self.num_rotations, row.batch, -1)
        tokens = row.batch * row.new
        self.q, self.q_rope = (
            torch.randn(1, row.heads, tokens, width, device="cuda", dtype=HALF) for width in (keys, rope)
        )
        self.k, self.k_rope = (
            self._pool(num_pages, heads, width) for heads, width in ((row.kv_heads, keys), (1, rope))
        )
        self.v = self.k if row.kind == "mla" else self._pool(num_pages, row.kv_heads, values)
        starts = torch.arange(row.batch, device="cuda") * row.new
        self.sequences = torch.stack(
            [starts, torch.full_like(starts, row.new), torch.full_like(starts, row.context)], 1
        )

    def _pool(self, pages: int, heads: int, columns: int) -> torch.Tensor:
        pool = torch.empty(pages, heads, PAGE_TOKENS, columns, dtype=self.row.stored, device="cuda")
        for chunk in pool.split(4096):
            chunk.copy_(torch.randn(chunk.shape, device="cuda", dtype=HALF))
        return pool

    def calls(self, kernels: Any) -> list[Callable[[], torch.Tensor]]:
        """Returns a call for each page table, whose schedule is already planned."""
        from ktx.kernels.gpu.split_kv import AttentionShape

        row, (keys, _, values) = self.row, self.row.columns
        shape = AttentionShape(row.heads, row.kv_heads, keys, values, latent=row.kind == "mla")
        schedule = kernels.schedule([row.new] * row.batch, shape, "cuda")
        plans = [schedule.plan(self.sequences, pages) for pages in self.pages]
        return [lambda plan=plan: self._call(kernels, plan) for plan in plans]  # type: ignore[misc]

    def _call(self, kernels: Any, plan: Any) -> torch.Tensor:
        if self.row.kind == "mla":
            return kernels.mla_attention(self.q, self.q_rope, self.k[:, 0], self.k_rope[:, 0], plan, self.scale)
        rope = {"q_rope": self.q_rope, "k_rope": self.k_rope} if self.row.kind == "expanded" else {}
        return kernels.attention(self.q, self.k, self.v, plan, self.scale, **rope)

    def last(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query, keys and values of the last token of the last sequence, converted to `dtype`.

        q is [kv_heads, heads / kv_heads, D], k and v are [kv_heads, tokens, D].
        """
        row, pages = self.row, self.pages[0, -1].long()
        k, rope, v = (
            pool[pages].to(dtype).transpose(0, 1).flatten(1, 2)[:, : row.context]
            for pool in (self.k, self.k_rope, self.v)
        )
        q = torch.cat([self.q, self.q_rope], -1)[0, :, -1].to(dtype).unflatten(0, (row.kv_heads, -1))
        return q, torch.cat([k, rope.expand(row.kv_heads, -1, -1)], -1), v

    def exact(self) -> torch.Tensor:
        """Returns the attention output of that token in float64: [heads, D]."""
        q, k, v = self.last(torch.float64)
        return ((q @ k.transpose(1, 2) * self.scale).softmax(-1) @ v).flatten(0, 1)

    def torchs(self) -> torch.Tensor:
        """Returns torch's attention output in half precision; heads that share keys are passed as queries."""
        q, k, v = (x[None] for x in self.last(HALF))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)[0].flatten(0, 1)


def seconds(calls: list[Callable[[], Any]], repeat: int = 5) -> float:
    """Returns the seconds of a call: the median of replays of a CUDA graph of all calls, over their number."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replayed(graph.replay, repeat) / len(calls)


def replayed(run: Callable[[], Any], repeat: int = 5) -> float:
    """Returns the median seconds of `run` on the device."""
    run()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def limits() -> tuple[float, float]:
    """Returns the bytes per second of a large copy (read and write) and the operations per second of a bf16 product."""
    src = torch.randn(1 << 29, device="cuda", dtype=HALF)
    dst = torch.empty_like(src)
    copy = 2 * src.nbytes / replayed(lambda: dst.copy_(src), 9)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=HALF) for _ in range(2))
    return copy, 2 * 8192**3 / replayed(lambda: a @ b, 9)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the relative error in the Frobenius norm."""
    return float((result.double() - exact).norm() / exact.norm())


def measure(row: Row, copy: float, product: float) -> dict[str, Any]:
    """Measures a row; `share` is the fraction of the nearer limit."""
    from ktx.errors import UsageError
    from ktx.kernels.gpu.attention_backend import kernels_for
    from ktx.kernels.gpu.split_kv import AttentionShape

    case, (keys, rope, values) = Case(row), row.columns
    shape = AttentionShape(row.heads, row.kv_heads, keys, values, latent=row.kind == "mla")
    calls = case.calls(kernels_for(shape))
    exact = case.exact()
    results: dict[str, Any] = {"error": error(calls[0]()[0, -1], exact), "torch_error": error(case.torchs(), exact)}
    call_s = seconds(calls)
    limit_s = max(row.nbytes / copy, row.operations / product)
    results |= {"us": call_s * 1e6, "gb_s": row.nbytes / call_s / 1e9, "tflop_s": row.operations / call_s / 1e12}
    results |= {"copy_share": row.nbytes / call_s / copy, "product_share": row.operations / call_s / product}
    results |= {
        "share": limit_s / call_s,
        "floor": MIN_SHARES.get(row.heads, 0.0) if (row.kind, row.new, row.stored) == ("mla", 1, HALF) else 0.0,
    }
    try:
        flashinfer = kernels_for(shape, "flashinfer", rope, cache_dtype=row.stored)
    except UsageError as unsupported:
        return results | {"flashinfer": str(unsupported)}
    flashinfer_s = seconds(case.calls(flashinfer))
    return results | {"flashinfer_us": flashinfer_s * 1e6, "over_flashinfer": flashinfer_s / call_s}


def row_line(row: Row, results: dict[str, Any]) -> str:
    """Returns the printed line of a row."""
    stored = "e4m3" if row.stored.itemsize == 1 else "bf16"
    setup = f"{row.kind:9}{row.context:>7} x {row.batch:<3}{row.heads:>4} heads {row.new:>5} new {stored}"
    speed = (
        f"{results['us']:>10.1f} us{results['gb_s']:>8.0f} GB/s {results['copy_share']:>4.0%}"
        f"{results['tflop_s']:>7.0f} TFLOP/s {results['product_share']:>4.0%}"
    )
    flashinfer = f"{results['over_flashinfer']:>6.2f} x FlashInfer" if "over_flashinfer" in results else ""
    floor = "  below its minimum" if results["share"] < results["floor"] else ""
    return f"{setup}{speed}  error {results['error']:.1e} ({results['torch_error']:.1e}){flashinfer}{floor}"


def main(argv: list[str] | None = None) -> int:
    """Prints a line per row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure a third of the rows (two minutes)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_attention: torch sees no CUDA device on this machine; there is nothing to measure", file=sys.stderr)
        return 1
    from ktx.cli.bench_process import run_metadata

    copy, product = limits()
    common = run_metadata() | {
        "gpu": torch.cuda.get_device_name(0),
        "copy_gb_s": copy / 1e9,
        "product_tflop_s": product / 1e12,
    }
    if not args.json:
        print(f"{common['gpu']}: a copy moves {copy / 1e9:.0f} GB/s, a bf16 product {product / 1e12:.0f} TFLOP/s")
    lines, num_wrong = [], 0
    for row in rows(args.quick):
        results = measure(row, copy, product)
        num_wrong += results["error"] > 2 * results["torch_error"]
        setup = {
            "kind": row.kind,
            "context": row.context,
            "batch": row.batch,
            "heads": row.heads,
            "kv_heads": row.kv_heads,
        }
        setup |= {"new": row.new, "stored": str(row.stored).removeprefix("torch.")}
        lines.append(json.dumps(common | setup | results))
        print(lines[-1] if args.json else row_line(row, results), flush=True)
        torch.cuda.empty_cache()
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(line + "\n" for line in lines)
    if num_wrong:
        print(f"gpu_attention: {num_wrong} rows have more than twice the error of torch in bf16", file=sys.stderr)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
