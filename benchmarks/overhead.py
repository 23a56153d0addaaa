"""Host overhead per token: decodes with a DeepSeek-V3 of 61 layers whose matrices are tiny.

    python benchmarks/overhead.py

The arithmetic is negligible, so the time is Python, dispatch and fork-joins. Rows: transformers' own modules,
`model.generate` with ktx's operators, a plain decode loop on ktx; all in one process on one thread, alternating.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ktx
from ktx.cache.kv import KVCache
from ktx.transformers_compat import cache_argument

TINY = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 4, "n_group": 2, "topk_group": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "vocab_size": 512, "first_k_dense_replace": 3,
    "pad_token_id": None, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


def byte_tokenizer() -> Any:
    """Returns a minimal tokenizer, without which the folder cannot be loaded."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(64)}, merges=[]))


def make(layers: int, folder: str) -> Any:
    """Creates the model in transformers, writes its weights to `folder` and returns it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=layers, **TINY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save(f"{folder}/tokenizer.json")
    return model


def generate(model: Any, tokens: int) -> Callable[[], None]:
    """Returns a run of `model.generate`."""
    ids = torch.zeros(1, 4, dtype=torch.long)
    return lambda: model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def loop(model: Any, tokens: int) -> Callable[[], None]:
    """Returns a run of a plain greedy decode loop."""

    def run() -> None:
        cache, token = KVCache(model.config), torch.zeros(1, 1, dtype=torch.long)
        with torch.inference_mode():
            for _ in range(tokens):
                logits = model(input_ids=token, **cache_argument(model, cache), logits_to_keep=1).logits
                token = logits[:, -1].argmax(-1, keepdim=True)

    return run


def main() -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61, help="number of layers (default 61)")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="tokens to decode (default 32)")
    parser.add_argument("-r", "--repeat", type=int, default=5, help="rounds; the median is reported (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        transformers_model = make(args.layers, folder)
        ktx_model, _ = ktx.load(folder, threads=1, progress=False)
    runs = {
        "transformers, generate": generate(transformers_model, args.tokens),
        "ktx, generate": generate(ktx_model, args.tokens),
        "ktx, own loop": loop(ktx_model, args.tokens),
    }
    times_ms: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(args.repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_index:  # the first round warms up caches
                times_ms[name].append((time.perf_counter() - start) / args.tokens * 1e3)
    print(f"{args.layers} layers, {args.tokens} tokens, one thread; ms per token, median (best)")
    for name, values in times_ms.items():
        print(f"{name:24}{statistics.median(values):8.1f} ({min(values):.1f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
