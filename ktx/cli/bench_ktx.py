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
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ktx.cli.bench import parts, token_ids

FRESH = 1024  # MiB of new memory to be written
ERROR_ROWS = 256  # of a matrix, whose products are compared
CAT_PIECE, CAT_PIECES = 1 << 26, 64  # at most 4 GiB are read for the comparison


def main() -> int:
    """Loads, announces the model on one line, then measures until standard input ends."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--weights", "--rules"):
        parser.add_argument(name)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: what else ktx.load is told")
    args = parser.parse_args()
    from ktx.errors import KtxError

    try:
        import ktx
        from ktx.hardware import last_level_cache
        from ktx.kernels.cpu import ops
        from ktx.kernels.microbench import pass_bytes

        model, _ = ktx.load(args.model, args.weights, args.rules, threads=args.threads, progress=False, **args.options)
    except KtxError as error:
        print(json.dumps({"error": str(error), "exit": error.exit_code}), flush=True)
        return error.exit_code
    h = model.ktx
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {
        "ready": True,
        "isa": h.isa,
        "threads": h.threads,
        "bytes": h.nbytes,
        "bytes_per_token": h.bytes_per_token,
        "load_seconds": h.seconds,
        "load_gb_s": h.load_speed,
        "cat_gb_s": cat_speed({spec.file for step in h.plan for spec in step.specs}, h.threads),
        "pack_gb_s": pack_speed(h.plan, h.threads),
        "fresh_gb_s": ops.probe_fresh(h.threads, FRESH),
        "probe_bytes": pass_bytes(),
        "cache_bytes": last_level_cache(),
        "peak_rss": peak,
        "rss_bound": int(h.nbytes * 1.15) + (1 << 30),
        "params": active_params(model),
        "errors": {kind: matrix_errors(model, together) for kind, together in (("pp", 64), ("tg", 1))},
    }
    print(json.dumps(facts), flush=True)
    forward(model, token_ids(16, model.config.vocab_size), 16)
    for line in sys.stdin:
        print(json.dumps(measure(model, json.loads(line)["test"])), flush=True)
    os._exit(0)  # the team's threads need no farewell


def active_params(model: Any) -> int:
    """Weights that a token of a prompt is multiplied with: all but the output layer, experts by their share."""
    from ktx.ops.experts import Experts
    from ktx.ops.linear import Linear
    from ktx.ops.mla import MLA

    total = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            total += module.in_features * module.out_features
        elif isinstance(module, Experts):
            total += module.weights_per_token()
        elif isinstance(module, MLA):
            total += sum(w.n * w.k * w.matrices for w in (module.w_uk_t, module.w_uv))
    return total


def matrix_errors(model: Any, together: int) -> dict[str, float]:
    """Of one matrix of each weight type, on Gaussian activations: relative RMS of the product against float64 on the same weights.

    `together` tokens are multiplied at once. Of stacked matrices the first memory node's share of the first one is taken.
    """
    import torch

    from ktx.kernels import cpu
    from ktx.kernels.check import relative

    found: dict[str, float] = {}
    for packed in packed_matrices(model):
        groups = -(-packed.n // cpu.GROUP_ROWS)
        share = groups if packed.matrices == 1 else cpu.ops.share_of(groups, 1)
        if packed.qtype.name in found or not share:
            continue
        n = min(packed.n, share * cpu.GROUP_ROWS)
        one = cpu.Packed(packed.data[: packed.nbytes // packed.matrices // groups * share], packed.qtype, n, packed.k)
        rows = one.rows(torch.arange(min(n, ERROR_ROWS))).double()
        x = torch.randn(64, packed.k, generator=torch.Generator().manual_seed(3))
        got = torch.cat([cpu.linear(some, one) for some in x.split(together)])[:, : len(rows)]
        found[packed.qtype.name] = relative(got, x.double() @ rows.T)
    return found


def packed_matrices(model: Any) -> Iterator[Any]:
    """Every packed matrix of the model's linear layers and experts."""
    from ktx.ops.experts import Experts
    from ktx.ops.linear import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            yield from module.parts
        elif isinstance(module, Experts):
            yield from module.weights.values()


