"""What a long past costs a token: `python benchmarks/depth.py [--model DIR] [-d 8192] [--kv-dtype q8_0]`.

The cache is filled with random numbers, which costs seconds where computing them would take minutes, and a token's time does not depend on them. Tokens
after none and after many others take turns.
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
import ktx.demo  # noqa: E402

BEFORE = 4  # tokens that are computed first, so that the cache knows its shapes


def main(argv: list[str] | None = None) -> int:
    """Prints one line a round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or GGUF (default: the demo model)")
    parser.add_argument("-d", "--depth", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("-n", "--tokens", type=int, default=12, help="a round")
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("--kv-dtype", default="f16")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    import torch

    from ktx.transformers_compat import cache_argument

    model, _ = ktx.load(
        args.model or ktx.demo.path(),
        None if args.model else ktx.demo.gguf(),
        kv_dtype=args.kv_dtype,
        progress=False,
    )
    caches = [filled(model, depth) for depth in (0, args.depth)]

    def milliseconds(cache: Any) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for i in range(args.tokens):
                model(input_ids=torch.tensor([[i + 5]]), **cache_argument(model, cache))
        return (time.perf_counter() - start) / args.tokens * 1e3

    rounds = []
    for _ in range(args.repeat):
        near, far = map(milliseconds, caches)
        rounds.append((near, far, near / far))
        if not args.json:
            print(f"after none {near:.1f} ms, after {args.depth} {far:.1f}: {near / far:.0%} of the speed", flush=True)
    near, far, share = (statistics.median(column) for column in zip(*rounds, strict=True))
    if args.json:
        print(
            json.dumps(
                {"depth": args.depth, "near_ms": near, "far_ms": far, "share": share, "bytes": caches[1].nbytes()}
            )
        )
    else:
        print(f"median {share:.0%}; the cache holds {caches[1].nbytes() / 1e6:.1f} MB")
    return 0


def filled(model: Any, depth: int) -> Any:
    """A cache with a few computed positions, and `depth` of random numbers."""
    import torch

    from ktx.cache.kv import GrowingLayer, KVCache
    from ktx.transformers_compat import cache_argument

    cache = KVCache(model.config, model.ktx.kv_dtype)
    with torch.inference_mode():
        model(input_ids=torch.arange(5, 5 + BEFORE)[None], **cache_argument(model, cache))
        for layer in cache.layers if depth else ():
            if isinstance(layer, GrowingLayer):
                batch, heads = layer.buffers[0].shape[:2]
                layer.update(*(torch.randn(batch, heads, depth, width) for width in layer.columns))
    return cache


if __name__ == "__main__":
    raise SystemExit(main())
