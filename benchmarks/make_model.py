"""Creates a model of real shapes with random weights: a GGUF file and its Hugging Face folder, in one directory.

    python benchmarks/make_model.py --preset v2lite -o /tmp/v2lite

writes /tmp/v2lite/v2lite-Q4_K_M.gguf, config.json and a byte-level tokenizer, which ktx and llama.cpp both load.
Speed does not depend on the values of the weights, so benchmarks need no download; the outputs are noise. Every tensor
is cut from a small pool of quantized Gaussian rows, so it needs little memory, and 10 GB take a minute. With
`--header-only` the tensor data is a hole in the file, so that `ktx plan` reads 671B headers without 400 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ktx.quant.random_blocks import random_rows
from ktx.quant.types import QTYPES, QType

POOL_WEIGHTS = 1 << 22  # weights in a pool; the tensors cut from it exceed the last-level cache several times
CHUNK_BYTES = 1 << 24
SHAPES = Path(__file__).resolve().parent / "shapes"  # the published config.json of each model
PRESETS = {file.stem: file for file in sorted(SHAPES.glob("*.json"))}
CONFIG_OPTIONS = {  # option -> the key of config.json that it sets
    "layers": "num_hidden_layers",
    "experts": "n_routed_experts",
    "experts-used": "num_experts_per_tok",
    "moe-ff": "moe_intermediate_size",
    "hidden": "hidden_size",
    "ff": "intermediate_size",
    "vocab": "vocab_size",
}
# types for rows that are not multiples of 256; IQ*: IQ4_NL
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file, with rows of shape[-1]. `role` decides its type in a mix such as Q4_K_M."""

    name: str
    shape: tuple[int, ...]
    role: str  # embedding, output, norm, router, bias, value, down or other
    layer: int = 0

    @property
    def columns(self) -> int:
        """Number of columns, the last dimension."""
        return self.shape[-1]


def configuration(preset: str, changes: dict[str, int | None]) -> dict[str, Any]:
    """Returns config.json of a preset, with the given dimensions changed."""
    config: dict[str, Any] = json.loads(PRESETS[preset].read_text())
    for option, value in changes.items():
        key = CONFIG_OPTIONS[option]
        if value is not None:
            config["num_experts" if key == "n_routed_experts" and key not in config else key] = value
    config["num_experts_per_tok"] = min(config["num_experts_per_tok"], num_experts(config))
    num_groups, topk_groups = config.get("n_group", 1), config.get("topk_group", 1)
    if (
        num_experts(config) % num_groups
        or num_experts(config) // num_groups * topk_groups < config["num_experts_per_tok"]
    ):
        config |= {"n_group": 1, "topk_group": 1}
    if max(config["bos_token_id"], config["eos_token_id"]) >= config["vocab_size"]:
        config |= {"bos_token_id": config["vocab_size"] - 2, "eos_token_id": config["vocab_size"] - 1}
    return config


def num_experts(config: dict[str, Any]) -> int:
    """Returns the number of routed experts of a layer, whatever name the family has for it."""
    return config.get("n_routed_experts") or config["num_experts"]


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Yields every tensor in file order, with the name and shape that llama.cpp's converter gives it."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Tensor("token_embd.weight", (vocab, hidden), "embedding")
    yield Tensor("output_norm.weight", (hidden,), "norm")
    yield Tensor("output.weight", (vocab, hidden), "output")
    attention = _mla if "kv_lora_rank" in config else _grouped_query
    for layer in range(config["num_hidden_layers"]):
        for name, shape, role in [*attention(config), *_feed_forward(config, layer)]:
            yield Tensor(f"blk.{layer}.{name}", shape, role, layer)


Entry = tuple[str, tuple[int, ...], str]


def _mla(c: dict[str, Any]) -> Iterator[Entry]:
    hidden, heads, latent, nope, rope, value = (
        c[k]
        for k in (
            "hidden_size",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        )
    )
    yield "attn_norm.weight", (hidden,), "norm"
    if c["q_lora_rank"]:
        yield "attn_q_a_norm.weight", (c["q_lora_rank"],), "norm"
        yield "attn_q_a.weight", (c["q_lora_rank"], hidden), "other"
        yield "attn_q_b.weight", (heads * (nope + rope), c["q_lora_rank"]), "other"
    else:
        yield "attn_q.weight", (heads * (nope + rope), hidden), "other"
    yield "attn_kv_a_norm.weight", (latent,), "norm"
    yield "attn_kv_a_mqa.weight", (latent + rope, hidden), "other"
    yield "attn_k_b.weight", (heads, latent, nope), "other"
    yield "attn_v_b.weight", (heads, value, latent), "value"
    yield "attn_output.weight", (hidden, heads * value), "other"


