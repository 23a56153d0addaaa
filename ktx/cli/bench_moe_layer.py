"""One MoE layer with random weights: what each engine of `ktx bench --layer` computes, and how it is timed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIN_SECONDS = 0.4  # minimum seconds of a measurement
CHECKED_TOKENS = 64  # tokens whose output is compared


@dataclass(frozen=True)
class MoELayer:
    """Dimensions of an MoE layer: experts, experts per token, hidden size, rows of an expert's gate and up."""

    experts: int
    top: int
    hidden: int
    width: int

    @classmethod
    def read(cls, text: str) -> MoELayer:
        """Parses "64,8,2048,1536": experts, experts per token, hidden size, width of an expert.

        The sizes must be multiples of 256, the largest block of a quant type, so that every format can be measured.
        """
        try:
            numbers = [int(part) for part in text.split(",")]
            experts, top, hidden, width = numbers
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be four numbers: experts, experts per token, hidden size, width of an expert"
            ) from None
        if not 1 <= top <= experts or hidden < 1 or width < 1 or hidden % 256 or width % 256:
            raise argparse.ArgumentTypeError(
                f"{text!r}: experts per token must be 1 to all experts, hidden size and width multiples of 256"
            )
        return cls(experts, top, hidden, width)

    def __str__(self) -> str:
        return f"{self.experts},{self.top},{self.hidden},{self.width}"

    @property
    def operations(self) -> int:
        """Number of multiplications and additions per token."""
        return 6 * self.top * self.hidden * self.width

    def weights(self) -> list[Any]:
        """Returns gate, up [experts, width, hidden] and down [experts, hidden, width], bf16.

        They are equal in every process, so that the errors of ktx and of the peer can be compared.
        """
        import torch

        rng = torch.Generator().manual_seed(11)
        shapes = ((self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width))
        return [
            torch.stack(
                [(torch.randn(shape, generator=rng) * shape[1] ** -0.5).bfloat16() for _ in range(self.experts)]
            )
            for shape in shapes
        ]

    def call(self, tokens: int) -> tuple[Any, Any, Any]:
        """Returns random inputs: x bf16 [tokens, hidden], expert ids int64 and routing weights f32 [tokens, top]."""
        import torch

        rng = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, self.hidden, generator=rng).bfloat16()
        ids = torch.stack([torch.randperm(self.experts, generator=rng)[: self.top] for _ in range(tokens)])
        routing_weights = torch.rand(tokens, self.top, generator=rng)
        return x, ids, routing_weights / routing_weights.sum(-1, keepdim=True)


def reference_output(weights: list[Any], x: Any, ids: Any, routing_weights: Any) -> Any:
    """Computes the layer in float32, as the reference for the relative errors of all engines.

    The sum over the chosen experts of routing weight * down(silu(gate x) * up x).
    """
    import torch

    out = torch.zeros(len(x), weights[2].shape[1])
    for expert in ids.unique().tolist():
        tokens, slots = torch.where(ids == expert)
        gate, up, down = (matrices[expert].float() for matrices in weights)
        rows = x[tokens].float()
        outputs = (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
        out.index_add_(0, tokens, outputs * routing_weights[tokens, slots, None])
    return out


def milliseconds(call: Callable[[], object]) -> float:
    """Returns the mean milliseconds of a call, over at least MIN_SECONDS."""
    call()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < MIN_SECONDS or count < 2:
        call()
        count += 1
    return (time.perf_counter() - start) / count * 1e3


def serve_tests(
    startup_report: dict[str, Any], build: Callable[[str], Callable[[int], dict[str, float]]], out: Any = None
) -> None:
    """Answers requests of `ktx bench --layer`, JSON lines on standard input, with one JSON line each; exits at the end.

    Args:
        startup_report: the first line of output, for the benchmark that started the engine.
        build: builds the layer in a format and returns a function that measures it with a number of tokens.
        out: stream for the results (default: standard output).
    """
    out = out or sys.stdout
    print(json.dumps(startup_report), file=out, flush=True)
    measures: dict[str, Callable[[int], dict[str, float]]] = {}
    for line in sys.stdin:
        request = json.loads(line)["test"]
        if request["format"] not in measures:
            measures.clear()  # only one format is in memory at a time
            measures[request["format"]] = build(request["format"])
        print(json.dumps(measures[request["format"]](request["tokens"])), file=out, flush=True)
    out.flush()
    os._exit(0)  # skips the shutdown of the engine's threads


def parse_engine_args() -> argparse.Namespace:
    """Parses the arguments of an engine's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=MoELayer.read, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()
