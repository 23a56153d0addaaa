"""The process of `ktx bench --peer ftllm`: the ftllm wheel (fastllm 1.9), the protocols of bench_ktx and of bench_layer.

ftllm runs models only, so with --layer it gets a Qwen3-MoE of one layer: its attention is a single head with no output, its embedding so small that the last
norm sees the experts alone, and its output layer 256 random directions in which results are compared. A prompt's time is that to its first token, a
single token's that between two of an answer.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktx.cli.bench import parts, token_ids
from ktx.cli.bench_layer import CHECKED, ENOUGH, Layer, serve, truth
from ktx.kernels.check import relative

VOCABULARY, DIRECTIONS, HEAD = 4096, 256, 64
SMALL = 2.0**-12  # of the embedding, beside results of about one
ANSWER = 33  # tokens of an answer that is timed
CALM = 3.5  # seconds before an answer: its workers spin for three after their work, beside whoever is measured next
ABSENT = ("PIL", "PIL.Image", "imageio", "tiktoken", "blobfile")  # imported by ftllm for pictures and other tokenizers


class Anything(types.ModuleType):
    """Stands in for a package that is imported and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def stand_in(name: str) -> None:
    module: Any = Anything(name)
    module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


def main() -> int:
    """Loads a model and measures it; or writes that of a layer, and loads it in each format asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=Layer.read)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights")
    parser.add_argument("--model")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")  # the wheel prints to standard output
    os.dup2(2, 1)
    for name in ABSENT:
        if not there(name):
            stand_in(name)
    try:
        from ftllm import llm
    except (ImportError, OSError) as missing:
        text = f"ftllm is not there ({missing}): pip install --no-deps ftllm"
        print(json.dumps({"error": text, "exit": 1}), file=out, flush=True)
        return 1
    llm.set_device_map("cpu")
    llm.set_device_map("cpu", True)
    llm.set_cpu_threads(args.threads)
    if args.weights:
        return whole(llm, args, out)
    folder = Path(tempfile.mkdtemp(prefix="ktx-bench-"))
    try:
        tensors = write(folder, args.layer)

        def build(name: str) -> Callable[[int], dict[str, float]]:
            return loaded(llm, folder, args.layer, tensors, name)

        serve({"ready": True, "version": importlib.metadata.version("ftllm"), "formats": ["int8", "int4g"]}, build, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def write(folder: Path, layer: Layer) -> dict[str, Any]:
    """The model as a Hugging Face folder in bf16; its tensors but for the experts'."""
    import torch
    from safetensors.torch import save_file

    from ktx import demo

    source = torch.Generator().manual_seed(12)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(shape, generator=source) * scale).bfloat16()

    own = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, layer.hidden, scale=SMALL),
        "model.norm.weight": torch.ones(layer.hidden).bfloat16(),
        "lm_head.weight": torch.cat(
            [
                normal(DIRECTIONS, layer.hidden, scale=layer.hidden**-0.5),
                torch.zeros(VOCABULARY - DIRECTIONS, layer.hidden).bfloat16(),
            ]
        ),
        f"{own}input_layernorm.weight": torch.ones(layer.hidden).bfloat16(),
        f"{own}post_attention_layernorm.weight": torch.ones(layer.hidden).bfloat16(),
        **{f"{own}self_attn.{n}_proj.weight": normal(HEAD, layer.hidden, scale=layer.hidden**-0.5) for n in "qkv"},
        f"{own}self_attn.o_proj.weight": torch.zeros(layer.hidden, HEAD).bfloat16(),
        **{f"{own}self_attn.{n}_norm.weight": torch.ones(HEAD).bfloat16() for n in "qk"},
        f"{own}mlp.gate.weight": normal(layer.experts, layer.hidden, scale=layer.hidden**-0.5),
    }
    weights = layer.weights()
    experts = {
        f"{own}mlp.experts.{e}.{name}_proj.weight": matrices[e]
        for name, matrices in zip(("gate", "up", "down"), weights, strict=True)
        for e in range(layer.experts)
    }
    save_file(
        {k: v.contiguous() for k, v in (tensors | experts).items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": layer.hidden, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD, "num_experts": layer.experts, "num_experts_per_tok": layer.top,
        "moe_intermediate_size": layer.width, "intermediate_size": layer.width, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": VOCABULARY - 1, "attention_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(demo.path()) / name, folder)
    return {"weights": weights, **tensors}


class Loaded:
    """A model of ftllm's, asked by token ids."""

    def __init__(self, llm: Any, path: str, **words: str):
        self.model, self.library = llm.model(path, dtype="float16", **words), llm.fastllm_lib
        self.model.set_atype("float32")
        self.stops = self.model.stop_token_ctypes(None)

    def ask(self, ids: list[int], answer: int, logits: bool = False) -> int:
        single = ctypes.c_float(1)
        return int(
            self.library.launch_response_llm_model(
                self.model.model, len(ids), (ctypes.c_int * len(ids))(*ids), ctypes.c_int(answer), ctypes.c_int(0), ctypes.c_bool(False),
                single, ctypes.c_int(1), single, single, ctypes.c_bool(logits), *self.stops,
            )
        )  # fmt: skip

    def stamps(self, ids: list[int], answer: int) -> list[float]:
        """Seconds after which each token of an answer was there."""
        found: list[float] = []
        start, handle = time.perf_counter(), self.ask(ids, answer)
        while True:
            while not self.library.can_fetch_response_llm_model(self.model.model, handle):
                time.sleep(0.0001)
            if self.library.fetch_response_llm_model(self.model.model, handle) <= -1:
                return found
            found.append(time.perf_counter() - start)

    def logits(self, ids: list[int], vocabulary: int) -> list[float]:
        """Of the last token."""
        buffer = (ctypes.c_float * (vocabulary * 4))()
        handle = self.ask(ids, 1, True)
        self.library.fetch_response_logits_llm_model(self.model.model, handle, buffer)
        found = list(buffer)[:vocabulary]
        while self.library.fetch_response_logits_llm_model(self.model.model, handle, buffer) != -1:
            continue
        return found


def whole(llm: Any, args: argparse.Namespace, out: Any) -> int:
    """Serves tests of a whole model: a GGUF, with the folder of its configuration, or a folder of safetensors."""
    start = time.perf_counter()
    words = {"ori_model_path": args.model} if args.weights.endswith(".gguf") else {}
    model, vocabulary = (
        Loaded(llm, args.weights, **words),
        json.loads((Path(args.model) / "config.json").read_text())["vocab_size"],
    )
    model.stamps(token_ids(16, vocabulary), 2)  # repacks experts of a GGUF
    print(json.dumps({"ready": True, "load_seconds": time.perf_counter() - start}), file=out, flush=True)
    for turn, line in enumerate(sys.stdin):
        test = json.loads(line)["test"]
        kind, count, depth = parts(test)
        if kind == "pp" and depth:
            print(
                json.dumps({"error": f"ftllm: {test}: prompts after others are not measured", "exit": 2}),
                file=out,
                flush=True,
            )
            continue
        prompt = token_ids(count if kind == "pp" else depth or 4, vocabulary)
        prompt[0] = 3 + turn  # a prompt it has not seen: it keeps what it has
        found = model.stamps(prompt, 2 if kind == "pp" else count + 1)
        speed = count / found[0] if kind == "pp" else (len(found) - 1) / (found[-1] - found[0])
        time.sleep(CALM)
        print(json.dumps({"test": test, "isa": "CPU", "tok_s": speed}), file=out, flush=True)
    out.flush()
    os._exit(0)


def loaded(
    llm: Any, folder: Path, layer: Layer, tensors: dict[str, Any], name: str
) -> Callable[[int], dict[str, float]]:
    """The layer's model with its experts in one of ftllm's types, and what measures it."""
    import torch

    model = Loaded(llm, str(folder), moe_dtype=name)

    def measure(tokens: int) -> dict[str, float]:
        source = torch.Generator().manual_seed(tokens)
        times: list[float] = []
        while len(times) < 2 or sum(times) < ENOUGH:  # a new prompt each time: none is found in a cache
            ids = torch.randint(5, VOCABULARY - 5, (max(tokens, 4),), generator=source).tolist()
            found = model.stamps(ids, 2 if tokens > 1 else ANSWER)
            times.append(found[0] if tokens > 1 else (found[-1] - found[0]) / (len(found) - 1))
        ids = torch.randint(5, VOCABULARY - 5, (CHECKED // 8,), generator=source).tolist()
        got = torch.tensor([model.logits([i], VOCABULARY)[:DIRECTIONS] for i in ids])
        time.sleep(CALM)
        return {"ms": min(times[1:]) * 1e3, "relative_error": relative(got, exact(layer, tensors, ids))}

    return measure


def exact(layer: Layer, tensors: dict[str, Any], ids: list[int]) -> Any:
    """The model's logits of single tokens in float32."""
    import torch

    def norm(x: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    x = tensors["model.embed_tokens.weight"][ids].float()
    inner = norm(x)
    shares, chosen = (inner @ tensors["model.layers.0.mlp.gate.weight"].float().T).softmax(-1).topk(layer.top, -1)
    y = truth(tensors["weights"], inner, chosen, shares / shares.sum(-1, keepdim=True))
    return norm(x + y) @ tensors["lm_head.weight"][:DIRECTIONS].float().T


if __name__ == "__main__":
    raise SystemExit(main())
