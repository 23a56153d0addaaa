"""Matrix products with packed weights on a CUDA GPU, for every type and number of tokens, and a layer of experts.

    python benchmarks/gpu_weights.py

Prints a JSON line for each: microseconds, GB/s of packed bytes and their fraction of this GPU's copy bandwidth
(measured in the same run), TFLOPS, and the relative error against float64 on the dequantized weights. Calls are
replayed from a CUDA graph, on more matrices than the caches hold. Exit status 1 if an error exceeds its bound, or if
one token of a type in MIN_SHARES reads at a lower fraction.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from ktx.kernels.check import relative_error
from ktx.quant.random_blocks import random_rows
from ktx.quant.types import QTYPES, QType
from ktx.weights.base import QuantizedTensor

ROWS, COLUMNS, BYTES_PER_PASS = 4096, 7168, 1 << 28  # shape of a matrix; packed bytes that a pass reads
EXPERTS, WIDTH, HIDDEN, TOP = 64, 2048, 2048, 8
TOKENS, QUICK_TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 4096), (1, 8, 64, 512)
QUICK_TYPES = ("Q4_K", "Q6_K", "Q8_0", "INT4_128", "IQ2_XXS", "F8_E4M3", "BF16")
# minimum fractions of the copy bandwidth with one token
MIN_SHARES = dict.fromkeys(("Q4_K", "Q6_K", "Q8_0", "INT4_64", "INT4_128"), 0.70)
# bounds on relative errors: bf16 activations; activations and weights in FP8; two products with bf16 in between
MAX_ERROR, MAX_ERROR_FP8, MAX_ERROR_EXPERTS = (5e-3, 4e-2, 1e-2)


def microseconds(calls: list[Callable[[], Any]], repeat: int) -> float:
    """Returns the median microseconds of a call, from replays of a CUDA graph of all calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles kernels and lets libraries allocate workspaces
        calls[0]()
        calls[-1]()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times_us = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times_us)[len(times_us) // 2]


def copy_bandwidth(repeat: int) -> float:
    """Returns the GB/s, read plus written, of a copy of half a gigabyte."""
    src = torch.zeros(1 << 29, dtype=torch.uint8, device="cuda")
    dst = torch.empty_like(src)
    return 2 * src.numel() / microseconds([lambda: dst.copy_(src)], repeat) / 1e3


def matrix(qtype: QType, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    """Returns a matrix of random rows, of which at most 64 differ, because speed does not depend on the values."""
    rows = random_rows(qtype, min(n, 64), k, seed)
    scale = torch.rand(-(-n // 128), -(-k // 128)) + 0.5 if qtype.name == "F8_E4M3" else None
    return QuantizedTensor(rows.repeat(-(-n // len(rows)), 1)[:n].contiguous(), qtype, (n, k), scale)


def linear_lines(qtype: QType, tokens: tuple[int, ...], repeat: int, copy_gb_s: float) -> Iterator[dict[str, Any]]:
    """Measures a linear layer of a type; yields a line per number of tokens."""
    from ktx.kernels.gpu import fp8, linear

    weight = matrix(qtype, ROWS, COLUMNS)
    packed = linear.pack(weight)
    copies = [packed] + [
        linear.SoAWeight(packed.data.clone(), qtype, ROWS, COLUMNS, 1, packed.scale)
        for _ in range(BYTES_PER_PASS // packed.nbytes)
    ]
    exact = weight.dequantize().cuda().double()
    for count in tokens:
        x = torch.randn(count, COLUMNS, device="cuda", dtype=torch.bfloat16)
        weights = copies if count <= 64 else copies[:4]
        call_us = microseconds([lambda w=w, x=x: linear.linear(x, w) for w in weights], repeat)  # type: ignore[misc]
        in_fp8 = count > linear.MAX_GEMM_TOKENS and fp8.supports(x, packed)
        yield line("linear", qtype, count, call_us, packed.nbytes, 2 * count * ROWS * COLUMNS, copy_gb_s) | {
            "error": relative_error(linear.linear(x, packed), x.double() @ exact.T),
            "bound": MAX_ERROR_FP8 if in_fp8 else MAX_ERROR,
        }


def experts_lines(qtype: QType, tokens: tuple[int, ...], repeat: int, copy_gb_s: float) -> Iterator[dict[str, Any]]:
    """Measures a layer of experts of a type; yields a line per number of tokens."""
    from ktx.kernels import reference
    from ktx.kernels.gpu import linear, moe

    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    matrices = [matrix(qtype, *shape, seed) for seed, shape in enumerate(shapes)]
    gate, up, down = (linear.pack_experts([part] * EXPERTS) for part in matrices)
    nbytes = sum(part.nbytes for part in (gate, up, down)) // EXPERTS
    values = [part.dequantize().cuda().double() for part in matrices]
    for count in tokens:
        x = torch.randn(count, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(count)]).cuda()
        weights = torch.rand(count, TOP, device="cuda")
        rotated_ids = [(ids + i * TOP) % EXPERTS for i in range(EXPERTS // TOP)]
        calls = [
            lambda x=x, i=i, w=weights: moe.experts(x, i, w, gate, up, down)  # type: ignore[misc]
            for i in rotated_ids
        ]
        call_us = microseconds(calls, repeat)
        x64 = x.double()
        activated = reference.activate(x64 @ values[0].T, x64 @ values[1].T, "silu")
        exact = activated @ values[2].T * weights.double().sum(1, keepdim=True)  # all experts have the same weights
        read_bytes = nbytes * (count * TOP if count * TOP <= moe.MAX_GEMV_PAIRS else ids.unique().numel())
        yield line("experts", qtype, count, call_us, read_bytes, 6 * count * TOP * WIDTH * HIDDEN, copy_gb_s) | {
            "error": relative_error(moe.experts(x, ids, weights, gate, up, down), exact),
            "bound": MAX_ERROR_EXPERTS,
        }


def line(
    kernel: str, qtype: QType, tokens: int, call_us: float, nbytes: int, operations: int, copy_gb_s: float
) -> dict[str, Any]:
    """Returns the JSON fields of a measurement."""
    gb_s = nbytes / call_us / 1e3
    figures = {"us": call_us, "gb_s": gb_s, "share": gb_s / copy_gb_s, "tflops": operations / call_us / 1e6}
    return {"kernel": kernel, "type": qtype.name, "tokens": tokens} | {key: round(v, 4) for key, v in figures.items()}


def violations(line: dict[str, Any]) -> list[str]:
    """Returns a message for each bound that a line violates."""
    case = f"{line['kernel']} {line['type']} {line['tokens']} tokens"
    min_share = MIN_SHARES.get(line["type"], 0.0) if line["kernel"] == "linear" and line["tokens"] == 1 else 0.0
    messages = (
        [] if line["error"] <= line["bound"] else [f"{case}: error {line['error']:.1e} exceeds {line['bound']:.1e}"]
    )
    return (
        messages
        if line["share"] >= min_share
        else [*messages, f"{case}: {line['share']:.0%} of the copy bandwidth, at least {min_share:.0%} expected"]
    )


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"types to measure (default: all): {' '.join(QTYPES)}")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK_TYPES)}, and fewer token counts")
    parser.add_argument("-r", "--repeat", type=int, default=11, help="replays; the median is reported (default 11)")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to FILE")
    args = parser.parse_args(argv)
    unknown = [name for name in args.types if name not in QTYPES]
    if unknown:
        parser.error(f"{unknown[0]} is not a weight type; available: {' '.join(QTYPES)}")
    if not torch.cuda.is_available():
        print("gpu_weights: torch sees no CUDA device on this machine; `make bench` measures its CPU", file=sys.stderr)
        return 1
    names, tokens = args.types or (QUICK_TYPES if args.quick else QTYPES), QUICK_TOKENS if args.quick else TOKENS
    copy_gb_s = copy_bandwidth(args.repeat)
    common = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "copy_gb_s": round(copy_gb_s, 1)}
    lines, messages = [], []
    for name in names:
        for measure_lines in (linear_lines, experts_lines):
            for result in measure_lines(QTYPES[name], tokens, args.repeat, copy_gb_s):
                lines.append(json.dumps(common | result | {"error": float(f"{result['error']:.3g}")}))
                messages += violations(result)
                print(lines[-1], flush=True)
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(result + "\n" for result in lines)
    for message in messages:
        print(message, file=sys.stderr)
    return 1 if messages else 0


if __name__ == "__main__":
    raise SystemExit(main())
