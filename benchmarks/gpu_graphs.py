"""Steps of one token a request, as CUDA graphs and launched kernel by kernel: `python benchmarks/gpu_graphs.py --model DIR [-b 1,3,4,8] [-n 32]`.

Two placements, `hybrid` with the routed experts in the CPU's memory and `gpu`, by several numbers of requests, of which some fill a graph and others are padded to the next one. Both
ways compute the same tokens on the same pages; a line says the median milliseconds of a step, the largest relative error of a step's logits, and how many of all tokens would be
chosen alike. Exit status 1 where the error is over its bound. Without a GPU: KTX_GPU=fake:1 TRITON_INTERPRET=1. `--record FILE` appends JSON lines.
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

import ktx  # noqa: E402  # before torch, whose idle threads then sleep

PLACEMENTS = {"hybrid": {"moe_device": "cpu"}, "gpu": {"moe_device": "cuda"}}
BOUND = 2e-2  # activations in bf16, sums cut elsewhere where rows are padded
WARM = 3  # steps before the clock runs


class Bench:
    """A model with an engine's runner, and requests with prompts of `prompt` tokens."""

    def __init__(self, args: argparse.Namespace, name: str, **load: Any):
        from ktx.engine.runner_selection import runner_for
        from ktx.engine.scheduler import pages_for

        self.args, self.context = args, args.prompt + args.tokens + 1
        self.model, _ = ktx.load(args.model, args.weights, device="cuda", progress=False, **PLACEMENTS[name], **load)
        most, self.each = max(args.batches), pages_for(self.context)
        self.runner = runner_for(self.model, most * self.each, most)
        self.requests = [self._request(i) for i in range(most)]
        for request in self.requests:
            self._compute([request], args.prompt)
        start = time.perf_counter()
        self.runner.capture(self.context)
        self.seconds, self.graphs = time.perf_counter() - start, self.runner.graphs

    def _request(self, number: int) -> Any:
        from ktx.engine.request import Request
        from ktx.engine.sampler import SamplingParams

        ids = [(7 + 31 * number + 13 * j) % (self.model.config.vocab_size - 3) + 3 for j in range(self.args.prompt)]
        pages = list(range(number * self.each, (number + 1) * self.each))
        return Request(ids, SamplingParams(), lambda event: None, id=number, pages=pages)

    def _compute(self, requests: list[Any], count: int) -> tuple[list[Any], float]:
        from ktx.engine.scheduler import ScheduledChunk

        start = time.perf_counter()
        found = self.runner.run([ScheduledChunk(request, len(request.ids) - count, count) for request in requests])
        return [found[request][-1] for request in requests], time.perf_counter() - start

    def steps(self, requests: list[Any], tokens: list[list[int]] | None) -> tuple[list[Any], list[float]]:
        """Logits and seconds of each step, on given tokens or the likeliest ones."""
        import torch

        made, seconds = [], []
        for step in range(self.args.tokens):
            for i, request in enumerate(requests):
                request.ids.append(tokens[step][i] if tokens else int(made[-1][i].argmax()) if made else 5 + i)
            logits, taken = self._compute(requests, 1)
            made.append(torch.stack(logits).float())
            seconds.append(taken)
        for request in requests:
            del request.ids[self.args.prompt :]
        return made, seconds

    def line(self, count: int) -> dict[str, Any]:
        """Both ways by one number of requests."""
        from ktx.kernels.check import relative

        requests = self.requests[:count]
        self.runner.graphs = None
        eager, eager_seconds = self.steps(requests, None)
        given = [[5 + i for i in range(count)], *(step.argmax(-1).tolist() for step in eager[:-1])]
        self.runner.graphs = self.graphs
        replayed, seconds = self.steps(requests, given)
        alike = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(eager, replayed, strict=True)]
        size = min(size for size in self.graphs.graphs if size >= count)
        one, other = (1e3 * statistics.median(taken[WARM:] or taken) for taken in (eager_seconds, seconds))
        return {
            "requests": count,
            "graph": size,
            "eager ms": one,
            "graph ms": other,
            "times": one / other,
            "error": max(relative(b, a) for a, b in zip(eager, replayed, strict=True)),
            "alike": statistics.mean(alike),
            "capture s": self.seconds,
        }


def main(argv: list[str] | None = None, **load: Any) -> int:
    """`load`: what ktx.load is told beside what the words say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or GGUF")
    parser.add_argument("--weights", help="GGUF file or safetensors (default: the model's folder)")
    parser.add_argument(
        "-b", "--batches", default="1,3,4,8", type=lambda text: [int(n) for n in text.split(",")], help="requests"
    )
    parser.add_argument("-p", "--prompt", type=int, default=100, help="tokens of each prompt")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="steps")
    parser.add_argument("--placements", nargs="+", choices=list(PLACEMENTS), default=list(PLACEMENTS))
    parser.add_argument("--record", metavar="FILE", help="append JSON lines")
    args = parser.parse_args(argv)
    worst = 0.0
    for name in args.placements:
        bench = Bench(args, name, **load)
        if bench.graphs is None:
            print(f"{name}: nothing was captured", file=sys.stderr)
            return 1
        for count in args.batches:
            line = {"placement": name} | bench.line(count)
            worst = max(worst, line["error"])
            print(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True
            )
            if args.record:
                with open(args.record, "a") as file:
                    file.write(json.dumps(line) + "\n")
        del bench
    if not worst <= BOUND:
        print(f"a graph's logits err by {worst:.3g}, {BOUND} is allowed", file=sys.stderr)
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
