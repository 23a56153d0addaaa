"""The plot of `ktx bench serve`: latency against throughput, with a point per number of clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = (("ttft", "time to the first token, s", 1), ("itl", "inter-token latency, ms", 1000))


def draw(lines: list[dict[str, Any]], output: str) -> None:
    """Plots the medians and the 99th percentiles as lines to the file `output`, without levels that have no answer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    answered = [line for line in lines if line["ttft_p50"] is not None]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), dpi=130)
    for axes, (name, label, scale) in zip(panels, PANELS, strict=True):
        throughputs = [line["answer_tok_s"] for line in answered if line[f"{name}_p50"] is not None]
        for quantile, style in (("p50", "o-"), ("p99", "^:")):
            latencies = [
                scale * line[f"{name}_{quantile}"] for line in answered if line[f"{name}_{quantile}"] is not None
            ]
            axes.plot(throughputs, latencies, style, ms=4, lw=1, label=quantile)
        for line in answered:
            if line[f"{name}_p50"] is not None:
                at = (line["answer_tok_s"], scale * line[f"{name}_p50"])
                axes.annotate(f"{line['concurrency']}", at, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="output tokens/s, all clients together", ylabel=label)
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
