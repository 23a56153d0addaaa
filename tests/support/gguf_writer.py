"""Writes a tiny transformers model as GGUF the way llama.cpp's converter lays it out, and returns the weights as they
can be read back. LoRA adapters of PEFT's too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

from ktx.families import gguf_of
from ktx.quant.random_blocks import random_rows
from ktx.quant.types import QTYPES, QType

ARCH = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "mixtral": "llama",
    "mistral": "llama",
    "llama": "llama",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
    "ernie4_5_moe": "ernie4_5-moe",
    "gpt_oss": "gpt-oss",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
}
# Architectures whose converter is a subclass of LlamaModel with undo_permute: rows of q and k are permuted.
INTERLEAVED_QK = ("llama", "granite", "granitemoe")
FALLBACK = {
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
}  # as llama-quantize: rows that are no 256-blocks
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def permuted(w: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of llama's q and k rows."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermuted(w: torch.Tensor, heads: int) -> torch.Tensor:
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def packed(qtype: QType, x: torch.Tensor) -> torch.Tensor:
    """Types that need an importance matrix hold other weights of the same spread."""
    if not qtype.name.startswith(("IQ1", "IQ2", "IQ3")):
        return qtype.quantize(x)
    rows, seed = x.numel() // x.shape[-1], int(x.abs().sum()) % 1000
    return random_rows(qtype, rows, x.shape[-1], seed, float(x.std())).view(*x.shape[:-1], -1)


class Writer:
    """One file; `put` writes a tensor in the wanted type and returns what a reader will see."""

    def __init__(
        self,
        path: Path,
        config: Any,
        quant: str | Callable[[str], str],
        split_kvb: bool,
        fuse_gate_up: bool,
        fuse_qkv: bool,
        mangle: dict[str, Any],
    ):
        self.config, self.quant, self.split_kvb, self.fuse_gate_up, self.fuse_qkv = (
            config,
            quant,
            split_kvb,
            fuse_gate_up,
            fuse_qkv,
        )
        self.arch = ARCH.get(config.model_type) or gguf_of(config.model_type).arch
        self.w = gguf.GGUFWriter(path, self.arch)
        self.oracle: dict[str, torch.Tensor] = {}
        number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[self.arch]
        self.names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self.head(mangle)

    def head(self, mangle: dict[str, Any]) -> None:
        c = self.config
        values = {
            "block_count": c.num_hidden_layers,
            "embedding_length": c.hidden_size,
            "attention.head_count": c.num_attention_heads,
            "attention.head_count_kv": 1 if getattr(c, "kv_lora_rank", None) else c.num_key_value_heads,
            "expert_count": next((getattr(c, k) for k in EXPERT_KEYS if getattr(c, k, None)), None),
            "expert_used_count": getattr(c, "num_experts_per_tok", None),
            "expert_feed_forward_length": getattr(c, "moe_intermediate_size", None),
            "attention.kv_lora_rank": getattr(c, "kv_lora_rank", None),
            "vocab_size": c.vocab_size,
            **self.as_the_converter_writes(),
            **mangle,
        }
        for key, value in values.items():
            if isinstance(value, bool):
                self.w.add_bool(f"{self.arch}.{key}", value)
            elif isinstance(value, str):
                self.w.add_string(f"{self.arch}.{key}", value)
            elif isinstance(value, float):
                self.w.add_float32(f"{self.arch}.{key}", value)
            elif value is not None:
                self.w.add_uint32(f"{self.arch}.{key}", int(value))

    def as_the_converter_writes(self) -> dict[str, Any]:
        """Keys from which a configuration can be made again."""
        c = self.config
        rope = c.rope_parameters if isinstance(getattr(c, "rope_parameters", None), dict) else {}
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        dense = c.moe_intermediate_size if c.model_type == "ernie4_5_moe" else c.intermediate_size
        values: dict[str, Any] = {
            "context_length": c.max_position_embeddings,
            "feed_forward_length": dense,
            "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
            "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
            "attention.sliding_window": getattr(c, "sliding_window", None) if c.model_type == "phi3" else None,
            "expert_shared_feed_forward_length": getattr(c, "shared_expert_intermediate_size", None),
        }
        scales = {  # GraniteModel.set_gguf_parameters
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        }
        values |= {key: float(getattr(c, name)) for key, name in scales.items() if hasattr(c, name)}
        if rope.get("rope_type") == "yarn":
            values |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(rope["factor"]),
                "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
                "rope.scaling.yarn_log_multiplier": 0.1 * rope.get("mscale_all_dim", 0.0),
            }
        if (
            rope.get("rope_type") == "llama3"
        ):  # a table of divisors and no key: modify_tensors of the converter's LlamaModel
            wavelength = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, width, 2) / width)
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            smooth = smooth.clamp(0, 1)
            self.put1("rope_freqs.weight", 1 / ((1 - smooth) / rope["factor"] + smooth))
        if rope.get("rope_type") == "longrope":
            values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
            for kind in ("long", "short"):
                self.put1(f"rope_factors_{kind}.weight", torch.tensor(rope[f"{kind}_factor"]))
        if not getattr(c, "kv_lora_rank", None):
            partial = rope.get("partial_rotary_factor", 1.0)
            return values | {"attention.key_length": width, "rope.dimension_count": int(width * partial)}
        return values | {
            "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
            "attention.value_length": c.kv_lora_rank,
            "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
            "attention.value_length_mla": c.v_head_dim,
            "attention.q_lora_rank": c.q_lora_rank,
            "rope.dimension_count": c.qk_rope_head_dim,
            "leading_dense_block_count": c.first_k_dense_replace,
            "expert_shared_count": c.n_shared_experts,
            "expert_weights_scale": float(c.routed_scaling_factor),
            "expert_weights_norm": bool(c.norm_topk_prob) if c.model_type == "deepseek_v3" else None,
            "expert_gating_func": 2 if c.model_type == "deepseek_v3" else 1,
            "expert_group_count": c.n_group,
            "expert_group_used_count": c.topk_group,
        }

    def type_for(self, name: str, shape: tuple[int, ...]) -> QType:
        wanted = self.quant if isinstance(self.quant, str) else self.quant(name)
        if len(shape) < 2 or "ffn_gate_inp" in name or "norm" in name or "ssm_conv1d" in name:
            return QTYPES["F32"]
        if shape[-1] % QTYPES[wanted].block:
            wanted = FALLBACK.get(wanted, wanted)
        return QTYPES[wanted if shape[-1] % QTYPES[wanted].block == 0 else "F32"]

    def put(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        qtype = self.type_for(name, tuple(x.shape))
        data = packed(qtype, x)
        kind = gguf.GGMLQuantizationType(qtype.code)
        if qtype.name == "F32":
            self.w.add_tensor(name, x.numpy())
        elif qtype.name == "F16":
            self.w.add_tensor(name, x.half().numpy())
        else:
            self.w.add_tensor(name, data.numpy(), raw_dtype=kind)
        return qtype.dequantize(data).reshape(x.shape)

    # ---- one parameter

    def write(self, hf: str, x: torch.Tensor) -> None:
        layer = re.match(r"model\.layers\.(\d+)\.(.+)$", hf)
        block, rest = (f"blk.{layer[1]}.", layer[2]) if layer else ("", hf)
        for pattern, method in SPECIAL:
            hit = re.fullmatch(pattern, rest)
            if hit and layer:
                seen = getattr(self, method)(block, hit, x)
                if seen is not None:
                    self.oracle[hf] = seen.reshape(x.shape)
                    return
        plus = (
            1
            if self.arch in ("qwen3next", "qwen35", "qwen35moe")
            and rest.endswith("norm.weight")
            and "linear_attn" not in rest
            else 0
        )
        base, suffix = (
            (hf.removesuffix(".weight"), ".weight") if hf.endswith(".weight") else (hf.removesuffix(".bias"), ".bias")
        )
        name = self.names.get_name(base) or self.names.get_name(f"{base}.layer")  # of earlier classes in transformers
        assert name, hf
        self.oracle[hf] = (self.put(name + suffix, x.float() + plus) - plus).reshape(x.shape)

    def qkv(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor | None:
        which, suffix = hit[1], hit[2]
        heads = self.config.num_attention_heads if which == "q" else self.config.num_key_value_heads
        swap = self.arch in INTERLEAVED_QK and which != "v"
        y = permuted(x, heads) if swap else x
        if self.fuse_qkv and suffix == "weight":
            self.pending[which] = y
            if len(self.pending) == 3:
                sizes = [self.pending[w].shape[0] for w in "qkv"]
                seen = self.put(f"{block}attn_qkv.weight", torch.cat([self.pending[w] for w in "qkv"])).split(sizes)
                for w, part in zip("qkv", seen, strict=True):
                    n = self.config.num_attention_heads if w == "q" else self.config.num_key_value_heads
                    back = unpermuted(part, n) if self.arch in INTERLEAVED_QK and w != "v" else part
                    self.oracle[f"model.layers.{block[4:-1]}.self_attn.{w}_proj.weight"] = back
                self.pending = {}
            return self.oracle.get(f"model.layers.{block[4:-1]}.self_attn.{which}_proj.weight", x)
        seen = self.put(f"{block}attn_{which}.{suffix}", y)
        return unpermuted(seen, heads) if swap else seen

    pending: dict[str, torch.Tensor] = {}

    def kv_b(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor | None:
        if not self.split_kvb:
            return None
        c = self.config
        kv = x.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, -1)
        k = self.put(f"{block}attn_k_b.weight", kv[:, : c.qk_nope_head_dim].transpose(1, 2))
        v = self.put(f"{block}attn_v_b.weight", kv[:, c.qk_nope_head_dim :])
        return torch.cat([k.transpose(1, 2), v], 1)

    def gate_up_experts(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        oss = self.arch == "gpt-oss"
        y = x.transpose(1, 2) if oss else x
        gate, up = (y[:, ::2], y[:, 1::2]) if oss else y.chunk(2, 1)
        if self.fuse_gate_up:
            return self.put(f"{block}ffn_gate_up_exps.weight", y)
        gate, up = self.put(f"{block}ffn_gate_exps.weight", gate), self.put(f"{block}ffn_up_exps.weight", up)
        if not oss:
            return torch.cat([gate, up], 1)
        return torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2)

    def down_experts(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        if self.arch == "gpt-oss":
            return self.put(f"{block}ffn_down_exps.weight", x.transpose(1, 2)).transpose(1, 2)
        return self.put(f"{block}ffn_down_exps.weight", x)

    def gate_up_bias(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        self.put1(f"{block}ffn_gate_exps.bias", x[:, ::2]), self.put1(f"{block}ffn_up_exps.bias", x[:, 1::2])
        return x

    def down_bias(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        return self.put1(f"{block}ffn_down_exps.bias", x)

    def put1(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.w.add_tensor(name, x.float().contiguous().numpy())
        return x

    def correction(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        return self.put1(f"{block}exp_probs_b.bias", x.reshape(-1))

    def sinks(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        return self.put1(f"{block}attn_sinks.weight", x)

    def shared_gate(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        return self.put1(f"{block}ffn_gate_inp_shexp.weight", x.reshape(-1))

    def tiled(self, x: torch.Tensor, dim: int, width: int, back: bool = False) -> torch.Tensor:
        """Value heads in the order of llama.cpp's converter (_reorder_v_heads) for Qwen3.5; as they are for others."""
        if not self.arch.startswith("qwen35"):
            return x
        keys, values = self.config.linear_num_key_heads, self.config.linear_num_value_heads
        split = (values // keys, keys) if back else (keys, values // keys)
        return x.unflatten(dim, (*split, width)).transpose(dim, dim + 1).flatten(dim, dim + 2)

    def behind_keys(self, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        before = 2 * self.config.linear_num_key_heads * self.config.linear_key_head_dim
        return torch.cat([x[:before], self.tiled(x[before:], 0, self.config.linear_value_head_dim, back)])

    def dt_bias(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        self.put1(f"{block}ssm_dt.bias", self.tiled(x, 0, 1))
        return x

    def a_log(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        return torch.log(-self.tiled(self.put1(f"{block}ssm_a", -torch.exp(self.tiled(x.float(), 0, 1))), 0, 1, True))

    def conv1d(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        self.put1(f"{block}ssm_conv1d.weight", self.behind_keys(x.squeeze(1)))
        return x

    def tiled_rows(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        if hit[1] == "qkv":
            return self.behind_keys(self.put(f"{block}attn_qkv.weight", self.behind_keys(x)), True)
        width = self.config.linear_value_head_dim if hit[1] == "z" else 1
        name = {"z": "attn_gate", "a": "ssm_alpha", "b": "ssm_beta"}[hit[1]]
        return self.tiled(self.put(f"{block}{name}.weight", self.tiled(x, 0, width)), 0, width, True)

    def tiled_columns(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        width = self.config.linear_value_head_dim
        return self.tiled(self.put(f"{block}ssm_out.weight", self.tiled(x, 1, width)), 1, width, True)

    def qkvz(self, block: str, hit: re.Match[str], x: torch.Tensor) -> torch.Tensor:
        c = self.config
        k, v = c.linear_key_head_dim, c.linear_num_value_heads // c.linear_num_key_heads * c.linear_value_head_dim
        heads = x.reshape(c.linear_num_key_heads, 2 * k + 2 * v, -1)
        parts = [p.reshape(-1, x.shape[1]) for p in heads.split([k, k, v, v], 1)]
        qkv, z = (
            self.put(f"{block}attn_qkv.weight", torch.cat(parts[:3])),
            self.put(f"{block}attn_gate.weight", parts[3]),
        )
        back = [*qkv.split([p.shape[0] for p in parts[:3]]), z]
        return torch.cat([p.reshape(c.linear_num_key_heads, -1, x.shape[1]) for p in back], 1)


SPECIAL = [
    (r"self_attn\.([qkv])_proj\.(weight|bias)", "qkv"),
    (r"self_attn\.kv_b_proj\.weight", "kv_b"),
    (r"self_attn\.sinks", "sinks"),
    (r"(?:mlp|block_sparse_moe)\.experts\.gate_up_proj", "gate_up_experts"),
    (r"(?:mlp|block_sparse_moe)\.experts\.down_proj", "down_experts"),
    (r"(?:mlp|block_sparse_moe)\.experts\.gate_up_proj_bias", "gate_up_bias"),
    (r"(?:mlp|block_sparse_moe)\.experts\.down_proj_bias", "down_bias"),
    (r"mlp\..*e_score_correction_bias|mlp\.e_score_correction_bias", "correction"),
    (r"mlp\.shared_expert_gate\.weight", "shared_gate"),
    (r"linear_attn\.dt_bias", "dt_bias"),
    (r"linear_attn\.A_log", "a_log"),
    (r"linear_attn\.conv1d\.weight", "conv1d"),
    (r"linear_attn\.in_proj_qkvz\.weight", "qkvz"),
    (r"linear_attn\.in_proj_(qkv|z|a|b)\.weight", "tiled_rows"),
    (r"linear_attn\.out_proj\.weight", "tiled_columns"),
]


def write_gguf(
    path: Path,
    model: Any,
    quant: str | Callable[[str], str] = "Q8_0",
    *,
    split_kvb: bool = True,
    fuse_gate_up: bool = False,
    fuse_qkv: bool = False,
    mangle: dict[str, Any] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes the model's parameters; returns the state dict with the values that the file holds."""
    writer = Writer(path, model.config, quant, split_kvb, fuse_gate_up, fuse_qkv, mangle or {})
    if extra:
        extra(writer.w)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        if name not in tied:
            writer.write(name, tensor.detach())
    writer.w.write_header_to_file()
    writer.w.write_kv_data_to_file()
    writer.w.write_tensors_to_file()
    writer.w.close()
    return writer.oracle


class LoraWriter(Writer):
    """An adapter as convert_lora_to_gguf.py writes it: what a model's converter does to rows of W it does to B's, what
    it does to columns to A's.
    """

    a: torch.Tensor
    b: torch.Tensor

    def head(self, keys: dict[str, Any]) -> None:
        self.w.add_type(gguf.GGUFType.ADAPTER)
        for key, value in ({gguf.Keys.Adapter.TYPE: "lora"} | keys).items():
            if value is not None:
                add = {str: self.w.add_string, float: self.w.add_float32, list: self.w.add_array}[type(value)]
                add(key, value)

    def add(self, path: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """The adapter of a parameter: a [..., r, in], b [..., out, r]."""
        self.a, self.b = a.float(), b.float()
        if path == "model.embed_tokens.weight":
            return self.halves("token_embd.weight", self.a.t(), self.b)
        by_columns = path.endswith("linear_attn.out_proj.weight")
        self.write(
            path, self.a if by_columns else self.b.transpose(1, 2) if self.arch == "gpt-oss" and b.ndim == 3 else self.b
        )

    def put(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.halves(name, *((x, self.b) if name.endswith("ssm_out.weight") else (self.a, x)))
        return x

    def halves(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        for half, values in (("a", a), ("b", b)):
            values = values.contiguous()
            qtype = QTYPES[self.quant if values.shape[-1] % QTYPES[self.quant].block == 0 else "F16"]
            raw = {} if qtype.name in ("F32", "F16") else {"raw_dtype": gguf.GGMLQuantizationType(qtype.code)}
            plain = values.half() if qtype.name == "F16" else values
            self.w.add_tensor(f"{name}.lora_{half}", (qtype.quantize(values) if raw else plain).numpy(), **raw)


def write_gguf_lora(path: Path, folder: Path, model: Any, quant: str = "F32", **keys: Any) -> None:
    """A folder of PEFT's as one GGUF file, for the transformers model that it was made for. `keys`: of the header, None
    for one that is left out.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    header = {gguf.Keys.Adapter.LORA_ALPHA: float(config["lora_alpha"])} | keys
    writer = LoraWriter(path, model.config, quant, False, False, False, header)
    halves: dict[str, list[torch.Tensor]] = {}
    for key, values in sorted(load_file(folder / "adapter_model.safetensors").items()):
        if "lora_" not in key:  # the base model's embeddings
            continue
        module = re.sub(r"\.lora_(embedding_)?[AB](\.weight)?$", "", key.removeprefix("base_model.model."))
        halves.setdefault(module, []).append(values)
    for module, (a, b) in halves.items():
        stacked = a.shape[0] // config["r"] if ".experts" in module else 1
        if stacked == 1:
            writer.add(f"{module}.weight", a, b)
            continue
        module = module.removesuffix(".base_layer")
        name = "down_proj" if b.shape[0] == model.config.hidden_size else "gate_up_proj"
        writer.add(
            f"{module}.{name}", a.view(stacked, config["r"], -1), b.view(-1, config["r"], stacked).permute(2, 0, 1)
        )
    writer.w.write_header_to_file()
    writer.w.write_kv_data_to_file()
    writer.w.write_tensors_to_file()
    writer.w.close()
