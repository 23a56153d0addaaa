"""Measures an idle process and its first token after the pause: `python benchmarks/idle.py [--model DIR]`.

Reports the CPU time while idle, as a fraction of one core, and how much longer the first token after the pause takes
than a token in steady state. On a virtual machine a pause has a cost of its own, because the host parks cores and
gives their caches away. So each pause is preceded by another one, after which torch sums as many bytes as a token
reads: the time that this takes longer than in steady state is the machine's part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str] | None = None) -> int:
    """Prints a line per pause and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or GGUF (default: the demo model)")
    parser.add_argument("--pause", type=float, default=10.0, metavar="SECONDS", help="length of a pause (default 10)")
    parser.add_argument(
        "-r", "--repeat", type=int, default=3, help="number of pauses; the median is reported (default 3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    import torch

    import ktx
    import ktx.demo
    from ktx.cache.kv import KVCache
    from ktx.transformers_compat import cache_argument

    weights = None if args.model else str(ktx.demo.gguf())
    model, _ = ktx.load(args.model or str(ktx.demo.path()), weights, progress=False)
    cache = KVCache(model.config)
    buffer = torch.ones(max(1, model.ktx.bytes_per_token // 8), dtype=torch.int64)

    def token_ms() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=torch.tensor([[5]]), **cache_argument(model, cache))
        return (time.perf_counter() - start) * 1e3

    def read_ms() -> float:
        start = time.perf_counter()
        buffer.sum()
        return (time.perf_counter() - start) * 1e3

    for _ in range(10):
        token_ms()
    rows = []
    for _ in range(args.repeat):
        steady_read_ms = statistics.median(read_ms() for _ in range(20))
        time.sleep(args.pause)
        machine_extra_ms = read_ms() - steady_read_ms
        steady_ms = statistics.median(token_ms() for _ in range(20))
        cpu_share = time.process_time()
        time.sleep(args.pause)
        cpu_share = (time.process_time() - cpu_share) / args.pause
        first_extra_ms = token_ms() - steady_ms
        rows.append(
            {
                "idle_core_share": cpu_share,
                "token_ms": steady_ms,
                "first_extra_ms": first_extra_ms,
                "machine_extra_ms": machine_extra_ms,
            }
        )
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    if args.json:
        print(json.dumps(medians))
        return 0
    for row in [*rows, medians]:
        name = "median" if row is medians else f"{args.pause:g} s idle"
        print(
            f"{name:12}{row['idle_core_share']:>9.2%} of a core"
            f"{row['token_ms']:>10.2f} ms per token, the first {row['first_extra_ms']:+.2f} ms; "
            f"a plain read of as many bytes {row['machine_extra_ms']:+.2f} ms"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
