"""The kernels under this machine's roof, as a picture: `python benchmarks/roofline.py -o docs/roofline.png`.

Across: operations for each packed byte that is read, which grows with the number of tokens that are multiplied at once. Up: operations a second. The roof is
the read bandwidth times that, then the peak of the dot product; both are measured right before each point, and their medians are drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TYPES = ("Q4_K", "Q6_K", "Q8_0", "IQ3_XXS", "BF16")
TOKENS = (1, 2, 4, 8, 16, 48, 128, 512)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints one row a point, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N")
    parser.add_argument("-t", "--threads", type=int, default=0, help="default: usable physical cores")
    parser.add_argument("-r", "--repeat", type=int, default=3, help="measurements a point, of which the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the points as JSON lines too")
    args = parser.parse_args(argv)
    from ktx.errors import did_you_mean
    from ktx.hardware import default_threads
    from ktx.quant.types import QTYPES

    unknown = [name for name in args.types if name not in QTYPES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no weight type{did_you_mean(unknown[0], QTYPES)}")
    threads = args.threads or default_threads()
    print(f"{'type':10}{'tokens':>7}{'ops/byte':>10}{'GOPS':>9}{'of the roof':>13}")
    points = [point for name in args.types for point in measure(QTYPES[name], args.tokens, threads, args.repeat)]
    if args.json:
        args.json.write_text("".join(json.dumps(point) + "\n" for point in points))
    draw(points, threads, args.output)
    print(args.output)
    return 0


def measure(qtype: Any, tokens: list[int], threads: int, repeat: int) -> list[dict[str, Any]]:
    """A point for each number of tokens, on matrices that come from memory."""
    import torch

    from ktx.kernels import cpu, microbench

    cpu.ops.set_threads(threads)
    one = cpu.packed_nbytes(qtype, microbench.ROWS, microbench.COLUMNS)
    packed = cpu.pack(
        microbench.matrices(qtype, max(2, microbench.pass_bytes() // one), microbench.ROWS, microbench.COLUMNS)
    )
    weights, points = microbench.ROWS * microbench.COLUMNS, []
    for count in tokens:
        some = microbench.split(packed, max(1, min(packed.matrices, 1024 // count)))
        x, turns = torch.randn(count, microbench.COLUMNS), []
        for _ in range(repeat):
            read, peak = (
                microbench.read_bandwidth(threads, microbench.MIN_PASS_BYTES // 2).gb_s,
                microbench.peak(qtype, threads),
            )
            taken = microbench.seconds(lambda some=some, x=x: [cpu.linear(x, matrix) for matrix in some], 1)  # type: ignore[misc]
            turns.append((2 * count * weights * len(some) / taken / 1e9, read, peak))
        rate, read, peak = (statistics.median(column) for column in zip(*turns, strict=True))
        intensity = 2 * count * weights / one
        roof = min(peak, read * intensity)
        points.append(
            {"type": qtype.name, "tokens": count, "intensity": intensity, "gops": rate, "read": read, "peak": peak}
        )
        print(f"{qtype.name:10}{count:>7}{intensity:>10.1f}{rate:>9.0f}{rate / roof:>13.0%}", flush=True)
    return points


def draw(points: list[dict[str, Any]], threads: int, output: Path) -> None:
    """Two roofs (int8, bf16 or f32) and a line of points a type, in logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ktx.cli.bench import stamp
    from ktx.quant.types import QTYPES

    figure, axes = plt.subplots(figsize=(8, 5), dpi=130)
    read = statistics.median(p["read"] for p in points)
    low, high = min(p["intensity"] for p in points) / 1.5, max(p["intensity"] for p in points) * 1.5
    for floats, label in ((False, "int8"), (True, "float")):
        peaks = [p["peak"] for p in points if QTYPES[p["type"]].is_float == floats]
        if peaks:
            peak = statistics.median(peaks)
            corner = max(low, peak / read)
            axes.plot([low, corner, high], [low * read, peak, peak], color="0.35" if not floats else "0.65", lw=1.5)
            axes.annotate(f"{label} peak {peak:.0f} GOPS", (high, peak), ha="right", va="bottom", fontsize=8)
    axes.annotate(f"read {read:.0f} GB/s", (low * 1.1, low * read * 1.5), fontsize=8, rotation=0)
    for name in dict.fromkeys(p["type"] for p in points):
        own = [p for p in points if p["type"] == name]
        axes.plot([p["intensity"] for p in own], [p["gops"] for p in own], marker="o", ms=4, lw=1, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations for each packed byte (1 to 512 tokens)", ylabel="GOPS")
    machine = stamp()
    axes.set_title(f"{machine['machine']}, {threads} threads, {machine['date']}", fontsize=9)
    axes.grid(True, which="both", lw=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


if __name__ == "__main__":
    raise SystemExit(main())
