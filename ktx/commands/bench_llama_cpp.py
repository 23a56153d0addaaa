"""The process of `ktx bench --peer llama.cpp` that runs llama.cpp through llama-cpp-python's C interface. Same protocol as bench_ktx."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> int:
    """Loads the GGUF with or without repacking, announces it, then measures until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repack", type=int)
    parser.add_argument("--context", type=int)
    args = parser.parse_args()
    try:
        import llama_cpp as lib
    except ImportError as error:
        print(
            json.dumps({"error": f"llama.cpp is not there ({error}): pip install llama-cpp-python", "exit": 1}),
            flush=True,
        )
        return 1
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where llama.cpp logs
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.use_mmap, params.use_extra_bufts = 0, True, bool(args.repack)
    start = time.perf_counter()
    model = lib.llama_model_load_from_file(args.weights.encode(), params)
    context = lib.llama_context_default_params()
    context.n_ctx, context.n_batch, context.n_ubatch = args.context, 512, 512
    context.n_threads = context.n_threads_batch = args.threads
    state = lib.llama_init_from_model(model, context) if model else None
    if not state:
        print(json.dumps({"error": f"llama.cpp cannot load {args.weights}", "exit": 1}), file=out, flush=True)
        return 1
    print(json.dumps({"ready": True, "load_seconds": time.perf_counter() - start}), file=out, flush=True)

    def decode(ids: list[int]) -> None:
        tokens = (lib.llama_token * len(ids))(*ids)  # the batch only points to them
        if lib.llama_decode(state, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")

    decode([5, 6, 7])  # touches every page once
    for line in sys.stdin:
        test = json.loads(line)["test"]
        kind, count = test[:2], int(test[2:])
        lib.llama_memory_clear(lib.llama_get_memory(state), True)
        ids = [100 + i * 7919 % 200 for i in range(count)]
        if kind == "tg":
            decode(ids[:4])
        start = time.perf_counter()
        for at in range(0, count, 512 if kind == "pp" else 1):
            decode(ids[at : at + (512 if kind == "pp" else 1)])
        lib.llama_synchronize(state)
        print(json.dumps({"test": test, "tok_s": count / (time.perf_counter() - start)}), file=out, flush=True)
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
