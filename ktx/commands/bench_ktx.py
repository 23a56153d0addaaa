"""The process of `ktx bench` that runs ktx: loads a model, then answers requests on standard input with measurements.

A request is a JSON line {"test": "pp512"} or {"test": "tg32"}; the answer is a JSON line with tok_s and what bounds it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from typing import Any


def main() -> int:
    """Loads, announces the model on one line, then measures until standard input ends."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--weights", "--rules"):
        parser.add_argument(name)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trust", action="store_true")
    args = parser.parse_args()
    from ktx.errors import KtxError

    try:
        import ktx

        model, _ = ktx.load(
            args.model, args.weights, args.rules, threads=args.threads, trust_remote_code=args.trust, progress=False
        )
    except KtxError as error:
        print(json.dumps({"error": str(error), "exit": error.exit_code}), flush=True)
        return error.exit_code
    h = model.ktx
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "ready": True,
                "isa": h.isa,
                "threads": h.threads,
                "bytes": h.nbytes,
                "bytes_per_token": h.bytes_per_token,
                "load_seconds": h.seconds,
                "load_gb_s": h.load_speed,
                "peak_rss": peak,
                "rss_bound": int(h.nbytes * 1.15) + (1 << 30),
                "params": active_params(model),
            }
        ),
        flush=True,
    )
    for line in sys.stdin:
        print(json.dumps(measure(model, json.loads(line)["test"])), flush=True)
    os._exit(0)  # the team's threads need no farewell


def active_params(model: Any) -> int:
    """Weights that one token of a prompt is multiplied with: everything packed, experts by their share, without the output layer."""
    from ktx.ops.experts import Experts
    from ktx.ops.linear import Linear
    from ktx.ops.mla import MLA

    total = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            total += module.in_features * module.out_features
        elif isinstance(module, Experts):
            total += sum(w.n * w.k for w in module.weights.values()) * min(module.top, module.num_experts)
        elif isinstance(module, MLA):
            total += sum(w.n * w.k * w.matrices for w in (module.w_uk_t, module.w_uv))
    return total


def measure(model: Any, test: str) -> dict[str, Any]:
    """One prompt of N tokens ("ppN"), or N tokens after a short prompt ("tgN"), with the machine's limits probed right before."""
    import torch

    from ktx.cache.kv import KVCache
    from ktx.kernels.cpu import ops

    kind, count = test[:2], int(test[2:])
    threads = model.ktx.threads
    limit = ops.probe_int8(threads, 0.1) if kind == "pp" else ops.probe_read(threads, 256)
    ids = torch.randint(
        3, model.config.vocab_size - 1, (1, count if kind == "pp" else 4), generator=torch.Generator().manual_seed(1)
    )
    cache = KVCache(model.config)
    with torch.inference_mode():
        if kind == "pp":
            start = time.perf_counter()
            for at in range(0, count, 512):
                out = model(input_ids=ids[:, at : at + 512], past_key_values=cache, logits_to_keep=1)
            float(out.logits.sum())
        else:
            token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(count):
                token = (
                    model(input_ids=token, past_key_values=cache, logits_to_keep=1)
                    .logits[:, -1]
                    .argmax(-1, keepdim=True)
                )
        seconds = time.perf_counter() - start
    rate = count / seconds
    used = rate * (2 * active_params(model) if kind == "pp" else model.ktx.bytes_per_token) / 1e9
    return {"test": test, "tok_s": rate, "limit": limit, "used": used, "share": used / limit}


if __name__ == "__main__":
    raise SystemExit(main())
