"""Products with packed weights on a CUDA GPU (`python benchmarks/gpu_weights.py`): every type by a few to many tokens, and a layer of experts.

A JSON line for each: microseconds, GB/s of packed bytes and their share of what this GPU copies (measured in the same run), TFLOPS, and the relative error
against float64 on the dequantised weights. Calls are replayed from a CUDA graph, on more matrices than the caches hold. Exit status 1 when an error
is over its bound or one token of a type in FLOORS reads slower than its share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from ktx.kernels.check import relative  # noqa: E402
from ktx.quant.quantize import random_rows  # noqa: E402
from ktx.quant.types import QTYPES, QType  # noqa: E402
from ktx.weights.base import QuantizedTensor  # noqa: E402

ROWS, COLUMNS, STREAM = 4096, 7168, 1 << 28  # of a matrix; packed bytes that a pass reads
EXPERTS, WIDTH, HIDDEN, TOP = 64, 2048, 2048, 8
TOKENS, QUICK_TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 4096), (1, 8, 64, 512)
QUICK_TYPES = ("Q4_K", "Q6_K", "Q8_0", "INT4_128", "IQ2_XXS", "F8_E4M3", "BF16")
FLOORS = dict.fromkeys(
    ("Q4_K", "Q6_K", "Q8_0", "INT4_64", "INT4_128"), 0.70
)  # shares of the copy bandwidth at one token
BOUND, BOUND_FP8, BOUND_EXPERTS = (
    5e-3,
    4e-2,
    1e-2,
)  # activations in bf16; both in FP8; two products and bf16 between them


def microseconds(calls: list[Callable[[], Any]], repeat: int) -> float:
    """Median time of one call of a graph that holds them all."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, and lets libraries take their workspaces
        calls[0]()
        calls[-1]()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    taken = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(taken)[len(taken) // 2]


def copy_bandwidth(repeat: int) -> float:
    """GB/s read and written by a copy of half a gigabyte."""
    source = torch.zeros(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)], repeat) / 1e3


def matrix(qtype: QType, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    """Random rows, few of them different: speed does not depend on them."""
    few = random_rows(qtype, min(n, 64), k, seed)
    scale = torch.rand(-(-n // 128), -(-k // 128)) + 0.5 if qtype.name == "F8_E4M3" else None
    return QuantizedTensor(few.repeat(-(-n // len(few)), 1)[:n].contiguous(), qtype, (n, k), scale)


def linear_lines(qtype: QType, tokens: tuple[int, ...], repeat: int, copied: float) -> Iterator[dict[str, Any]]:
    from ktx.kernels.gpu import fp8, linear

    weight = matrix(qtype, ROWS, COLUMNS)
    packed = linear.pack(weight)
    copies = [packed] + [
        linear.SoAWeight(packed.data.clone(), qtype, ROWS, COLUMNS, 1, packed.scale)
        for _ in range(STREAM // packed.nbytes)
    ]
    exact = weight.dequantize().cuda().double()
    for count in tokens:
        x = torch.randn(count, COLUMNS, device="cuda", dtype=torch.bfloat16)
        some = copies if count <= 64 else copies[:4]
        taken = microseconds([lambda w=w, x=x: linear.linear(x, w) for w in some], repeat)  # type: ignore[misc]
        in_fp8 = count > linear.MAX_GEMM_TOKENS and fp8.supports(x, packed)
        yield line("linear", qtype, count, taken, packed.nbytes, 2 * count * ROWS * COLUMNS, copied) | {
            "error": relative(linear.linear(x, packed), x.double() @ exact.T),
            "bound": BOUND_FP8 if in_fp8 else BOUND,
        }


def experts_lines(qtype: QType, tokens: tuple[int, ...], repeat: int, copied: float) -> Iterator[dict[str, Any]]:
    from ktx.kernels import reference
    from ktx.kernels.gpu import linear, moe

    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    one = [matrix(qtype, *shape, seed) for seed, shape in enumerate(shapes)]
    gate, up, down = (linear.pack_experts([part] * EXPERTS) for part in one)
    nbytes = sum(part.nbytes for part in (gate, up, down)) // EXPERTS
    values = [part.dequantize().cuda().double() for part in one]
    for count in tokens:
        x = torch.randn(count, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(count)]).cuda()
        weights = torch.rand(count, TOP, device="cuda")
        turns = [(ids + i * TOP) % EXPERTS for i in range(EXPERTS // TOP)]
        call = [lambda x=x, i=i, w=weights: moe.experts(x, i, w, gate, up, down) for i in turns]  # type: ignore[misc]
        taken = microseconds(call, repeat)
        wide = x.double()
        inner = reference.activate(wide @ values[0].T, wide @ values[1].T, "silu")
        exact = inner @ values[2].T * weights.double().sum(1, keepdim=True)  # all experts are one
        read = nbytes * (count * TOP if count * TOP <= moe.MAX_GEMV_PAIRS else ids.unique().numel())
        yield line("experts", qtype, count, taken, read, 6 * count * TOP * WIDTH * HIDDEN, copied) | {
            "error": relative(moe.experts(x, ids, weights, gate, up, down), exact),
            "bound": BOUND_EXPERTS,
        }


def line(kernel: str, qtype: QType, tokens: int, taken: float, nbytes: int, work: int, copied: float) -> dict[str, Any]:
    rate = nbytes / taken / 1e3
    numbers = {"us": taken, "gb_s": rate, "share": rate / copied, "tflops": work / taken / 1e6}
    return {"kernel": kernel, "type": qtype.name, "tokens": tokens} | {key: round(v, 4) for key, v in numbers.items()}


def complaints(found: dict[str, Any]) -> list[str]:
    """What is wrong with a line."""
    what = f"{found['kernel']} {found['type']} {found['tokens']} tokens"
    floor = FLOORS.get(found["type"], 0.0) if found["kernel"] == "linear" and found["tokens"] == 1 else 0.0
    wrong = (
        [] if found["error"] <= found["bound"] else [f"{what}: error {found['error']:.1e} over {found['bound']:.1e}"]
    )
    return (
        wrong
        if found["share"] >= floor
        else [*wrong, f"{what}: {found['share']:.0%} of a copy's bandwidth, not {floor:.0%}"]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"types to measure (default: all): {' '.join(QTYPES)}")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_TYPES)}; fewer numbers of tokens")
    parser.add_argument("-r", "--repeat", type=int, default=11, help="replays of which the median counts (default 11)")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to this file")
    args = parser.parse_args(argv)
    unknown = [name for name in args.types if name not in QTYPES]
    if unknown:
        parser.error(f"{unknown[0]} is no weight type; there are {' '.join(QTYPES)}")
    if not torch.cuda.is_available():
        print("gpu_weights: torch sees no CUDA device on this machine; `make bench` measures its CPU", file=sys.stderr)
        return 1
    names, tokens = args.types or (QUICK_TYPES if args.quick else QTYPES), QUICK_TOKENS if args.quick else TOKENS
    copied = copy_bandwidth(args.repeat)
    common = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "copy_gb_s": round(copied, 1)}
    lines, wrong = [], []
    for name in names:
        for measured in (linear_lines, experts_lines):
            for found in measured(QTYPES[name], tokens, args.repeat, copied):
                lines.append(json.dumps(common | found | {"error": float(f"{found['error']:.3g}")}))
                wrong += complaints(found)
                print(lines[-1], flush=True)
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(found + "\n" for found in lines)
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
