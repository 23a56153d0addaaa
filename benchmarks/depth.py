"""Measures decode speed after a long context: `python benchmarks/depth.py [--model DIR] [-d 8192] [--kv-dtype q8_0]`.

The KV cache is filled with random values, which takes seconds where a prefill would take minutes; the time of a token
does not depend on the values. Tokens with an empty and with the long context alternate.
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
import ktx.demo

WARMUP_TOKENS = 4  # tokens that are computed first, so that the cache's buffers exist


def main(argv: list[str] | None = None) -> int:
    """Prints a line per round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or GGUF (default: the demo model)")
    parser.add_argument(
        "-d", "--depth", type=int, default=8192, metavar="TOKENS", help="length of the context (default 8192)"
    )
    parser.add_argument("-n", "--tokens", type=int, default=12, help="tokens per round (default 12)")
    parser.add_argument("-r", "--repeat", type=int, default=5, help="rounds; the median is reported (default 5)")
    parser.add_argument("--kv-dtype", default="f16", help="type of the KV cache, as in ktx bench (default f16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
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
        empty_ms, deep_ms = map(milliseconds, caches)
        rounds.append((empty_ms, deep_ms, empty_ms / deep_ms))
        if not args.json:
            print(
                f"empty context {empty_ms:.1f} ms, {args.depth} tokens {deep_ms:.1f}:"
                f" {empty_ms / deep_ms:.0%} of the speed",
                flush=True,
            )
    empty_ms, deep_ms, speed_ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
    if args.json:
        print(
            json.dumps(
                {
                    "depth": args.depth,
                    "near_ms": empty_ms,
                    "far_ms": deep_ms,
                    "share": speed_ratio,
                    "bytes": caches[1].nbytes(),
                }
            )
        )
    else:
        print(f"median {speed_ratio:.0%}; the cache holds {caches[1].nbytes() / 1e6:.1f} MB")
    return 0


def filled(model: Any, depth: int) -> Any:
    """Returns a KV cache with a few computed positions and `depth` random ones."""
    import torch

    from ktx.cache.kv import GrowingLayer, KVCache
    from ktx.transformers_compat import cache_argument

    cache = KVCache(model.config, model.ktx.kv_dtype)
    with torch.inference_mode():
        model(input_ids=torch.arange(5, 5 + WARMUP_TOKENS)[None], **cache_argument(model, cache))
        for layer in cache.layers if depth else ():
            if isinstance(layer, GrowingLayer):
                batch, heads = layer.buffers[0].shape[:2]
                layer.update(*(torch.randn(batch, heads, depth, width) for width in layer.columns))
    return cache


if __name__ == "__main__":
    raise SystemExit(main())
