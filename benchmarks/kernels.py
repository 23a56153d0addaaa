"""Kernel speeds of every weight type against this machine's own limits (`make bench`).

One token: weights stream from memory once, so packed GB/s over the read bandwidth. 512 tokens: operations over the
int8 peak (f32 or bf16 for float types). Columns: a matrix product, a layer of experts (8 of them a token), packing. The
limits are measured next to each figure, because clocks and neighbours change.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from ktx.cli.bench import stamp  # noqa: E402
from ktx.hardware import default_threads  # noqa: E402
from ktx.kernels import cpu  # noqa: E402
from ktx.kernels.microbench import matrices, pass_bytes, peak, read_bandwidth, seconds, split  # noqa: E402
from ktx.quant.types import QTYPES, QType  # noqa: E402

HIDDEN, WIDTH, TOP, TOKENS = 2048, 1024, 8, 512


def measure(qtype: QType, threads: int, repeat: int) -> dict[str, float]:
    """GB/s and GOPS of one type with their shares of the limits."""
    one = cpu.packed_nbytes(qtype, WIDTH, HIDDEN)
    count = max(2 * TOP, pass_bytes() // one)
    weights = matrices(qtype, count, WIDTH, HIDDEN)
    start = time.perf_counter()
    gate = cpu.pack_experts(weights)
    packing = time.perf_counter() - start
    singles = split(gate)
    x = torch.randn(1, HIDDEN)
    found = {"bits": 8 * one / WIDTH / HIDDEN, "pack_gb_s": gate.nbytes / packing / 1e9}

    read = read_bandwidth(threads).gb_s
    gemv = seconds(lambda: [cpu.linear(x, matrix) for matrix in singles], repeat)
    found |= {"linear_1_gb_s": gate.nbytes / gemv / 1e9, "linear_1_share": gate.nbytes / gemv / 1e9 / read}

    limit = peak(qtype, threads)
    many = torch.randn(TOKENS, HIDDEN)
    gemm = seconds(lambda: [cpu.linear(many, matrix) for matrix in singles[:8]], repeat)
    rate = 2 * TOKENS * WIDTH * HIDDEN * len(singles[:8]) / gemm / 1e9
    found |= {"linear_512_gops": rate, "linear_512_share": rate / limit}
    return found | mixture(qtype, gate, count, threads, repeat)


def mixture(qtype: QType, gate: cpu.Packed, count: int, threads: int, repeat: int) -> dict[str, float]:
    """The same for a layer of experts; `gate` serves as up too, in other experts' places."""
    half = count // 2
    first, second = gate.nbytes // gate.matrices * half, gate.nbytes // gate.matrices * 2 * half
    gate, up = (cpu.Packed(gate.data[a:b], qtype, WIDTH, HIDDEN, half) for a, b in ((0, first), (first, second)))
    down = cpu.pack_experts(matrices(qtype, half, HIDDEN, WIDTH))
    nbytes = sum(matrix.nbytes for matrix in (gate, up, down)) / half

    def layer(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return cpu.experts(x, chosen, torch.full(chosen.shape, 1 / TOP), gate, up, down)

    x = torch.randn(1, HIDDEN)
    steps = [torch.arange(i, i + TOP)[None] % half for i in range(0, half, TOP)]
    read = read_bandwidth(threads).gb_s
    taken = seconds(lambda: [layer(x, chosen) for chosen in steps], repeat)
    rate = nbytes * TOP * len(steps) / taken / 1e9
    many, choice = (
        torch.randn(TOKENS, HIDDEN),
        torch.stack([torch.randperm(min(half, 64))[:TOP] for _ in range(TOKENS)]),
    )
    limit = peak(qtype, threads)
    work = 2 * 3 * TOKENS * TOP * WIDTH * HIDDEN / seconds(lambda: layer(many, choice), repeat) / 1e9
    return {
        "experts_1_gb_s": rate,
        "experts_1_share": rate / read,
        "experts_512_gops": work,
        "experts_512_share": work / limit,
    }


def show(name: str, found: dict[str, float]) -> str:
    cells = [f"{name:9}{found['bits']:>6.2f}"]
    for kernel in ("linear", "experts"):
        cells.append(f"{found[f'{kernel}_1_gb_s']:>12.1f} GB/s {found[f'{kernel}_1_share']:>4.0%}")
        cells.append(f"{found[f'{kernel}_512_gops']:>9.0f} GOPS {found[f'{kernel}_512_share']:>4.0%}")
    return "".join(cells) + f"{found['pack_gb_s']:>9.2f} GB/s"


def main(argv: list[str] | None = None) -> int:
    """Prints a row a type as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"types to measure (default: all): {' '.join(QTYPES)}")
    parser.add_argument("-t", "--threads", type=int, default=default_threads(), help="default: usable physical cores")
    parser.add_argument("-r", "--repeat", type=int, default=5, help="runs of which the median counts (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to this file")
    args = parser.parse_args(argv)
    unknown = [name for name in args.types if name not in QTYPES]
    if unknown:
        parser.error(f"{unknown[0]} is no weight type; there are {' '.join(QTYPES)}")
    cpu.ops.set_threads(args.threads)
    common = stamp() | {"isa": cpu.ops.isa(), "threads": args.threads}
    if not args.json:
        print(f"{common['isa']} kernels, {args.threads} threads, {common['machine']}")
        head = f"{'linear, 1 token':>22}{'512 tokens':>19}{'experts, 1 token':>22}{'512 tokens':>19}{'packing':>14}"
        print(f"{'type':9}{'bits':>6}{head}")
    lines = []
    for name in args.types or QTYPES:
        found = measure(QTYPES[name], args.threads, args.repeat)
        lines.append(json.dumps(common | {"type": name} | {key: round(value, 4) for key, value in found.items()}))
        print(lines[-1] if args.json else show(name, found), flush=True)
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(line + "\n" for line in lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
