"""What an idle process costs, and what its first token costs after it: `python benchmarks/idle.py [--model DIR]`.

CPU time used while nothing is asked, as a share of one core, and the time of the first token after the pause less that of a token among others.
A virtual machine pays for a pause by itself: its host parks cores and gives their caches away. So before each of these pauses lies another,
after which torch adds up as many bytes as a token reads: what that takes longer than usual is the machine's own share.
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
    """Prints one line a pause and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or GGUF (default: the demo model)")
    parser.add_argument("--pause", type=float, default=10.0, metavar="SECONDS", help="default 10")
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    import torch

    import ktx
    import ktx.demo
    from ktx.cache.kv import KVCache
    from ktx.transformers_compat import cache_argument

    weights = None if args.model else str(ktx.demo.gguf())
    model, _ = ktx.load(args.model or str(ktx.demo.path()), weights, progress=False)
    cache = KVCache(model.config)
    plain = torch.ones(max(1, model.ktx.bytes_per_token // 8), dtype=torch.int64)

    def token() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=torch.tensor([[5]]), **cache_argument(model, cache))
        return (time.perf_counter() - start) * 1e3

    def read() -> float:
        start = time.perf_counter()
        plain.sum()
        return (time.perf_counter() - start) * 1e3

    for _ in range(10):
        token()
    rows = []
    for _ in range(args.repeat):
        read_steady = statistics.median(read() for _ in range(20))
        time.sleep(args.pause)
        machine = read() - read_steady
        steady = statistics.median(token() for _ in range(20))
        used = time.process_time()
        time.sleep(args.pause)
        used = (time.process_time() - used) / args.pause
        first = token() - steady
        rows.append({"idle_core_share": used, "token_ms": steady, "first_extra_ms": first, "machine_extra_ms": machine})
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    if args.json:
        print(json.dumps(found))
        return 0
    for row in [*rows, found]:
        name = "median" if row is found else f"{args.pause:g} s idle"
        print(
            f"{name:12}{row['idle_core_share']:>9.2%} of a core"
            f"{row['token_ms']:>10.2f} ms a token, the first {row['first_extra_ms']:+.2f} ms; "
            f"a plain read of as many bytes {row['machine_extra_ms']:+.2f} ms"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
