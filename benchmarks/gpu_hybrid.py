"""A model on a GPU, on the CPU, and on both: `python benchmarks/gpu_hybrid.py --model DIR [-p 512,2048] [-n 32]`.

Measures three placements, each in its own process: `cpu`; `hybrid`, with the routed experts in CPU memory; `gpu`. A
line for each: tokens per second of prefill and of decode, and the GPU memory, as the plan counts it (without its
allowance for CUDA itself) and torch's peak allocation. `--record FILE` appends JSON lines. `--of 61` is for a model
that was cut to fewer layers: the first half of its layers is measured too, and the time per layer extrapolated to 61.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ktx  # before torch, whose idle threads then sleep

PLACEMENTS = ("cpu", "hybrid", "gpu")
WARMUP_TOKENS = 2  # kernels are compiled and buffers allocated


def placement(args: argparse.Namespace, context: int) -> Any:
    """Returns the placement to measure, with the memory model of `ktx plan --vram`."""
    from ktx.loader.build import measure_footprint
    from ktx.placement.memory_model import EXPERTS
    from ktx.placement.solver import Budget, Placement

    model, _ = measure_footprint(args.model, args.weights)
    budget = Budget(() if args.one == "cpu" else (1 << 40,), 1 << 50, context, chunk_size=max(args.prompts))
    if args.one == "cpu":
        return Placement(model, budget, ["cpu"] * model.num_layers)
    routed = frozenset(part.layer for part in model.modules if part.group == EXPERTS and part.layer is not None)
    all_on_gpu = args.one == "gpu"
    return Placement(
        model,
        budget,
        ["cuda:0"] * model.num_layers,
        routed if all_on_gpu else frozenset(),
        "cuda:0" if all_on_gpu else "cpu",
    )


@contextmanager
def first_layers(model: Any, layers: int) -> Iterator[None]:
    """Context in which the model has only its first `layers` layers."""
    num_layers, model.config.num_hidden_layers = model.config.num_hidden_layers, layers
    try:
        yield
    finally:
        model.config.num_hidden_layers = num_layers


def timed(args: argparse.Namespace, model: Any) -> dict[str, float]:
    """Returns the seconds of each prompt length ("prompt N") and of a decoded token ("token")."""
    import torch

    from ktx.cache.kv import KVCache
    from ktx.transformers_compat import cache_argument

    def step(ids: torch.Tensor, cache: Any) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            logits = model(input_ids=ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
        logits.float().cpu()  # the sampler needs the logits on the CPU
        return time.perf_counter() - start

    rng = torch.Generator().manual_seed(1)
    seconds = {}
    for count in args.prompts:
        prompts = [torch.randint(3, model.config.vocab_size, (1, count), generator=rng) for _ in range(args.repeat + 1)]
        times = []
        for prompt in prompts:
            cache = KVCache(model.config, model.ktx.kv_dtype)
            times.append(step(prompt, cache))
        seconds[f"prompt {count}"] = statistics.median(times[1:])  # without the first, which compiles kernels
    token_times = [step(torch.tensor([[7]]), cache) for _ in range(WARMUP_TOKENS + args.tokens)][WARMUP_TOKENS:]
    return seconds | {"token": statistics.median(token_times)}


def figures_of(args: argparse.Namespace, seconds: dict[str, float], note: str = "") -> dict[str, float]:
    """Converts seconds to the printed figures; `note` is appended to their names."""
    figures = {f"prompt {count} tok/s{note}": count / seconds[f"prompt {count}"] for count in args.prompts}
    return figures | {f"token ms{note}": 1e3 * seconds["token"], f"token tok/s{note}": 1 / seconds["token"]}


def extrapolated(args: argparse.Namespace, model: Any, seconds: dict[str, float]) -> dict[str, float]:
    """Returns the milliseconds per additional layer, and the figures extrapolated to `args.of` layers."""
    layers = model.config.num_hidden_layers
    fewer_layers = max(getattr(model.config, "first_k_dense_replace", 0), layers // 2)
    if not 0 < fewer_layers < layers <= args.of:
        raise SystemExit(
            f"--of {args.of}: the model has {layers} layers; it needs at least two with experts, and no more than --of"
        )
    with first_layers(model, fewer_layers):
        fewer_seconds = timed(args, model)
    per_layer = {name: (taken - fewer_seconds[name]) / (layers - fewer_layers) for name, taken in seconds.items()}
    extrapolated_seconds = {name: taken + (args.of - layers) * per_layer[name] for name, taken in seconds.items()}
    return {f"{name} ms a layer": 1e3 * layer_s for name, layer_s in per_layer.items()} | figures_of(
        args, extrapolated_seconds, f" of {args.of} layers, extrapolated"
    )


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one placement and returns its line."""
    import torch

    from ktx.placement.solver import CUDA_CONTEXT_BYTES

    plan = placement(args, max(args.prompts) + args.tokens + WARMUP_TOKENS)
    model, _ = ktx.load(args.model, args.weights, devices=plan.device_map(), progress=False)
    line: dict[str, Any] = {"placement": args.one, "layers": plan.model.num_layers}
    line |= figures_of(args, seconds := timed(args, model))
    if args.of:
        line |= extrapolated(args, model, seconds)
    if args.one != "cpu":
        has_gpu = torch.cuda.is_available()
        line["vram planned"] = plan.total_bytes("cuda:0") - CUDA_CONTEXT_BYTES
        line["vram used"] = torch.cuda.max_memory_allocated() if has_gpu else None
        line["gpu"] = torch.cuda.get_device_name() if has_gpu else "pretended"
    return line


