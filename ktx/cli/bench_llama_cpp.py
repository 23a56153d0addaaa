"""The process of `ktx bench --peer llama.cpp` or `ik_llama.cpp`: their C API behind the protocol of bench_ktx."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from typing import Any

from ktx.cli.bench_process import parse_test, token_ids


class LlamaCpp:
    """llama.cpp through llama-cpp-python.

    Parameters are llama.cpp's defaults except threads, context size, repacking and micro-batch size.
    """

    package = "llama-cpp-python"
    state: Any = None
    vocabulary = 0
    ubatch = 0  # micro-batch size in tokens; no call gets more
    position = 0  # tokens in the KV cache

    def __init__(self) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp

    def load(self, args: argparse.Namespace) -> bool:
        """Loads the model and creates a context; returns whether that succeeded."""
        lib = self.lib
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(args.weights.encode(), self.model_params(args))
        if not model:
            return False
        context = lib.llama_context_default_params()
        self.ubatch = args.ubatch
        context.n_ctx, context.n_batch, context.n_ubatch = args.context, args.ubatch, args.ubatch
        context.n_threads = context.n_threads_batch = args.threads
        self.state = lib.llama_init_from_model(model, context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        return bool(self.state)

    def model_params(self, args: argparse.Namespace) -> Any:
        """Returns the parameters of the model: weights mapped, and repacked if `args` says so."""
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers, params.use_mmap, params.use_extra_bufts = 0, True, bool(args.repack)
        return params

    def clear(self) -> None:
        """Empties the KV cache."""
        self.position = 0
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.state), True)

    def batch(self, tokens: Any) -> Any:
        """Returns a llama_batch of one sequence of tokens."""
        return self.lib.llama_batch_get_one(tokens, len(tokens))

    def decode(self, ids: list[int]) -> None:
        """Computes at most `ubatch` tokens."""
        tokens = (self.lib.llama_token * len(ids))(*ids)  # the batch only points to them
        if self.lib.llama_decode(self.state, self.batch(tokens)):
            raise RuntimeError("llama_decode failed")
        self.position += len(ids)

    def wait(self) -> None:
        """Waits until all decodes are done."""
        self.lib.llama_synchronize(self.state)

    def system_info(self) -> str:
        """Returns the instruction sets that the library was built for and found."""
        return str(self.lib.llama_print_system_info().decode())


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp through ik-llama-cpp-python, whose API is llama.cpp's of 2024: a batch has its position."""

    package = "ik-llama-cpp-python"

    def __init__(self) -> None:
        from ik_llama_cpp import _ctypes_api

        self.lib = _ctypes_api
        self.c_library: Any = _ctypes_api._lib  # for functions that the package does not bind
        self.c_library.llama_synchronize.argtypes = [ctypes.c_void_p]
        self.c_library.llama_print_system_info.restype = ctypes.c_char_p

    def model_params(self, args: argparse.Namespace) -> Any:
        """Returns the parameters of the model: weights mapped, and repacked if `args` says so."""
        params = self.lib.llama_model_default_params()
        params.repack_tensors, params.mla = bool(args.repack), self.lib.llama_context_default_params().mla_attn
        params.use_mmap = not args.repack  # it repacks into newly allocated memory
        return params

    def clear(self) -> None:
        """Empties the KV cache."""
        self.position = 0
        self.lib.llama_kv_cache_clear(self.state)

    def batch(self, tokens: Any) -> Any:
        """A batch at the current position: this API does not continue by itself."""
        return self.lib.llama_batch(
            n_tokens=len(tokens), token=tokens, all_pos_0=self.position, all_pos_1=1, all_seq_id=0
        )

    def wait(self) -> None:
        """Waits until the library has computed the last batch."""
        self.c_library.llama_synchronize(self.state)

    def system_info(self) -> str:
        """Returns the instruction sets that the library was built for and found."""
        return str(self.c_library.llama_print_system_info().decode())


ENGINES = {"llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlamaCpp}


def main() -> int:
    """Loads the GGUF with or without repacking, reports it, then measures until standard input ends.

    Standard output is moved to another descriptor first, because the library logs to it and the results are JSON lines.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--weights")
    for name in ("--threads", "--repack", "--ubatch", "--context"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    engine_class = ENGINES[args.engine]
    try:
        engine = engine_class()
    except ImportError as error:
        text = f"{args.engine} is not installed ({error}): pip install {engine_class.package}"
        print(json.dumps({"error": text, "exit": 1}), file=out, flush=True)
        return 1
    for stream in (1, 2):  # the libraries log to both
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    start = time.perf_counter()
    if not engine.load(args):
        print(json.dumps({"error": f"{args.engine} cannot load {args.weights}", "exit": 1}), file=out, flush=True)
        return 1
    print(json.dumps({"ready": True, "load_seconds": time.perf_counter() - start}), file=out, flush=True)
    engine.clear()
    engine.decode(token_ids(16, engine.vocabulary))  # warm-up
    isa = instruction_sets(engine.system_info())
    for line in sys.stdin:
        test = json.loads(line)["test"]
        print(json.dumps({"test": test, "isa": isa, "tok_s": measure(engine, test)}), file=out, flush=True)
    out.flush()
    os._exit(0)


def measure(engine: LlamaCpp, test: str) -> float:
    """Returns the tokens per second of one test.

    Before the timed part, `depth` tokens are put into the empty KV cache; before a decode at least 4, as in bench_ktx,
    because a decode continues a prompt.
    """
    kind, count, depth = parse_test(test)
    engine.clear()
    prompt, ids = (
        token_ids(depth if kind == "pp" else depth or 4, engine.vocabulary),
        token_ids(count, engine.vocabulary),
    )
    step = engine.ubatch if kind == "pp" else 1
    for offset in range(0, len(prompt), engine.ubatch):
        engine.decode(prompt[offset : offset + engine.ubatch])
    engine.wait()
    start = time.perf_counter()
    for offset in range(0, count, step):
        engine.decode(ids[offset : offset + step])
    engine.wait()
    return count / (time.perf_counter() - start)


def instruction_sets(text: str) -> str:
    """Returns the instruction sets that llama.cpp was built for, such as "AVX2 AVX512 AVX512_VNNI".

    Args:
        text: llama.cpp's system info, entries of NAME = 0 or 1.
    """
    entries = [entry.split(":")[-1].split("=") for entry in text.split("|") if "=" in entry]
    return " ".join(name.strip() for name, value in entries if value.strip() == "1" and "AVX" in name)


if __name__ == "__main__":
    raise SystemExit(main())
