"""Attention on a CUDA device against the device's own limits: MLA and GQA on pages, answers and prompts.

A row is some sequences of one context: GB/s of keys and values over the bandwidth of a large copy, TFLOP/s over a large bf16 product
(both measured here), the error against float64 beside torch's in the same type, and FlashInfer's time where it is installed. Calls are
replayed from a CUDA graph over more pages than the second-level cache holds. Exit status 1 if an error is over twice torch's.
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

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

PAGE, CACHE = 64, 256 << 20  # bytes of keys that calls go through before they come back to the first
RANK, ROPE = 512, 64
FLOORS = {16: 0.80, 32: 0.80, 128: 0.60}  # MLA: share of the nearer limit by query heads
HALF = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """`batch` sequences of `context` keys of which the last `new` are new. Absorbed MLA, MLA's expanded form, or GQA."""

    kind: str  # mla, expanded, gqa
    context: int
    batch: int
    heads: int
    kv_heads: int = 1
    new: int = 1
    stored: torch.dtype = HALF

    @property
    def columns(self) -> tuple[int, int, int]:
        """Of keys, of their rotated part that lies apart, of values."""
        return {"mla": (RANK, ROPE, RANK), "expanded": (128, ROPE, 128), "gqa": (128, 0, 128)}[self.kind]

    @property
    def nbytes(self) -> int:
        """Keys and values once, queries and results."""
        keys, rope, values = self.columns
        stored = self.batch * self.context * self.stored.itemsize
        cached = keys + rope if self.kind == "mla" else self.kv_heads * (keys + values) + rope
        return stored * cached + self.batch * self.new * self.heads * (keys + rope + values) * HALF.itemsize

    @property
    def operations(self) -> int:
        seen = self.new * (self.context - self.new) + self.new * (self.new + 1) // 2
        return 2 * self.batch * self.heads * seen * sum(self.columns)


def rows(quick: bool) -> list[Row]:
    contexts, batches = ((4096, 32768), (1, 32)) if quick else ((4096, 16384, 65536, 131072), (1, 4, 8, 32))
    decode = [Row("mla", context, batch, heads) for heads in (16, 32, 128) for context in contexts for batch in batches]
    more = [Row("mla", contexts[1], 32, heads, stored=torch.float8_e4m3fn) for heads in (16, 128)]
    few = [Row("gqa", context, batch, 32, 8) for context in contexts[:3] for batch in (1, 32)]
    chunks = [Row("mla", 8192, 1, 128, new=512), Row("mla", 8192, 1, 16, new=2048)]
    prompts = [Row("expanded", 8192, 1, 128, 128, new=4096), Row("gqa", 8192, 1, 32, 8, new=4096)]
    return decode + more + few + chunks + prompts


