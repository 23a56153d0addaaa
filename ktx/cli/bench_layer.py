"""`ktx bench --layer`: one mixture-of-experts layer with random weights, beside the kernels of a peer, with the error of each.

An engine is a process that says which formats it has, then answers {"format", "tokens"} with milliseconds and its error: relative RMS
against the layer in float32 on the weights before they were quantised, so that a coarser format shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ktx.cli.bench import Engine, stamp
from ktx.errors import UsageError, did_you_mean
from ktx.kernels.check import relative

PAIRS = {  # a peer's formats and the ones of ktx that have as many bits
    "kt-kernel": {"AMXINT8": "int8", "AMXINT4": "int4", "RAWINT4": "int4g32", "LLAMAFILE": "Q4_K", "BF16": "BF16"},
    "ftllm": {"int8": "int8", "int4g": "int4g32"},
}
MODULES = {"kt-kernel": "ktx.cli.bench_kt_kernel", "ftllm": "ktx.cli.bench_ftllm"}
FORMATS = {  # gate and up, down
    "int8": ("INT8_128", "INT8_128"),
    "int4": ("INT4_128", "INT4_128"),
    "int4g32": ("Q4_0", "Q4_0"),
    "Q4_K": ("Q4_K", "Q6_K"),
    "Q8_0": ("Q8_0", "Q8_0"),
    "BF16": ("BF16", "BF16"),
}
ENOUGH = 0.4  # seconds a measurement takes at least
CHECKED = 64  # tokens whose result is compared


@dataclass(frozen=True)
class Layer:
    experts: int
    top: int
    hidden: int
    width: int

    @classmethod
    def read(cls, text: str) -> Layer:
        """64,8,2048,1536: experts, how many a token takes, hidden columns, an expert's rows."""
        try:
            numbers = [int(part) for part in text.split(",")]
            experts, top, hidden, width = numbers
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be four numbers: experts, experts a token, hidden columns, rows of an expert"
            ) from None
        if not 1 <= top <= experts or hidden < 1 or width < 1 or hidden % 256 or width % 256:
            raise argparse.ArgumentTypeError(
                f"{text!r}: a token takes 1 to all experts, and columns are multiples of 256"
            )
        return cls(experts, top, hidden, width)

    def __str__(self) -> str:
        return f"{self.experts},{self.top},{self.hidden},{self.width}"

    @property
    def operations(self) -> int:
        """Multiplications and additions of one token."""
        return 6 * self.top * self.hidden * self.width

    def weights(self) -> list[Any]:
        """gate, up [experts, width, hidden] and down [experts, hidden, width] in bf16, the same in every process."""
        import torch

        source = torch.Generator().manual_seed(11)
        shapes = ((self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width))
        return [
            torch.stack(
                [(torch.randn(shape, generator=source) * shape[1] ** -0.5).bfloat16() for _ in range(self.experts)]
            )
            for shape in shapes
        ]

    def call(self, tokens: int) -> tuple[Any, Any, Any]:
        """x bf16 [tokens, hidden], ids int64 and weights f32 [tokens, top]."""
        import torch

        source = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, self.hidden, generator=source).bfloat16()
        ids = torch.stack([torch.randperm(self.experts, generator=source)[: self.top] for _ in range(tokens)])
        shares = torch.rand(tokens, self.top, generator=source)
        return x, ids, shares / shares.sum(-1, keepdim=True)


