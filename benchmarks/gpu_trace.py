"""Plots a decode step of a model on GPU and CPU.

    python benchmarks/gpu_trace.py --model DIR [--weights FILE] [--output trace.png]

The plot has GPU kernels, copies and the CPU's experts on one time axis. The target for the step is at most 1.1 times
the time of the busier side plus a millisecond. Kernels and copies are from torch's profiler, experts are timed where
they run. On a fake GPU the profiler's operators replace the kernels, which shows their order but no real times.
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

import ktx  # before torch, whose idle threads then sleep

MARK = "ktx step"  # the profiler's name of the step, whose start aligns its clock with Python's
KINDS = {"kernel": "GPU", "gpu_memcpy": "copies", "gpu_memset": "GPU"}  # the profiler's categories, as rows
GPU, COPIES, EXPERTS = "GPU", "copies", "CPU experts"
MAX_RATIO, MAX_EXTRA_MS = 1.1, 1.0  # target: MAX_RATIO times the busier side's time plus MAX_EXTRA_MS
WARMUP_TOKENS = 3
Span = tuple[float, float]  # milliseconds since the step began


@dataclass(frozen=True)
class Trace:
    """A step of `length` milliseconds, and the busy spans of each row."""

    length: float
    rows: dict[str, list[Span]]

    def busy(self, row: str) -> float:
        """Returns the milliseconds in which at least one span of a row is active."""
        return sum(end - begin for begin, end in union(self.rows[row]))

    @property
    def limit(self) -> float:
        """The target: the maximum milliseconds of the step."""
        return MAX_RATIO * max(self.busy(GPU), self.busy(EXPERTS)) + MAX_EXTRA_MS


def union(spans: Iterable[Span]) -> list[Span]:
    """Sorts spans and merges those that overlap or touch."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def parse_events(
    events: Iterable[dict[str, Any]], start: int, experts: Iterable[tuple[int, int]], fake_gpu: bool
) -> Trace:
    """Builds a trace from the profiler's events and the experts' times.

    Args:
        events: events in Chrome's trace format, in microseconds.
        start: the time of MARK's start on the experts' clock, in nanoseconds.
        experts: begin and end of each call of the experts, in nanoseconds.
        fake_gpu: the GPU is fake: operators count as kernels.
    """
    complete_events = [event for event in events if event.get("ph") == "X"]
    mark = next(event for event in complete_events if event["name"] == MARK and event.get("cat") == "user_annotation")
    rows: dict[str, list[Span]] = {GPU: [], COPIES: [], EXPERTS: []}
    kinds = {"cpu_op": GPU} if fake_gpu else KINDS
    for event in complete_events:
        row = kinds.get(event.get("cat", ""))
        if row is None or (fake_gpu and event["tid"] != mark["tid"]):
            continue
        begin = (event["ts"] - mark["ts"]) / 1e3
        if begin >= 0 and begin * 1e3 <= mark["dur"]:
            rows[row].append((begin, begin + event["dur"] / 1e3))
    rows[EXPERTS] = [((begin - start) / 1e6, (end - start) / 1e6) for begin, end in experts if begin >= start]
    return Trace(mark["dur"] / 1e3, rows)


def profile_step(step: Callable[[], None], fake_gpu: bool) -> Trace:
    """Runs a step under the profiler and returns its trace."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from ktx.ops.gpu.offload import Job

    experts: list[tuple[int, int]] = []
    original_run = Job.run

    def timed_run(job: Job) -> None:
        begin = time.perf_counter_ns()
        try:
            original_run(job)
        finally:
            experts.append((begin, time.perf_counter_ns()))

    kinds = [ProfilerActivity.CPU, *([] if fake_gpu else [ProfilerActivity.CUDA])]
    Job.run = timed_run  # type: ignore[method-assign]
    try:
        with profile(activities=kinds) as profiler:
            with record_function(MARK):
                start = time.perf_counter_ns()
                step()
            if not fake_gpu:
                torch.cuda.synchronize()
    finally:
        Job.run = original_run  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return parse_events(events, start, experts, fake_gpu)


def trace_step(args: argparse.Namespace) -> tuple[Trace, str]:
    """Traces a decode step of the model after a prompt and a warm-up; returns the trace and the GPU's name."""
    import torch

    from ktx.cache.kv import KVCache
    from ktx.transformers_compat import cache_argument

    model, _ = ktx.load(args.model, args.weights, device="cuda", moe_device="cpu", progress=False)
    cache = KVCache(model.config, model.ktx.kv_dtype)
    rng = torch.Generator().manual_seed(1)

    @torch.inference_mode()
    def forward(count: int) -> None:
        ids = torch.randint(3, model.config.vocab_size, (1, count), generator=rng)
        logits = model(input_ids=ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
        logits.float().cpu()  # the sampler needs the logits on the CPU

    forward(args.context)
    for _ in range(WARMUP_TOKENS):
        forward(1)
    fake_gpu = not torch.cuda.is_available()
    gpu_name = "a fake GPU" if fake_gpu else torch.cuda.get_device_name()
    return profile_step(lambda: forward(1), fake_gpu), gpu_name


def draw(trace: Trace, title: str, output: str) -> None:
    """Plots the rows over time, the step's end and the target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 2.6), dpi=130)
    for index, (name, spans) in enumerate(trace.rows.items()):
        bars = [(begin, end - begin) for begin, end in union(spans)]
        axes.broken_barh(bars, (-index - 0.35, 0.7), facecolors=f"C{index}")
        axes.text(1.01, -index, f"{trace.busy(name):.2f} ms", transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(trace.length, color="black", lw=1)
    axes.axvline(trace.limit, color="black", lw=1, ls=":")
    axes.set(xlabel="milliseconds", xlim=(0, 1.02 * max(trace.length, trace.limit)))
    axes.set_yticks([-index for index in range(len(trace.rows))], list(trace.rows))
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def summary(trace: Trace) -> str:
    """Returns the trace as one line of text."""
    parts = " · ".join(f"{name} {trace.busy(name):.2f} ms" for name in trace.rows)
    return f"step {trace.length:.2f} ms · {parts} · target: at most {trace.limit:.2f} ms"


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or GGUF")
    parser.add_argument("--weights", help="GGUF file or safetensors (default: the model's folder)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens before the step (default 1024)")
    parser.add_argument("--output", default="trace.png", metavar="FILE", help="PNG to write (default trace.png)")
    args = parser.parse_args(argv)
    trace, gpu_name = trace_step(args)
    text = summary(trace)
    print(text)
    draw(trace, f"{Path(args.model).resolve().name}, one token after {args.context}, {gpu_name}\n{text}", args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
