"""The picture of `ktx bench serve`: latencies over throughput, a point for each number of clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = (("ttft", "time to the first token, s", 1), ("itl", "from token to token, ms", 1000))


def draw(lines: list[dict[str, Any]], output: str) -> None:
    """Medians as a line, the 99th percentiles above it. Levels without an answer are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    told = [line for line in lines if line["ttft_p50"] is not None]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), dpi=130)
    for axes, (name, label, scale) in zip(panels, PANELS, strict=True):
        across = [line["answer_tok_s"] for line in told if line[f"{name}_p50"] is not None]
        for quantile, style in (("p50", "o-"), ("p99", "^:")):
            up = [scale * line[f"{name}_{quantile}"] for line in told if line[f"{name}_{quantile}"] is not None]
            axes.plot(across, up, style, ms=4, lw=1, label=quantile)
        for line in told:
            if line[f"{name}_p50"] is not None:
                at = (line["answer_tok_s"], scale * line[f"{name}_p50"])
                axes.annotate(f"{line['concurrency']}", at, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="tokens of answers a second, all clients together", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(True, lw=0.3)
        axes.legend(fontsize=8)
    first = lines[0]
    figure.suptitle(
        f"{first['model']}: {first['test'].rpartition(' ')[0]}, {first['machine']}, {first['date']}", fontsize=9
    )
    figure.tight_layout()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)