def _grouped_query(c: dict[str, Any]) -> Iterator[Entry]:
    hidden, heads, kv_heads, width = (
        c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    yield "attn_norm.weight", (hidden,), "norm"
    yield "attn_q.weight", (heads * width, hidden), "other"
    yield "attn_k.weight", (kv_heads * width, hidden), "other"
    yield "attn_v.weight", (kv_heads * width, hidden), "value"
    yield "attn_output.weight", (hidden, heads * width), "other"
    yield "attn_q_norm.weight", (width,), "norm"
    yield "attn_k_norm.weight", (width,), "norm"


def _feed_forward(c: dict[str, Any], layer: int) -> Iterator[Entry]:
    hidden, width, count = c["hidden_size"], c["moe_intermediate_size"], num_experts(c)
    yield "ffn_norm.weight", (hidden,), "norm"
    if layer < c.get("first_k_dense_replace", 0):
        yield from _gated("", (), c["intermediate_size"], hidden)
        return
    yield "ffn_gate_inp.weight", (count, hidden), "router"
    if c.get("topk_method") == "noaux_tc":
        yield "exp_probs_b.bias", (count,), "bias"
    yield from _gated("_exps", (count,), width, hidden)
    if c.get("n_shared_experts"):
        yield from _gated("_shexp", (), width * c["n_shared_experts"], hidden)


def _gated(suffix: str, lead: tuple[int, ...], width: int, hidden: int) -> Iterator[Entry]:
    yield f"ffn_gate{suffix}.weight", (*lead, width, hidden), "other"
    yield f"ffn_up{suffix}.weight", (*lead, width, hidden), "other"
    yield f"ffn_down{suffix}.weight", (*lead, hidden, width), "down"


def qtype_of(tensor: Tensor, quant: str, layers: int) -> QType:
    """Returns the type in which llama-quantize stores a tensor, for a mix or a single type."""
    if tensor.role in ("norm", "router", "bias"):
        return QTYPES["F32"]
    name = quant
    if quant == "Q4_K_M":
        name = (
            "Q6_K"
            if tensor.role == "output" or (tensor.role in ("value", "down") and _needs_more_bits(tensor.layer, layers))
            else "Q4_K"
        )
    if tensor.columns % QTYPES[name].block:
        name = FALLBACK.get(name, "IQ4_NL" if name.startswith("IQ") else "F16")
    return QTYPES[name if tensor.columns % QTYPES[name].block == 0 else "F16"]


def _needs_more_bits(layer: int, layers: int) -> bool:
    """Returns llama-quantize's choice: the first and the last eighth of the layers, and every third in between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Writes the metadata that llama.cpp needs, from config.json."""
    arch = writer.arch
    common = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "vocab_size": "vocab_size",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }
    integers: dict[str, Any] = {key: config[name] for key, name in common.items()} | {
        "expert_count": num_experts(config)
    }
    integers |= (
        _deepseek_integers(config)
        if arch == "deepseek2"
        else {
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "rope.dimension_count": config["head_dim"],
        }
    )
    writer.add_quantization_version(2)
    for key, value in integers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{arch}.rope.freq_base", config["rope_theta"])
    if arch == "deepseek2":
        writer.add_float32(f"{arch}.expert_weights_scale", config["routed_scaling_factor"])
        writer.add_bool(f"{arch}.expert_weights_norm", config["norm_topk_prob"])
        writer.add_string(f"{arch}.rope.scaling.type", "yarn")
        writer.add_float32(f"{arch}.rope.scaling.factor", config["rope_scaling"]["factor"])
        writer.add_float32(f"{arch}.rope.scaling.yarn_log_multiplier", 0.1 * config["rope_scaling"]["mscale_all_dim"])


def _deepseek_integers(c: dict[str, Any]) -> dict[str, int]:
    """Returns the deepseek2 metadata; MLA is in absorbed form: one head, key = latent and RoPE, value = latent."""
    integers = {
        "attention.head_count_kv": 1,
        "attention.key_length": c["kv_lora_rank"] + c["qk_rope_head_dim"],
        "attention.value_length": c["kv_lora_rank"],
        "attention.key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        "attention.value_length_mla": c["v_head_dim"],
        "attention.kv_lora_rank": c["kv_lora_rank"],
        "rope.dimension_count": c["qk_rope_head_dim"],
        "leading_dense_block_count": c["first_k_dense_replace"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_gating_func": 2 if c["scoring_func"] == "sigmoid" else 1,
        "rope.scaling.original_context_length": c["rope_scaling"]["original_max_position_embeddings"],
    }
    if c["n_group"] > 1:
        integers |= {"expert_group_count": c["n_group"], "expert_group_used_count": c["topk_group"]}
    if c["q_lora_rank"] or c["num_hidden_layers"] not in (
        26,
        27,
    ):  # llama.cpp recognizes the Lite model by its number of layers
        integers["attention.q_lora_rank"] = c["q_lora_rank"] or 0
    return integers


def vocabulary(config: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Returns tokens and their types (1 normal, 3 control): special tokens, the 256 bytes, unused words."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if config["vocab_size"] < 260:
        sys.exit(
            f"make_model.py: a vocabulary of {config['vocab_size']} is too small for 256 bytes and the special tokens"
        )
    special = {config["bos_token_id"]: "<|begin|>", config["eos_token_id"]: "<|end|>"}
    ordinary = iter(
        [*bytes_to_unicode().values(), "Ġt", *(f"Ġx{number:05x}" for number in range(config["vocab_size"]))]
    )
    tokens = [special.get(i) or next(ordinary) for i in range(config["vocab_size"])]
    return tokens, [3 if i in special else 1 for i in range(config["vocab_size"])]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Writes the tokenizer's metadata."""
    tokens, types = vocabulary(config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if config["model_type"] == "qwen3_moe" else "deepseek-llm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ t"])  # llama.cpp requires at least one
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["eos_token_id"])
    writer.add_add_bos_token(config["model_type"] != "qwen3_moe")
    writer.add_chat_template(TEMPLATE)