def cat_speed(files: Iterable[str], threads: int) -> float:
    """GB/s at which `threads` copies of `cat FILE >/dev/null` would read the cached files; the better of two passes."""
    pieces = [
        (file, at, min(CAT_PIECE, size - at))
        for file in sorted(files)
        for size in [os.path.getsize(file)]
        for at in range(0, size, CAT_PIECE)
    ][:CAT_PIECES]

    def read(piece: tuple[str, int, int]) -> int:
        file, at, size = piece
        buffer, done = bytearray(1 << 20), 0
        with open(file, "rb", buffering=0) as handle:
            handle.seek(at)
            while done < size and (count := handle.readinto(memoryview(buffer)[: size - done])):
                done += count
        return done

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):
            start = time.perf_counter()
            total = sum(pool.map(read, pieces))
            best = max(best, total / (time.perf_counter() - start) / 1e9)
    return best


def pack_speed(plan: Any, threads: int) -> float:
    """GB/s at which `threads` threads pack the plan's largest tensor type into memory that they have; the better of three passes."""
    import torch

    from ktx.kernels.cpu import ops, packed_nbytes

    nbytes: Counter[Any] = Counter()
    for spec in (spec for step in plan for spec in step.specs if len(spec.shape) > 1):
        nbytes[spec.qtype] += spec.nbytes
    qtype, rows, columns = nbytes.most_common(1)[0][0], 1 << 15, 2048  # more than caches hold
    scale = torch.ones(rows // 128, columns // 128) if qtype.name == "F8_E4M3" else None
    source = [torch.zeros(rows, qtype.row_bytes(columns), dtype=torch.uint8) for _ in range(threads)]
    target = [torch.zeros(packed_nbytes(qtype, rows, columns), dtype=torch.uint8) for _ in range(threads)]

    def pack(thread: int) -> int:
        for row in range(0, rows, 1024):
            ops.pack(source[thread][row : row + 1024], qtype.code, rows, columns, target[thread], row, scale)
        return source[thread].numel()

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            total = sum(pool.map(pack, range(threads)))
            best = max(best, total / (time.perf_counter() - start) / 1e9)
    return best


def forward(model: Any, ids: list[int], step: int | None, prompt: tuple[int, ...] | list[int] = ()) -> float:
    """Seconds to run ids through the model, `step` at a time (None: as a prompt), after a prompt that does not count."""
    import torch

    from ktx.cache.kv import KVCache
    from ktx.engine.budget import StepBudget
    from ktx.transformers_compat import cache_argument

    budget = StepBudget()
    cache, tokens = KVCache(model.config, model.ktx.kv_dtype), torch.tensor([[*prompt, *ids]])
    start, at = time.perf_counter(), 0
    with torch.inference_mode():
        while at < tokens.shape[1]:
            before = at < len(prompt)
            piece = budget.tokens(at)
            end = min(at + (piece if before else step or piece), len(prompt) if before else tokens.shape[1])
            model(input_ids=tokens[:, at:end], **cache_argument(model, cache), logits_to_keep=1)
            at = end
            if at == len(prompt):
                start = time.perf_counter()
    return time.perf_counter() - start


def measure(model: Any, test: str) -> dict[str, Any]:
    """A prompt of N tokens ("ppN"), or N tokens after a short one ("tgN"), after D others ("@dD"), with the limit probed right before."""
    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import read_bandwidth

    kind, count, depth = parts(test)
    threads, vocabulary = model.ktx.threads, model.config.vocab_size
    limit = ops.probe_int8(threads, 0.1) if kind == "pp" else read_bandwidth(threads).gb_s
    ids = token_ids(count, vocabulary)
    before = token_ids(depth if kind == "pp" else depth or 4, vocabulary)
    rate = count / forward(model, ids, None if kind == "pp" else 1, before)
    used = rate * (2 * active_params(model) if kind == "pp" else model.ktx.bytes_per_token) / 1e9
    return {"test": test, "tok_s": rate, "limit": limit, "used": used, "share": used / limit}


if __name__ == "__main__":
    raise SystemExit(main())