def truth(weights: list[Any], x: Any, ids: Any, shares: Any) -> Any:
    """The layer in float32: sum over the chosen experts of share * down(silu(gate x) * up x)."""
    import torch

    out = torch.zeros(len(x), weights[2].shape[1])
    for e in ids.unique().tolist():
        token, choice = torch.where(ids == e)
        gate, up, down = (w[e].float() for w in weights)
        rows = x[token].float()
        y = (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
        out.index_add_(0, token, y * shares[token, choice, None])
    return out


def milliseconds(work: Callable[[], object]) -> float:
    """Of one call, of as many as take ENOUGH."""
    work()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < ENOUGH or count < 2:
        work()
        count += 1
    return (time.perf_counter() - start) / count * 1e3


def serve(facts: dict[str, Any], build: Callable[[str], Callable[[int], dict[str, float]]], out: Any = None) -> None:
    """The engine's side: `build(format)` makes the layer, whose call with a number of tokens measures it."""
    out = out or sys.stdout
    print(json.dumps(facts), file=out, flush=True)
    made: dict[str, Callable[[int], dict[str, float]]] = {}
    for line in sys.stdin:
        wish = json.loads(line)["test"]
        if wish["format"] not in made:
            made.clear()  # one format in memory at a time
            made[wish["format"]] = build(wish["format"])
        print(json.dumps(made[wish["format"]](wish["tokens"])), file=out, flush=True)
    out.flush()
    os._exit(0)  # threads of engines need no farewell


def run(args: argparse.Namespace) -> int:
    """Measures formats and numbers of tokens, ktx and the peer in turns, and prints a table."""
    layer: Layer = args.layer
    if not any(args.prompt):
        raise UsageError("-p 0 leaves nothing to measure: give --layer a number of tokens")
    words = ["--layer", str(layer), "--threads", str(args.threads)]
    pairs = PAIRS.get(args.peer or "", {})
    if args.peer and not pairs:
        raise UsageError(f"--layer has no {args.peer}: its peers are {' and '.join(PAIRS)}")
    rows = list(pairs.items()) if args.peer else [("", name) for name in FORMATS]
    if args.formats:
        wanted, known = args.formats.split(","), [name for _, name in rows]
        for name in wanted:
            if name not in known:
                raise UsageError(
                    f"--formats {name} is not measured here{did_you_mean(name, known)}; there are {' '.join(known)}"
                )
        rows = [row for row in rows if row[1] in wanted]
    mine = Engine("ktx", __name__, words)
    other = Engine(args.peer, MODULES[args.peer], words) if args.peer else None
    lines = []
    try:
        facts = mine.start()
        theirs = other.start() if other else {}
        print(
            f"{layer.experts} experts, {layer.top} a token, {layer.hidden} x {layer.width}; {stamp()['machine']}, {args.threads} threads; ktx {facts['isa']}"
            + (f"; {args.peer} {theirs['version']}" if other else "")
        )
        print(f"{'tokens':>6}  {'engine':12}{'format':12}{'ms':>10}{'GOPS':>8}{'error':>9}{'ratio':>8}")
        for named, name in rows:
            for tokens in filter(None, args.prompt):
                lines += _row(layer, mine, other, name, named, tokens, args)
    finally:
        mine.stop()
        if other:
            other.stop()
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0


def _row(
    layer: Layer, mine: Engine, other: Engine | None, name: str, named: str, tokens: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    engines = [(mine, name), *([(other, named)] if other else [])]
    found: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine, _ in engines}
    for _ in range(args.repeat):
        for engine, word in engines:
            found[engine.name].append(engine.measure({"format": word, "tokens": tokens}))
    lines = []
    for engine, word in engines:
        ms = statistics.median(row["ms"] for row in found[engine.name])
        lines.append(
            {"test": f"layer {layer}", "tokens": tokens, "engine": engine.name, "format": word, "ms": ms}
            | {"gops": layer.operations * tokens / ms / 1e6, "relative_error": found[engine.name][0]["relative_error"]}
            | stamp()
            | {"threads": args.threads, "rounds": args.repeat}
        )
    if other:
        lines[0]["ratio"] = lines[1]["ms"] / lines[0]["ms"]
    for line in lines:
        ratio = f"{line['ratio']:.2f}x" if "ratio" in line else ""
        print(
            f"{tokens:>6}  {line['engine']:12}{line['format']:12}{line['ms']:>10.3f}{line['gops']:>8.0f}{line['relative_error']:>9.4f}{ratio:>8}",
            flush=True,
        )
    return lines


def engine_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=Layer.read, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def main() -> int:
    """The process that runs ktx's kernels."""
    args = engine_arguments()
    layer: Layer = args.layer
    import torch

    from ktx.kernels import cpu
    from ktx.quant.types import QTYPES
    from ktx.weights.base import QuantizedTensor

    torch.set_num_threads(args.threads)
    cpu.ops.set_threads(args.threads)
    weights = layer.weights()

    def packed(matrices: Any, name: str) -> Any:
        qtype = QTYPES[name]
        if name == "BF16":
            data = matrices.view(torch.uint8).reshape(*matrices.shape[:-1], -1)
            return cpu.pack_experts(QuantizedTensor(data, qtype, tuple(matrices.shape)))
        if name in ("INT8_128", "INT4_128", "Q4_0", "Q8_0"):
            data = matrices.view(torch.uint8).reshape(*matrices.shape[:-1], -1)
            return cpu.pack_experts(QuantizedTensor(data, QTYPES["BF16"], tuple(matrices.shape)), qtype)
        rows = [qtype.quantize(one.float()) for one in matrices]
        return cpu.pack_experts(
            [QuantizedTensor(r, qtype, tuple(one.shape)) for r, one in zip(rows, matrices, strict=True)]
        )

    def build(name: str) -> Callable[[int], dict[str, float]]:
        wide, narrow = FORMATS[name]
        gate, up, down = packed(weights[0], wide), packed(weights[1], wide), packed(weights[2], narrow)

        def measure(tokens: int) -> dict[str, float]:
            x, ids, shares = layer.call(tokens)
            out = cpu.experts(x, ids, shares, gate, up, down)
            some = slice(0, CHECKED)
            wrong = relative(out[some], truth(weights, x[some], ids[some], shares[some]))
            return {"ms": milliseconds(lambda: cpu.experts(x, ids, shares, gate, up, down)), "relative_error": wrong}

        return measure

    serve({"ready": True, "isa": cpu.ops.isa(), "formats": list(FORMATS)}, build)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
