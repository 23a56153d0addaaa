"""Roofline plot of the CPU kernels: `python benchmarks/roofline.py -o docs/roofline.png`.

The x axis is the arithmetic intensity, operations per packed byte, which grows with the number of tokens per call; the
y axis is operations per second. The roof is the read bandwidth times the intensity, up to the peak of the dot product;
both are measured right before each point, and their medians are plotted.
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
    """Measures the points, prints a row for each, and plots them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="file to write the plot to")
    parser.add_argument(
        "--types", nargs="+", default=TYPES, metavar="TYPE", help=f"weight types (default: {' '.join(TYPES)})"
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"tokens per call (default: {' '.join(map(str, TOKENS))})",
    )
    parser.add_argument("-t", "--threads", type=int, default=0, help="threads (default: usable physical cores)")
    parser.add_argument(
        "-r", "--repeat", type=int, default=3, help="measurements per point; the median is reported (default 3)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the points to FILE as JSON lines")
    args = parser.parse_args(argv)
    from ktx.errors import did_you_mean
    from ktx.hardware import default_threads
    from ktx.quant.types import QTYPES

    unknown = [name for name in args.types if name not in QTYPES]
    if unknown:
        parser.error(f"{unknown[0]!r} is not a weight type{did_you_mean(unknown[0], QTYPES)}")
    threads = args.threads or default_threads()
    print(f"{'type':10}{'tokens':>7}{'ops/byte':>10}{'GOPS':>9}{'of the roof':>13}")
    points = [point for name in args.types for point in measure(QTYPES[name], args.tokens, threads, args.repeat)]
    if args.json:
        args.json.write_text("".join(json.dumps(point) + "\n" for point in points))
    draw(points, threads, args.output)
    print(args.output)
    return 0


def measure(qtype: Any, tokens: list[int], threads: int, repeat: int) -> list[dict[str, Any]]:
    """Measures a point for each number of tokens, on matrices that are not in the caches."""
    import torch

    from ktx.kernels import cpu, microbench

    cpu.ops.set_threads(threads)
    matrix_nbytes = cpu.packed_nbytes(qtype, microbench.ROWS, microbench.COLUMNS)
    packed = cpu.pack(
        microbench.random_matrices(
            qtype, max(2, microbench.pass_bytes() // matrix_nbytes), microbench.ROWS, microbench.COLUMNS
        )
    )
    weights, points = microbench.ROWS * microbench.COLUMNS, []
    for count in tokens:
        matrices = microbench.split_matrices(packed, max(1, min(packed.matrices, 1024 // count)))
        x, samples = torch.randn(count, microbench.COLUMNS), []
        for _ in range(repeat):
            read, peak = (
                microbench.read_bandwidth(threads, microbench.MIN_PASS_BYTES // 2).gb_s,
                microbench.peak_gops(qtype, threads),
            )
            call_s = microbench.median_seconds(
                lambda matrices=matrices, x=x: [cpu.linear(x, matrix) for matrix in matrices], 1
            )  # type: ignore[misc]
            samples.append((2 * count * weights * len(matrices) / call_s / 1e9, read, peak))
        gops, read, peak = (statistics.median(column) for column in zip(*samples, strict=True))
        intensity = 2 * count * weights / matrix_nbytes
        roof = min(peak, read * intensity)
        points.append(
            {"type": qtype.name, "tokens": count, "intensity": intensity, "gops": gops, "read": read, "peak": peak}
        )
        print(f"{qtype.name:10}{count:>7}{intensity:>10.1f}{gops:>9.0f}{gops / roof:>13.0%}", flush=True)
    return points


def draw(points: list[dict[str, Any]], threads: int, output: Path) -> None:
    """Plots the two roofs (int8; bf16 or f32) and a line of points per type, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ktx.cli.bench_process import run_metadata
    from ktx.quant.types import QTYPES

    figure, axes = plt.subplots(figsize=(8, 5), dpi=130)
    read = statistics.median(p["read"] for p in points)
    min_intensity, max_intensity = min(p["intensity"] for p in points) / 1.5, max(p["intensity"] for p in points) * 1.5
    for is_float, label in ((False, "int8"), (True, "float")):
        peaks = [p["peak"] for p in points if QTYPES[p["type"]].is_float == is_float]
        if peaks:
            peak = statistics.median(peaks)
            ridge = max(min_intensity, peak / read)
            axes.plot(
                [min_intensity, ridge, max_intensity],
                [min_intensity * read, peak, peak],
                color="0.35" if not is_float else "0.65",
                lw=1.5,
            )
            axes.annotate(f"{label} peak {peak:.0f} GOPS", (max_intensity, peak), ha="right", va="bottom", fontsize=8)
    axes.annotate(f"read {read:.0f} GB/s", (min_intensity * 1.1, min_intensity * read * 1.5), fontsize=8, rotation=0)
    for name in dict.fromkeys(p["type"] for p in points):
        points_of_type = [p for p in points if p["type"] == name]
        axes.plot(
            [p["intensity"] for p in points_of_type],
            [p["gops"] for p in points_of_type],
            marker="o",
            ms=4,
            lw=1,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per packed byte (1 to 512 tokens)", ylabel="GOPS")
    machine = run_metadata()
    axes.set_title(f"{machine['machine']}, {threads} threads, {machine['date']}", fontsize=9)
    axes.grid(True, which="both", lw=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


if __name__ == "__main__":
    raise SystemExit(main())
