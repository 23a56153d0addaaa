"""The process of `ktx bench` that runs ktx: loads a model, then runs the tests that it reads from standard input.

A request is a JSON line {"test": "pp512"} or {"test": "tg32"}; the result is a JSON line with tok_s and its limit.
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

from ktx.cli.bench_process import parse_test, token_ids

FRESH_MIB = 1024  # new memory that the first-write test touches
ERROR_ROWS = 256  # rows of a matrix whose products are compared
CAT_CHUNK_BYTES, MAX_CAT_CHUNKS = 1 << 26, 64  # at most 4 GiB of the files are read


def main() -> int:
    """Loads the model, prints its startup report as a JSON line, then measures until standard input ends."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--weights", "--rules"):
        parser.add_argument(name)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON object of further arguments of ktx.load")
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
    info = model.ktx
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    startup_report = {
        "ready": True,
        "isa": info.isa,
        "threads": info.threads,
        "bytes": info.nbytes,
        "bytes_per_token": info.bytes_per_token,
        "load_seconds": info.seconds,
        "load_gb_s": info.load_speed,
        "cat_gb_s": measure_cat_speed({spec.file for step in info.plan for spec in step.specs}, info.threads),
        "pack_gb_s": measure_pack_speed(info.plan, info.threads),
        "fresh_gb_s": ops.probe_fresh(info.threads, FRESH_MIB),
        "probe_bytes": pass_bytes(),
        "cache_bytes": last_level_cache(),
        "peak_rss": peak_rss_bytes,
        "rss_bound": int(info.nbytes * 1.15) + (1 << 30),
        "params": active_params(model),
        "errors": {kind: measure_matrix_errors(model, together) for kind, together in (("pp", 64), ("tg", 1))},
    }
    print(json.dumps(startup_report), flush=True)
    time_forward(model, token_ids(16, model.config.vocab_size), 16)
    for line in sys.stdin:
        print(json.dumps(measure(model, json.loads(line)["test"])), flush=True)
    os._exit(0)  # skips the shutdown of the thread pool


def active_params(model: Any) -> int:
    """Returns the number of weights that a prompt token is multiplied with, from which `measure` computes operations.

    Of the routed experts those of top-k count; the output layer does not, because it is computed for one token only.
    """
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


