"""One token of a hybrid as a picture: `python benchmarks/gpu_trace.py --model DIR [--weights FILE] [--output trace.png]`.

What the GPU computes, what is copied and what the CPU's experts do, on one time axis, and how much longer the step is than the busier side:
at most 1.1 times as long and a millisecond is the aim. Kernels and copies are from torch's profiler, experts are timed where they run.
On a pretended GPU the profiler's operators stand for kernels, which shows the order and says nothing about time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ktx  # noqa: E402  # before torch, whose idle threads then sleep

MARK = "ktx step"  # the profiler's name for the step: its clock and Python's begin together there
KINDS = {"kernel": "GPU", "gpu_memcpy": "copies", "gpu_memset": "GPU"}  # the profiler's categories, as rows
GPU, COPIES, EXPERTS = "GPU", "copies", "CPU experts"
AIM, MORE = 1.1, 1.0  # of the busier side's time, and milliseconds
WARM = 3  # tokens before the one that counts
Span = tuple[float, float]  # milliseconds since the step began


@dataclass(frozen=True)
class Trace:
    """A step of `length` milliseconds, and what was busy in it, by row."""

    length: float
    rows: dict[str, list[Span]]

    def busy(self, row: str) -> float:
        """Milliseconds in which at least one span of a row is open."""
        return sum(end - begin for begin, end in union(self.rows[row]))

    @property
    def limit(self) -> float:
        """The longest that the step should be."""
        return AIM * max(self.busy(GPU), self.busy(EXPERTS)) + MORE


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans that touch as one, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def read(events: Iterable[dict[str, Any]], start: int, experts: Iterable[tuple[int, int]], pretended: bool) -> Trace:
    """The profiler's events (Chrome's trace format, microseconds) beside the experts' times (nanoseconds of the clock that said `start` when MARK began)."""
    whole = [event for event in events if event.get("ph") == "X"]
    mark = next(event for event in whole if event["name"] == MARK and event.get("cat") == "user_annotation")
    rows: dict[str, list[Span]] = {GPU: [], COPIES: [], EXPERTS: []}
    kinds = {"cpu_op": GPU} if pretended else KINDS
    for event in whole:
        row = kinds.get(event.get("cat", ""))
        if row is None or (pretended and event["tid"] != mark["tid"]):
            continue
        begin = (event["ts"] - mark["ts"]) / 1e3
        if 0 <= begin and begin * 1e3 <= mark["dur"]:
            rows[row].append((begin, begin + event["dur"] / 1e3))
    rows[EXPERTS] = [((begin - start) / 1e6, (end - start) / 1e6) for begin, end in experts if begin >= start]
    return Trace(mark["dur"] / 1e3, rows)


def profiled(step: Callable[[], None], pretended: bool) -> Trace:
    """A step, watched."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from ktx.ops.gpu.offload import Job

    experts: list[tuple[int, int]] = []
    run = Job.run

    def timed(job: Job) -> None:
        begin = time.perf_counter_ns()
        try:
            run(job)
        finally:
            experts.append((begin, time.perf_counter_ns()))

    kinds = [ProfilerActivity.CPU, *([] if pretended else [ProfilerActivity.CUDA])]
    Job.run = timed  # type: ignore[method-assign]
    try:
        with profile(activities=kinds) as watching:
            with record_function(MARK):
                start = time.perf_counter_ns()
                step()
            if not pretended:
                torch.cuda.synchronize()
    finally:
        Job.run = run  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        watching.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return read(events, start, experts, pretended)


def measured(args: argparse.Namespace) -> tuple[Trace, str]:
    """The last of some tokens of a hybrid model behind a prompt, and where it ran."""
    import torch

    from ktx.cache.kv import KVCache
    from ktx.transformers_compat import cache_argument

    model, _ = ktx.load(args.model, args.weights, device="cuda", moe_device="cpu", progress=False)
    cache = KVCache(model.config, model.ktx.kv_dtype)
    source = torch.Generator().manual_seed(1)

    @torch.inference_mode()
    def forward(count: int) -> None:
        ids = torch.randint(3, model.config.vocab_size, (1, count), generator=source)
        logits = model(input_ids=ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
        logits.float().cpu()  # whoever chooses a token waits for it

    forward(args.context)
    for _ in range(WARM):
        forward(1)
    pretended = not torch.cuda.is_available()
    where = "a pretended GPU" if pretended else torch.cuda.get_device_name()
    return profiled(lambda: forward(1), pretended), where


def draw(trace: Trace, title: str, output: str) -> None:
    """Rows over time; the step's end, and where it should be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 2.6), dpi=130)
    for place, (name, spans) in enumerate(trace.rows.items()):
        bars = [(begin, end - begin) for begin, end in union(spans)]
        axes.broken_barh(bars, (-place - 0.35, 0.7), facecolors=f"C{place}")
        axes.text(1.01, -place, f"{trace.busy(name):.2f} ms", transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(trace.length, color="black", lw=1)
    axes.axvline(trace.limit, color="black", lw=1, ls=":")
    axes.set(xlabel="milliseconds", xlim=(0, 1.02 * max(trace.length, trace.limit)))
    axes.set_yticks([-place for place in range(len(trace.rows))], list(trace.rows))
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def told(trace: Trace) -> str:
    """The picture in a line."""
    parts = " · ".join(f"{name} {trace.busy(name):.2f} ms" for name in trace.rows)
    return f"step {trace.length:.2f} ms · {parts} · at most {trace.limit:.2f} ms is the aim"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or GGUF")
    parser.add_argument("--weights", help="GGUF file or safetensors (default: the model's folder)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens before it (default 1024)")
    parser.add_argument("--output", default="trace.png", metavar="FILE", help="the picture (default trace.png)")
    args = parser.parse_args(argv)
    trace, where = measured(args)
    line = told(trace)
    print(line)
    draw(trace, f"{Path(args.model).resolve().name}, one token after {args.context}, {where}\n{line}", args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