class Case:
    """The tensors of a row: pools larger than the cache, and a page table for each of `turns` parts of them."""

    def __init__(self, row: Row):
        self.row, self.scale = row, (192 if row.kind != "gqa" else 128) ** -0.5
        keys, rope, values = row.columns
        need = math.ceil(row.context / PAGE) * row.batch
        self.turns = max(1, min(64, CACHE // max(1, need * PAGE * (row.nbytes // (row.batch * row.context)))))
        count = need * self.turns
        self.pages = torch.randperm(count, device="cuda").int().view(self.turns, row.batch, -1)
        tokens = row.batch * row.new
        self.q, self.q_rope = (
            torch.randn(1, row.heads, tokens, wide, device="cuda", dtype=HALF) for wide in (keys, rope)
        )
        self.k, self.k_rope = (self._pool(count, heads, wide) for heads, wide in ((row.kv_heads, keys), (1, rope)))
        self.v = self.k if row.kind == "mla" else self._pool(count, row.kv_heads, values)
        first = torch.arange(row.batch, device="cuda") * row.new
        self.sequences = torch.stack([first, torch.full_like(first, row.new), torch.full_like(first, row.context)], 1)

    def _pool(self, pages: int, heads: int, columns: int) -> torch.Tensor:
        pool = torch.empty(pages, heads, PAGE, columns, dtype=self.row.stored, device="cuda")
        for part in pool.split(4096):
            part.copy_(torch.randn(part.shape, device="cuda", dtype=HALF))
        return pool

    def calls(self, kernels: Any) -> list[Callable[[], torch.Tensor]]:
        """One call for each page table, planned."""
        from ktx.kernels.gpu.split_kv import Shape

        row, (keys, _, values) = self.row, self.row.columns
        shape = Shape(row.heads, row.kv_heads, keys, values, latent=row.kind == "mla")
        work = kernels.work([row.new] * row.batch, shape, "cuda")
        plans = [work.plan(self.sequences, pages) for pages in self.pages]
        return [lambda plan=plan: self._call(kernels, plan) for plan in plans]  # type: ignore[misc]

    def _call(self, kernels: Any, plan: Any) -> torch.Tensor:
        if self.row.kind == "mla":
            return kernels.mla_attention(self.q, self.q_rope, self.k[:, 0], self.k_rope[:, 0], plan, self.scale)
        rope = {"q_rope": self.q_rope, "k_rope": self.k_rope} if self.row.kind == "expanded" else {}
        return kernels.attention(self.q, self.k, self.v, plan, self.scale, **rope)

    def last(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The last token of the last sequence with its keys and values in a type: q [Hkv, H/Hkv, D], k and v [Hkv, T, D]."""
        row, pages = self.row, self.pages[0, -1].long()
        k, rope, v = (
            pool[pages].to(dtype).transpose(0, 1).flatten(1, 2)[:, : row.context]
            for pool in (self.k, self.k_rope, self.v)
        )
        q = torch.cat([self.q, self.q_rope], -1)[0, :, -1].to(dtype).unflatten(0, (row.kv_heads, -1))
        return q, torch.cat([k, rope.expand(row.kv_heads, -1, -1)], -1), v

    def exact(self) -> torch.Tensor:
        q, k, v = self.last(torch.float64)
        return ((q @ k.transpose(1, 2) * self.scale).softmax(-1) @ v).flatten(0, 1)

    def torchs(self) -> torch.Tensor:
        """torch's own attention in half precision; the heads that share keys stand where queries do."""
        q, k, v = (x[None] for x in self.last(HALF))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)[0].flatten(0, 1)


def seconds(calls: list[Callable[[], Any]], repeat: int = 5) -> float:
    """Of one call: the median of replays of a graph that holds all of them, several times if they are short."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replayed(graph.replay, repeat) / len(calls)


def replayed(run: Callable[[], Any], repeat: int = 5) -> float:
    """Seconds of `run` on the device, the median."""
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
    """Bytes a second of a large copy, both ways, and operations a second of a large bf16 product."""
    source = torch.randn(1 << 29, device="cuda", dtype=HALF)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / replayed(lambda: target.copy_(source), 9)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=HALF) for _ in range(2))
    return copy, 2 * 8192**3 / replayed(lambda: a @ b, 9)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def measure(row: Row, copy: float, product: float) -> dict[str, Any]:
    """A row's figures; `share` is of the nearer limit."""
    from ktx.errors import UsageError
    from ktx.kernels.gpu.attention_backend import kernels_for
    from ktx.kernels.gpu.split_kv import Shape

    case, (keys, rope, values) = Case(row), row.columns
    shape = Shape(row.heads, row.kv_heads, keys, values, latent=row.kind == "mla")
    calls = case.calls(kernels_for(shape))
    exact = case.exact()
    found: dict[str, Any] = {"error": error(calls[0]()[0, -1], exact), "torch_error": error(case.torchs(), exact)}
    taken = seconds(calls)
    bound = max(row.nbytes / copy, row.operations / product)
    found |= {"us": taken * 1e6, "gb_s": row.nbytes / taken / 1e9, "tflop_s": row.operations / taken / 1e12}
    found |= {"copy_share": row.nbytes / taken / copy, "product_share": row.operations / taken / product}
    found |= {
        "share": bound / taken,
        "floor": FLOORS.get(row.heads, 0.0) if (row.kind, row.new, row.stored) == ("mla", 1, HALF) else 0.0,
    }
    try:
        other = kernels_for(shape, "flashinfer", rope, stored=row.stored)
    except UsageError as refused:
        return found | {"flashinfer": str(refused)}
    theirs = seconds(case.calls(other))
    return found | {"flashinfer_us": theirs * 1e6, "over_flashinfer": theirs / taken}


def show(row: Row, found: dict[str, Any]) -> str:
    stored = "e4m3" if row.stored.itemsize == 1 else "bf16"
    what = f"{row.kind:9}{row.context:>7} x {row.batch:<3}{row.heads:>4} heads {row.new:>5} new {stored}"
    speed = f"{found['us']:>10.1f} us{found['gb_s']:>8.0f} GB/s {found['copy_share']:>4.0%}{found['tflop_s']:>7.0f} TFLOP/s {found['product_share']:>4.0%}"
    beside = f"{found['over_flashinfer']:>6.2f} x FlashInfer" if "over_flashinfer" in found else ""
    floor = "  below its floor" if found["share"] < found["floor"] else ""
    return f"{what}{speed}  error {found['error']:.1e} ({found['torch_error']:.1e}){beside}{floor}"


def main(argv: list[str] | None = None) -> int:
    """Prints a line a row as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the rows: two minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_attention: torch sees no CUDA device on this machine; there is nothing to measure", file=sys.stderr)
        return 1
    from ktx.cli.bench import stamp

    copy, product = limits()
    common = stamp() | {
        "gpu": torch.cuda.get_device_name(0),
        "copy_gb_s": copy / 1e9,
        "product_tflop_s": product / 1e12,
    }
    if not args.json:
        print(f"{common['gpu']}: a copy moves {copy / 1e9:.0f} GB/s, a bf16 product {product / 1e12:.0f} TFLOP/s")
    lines, wrong = [], 0
    for row in rows(args.quick):
        found = measure(row, copy, product)
        wrong += found["error"] > 2 * found["torch_error"]
        about = {
            "kind": row.kind,
            "context": row.context,
            "batch": row.batch,
            "heads": row.heads,
            "kv_heads": row.kv_heads,
        }
        about |= {"new": row.new, "stored": str(row.stored).removeprefix("torch.")}
        lines.append(json.dumps(common | about | found))
        print(lines[-1] if args.json else show(row, found), flush=True)
        torch.cuda.empty_cache()
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(line + "\n" for line in lines)
    if wrong:
        print(f"gpu_attention: {wrong} rows err by more than twice what torch does in bf16", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