def measure_matrix_errors(model: Any, together: int) -> dict[str, float]:
    """Measures the error of one matrix product of each weight type, on Gaussian activations.

    Errors of ktx's kernels only: the reference multiplies the same quantized weights in float64. Of stacked matrices,
    the rows of the first matrix on the first NUMA node are used, because each node has its own part of the packed
    bytes.

    Args:
        together: tokens that are multiplied in one call; kernels differ for one token and for many.

    Returns:
        The relative RMS error, by type.
    """
    import torch

    from ktx.kernels import cpu
    from ktx.kernels.check import relative_error

    errors: dict[str, float] = {}
    for packed in packed_matrices(model):
        groups = -(-packed.n // cpu.GROUP_ROWS)
        node_groups = groups if packed.matrices == 1 else cpu.ops.node_begin(groups, 1)  # on the first NUMA node
        if packed.qtype.name in errors or not node_groups:
            continue
        n = min(packed.n, node_groups * cpu.GROUP_ROWS)
        matrix = cpu.Packed(
            packed.data[: packed.nbytes // packed.matrices // groups * node_groups], packed.qtype, n, packed.k
        )
        rows = matrix.rows(torch.arange(min(n, ERROR_ROWS))).double()
        x = torch.randn(64, packed.k, generator=torch.Generator().manual_seed(3))
        product = torch.cat([cpu.linear(chunk, matrix) for chunk in x.split(together)])[:, : len(rows)]
        errors[packed.qtype.name] = relative_error(product, x.double() @ rows.T)
    return errors


def packed_matrices(model: Any) -> Iterator[Any]:
    """Yields every packed matrix of the model's linear layers and experts, for `measure_matrix_errors`."""
    from ktx.ops.experts import Experts
    from ktx.ops.linear import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            yield from module.parts
        elif isinstance(module, Experts):
            yield from module.weights.values()


def measure_cat_speed(files: Iterable[str], threads: int) -> float:
    """Returns the GB/s at which `threads` threads read the files from the page cache, like `cat FILE >/dev/null`.

    The better of two passes counts. Loading reads the same bytes, so this speed limits it.
    """
    chunks = [
        (file, offset, min(CAT_CHUNK_BYTES, size - offset))
        for file in sorted(files)
        for size in [os.path.getsize(file)]
        for offset in range(0, size, CAT_CHUNK_BYTES)
    ][:MAX_CAT_CHUNKS]

    def read(chunk: tuple[str, int, int]) -> int:
        file, offset, size = chunk
        buffer, done = bytearray(1 << 20), 0
        with open(file, "rb", buffering=0) as handle:
            handle.seek(offset)
            while done < size and (count := handle.readinto(memoryview(buffer)[: size - done])):
                done += count
        return done

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):
            start = time.perf_counter()
            total = sum(pool.map(read, chunks))
            best = max(best, total / (time.perf_counter() - start) / 1e9)
    return best


def measure_pack_speed(plan: Any, threads: int) -> float:
    """Returns the GB/s at which `threads` threads pack the plan's largest tensor type into memory already touched.

    The best of three passes counts. Loading packs the same types, so this speed limits it.
    """
    import torch

    from ktx.kernels.cpu import ops, packed_nbytes

    nbytes: Counter[Any] = Counter()
    for spec in (spec for step in plan for spec in step.specs if len(spec.shape) > 1):
        nbytes[spec.qtype] += spec.nbytes
    qtype, rows, columns = nbytes.most_common(1)[0][0], 1 << 15, 2048  # larger than the caches
    # FP8 weights have a scale per 128 x 128 block, other types have theirs in the rows
    scale = torch.ones(rows // 128, columns // 128) if qtype.name == "F8_E4M3" else None
    sources = [torch.zeros(rows, qtype.row_bytes(columns), dtype=torch.uint8) for _ in range(threads)]
    targets = [torch.zeros(packed_nbytes(qtype, rows, columns), dtype=torch.uint8) for _ in range(threads)]

    def pack(thread: int) -> int:
        for row in range(0, rows, 1024):
            ops.pack(sources[thread][row : row + 1024], qtype.code, rows, columns, targets[thread], row, scale)
        return sources[thread].numel()

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            total = sum(pool.map(pack, range(threads)))
            best = max(best, total / (time.perf_counter() - start) / 1e9)
    return best


def time_forward(model: Any, ids: list[int], step: int | None, prompt: tuple[int, ...] | list[int] = ()) -> float:
    """Returns the seconds that a forward of `ids` takes.

    Args:
        step: tokens per forward; None: the chunks of a prefill.
        prompt: tokens to compute before, which are not timed.
    """
    import torch

    from ktx.cache.kv import KVCache
    from ktx.engine.budget import StepBudget
    from ktx.transformers_compat import cache_argument

    budget = StepBudget()
    cache, tokens = KVCache(model.config, model.ktx.kv_dtype), torch.tensor([[*prompt, *ids]])
    start, position = time.perf_counter(), 0
    with torch.inference_mode():
        while position < tokens.shape[1]:
            in_prompt = position < len(prompt)
            chunk_tokens = budget.max_prompt_tokens(position)
            end = min(
                position + (chunk_tokens if in_prompt else step or chunk_tokens),
                len(prompt) if in_prompt else tokens.shape[1],
            )
            model(input_ids=tokens[:, position:end], **cache_argument(model, cache), logits_to_keep=1)
            position = end
            if position == len(prompt):  # the prompt is done: the timed part begins
                start = time.perf_counter()
    return time.perf_counter() - start


def measure(model: Any, test: str) -> dict[str, Any]:
    """Runs one test, and right before it measures the machine's limit: int8 GOPS for a prefill, GB/s read for a decode.

    "ppN" is the prefill of N tokens, "tgN" the decode of N tokens after a short prompt; "@dD" after a context of D
    tokens.
    """
    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import read_bandwidth

    kind, count, depth = parse_test(test)
    threads, vocabulary = model.ktx.threads, model.config.vocab_size
    limit = ops.probe_int8(threads, 0.1) if kind == "pp" else read_bandwidth(threads).gb_s
    ids = token_ids(count, vocabulary)
    prompt = token_ids(depth if kind == "pp" else depth or 4, vocabulary)  # a decode begins after at least 4 tokens
    tok_s = count / time_forward(model, ids, None if kind == "pp" else 1, prompt)
    # What the test used of the limit: GOPS, with a multiplication and an addition per weight, or GB/s.
    used = tok_s * (2 * active_params(model) if kind == "pp" else model.ktx.bytes_per_token) / 1e9
    return {"test": test, "tok_s": tok_s, "limit": limit, "used": used, "share": used / limit}


if __name__ == "__main__":
    raise SystemExit(main())
