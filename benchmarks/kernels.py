"""Kernel speed of every weight type against this machine's measured limits (`make bench`).

One token: the weights are read from memory once, so packed GB/s over the read bandwidth. 512 tokens: operations over
the int8 peak (f32 or bf16 for float types). Columns: a matrix product, a layer of experts (8 per token), packing. The
limits are measured next to each figure, because clocks and the load of neighboring virtual machines change.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from ktx.cli.bench import run_metadata
from ktx.hardware import default_threads
from ktx.kernels import cpu
from ktx.kernels.microbench import (
    median_seconds,
    pass_bytes,
    peak_gops,
    random_matrices,
    read_bandwidth,
    split_matrices,
)
from ktx.quant.types import QTYPES, QType

HIDDEN, WIDTH, TOP, TOKENS = 2048, 1024, 8, 512


def measure(qtype: QType, threads: int, repeat: int) -> dict[str, float]:
    """Returns GB/s and GOPS of one type, and their fractions of the limits."""
    matrix_nbytes = cpu.packed_nbytes(qtype, WIDTH, HIDDEN)
    count = max(2 * TOP, pass_bytes() // matrix_nbytes)
    weights = random_matrices(qtype, count, WIDTH, HIDDEN)
    start = time.perf_counter()
    gate = cpu.pack_experts(weights)
    pack_s = time.perf_counter() - start
    matrices_alone = split_matrices(gate)
    x = torch.randn(1, HIDDEN)
    results = {"bits": 8 * matrix_nbytes / WIDTH / HIDDEN, "pack_gb_s": gate.nbytes / pack_s / 1e9}

    read_gb_s = read_bandwidth(threads).gb_s
    gemv_s = median_seconds(lambda: [cpu.linear(x, matrix) for matrix in matrices_alone], repeat)
    results |= {"linear_1_gb_s": gate.nbytes / gemv_s / 1e9, "linear_1_share": gate.nbytes / gemv_s / 1e9 / read_gb_s}

    int8_peak_gops = peak_gops(qtype, threads)
    x_prompt = torch.randn(TOKENS, HIDDEN)
    gemm_s = median_seconds(lambda: [cpu.linear(x_prompt, matrix) for matrix in matrices_alone[:8]], repeat)
    gops = 2 * TOKENS * WIDTH * HIDDEN * len(matrices_alone[:8]) / gemm_s / 1e9
    results |= {"linear_512_gops": gops, "linear_512_share": gops / int8_peak_gops}
    return results | measure_experts(qtype, gate, count, threads, repeat)


def measure_experts(qtype: QType, gate: cpu.Packed, count: int, threads: int, repeat: int) -> dict[str, float]:
    """Measures a layer of experts; `gate` and up are the two halves of the same packed matrices."""
    half = count // 2
    first_end, second_end = gate.nbytes // gate.matrices * half, gate.nbytes // gate.matrices * 2 * half
    gate, up = (
        cpu.Packed(gate.data[a:b], qtype, WIDTH, HIDDEN, half) for a, b in ((0, first_end), (first_end, second_end))
    )
    down = cpu.pack_experts(random_matrices(qtype, half, HIDDEN, WIDTH))
    nbytes = sum(matrix.nbytes for matrix in (gate, up, down)) / half

    def layer(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return cpu.experts(x, chosen, torch.full(chosen.shape, 1 / TOP), gate, up, down)

    x = torch.randn(1, HIDDEN)
    steps = [torch.arange(i, i + TOP)[None] % half for i in range(0, half, TOP)]
    read_gb_s = read_bandwidth(threads).gb_s
    decode_s = median_seconds(lambda: [layer(x, chosen) for chosen in steps], repeat)
    gb_s = nbytes * TOP * len(steps) / decode_s / 1e9
    x_prompt, chosen_prompt = (
        torch.randn(TOKENS, HIDDEN),
        torch.stack([torch.randperm(min(half, 64))[:TOP] for _ in range(TOKENS)]),
    )
    int8_peak_gops = peak_gops(qtype, threads)
    gops = 2 * 3 * TOKENS * TOP * WIDTH * HIDDEN / median_seconds(lambda: layer(x_prompt, chosen_prompt), repeat) / 1e9
    return {
        "experts_1_gb_s": gb_s,
        "experts_1_share": gb_s / read_gb_s,
        "experts_512_gops": gops,
        "experts_512_share": gops / int8_peak_gops,
    }


def table_row(name: str, results: dict[str, float]) -> str:
    """Returns the table row of a type."""
    cells = [f"{name:9}{results['bits']:>6.2f}"]
    for kernel in ("linear", "experts"):
        cells.append(f"{results[f'{kernel}_1_gb_s']:>12.1f} GB/s {results[f'{kernel}_1_share']:>4.0%}")
        cells.append(f"{results[f'{kernel}_512_gops']:>9.0f} GOPS {results[f'{kernel}_512_share']:>4.0%}")
    return "".join(cells) + f"{results['pack_gb_s']:>9.2f} GB/s"


def main(argv: list[str] | None = None) -> int:
    """Prints a row per type as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"types to measure (default: all): {' '.join(QTYPES)}")
    parser.add_argument(
        "-t", "--threads", type=int, default=default_threads(), help="threads (default: usable physical cores)"
    )
    parser.add_argument("-r", "--repeat", type=int, default=5, help="runs; the median is reported (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to FILE")
    args = parser.parse_args(argv)
    unknown = [name for name in args.types if name not in QTYPES]
    if unknown:
        parser.error(f"{unknown[0]} is not a weight type; available: {' '.join(QTYPES)}")
    cpu.ops.set_threads(args.threads)
    common = run_metadata() | {"isa": cpu.ops.isa(), "threads": args.threads}
    if not args.json:
        print(f"{common['isa']} kernels, {args.threads} threads, {common['machine']}")
        header = f"{'linear, 1 token':>22}{'512 tokens':>19}{'experts, 1 token':>22}{'512 tokens':>19}{'packing':>14}"
        print(f"{'type':9}{'bits':>6}{header}")
    lines = []
    for name in args.types or QTYPES:
        results = measure(QTYPES[name], args.threads, args.repeat)
        lines.append(json.dumps(common | {"type": name} | {key: round(value, 4) for key, value in results.items()}))
        print(lines[-1] if args.json else table_row(name, results), flush=True)
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(line + "\n" for line in lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