class Pools:
    """Quantized Gaussian weights, one pool per type and standard deviation; tensors start at a random block."""

    def __init__(self, seed: int):
        self.random, self.pools = np.random.default_rng(seed), dict[tuple[str, int], Any]()

    def write(self, file: BinaryIO, tensor: Tensor, qtype: QType, nbytes: int) -> None:
        """Writes a tensor's data to the file."""
        if tensor.role == "norm":
            file.write(np.ones(tensor.shape, np.float32).tobytes())
            return
        key = (qtype.name, 1 if tensor.role == "embedding" else tensor.columns)
        if key not in self.pools:
            self.pools[key] = (
                random_rows(qtype, max(1, POOL_WEIGHTS // 2048), 2048, seed=len(self.pools), std=key[1] ** -0.5)
                .numpy()
                .reshape(-1)
            )
        pool = self.pools[key]
        offset = int(self.random.integers(len(pool) // qtype.nbytes)) * qtype.nbytes
        while nbytes:
            chunk = pool[offset : offset + min(nbytes, CHUNK_BYTES)]
            file.write(chunk.data)
            nbytes, offset = nbytes - len(chunk), (offset + len(chunk)) % len(pool)


def write_gguf(path: Path, config: dict[str, Any], quant: str, seed: int = 0, header_only: bool = False) -> int:
    """Writes the GGUF file and returns its size in bytes; with `header_only` the tensor data is a hole."""
    writer = gguf.GGUFWriter(path, "qwen3moe" if config["model_type"] == "qwen3_moe" else "deepseek2")
    writer.add_name(f"{path.stem} (random weights)")
    metadata(writer, config)
    tokenizer(writer, config)
    typed_tensors = [(tensor, qtype_of(tensor, quant, config["num_hidden_layers"])) for tensor in tensors(config)]
    sizes = [qtype.row_bytes(tensor.columns) * math.prod(tensor.shape[:-1]) for tensor, qtype in typed_tensors]
    for (tensor, qtype), nbytes in zip(typed_tensors, sizes, strict=True):
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=gguf.GGMLQuantizationType(qtype.code)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout
    file, pools, align = writer.fout[0], Pools(seed), writer.data_alignment
    start = -(-file.tell() // align) * align
    for (tensor, qtype), nbytes in zip(typed_tensors, sizes, strict=True):
        if not header_only:
            file.seek(start)
            pools.write(file, tensor, qtype, nbytes)
        start = -(-(start + nbytes) // align) * align
    file.truncate(start)
    writer.close()
    return start


def write_folder(folder: Path, config: dict[str, Any], file: Path) -> None:
    """Writes config.json, generation_config.json and the GGUF's tokenizer in Hugging Face form."""
    from ktx.weights.gguf_header import read_header
    from ktx.weights.gguf_tokenizer import tokenizer_from_gguf

    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    tokenizer_from_gguf(read_header(file).metadata, str(file)).save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Writes the model; the last line of output is the path of the GGUF file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True, help="model whose shapes to use")
    quants = [name for name, qtype in QTYPES.items() if qtype.code < 1000]
    parser.add_argument(
        "--quant",
        default="Q4_K_M",
        choices=["Q4_K_M", *quants],
        metavar="TYPE",
        help="Q4_K_M or one type for all matrices: %(choices)s (default Q4_K_M)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the GGUF file, config.json and the tokenizer",
    )
    parser.add_argument(
        "--header-only", action="store_true", help="write no tensor data, only a hole, which suffices for `ktx plan`"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    for option, key in CONFIG_OPTIONS.items():
        parser.add_argument(f"--{option}", type=int, metavar="N", help=f"{key} (default: the preset's)")
    args = parser.parse_args(argv)
    config = configuration(args.preset, {option: getattr(args, option.replace("-", "_")) for option in CONFIG_OPTIONS})
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.preset}-{args.quant}.gguf"
    start_s = time.perf_counter()
    size = write_gguf(file, config, args.quant, args.seed, args.header_only)
    write_folder(args.out, config, file)
    params = sum(math.prod(tensor.shape) for tensor in tensors(config))
    note, elapsed_s = " (a hole)" if args.header_only else "", time.perf_counter() - start_s
    layers = config["num_hidden_layers"]
    print(f"{layers} layers, {params / 1e9:.2f} B weights, {size / 2**30:.2f} GiB{note}, {elapsed_s:.0f} s")
    print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
