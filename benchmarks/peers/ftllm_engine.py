"""ftllm's process for compare.py: the ftllm wheel (fastllm 1.9).

It speaks the protocols of ktx.cli.bench_ktx and, with --layer, of ktx.cli.bench_layer.

ftllm runs only complete models, so with --layer it gets a Qwen3-MoE of one layer: its attention is a single head with
an output of zero, its embedding is so small that the final norm sees the experts alone, and its output layer projects
on 256 random directions, in which results are compared. The time of a prompt is that to its first token, the time of a
single token that between two tokens of an answer.
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

from ktx.cli.bench_moe_layer import CHECKED_TOKENS, MIN_SECONDS, MoELayer, reference_output, serve_tests
from ktx.cli.bench_process import parse_test, token_ids
from ktx.kernels.check import relative_error

VOCABULARY, DIRECTIONS, HEAD_DIM = 4096, 256, 64
EMBEDDING_SCALE = 2.0**-12  # small against the experts' outputs of about 1
ANSWER_TOKENS = 33  # of an answer that is timed
SETTLE_S = (
    3.5  # before a result is reported: ftllm's workers spin for 3 s after their work and would slow the next engine
)
STUBBED_MODULES = (
    "PIL",
    "PIL.Image",
    "imageio",
    "tiktoken",
    "blobfile",
)  # imported by ftllm for pictures and other tokenizers


class StubModule(types.ModuleType):
    """Stub of a package that ftllm imports but does not use here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def is_importable(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def install_stub(name: str) -> None:
    """Makes a module importable that ftllm imports and this measurement does not use."""
    module: Any = StubModule(name)
    module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


def main() -> int:
    """Measures a model, or writes the one-layer model of --layer and measures it in each requested format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=MoELayer.read)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights")
    parser.add_argument("--model")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")  # the wheel prints to standard output
    os.dup2(2, 1)
    for name in STUBBED_MODULES:
        if not is_importable(name):
            install_stub(name)
    try:
        from ftllm import llm
    except (ImportError, OSError) as error:
        text = f"ftllm is not installed ({error}): pip install --no-deps ftllm"
        print(json.dumps({"error": text, "exit": 1}), file=out, flush=True)
        return 1
    llm.set_device_map("cpu")
    llm.set_device_map("cpu", True)
    llm.set_cpu_threads(args.threads)
    if args.weights:
        return run_model_tests(llm, args, out)
    folder = Path(tempfile.mkdtemp(prefix="ktx-bench-"))
    try:
        tensors = write_model(folder, args.layer)

        def build(name: str) -> Callable[[int], dict[str, float]]:
            return load_layer(llm, folder, args.layer, tensors, name)

        serve_tests(
            {"ready": True, "version": importlib.metadata.version("ftllm"), "formats": ["int8", "int4g"]}, build, out
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def write_model(folder: Path, layer: MoELayer) -> dict[str, Any]:
    """Writes the one-layer model to a Hugging Face folder in bf16.

    Attention contributes nothing (o_proj is zero) and the norms are ones, so that the logits show the errors of the
    experts.

    Returns:
        Its tensors by name, without those of the experts, which are in "weights" as gate, up and down.
    """
    import torch
    from safetensors.torch import save_file

    from ktx import demo

    rng = torch.Generator().manual_seed(12)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(shape, generator=rng) * scale).bfloat16()

    prefix = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, layer.hidden, scale=EMBEDDING_SCALE),
        "model.norm.weight": torch.ones(layer.hidden).bfloat16(),
        "lm_head.weight": torch.cat(
            [
                normal(DIRECTIONS, layer.hidden, scale=layer.hidden**-0.5),
                torch.zeros(VOCABULARY - DIRECTIONS, layer.hidden).bfloat16(),
            ]
        ),
        f"{prefix}input_layernorm.weight": torch.ones(layer.hidden).bfloat16(),
        f"{prefix}post_attention_layernorm.weight": torch.ones(layer.hidden).bfloat16(),
        **{
            f"{prefix}self_attn.{n}_proj.weight": normal(HEAD_DIM, layer.hidden, scale=layer.hidden**-0.5)
            for n in "qkv"
        },
        f"{prefix}self_attn.o_proj.weight": torch.zeros(layer.hidden, HEAD_DIM).bfloat16(),
        **{f"{prefix}self_attn.{n}_norm.weight": torch.ones(HEAD_DIM).bfloat16() for n in "qk"},
        f"{prefix}mlp.gate.weight": normal(layer.experts, layer.hidden, scale=layer.hidden**-0.5),
    }
    weights = layer.weights()
    experts = {
        f"{prefix}mlp.experts.{e}.{name}_proj.weight": matrices[e]
        for name, matrices in zip(("gate", "up", "down"), weights, strict=True)
        for e in range(layer.experts)
    }
    save_file(
        {k: v.contiguous() for k, v in (tensors | experts).items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "hidden_size": layer.hidden, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD_DIM,
        "num_experts": layer.experts, "num_experts_per_tok": layer.top,
        "moe_intermediate_size": layer.width, "intermediate_size": layer.width,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": VOCABULARY - 1, "attention_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(demo.path()) / name, folder)
    return {"weights": weights, **tensors}


class FtllmModel:
    """A model in ftllm, called with token ids through its C API."""

    def __init__(self, llm: Any, path: str, **options: str):
        self.model, self.library = llm.model(path, dtype="float16", **options), llm.fastllm_lib
        self.model.set_atype("float32")
        self.stops = self.model.stop_token_ctypes(None)

    def submit(self, ids: list[int], max_tokens: int, logits: bool = False) -> int:
        """Starts a greedy request of at most `max_tokens` tokens and returns its handle."""
        single = ctypes.c_float(1)
        return int(
            self.library.launch_response_llm_model(
                self.model.model, len(ids), (ctypes.c_int * len(ids))(*ids),
                ctypes.c_int(max_tokens), ctypes.c_int(0), ctypes.c_bool(False),
                single, ctypes.c_int(1), single, single, ctypes.c_bool(logits), *self.stops,
            )
        )  # fmt: skip

    def token_times(self, ids: list[int], max_tokens: int) -> list[float]:
        """Returns the seconds from the request to each token of its answer."""
        times: list[float] = []
        start, handle = time.perf_counter(), self.submit(ids, max_tokens)
        while True:
            while not self.library.can_fetch_response_llm_model(self.model.model, handle):
                time.sleep(0.0001)
            if self.library.fetch_response_llm_model(self.model.model, handle) <= -1:
                return times
            times.append(time.perf_counter() - start)

    def logits(self, ids: list[int], vocabulary: int) -> list[float]:
        """Returns the logits of the last token of `ids`."""
        buffer = (ctypes.c_float * (vocabulary * 4))()
        handle = self.submit(ids, 1, True)
        self.library.fetch_response_logits_llm_model(self.model.model, handle, buffer)
        values = list(buffer)[:vocabulary]
        while self.library.fetch_response_logits_llm_model(self.model.model, handle, buffer) != -1:
            continue
        return values


def run_model_tests(llm: Any, args: argparse.Namespace, out: Any) -> int:
    """Runs tests of a complete model: a GGUF with the folder of its configuration, or a folder of safetensors."""
    start = time.perf_counter()
    options = {"ori_model_path": args.model} if args.weights.endswith(".gguf") else {}
    model, vocabulary = (
        FtllmModel(llm, args.weights, **options),
        json.loads((Path(args.model) / "config.json").read_text())["vocab_size"],
    )
    model.token_times(token_ids(16, vocabulary), 2)  # warm-up, in which it repacks the experts of a GGUF
    print(json.dumps({"ready": True, "load_seconds": time.perf_counter() - start}), file=out, flush=True)
    for index, line in enumerate(sys.stdin):
        test = json.loads(line)["test"]
        kind, count, depth = parse_test(test)
        if kind == "pp" and depth:
            print(
                json.dumps({"error": f"ftllm: {test}: prefill after a context is not measured", "exit": 2}),
                file=out,
                flush=True,
            )
            continue
        prompt = token_ids(count if kind == "pp" else depth or 4, vocabulary)
        prompt[0] = 3 + index  # a new prompt, because ftllm has a prefix cache
        times = model.token_times(prompt, 2 if kind == "pp" else count + 1)
        speed = count / times[0] if kind == "pp" else (len(times) - 1) / (times[-1] - times[0])
        time.sleep(SETTLE_S)
        print(json.dumps({"test": test, "isa": "CPU", "tok_s": speed}), file=out, flush=True)
    out.flush()
    os._exit(0)


def load_layer(
    llm: Any, folder: Path, layer: MoELayer, tensors: dict[str, Any], name: str
) -> Callable[[int], dict[str, float]]:
    """Loads the one-layer model with its experts in one of ftllm's types; returns a function that measures it."""
    import torch

    model = FtllmModel(llm, str(folder), moe_dtype=name)

    def measure(tokens: int) -> dict[str, float]:
        """Returns milliseconds per forward, from times of tokens, and the relative error of the logits.

        ftllm has no call for a single layer, so the layer runs inside a one-layer model.
        """
        rng = torch.Generator().manual_seed(tokens)
        times: list[float] = []
        while len(times) < 2 or sum(times) < MIN_SECONDS:  # a new prompt each time, because ftllm has a prefix cache
            ids = torch.randint(5, VOCABULARY - 5, (max(tokens, 4),), generator=rng).tolist()
            token_times = model.token_times(ids, 2 if tokens > 1 else ANSWER_TOKENS)
            times.append(token_times[0] if tokens > 1 else (token_times[-1] - token_times[0]) / (len(token_times) - 1))
        ids = torch.randint(5, VOCABULARY - 5, (CHECKED_TOKENS // 8,), generator=rng).tolist()
        logits = torch.tensor([model.logits([i], VOCABULARY)[:DIRECTIONS] for i in ids])
        time.sleep(SETTLE_S)
        return {
            "ms": min(times[1:]) * 1e3,
            "relative_error": relative_error(logits, reference_logits(layer, tensors, ids)),
        }

    return measure


def reference_logits(layer: MoELayer, tensors: dict[str, Any], ids: list[int]) -> Any:
    """Computes the one-layer model's logits of single tokens in float32, the reference for its relative error."""
    import torch

    def norm(x: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    x = tensors["model.embed_tokens.weight"][ids].float()
    normed = norm(x)
    routing_weights, chosen = (
        (normed @ tensors["model.layers.0.mlp.gate.weight"].float().T).softmax(-1).topk(layer.top, -1)
    )
    y = reference_output(tensors["weights"], normed, chosen, routing_weights / routing_weights.sum(-1, keepdim=True))
    return norm(x + y) @ tensors["lm_head.weight"][:DIRECTIONS].float().T


if __name__ == "__main__":
    raise SystemExit(main())
