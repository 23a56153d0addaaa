"""A prompt on one thread and on all, in turns: `python benchmarks/scaling.py [--model DIR] [-p 512]`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ktx  # noqa: E402  # before torch, whose idle threads then sleep
import ktx.demo  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Prints one line a round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder or GGUF (default: the demo model)")
    parser.add_argument("-p", "--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("-t", "--threads", type=int, default=0, help="the larger team (default: usable physical cores)")
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    import torch

    from ktx.cache.kv import KVCache
    from ktx.hardware import default_threads
    from ktx.kernels.cpu import ops
    from ktx.transformers_compat import cache_argument

    most = args.threads or default_threads()
    model, _ = ktx.load(
        args.model or ktx.demo.path(), None if args.model else ktx.demo.gguf(), threads=most, progress=False
    )
    ids = torch.randint(3, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))

    def speed(threads: int) -> float:
        ops.set_threads(threads)
        torch.set_num_threads(threads)
        cache, start = KVCache(model.config, model.ktx.kv_dtype), time.perf_counter()
        with torch.inference_mode():
            model(input_ids=ids, **cache_argument(model, cache), logits_to_keep=1)
        return args.prompt / (time.perf_counter() - start)

    speed(most)
    rounds = []
    for _ in range(args.repeat):
        one, all_of_them = speed(1), speed(most)
        rounds.append((one, all_of_them, all_of_them / one))
        if not args.json:
            print(f"1 thread {one:.1f} tok/s, {most} threads {all_of_them:.1f}: {all_of_them / one:.2f}x", flush=True)
    one, all_of_them, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
    peaks = ops.probe_int8(most, 0.2) / ops.probe_int8(1, 0.2)
    if args.json:
        print(json.dumps({"threads": most, "one": one, "all": all_of_them, "ratio": ratio, "int8_probe": peaks}))
    else:
        print(f"median {ratio:.2f}x; the int8 probe alone {peaks:.2f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
