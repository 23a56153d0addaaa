"""`ktx bench --layer`: one MoE layer with random weights, on ktx's kernels and a peer's, with the error of each.

The peers are in benchmarks/peers of a checkout.

An engine is a process that reports its formats, then answers {"format", "tokens"} with milliseconds and its error:
the relative RMS against the layer in float32 on the weights before quantization, which shows how coarse a format is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ktx.cli.bench_moe_layer import (
    CHECKED_TOKENS,
    MoELayer,
    milliseconds,
    parse_engine_args,
    reference_output,
    serve_tests,
)
from ktx.cli.bench_process import BenchProcess, run_metadata
from ktx.errors import UsageError, did_you_mean
from ktx.kernels.check import relative_error

FORMATS = {  # name -> (type of gate and up, type of down)
    "int8": ("INT8_128", "INT8_128"),
    "int4": ("INT4_128", "INT4_128"),
    "int4g32": ("Q4_0", "Q4_0"),
    "Q4_K": ("Q4_K", "Q6_K"),
    "Q8_0": ("Q8_0", "Q8_0"),
    "BF16": ("BF16", "BF16"),
}


def engine_arguments(args: argparse.Namespace) -> list[str]:
    """Returns the arguments of an engine's process."""
    return ["--layer", str(args.layer), "--threads", str(args.threads)]


def run(
    args: argparse.Namespace, peer: BenchProcess | None = None, peer_formats: Mapping[str, str] | None = None
) -> int:
    """Measures each format with each number of tokens, alternating ktx and the peer, and prints a table.

    Args:
        peer: the peer's process.
        peer_formats: the peer's formats, each with ktx's format of as many bits.
    """
    layer: MoELayer = args.layer
    if not any(args.prompt):
        raise UsageError("-p 0 leaves nothing to measure: give --layer a number of tokens")
    rows = list(peer_formats.items()) if peer_formats else [("", name) for name in FORMATS]
    if args.formats:
        requested, known = args.formats.split(","), [name for _, name in rows]
        for name in requested:
            if name not in known:
                raise UsageError(
                    f"--formats {name}: unknown format{did_you_mean(name, known)}; available: {' '.join(known)}"
                )
        rows = [row for row in rows if row[1] in requested]
    ktx_engine = BenchProcess("ktx", __name__, engine_arguments(args))
    lines = []
    try:
        ktx_report = ktx_engine.start()
        peer_report = peer.start() if peer else {}
        print(
            f"{layer.experts} experts, {layer.top} per token, {layer.hidden} x {layer.width};"
            f" {run_metadata()['machine']}, {args.threads} threads; ktx {ktx_report['isa']}"
            + (f"; {peer.name} {peer_report['version']}" if peer else "")
        )
        print(f"{'tokens':>6}  {'engine':12}{'format':12}{'ms':>10}{'GOPS':>8}{'error':>9}{'ratio':>8}")
        for peer_format, name in rows:
            for tokens in filter(None, args.prompt):
                lines += _measure_row(layer, ktx_engine, peer, name, peer_format, tokens, args)
    finally:
        ktx_engine.stop()
        if peer:
            peer.stop()
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0


def _measure_row(
    layer: MoELayer,
    ktx_engine: BenchProcess,
    peer: BenchProcess | None,
    name: str,
    peer_format: str,
    tokens: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Measures the layer with one weight format and number of tokens on both engines in turn; prints a line per engine.

    `name` is ktx's name of the format, `peer_format` the peer's; without a peer only ktx is measured.

    Returns the records: medians of `--repeat` rounds; ktx's contains `ratio`, the peer's time divided by its own.
    """
    engines = [(ktx_engine, name), *([(peer, peer_format)] if peer else [])]
    measurements: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine, _ in engines}
    for _ in range(args.repeat):
        for engine, format_name in engines:
            measurements[engine.name].append(engine.measure({"format": format_name, "tokens": tokens}))
    lines = []
    for engine, format_name in engines:
        ms = statistics.median(row["ms"] for row in measurements[engine.name])
        lines.append(
            {"test": f"layer {layer}", "tokens": tokens, "engine": engine.name, "format": format_name, "ms": ms}
            | {
                "gops": layer.operations * tokens / ms / 1e6,
                "relative_error": measurements[engine.name][0]["relative_error"],
            }
            | run_metadata()
            | {"threads": args.threads, "rounds": args.repeat}
        )
    if peer:
        lines[0]["ratio"] = lines[1]["ms"] / lines[0]["ms"]
    for line in lines:
        ratio = f"{line['ratio']:.2f}x" if "ratio" in line else ""
        print(
            f"{tokens:>6}  {line['engine']:12}{line['format']:12}{line['ms']:>10.3f}{line['gops']:>8.0f}"
            f"{line['relative_error']:>9.4f}{ratio:>8}",
            flush=True,
        )
    return lines


def main() -> int:
    """Runs ktx's kernels as the engine's process: builds a layer per format and measures it on request."""
    args = parse_engine_args()
    layer: MoELayer = args.layer
    import torch

    from ktx.kernels import cpu
    from ktx.quant.types import QTYPES
    from ktx.weights.base import QuantizedTensor

    torch.set_num_threads(args.threads)
    cpu.ops.set_threads(args.threads)
    weights = layer.weights()

    def pack(matrices: Any, name: str) -> Any:
        """Packs bf16 matrices [experts, rows, columns] into the named type, by the same path as a model's weights.

        The kernels quantize to the integer types themselves, as for `quantize=`; other types are quantized first, as
        in a file.
        """
        qtype = QTYPES[name]
        if name == "BF16":
            data = matrices.view(torch.uint8).reshape(*matrices.shape[:-1], -1)
            return cpu.pack_experts(QuantizedTensor(data, qtype, tuple(matrices.shape)))
        if name in ("INT8_128", "INT4_128", "Q4_0", "Q8_0"):
            data = matrices.view(torch.uint8).reshape(*matrices.shape[:-1], -1)
            return cpu.pack_experts(QuantizedTensor(data, QTYPES["BF16"], tuple(matrices.shape)), qtype)
        rows = [qtype.quantize(matrix.float()) for matrix in matrices]
        return cpu.pack_experts(
            [QuantizedTensor(r, qtype, tuple(matrix.shape)) for r, matrix in zip(rows, matrices, strict=True)]
        )

    def build_measure(name: str) -> Callable[[int], dict[str, float]]:
        """Packs the layer's weights in a format and returns a function that measures it for a number of tokens."""
        gate_up_type, down_type = FORMATS[name]
        gate, up, down = (
            pack(weights[0], gate_up_type),
            pack(weights[1], gate_up_type),
            pack(weights[2], down_type),
        )

        def measure(tokens: int) -> dict[str, float]:
            """Returns the milliseconds of a call with `tokens` tokens, and the error of its first CHECKED_TOKENS."""
            x, ids, routing_weights = layer.call(tokens)
            out = cpu.experts(x, ids, routing_weights, gate, up, down)
            checked = slice(0, CHECKED_TOKENS)
            error = relative_error(
                out[checked], reference_output(weights, x[checked], ids[checked], routing_weights[checked])
            )
            return {
                "ms": milliseconds(lambda: cpu.experts(x, ids, routing_weights, gate, up, down)),
                "relative_error": error,
            }

        return measure

    serve_tests({"ready": True, "isa": cpu.ops.isa(), "formats": list(FORMATS)}, build_measure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