def row(line: dict[str, Any], names: list[str]) -> str:
    """Returns the table row of a line."""

    def cell(name: str) -> str:
        value = line.get(name)
        if value is None:
            return "-"
        return (
            f"{value / 1e9:.2f} GB"
            if name.startswith("vram")
            else f"{value:.1f}"
            if isinstance(value, float)
            else str(value)
        )

    return "  ".join(cell(name).rjust(max(len(name), 9)) for name in names)


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or GGUF")
    parser.add_argument("--weights", help="GGUF file or safetensors (default: the model's folder)")
    parser.add_argument(
        "-p",
        "--prompts",
        default="512,2048",
        type=lambda text: [int(n) for n in text.split(",")],
        help="prompt lengths in tokens (default %(default)s)",
    )
    parser.add_argument("-n", "--tokens", type=int, default=32, help="tokens to decode (default 32)")
    parser.add_argument("-r", "--repeat", type=int, default=2, help="timed prompts per length (default 2)")
    parser.add_argument("--of", type=int, metavar="LAYERS", help="extrapolate to a model with this number of layers")
    parser.add_argument(
        "--placements",
        nargs="+",
        choices=PLACEMENTS,
        default=list(PLACEMENTS),
        help="placements to measure (default: all)",
    )
    parser.add_argument("--record", metavar="FILE", help="append JSON lines to FILE")
    parser.add_argument("--one", choices=PLACEMENTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measured(args)))
        return 0
    arguments = sys.argv[1:] if argv is None else argv
    names = [
        "placement",
        "layers",
        *(f"prompt {n} tok/s" for n in args.prompts),
        "token ms",
        "vram planned",
        "vram used",
    ]
    print("  ".join(name.rjust(9) for name in names), flush=True)
    for placement_name in args.placements:
        result = subprocess.run(
            [sys.executable, __file__, *arguments, "--one", placement_name], stdout=subprocess.PIPE, text=True
        )
        if result.returncode:
            return 1
        line = json.loads(result.stdout.splitlines()[-1])
        print(row(line, names), flush=True)
        for name in line:
            if "a layer" in name or "extrapolated" in name:
                print(f"{'':9}  {name}: {line[name]:.2f}", flush=True)
        if args.record:
            with open(args.record, "a") as file:
                file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
