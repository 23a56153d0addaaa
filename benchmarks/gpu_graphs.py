"""Decode steps as CUDA graphs against eager launches.

    python benchmarks/gpu_graphs.py --model DIR [-b 1,3,4,8] [-n 32]

Measures two placements, `hybrid` with the routed experts in CPU memory and `gpu`, with several batch sizes, of which
some are captured sizes and others are padded to the next one. Both variants compute the same tokens on the same pages;
a line has the median milliseconds of a step, the largest relative error of a step's logits, and the fraction of tokens
for which both would choose the same next token. Exit status 1 if the error exceeds its bound. Without a GPU:
KTX_GPU=fake:1 TRITON_INTERPRET=1. `--record FILE` appends JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ktx  # before torch, whose idle threads then sleep

PLACEMENTS = {"hybrid": {"moe_device": "cpu"}, "gpu": {"moe_device": "cuda"}}
MAX_REL_ERROR = 2e-2  # activations are bf16, and padded batches split sums differently
WARMUP_STEPS = 3


class Bench:
    """A model with an engine's runner, and requests whose prompts are prefilled."""

    def __init__(self, args: argparse.Namespace, name: str, **load: Any):
        from ktx.engine.runner_selection import select_runner
        from ktx.engine.scheduler import num_pages

        self.args, self.context = args, args.prompt + args.tokens + 1
        self.model, _ = ktx.load(args.model, args.weights, device="cuda", progress=False, **PLACEMENTS[name], **load)
        max_batch, self.pages_per_request = max(args.batches), num_pages(self.context)
        self.runner = select_runner(self.model, max_batch * self.pages_per_request, max_batch)
        self.requests = [self._request(i) for i in range(max_batch)]
        for request in self.requests:
            self._compute([request], args.prompt)
        start = time.perf_counter()
        self.runner.capture(self.context)
        self.capture_s, self.graphs = time.perf_counter() - start, self.runner.graphs

    def _request(self, index: int) -> Any:
        from ktx.engine.request import Request
        from ktx.engine.sampler import SamplingParams

        ids = [(7 + 31 * index + 13 * j) % (self.model.config.vocab_size - 3) + 3 for j in range(self.args.prompt)]
        pages = list(range(index * self.pages_per_request, (index + 1) * self.pages_per_request))
        return Request(ids, SamplingParams(), lambda event: None, id=index, pages=pages)

    def _compute(self, requests: list[Any], count: int) -> tuple[list[Any], float]:
        from ktx.engine.scheduler import ScheduledChunk

        start = time.perf_counter()
        logits = self.runner.run([ScheduledChunk(request, len(request.ids) - count, count) for request in requests])
        return [logits[request][-1] for request in requests], time.perf_counter() - start

    def steps(self, requests: list[Any], tokens: list[list[int]] | None) -> tuple[list[Any], list[float]]:
        """Runs decode steps on given tokens, or on the most probable ones; returns each step's logits and seconds."""
        import torch

        logits_of_steps, seconds = [], []
        for step in range(self.args.tokens):
            for i, request in enumerate(requests):
                request.ids.append(
                    tokens[step][i] if tokens else int(logits_of_steps[-1][i].argmax()) if logits_of_steps else 5 + i
                )
            logits, step_s = self._compute(requests, 1)
            logits_of_steps.append(torch.stack(logits).float())
            seconds.append(step_s)
        for request in requests:
            del request.ids[self.args.prompt :]
        return logits_of_steps, seconds

    def line(self, count: int) -> dict[str, Any]:
        """Measures eager steps and graphs with a batch of `count` requests."""
        from ktx.kernels.check import relative_error

        requests = self.requests[:count]
        self.runner.graphs = None
        eager, eager_seconds = self.steps(requests, None)
        tokens = [[5 + i for i in range(count)], *(step.argmax(-1).tolist() for step in eager[:-1])]
        self.runner.graphs = self.graphs
        replayed, graph_seconds = self.steps(requests, tokens)
        agreement = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(eager, replayed, strict=True)]
        graph_size = min(graph_size for graph_size in self.graphs.graphs if graph_size >= count)
        eager_ms, graph_ms = (
            1e3 * statistics.median(taken[WARMUP_STEPS:] or taken) for taken in (eager_seconds, graph_seconds)
        )
        return {
            "requests": count,
            "graph": graph_size,
            "eager ms": eager_ms,
            "graph ms": graph_ms,
            "times": eager_ms / graph_ms,
            "error": max(relative_error(b, a) for a, b in zip(eager, replayed, strict=True)),
            "alike": statistics.mean(agreement),
            "capture s": self.capture_s,
        }


def main(argv: list[str] | None = None, **load: Any) -> int:
    """Measures all placements; `load` are further arguments of ktx.load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or GGUF")
    parser.add_argument("--weights", help="GGUF file or safetensors (default: the model's folder)")
    parser.add_argument(
        "-b",
        "--batches",
        default="1,3,4,8",
        type=lambda text: [int(n) for n in text.split(",")],
        help="batch sizes (default %(default)s)",
    )
    parser.add_argument("-p", "--prompt", type=int, default=100, help="tokens of each prompt (default 100)")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="decode steps (default 32)")
    parser.add_argument(
        "--placements",
        nargs="+",
        choices=list(PLACEMENTS),
        default=list(PLACEMENTS),
        help="placements to measure (default: both)",
    )
    parser.add_argument("--record", metavar="FILE", help="append JSON lines to FILE")
    args = parser.parse_args(argv)
    worst_error = 0.0
    for name in args.placements:
        bench = Bench(args, name, **load)
        if bench.graphs is None:
            print(f"{name}: no CUDA graph was captured", file=sys.stderr)
            return 1
        for count in args.batches:
            line = {"placement": name} | bench.line(count)
            worst_error = max(worst_error, line["error"])
            print(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True
            )
            if args.record:
                with open(args.record, "a") as file:
                    file.write(json.dumps(line) + "\n")
        del bench
    if not worst_error <= MAX_REL_ERROR:
        print(
            f"the logits of a graph have an error of {worst_error:.3g}, the bound is {MAX_REL_ERROR}", file=sys.stderr
        )
    return 0 if worst_error <= MAX_REL_ERROR else 1


if __name__ == "__main__":
    raise SystemExit(main())
