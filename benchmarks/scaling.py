"""Prefill speed on one thread and on all, alternating: `python benchmarks/scaling.py [--model DIR] [-p 512]`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ktx  # before torch, whose idle threads then sleep
import ktx.demo


def main(argv: list[str] | None = None) -> int:
    """Prints a line per round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder or GGUF (default: the demo model)")
    parser.add_argument("-p", "--prompt", type=int, default=512, metavar="TOKENS", help="prompt length (default 512)")
    parser.add_argument(
        "-t", "--threads", type=int, default=0, help="threads to compare with one (default: usable physical cores)"
    )
    parser.add_argument("-r", "--repeat", type=int, default=5, help="rounds; the median is reported (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    import torch

    from ktx.cache.kv import KVCache
    from ktx.hardware import default_threads
    from ktx.kernels.cpu import ops
    from ktx.transformers_compat import cache_argument

    max_threads = args.threads or default_threads()
    model, _ = ktx.load(
        args.model or ktx.demo.path(), None if args.model else ktx.demo.gguf(), threads=max_threads, progress=False
    )
    ids = torch.randint(3, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))

    def tokens_per_s(threads: int) -> float:
        ops.set_threads(threads)
        torch.set_num_threads(threads)
        cache, start = KVCache(model.config, model.ktx.kv_dtype), time.perf_counter()
        with torch.inference_mode():
            model(input_ids=ids, **cache_argument(model, cache), logits_to_keep=1)
        return args.prompt / (time.perf_counter() - start)

    tokens_per_s(max_threads)
    rounds = []
    for _ in range(args.repeat):
        one_thread, all_threads = tokens_per_s(1), tokens_per_s(max_threads)
        rounds.append((one_thread, all_threads, all_threads / one_thread))
        if not args.json:
            print(
                f"1 thread {one_thread:.1f} tok/s, {max_threads} threads {all_threads:.1f}:"
                f" {all_threads / one_thread:.2f}x",
                flush=True,
            )
    one_thread, all_threads, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
    int8_ratio = ops.probe_int8(max_threads, 0.2) / ops.probe_int8(1, 0.2)
    if args.json:
        print(
            json.dumps(
                {
                    "threads": max_threads,
                    "one": one_thread,
                    "all": all_threads,
                    "ratio": ratio,
                    "int8_probe": int8_ratio,
                }
            )
        )
    else:
        print(f"median {ratio:.2f}x; the int8 probe alone {int8_ratio:.2f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
