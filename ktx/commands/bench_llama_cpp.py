"""The process of `ktx bench --peer llama.cpp`: llama-cpp-python's C interface, the protocol of bench_ktx."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from ktx.commands.bench import parts, token_ids

BATCH = 512


def main() -> int:
    """Loads the GGUF with or without repacking, announces it, then measures until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    for name in ("--threads", "--repack", "--context"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    try:
        import llama_cpp as lib
    except ImportError as error:
        print(
            json.dumps({"error": f"llama.cpp is not there ({error}): pip install llama-cpp-python", "exit": 1}),
            file=out,
            flush=True,
        )
        return 1
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where llama.cpp logs
    start = time.perf_counter()
    state, vocabulary = load(lib, args)
    if not state:
        print(json.dumps({"error": f"llama.cpp cannot load {args.weights}", "exit": 1}), file=out, flush=True)
        return 1
    print(json.dumps({"ready": True, "load_seconds": time.perf_counter() - start}), file=out, flush=True)
    decode(lib, state, token_ids(16, vocabulary))
    isa = instruction_sets(lib.llama_print_system_info().decode())
    for line in sys.stdin:
        test = json.loads(line)["test"]
        print(
            json.dumps({"test": test, "isa": isa, "tok_s": measure(lib, state, test, vocabulary)}), file=out, flush=True
        )
    out.flush()
    os._exit(0)


def load(lib: Any, args: argparse.Namespace) -> tuple[Any, int]:
    """A context of its own defaults but for threads, length and repacking; and the size of the vocabulary."""
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.use_mmap, params.use_extra_bufts = 0, True, bool(args.repack)
    model = lib.llama_model_load_from_file(args.weights.encode(), params)
    if not model:
        return None, 0
    context = lib.llama_context_default_params()
    context.n_ctx, context.n_batch, context.n_ubatch = args.context, BATCH, BATCH
    context.n_threads = context.n_threads_batch = args.threads
    return lib.llama_init_from_model(model, context), lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))


def decode(lib: Any, state: Any, ids: list[int]) -> None:
    tokens = (lib.llama_token * len(ids))(*ids)  # the batch only points to them
    if lib.llama_decode(state, lib.llama_batch_get_one(tokens, len(ids))):
        raise RuntimeError("llama_decode failed")


def measure(lib: Any, state: Any, test: str, vocabulary: int) -> float:
    """Tokens a second of one test, in a context that holds no more than its depth."""
    kind, count, depth = parts(test)
    lib.llama_memory_clear(lib.llama_get_memory(state), True)
    prompt, ids = token_ids(depth if kind == "pp" else depth or 4, vocabulary), token_ids(count, vocabulary)
    step = BATCH if kind == "pp" else 1
    for at in range(0, len(prompt), BATCH):
        decode(lib, state, prompt[at : at + BATCH])
    lib.llama_synchronize(state)
    start = time.perf_counter()
    for at in range(0, count, step):
        decode(lib, state, ids[at : at + step])
    lib.llama_synchronize(state)
    return count / (time.perf_counter() - start)


def instruction_sets(text: str) -> str:
    """What llama.cpp was built for: "AVX2 AVX512 AVX512_VNNI" of its line of NAME = 0 or 1."""
    entries = [entry.split(":")[-1].split("=") for entry in text.split("|") if "=" in entry]
    return " ".join(name.strip() for name, value in entries if value.strip() == "1" and "AVX" in name)


if __name__ == "__main__":
    raise SystemExit(main())
