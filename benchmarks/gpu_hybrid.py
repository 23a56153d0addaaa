"""A model on a GPU, on the CPU, and on both: `python benchmarks/gpu_hybrid.py --model DIR [-p 512,2048] [-n 32]`.

Three placements, each in a process of its own: `cpu`; `hybrid`, with the routed experts in the CPU's memory; `gpu`. A line for each: tokens a second of prompts and of
tokens one at a time, and the GPU's memory, the most that torch has given out beside what the plan counts (without the plan's allowance for CUDA itself). `--record FILE` appends JSON lines.
`--of 61` is for a model that was cut to fewer layers: it is measured with the first half of its layers too, and what a layer more takes is extrapolated to 61.
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

import ktx  # noqa: E402  # before torch, whose idle threads then sleep

PLACEMENTS = ("cpu", "hybrid", "gpu")
WARM = 2  # tokens before the clock runs: kernels are compiled, buffers made


def placement(args: argparse.Namespace, context: int) -> Any:
    """Where everything is, by the same count as `ktx plan --vram`."""
    from ktx.loader.build import measure
    from ktx.placement.memory_model import EXPERTS
    from ktx.placement.solver import Budget, Placement

    model, _ = measure(args.model, args.weights)
    budget = Budget(() if args.one == "cpu" else (1 << 40,), 1 << 50, context, chunk=max(args.prompts))
    if args.one == "cpu":
        return Placement(model, budget, ["cpu"] * model.layers)
    routed = frozenset(part.layer for part in model.parts if part.group == EXPERTS and part.layer is not None)
    whole = args.one == "gpu"
    return Placement(
        model, budget, ["cuda:0"] * model.layers, routed if whole else frozenset(), "cuda:0" if whole else "cpu"
    )


@contextmanager
def cut(model: Any, layers: int) -> Iterator[None]:
    """The model with its first layers only."""
    whole, model.config.num_hidden_layers = model.config.num_hidden_layers, layers
    try:
        yield
    finally:
        model.config.num_hidden_layers = whole


def timed(args: argparse.Namespace, model: Any) -> dict[str, float]:
    """Seconds of each prompt, by its length, and of a token ("token")."""
    import torch

    from ktx.cache.kv import KVCache
    from ktx.transformers_compat import cache_argument

    def step(ids: torch.Tensor, cache: Any) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            logits = model(input_ids=ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
        logits.float().cpu()  # whoever chooses a token waits for it
        return time.perf_counter() - start

    source = torch.Generator().manual_seed(1)
    found = {}
    for count in args.prompts:
        prompts = [
            torch.randint(3, model.config.vocab_size, (1, count), generator=source) for _ in range(args.repeat + 1)
        ]
        times = []
        for prompt in prompts:
            cache = KVCache(model.config, model.ktx.kv_dtype)
            times.append(step(prompt, cache))
        found[f"prompt {count}"] = statistics.median(times[1:])  # the first one compiles
    each = [step(torch.tensor([[7]]), cache) for _ in range(WARM + args.tokens)][WARM:]
    return found | {"token": statistics.median(each)}


def named(args: argparse.Namespace, seconds: dict[str, float], note: str = "") -> dict[str, float]:
    """What is printed of times."""
    found = {f"prompt {count} tok/s{note}": count / seconds[f"prompt {count}"] for count in args.prompts}
    return found | {f"token ms{note}": 1e3 * seconds["token"], f"token tok/s{note}": 1 / seconds["token"]}


def extrapolated(args: argparse.Namespace, model: Any, seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds of one layer more, and what a model of `args.of` such layers would do."""
    layers = model.config.num_hidden_layers
    few = max(getattr(model.config, "first_k_dense_replace", 0), layers // 2)
    if not 0 < few < layers <= args.of:
        raise SystemExit(
            f"--of {args.of}: the model has {layers} layers; it takes at least two with experts, and no more than are asked for"
        )
    with cut(model, few):
        fewer = timed(args, model)
    layer = {name: (taken - fewer[name]) / (layers - few) for name, taken in seconds.items()}
    whole = {name: taken + (args.of - layers) * layer[name] for name, taken in seconds.items()}
    return {f"{name} ms a layer": 1e3 * each for name, each in layer.items()} | named(
        args, whole, f" of {args.of} layers, extrapolated"
    )


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One placement."""
    import torch

    from ktx.placement.solver import CONTEXT

    made = placement(args, max(args.prompts) + args.tokens + WARM)
    model, _ = ktx.load(args.model, args.weights, devices=made.map(), progress=False)
    found: dict[str, Any] = {"placement": args.one, "layers": made.model.layers}
    found |= named(args, seconds := timed(args, model))
    if args.of:
        found |= extrapolated(args, model, seconds)
    if args.one != "cpu":
        real = torch.cuda.is_available()
        found["vram planned"] = made.total("cuda:0") - CONTEXT
        found["vram used"] = torch.cuda.max_memory_allocated() if real else None
        found["gpu"] = torch.cuda.get_device_name() if real else "pretended"
    return found


def row(line: dict[str, Any], names: list[str]) -> str:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or GGUF")
    parser.add_argument("--weights", help="GGUF file or safetensors (default: the model's folder)")
    parser.add_argument("-p", "--prompts", default="512,2048", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("-n", "--tokens", type=int, default=32)
    parser.add_argument("-r", "--repeat", type=int, default=2)
    parser.add_argument("--of", type=int, metavar="LAYERS", help="extrapolate to a model of so many layers")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--record", metavar="FILE", help="append JSON lines")
    parser.add_argument("--one", choices=PLACEMENTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measured(args)))
        return 0
    words = sys.argv[1:] if argv is None else argv
    names = [
        "placement",
        "layers",
        *(f"prompt {n} tok/s" for n in args.prompts),
        "token ms",
        "vram planned",
        "vram used",
    ]
    print("  ".join(name.rjust(9) for name in names), flush=True)
    for one in args.placements:
        done = subprocess.run([sys.executable, __file__, *words, "--one", one], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return 1
        line = json.loads(done.stdout.splitlines()[-1])
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
