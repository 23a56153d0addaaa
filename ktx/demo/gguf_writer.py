"""Writes the demo model as a GGUF of any quant type, in the layout of llama.cpp's converter and ``llama-quantize``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ktx.quant.types import QTYPES

State = dict[str, torch.Tensor]
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # llama-quantize's types for rows that are not multiples of 256
FILE_TYPE = {"BF16": 32, "Q8_0": 7, "Q4_K_M": 15}
GUESSED_FILE_TYPE = 1024  # llama.cpp's file type of a mix without a name


def read_folder(folder: Path) -> tuple[State, dict[str, Any]]:
    """Reads the state dict and configuration of a Hugging Face folder."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def gguf_tensors(state: State, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (GGUF name, float values) of the demo model's tensors in file order.

    The MTP layer is dropped, the experts of a layer are stacked, and kv_b is split into its key part (transposed) and
    value part, as llama.cpp's converter does for deepseek2.
    """
    import gguf

    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, layers)
    for name, value in state.items():
        parts = name.split(".")  # such as model, layers, 1, mlp, experts, 0, gate_proj, weight
        block = f"blk.{parts[2]}" if parts[1] == "layers" else ""
        if block and int(parts[2]) >= layers:  # the MTP layer
            continue
        if ".experts." in name:
            if parts[5] == "0":  # all experts are stacked at the place of the first one
                experts = [state[".".join([*parts[:5], str(e), *parts[6:]])] for e in range(config["n_routed_experts"])]
                yield f"{block}.ffn_{parts[6].removesuffix('_proj')}_exps.weight", torch.stack(experts)
        elif name.endswith("kv_b_proj.weight"):
            nope_dim, value_dim = config["qk_nope_head_dim"], config["v_head_dim"]
            key_part, value_part = value.view(heads, nope_dim + value_dim, -1).split([nope_dim, value_dim], 1)
            yield f"{block}.attn_k_b.weight", key_part.transpose(1, 2)
            yield f"{block}.attn_v_b.weight", value_part
        elif name.endswith("e_score_correction_bias"):
            yield f"{block}.exp_probs_b.bias", value
        else:
            yield f"{names.get_name(name.removesuffix('.weight'))}.weight", value


def needs_more_bits(layer: int, layers: int) -> bool:
    """Returns whether llama-quantize stores value and down projections of this layer as Q6_K in Q4_K_M."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def pick_type(name: str, value: torch.Tensor, mix: str, layers: int) -> str:
    """Returns the type of a tensor in a mix, as llama-quantize chooses it; norms, router and bias are F32.

    In Q4_K_M the output layer, and in some layers the value and down projections, are Q6_K because they are sensitive.
    """
    if value.dim() == 1 or "ffn_gate_inp" in name:
        return "F32"
    if mix != "Q4_K_M":
        return mix if value.shape[-1] % QTYPES[mix].block == 0 else "Q8_0"
    is_sensitive = "ffn_down" in name or "attn_v_b" in name
    is_q6 = name == "output.weight" or (is_sensitive and needs_more_bits(int(name.split(".")[1]), layers))
    qtype = "Q6_K" if is_q6 else "Q4_K"
    return qtype if value.shape[-1] % 256 == 0 else FALLBACK[qtype]  # 256: the block of Q4_K and Q6_K


def add_architecture(writer: Any, config: dict[str, Any], mix: str) -> None:
    """Writes the deepseek2 metadata; MLA is described in absorbed form, with one key-value head over the latent.

    llama.cpp computes MLA in this form, and takes the head sizes of the expanded form from the keys with `_mla`.
    """
    import gguf

    rope, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_name("ktx demo")
    writer.add_license("apache-2.0")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPE.get(mix, GUESSED_FILE_TYPE))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])


def add_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    """Writes tokens, merges, special tokens and chat template, so that the GGUF needs no other file."""
    import gguf

    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    token_types = [gguf.TokenType.NORMAL] * len(tokens)
    for token in raw["added_tokens"]:
        token_types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(token_types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(True)
    writer.add_chat_template(settings["chat_template"])


def write_gguf(folder: Path, file: Path, mix: str) -> None:
    """Writes the folder's model as one GGUF, to measure ktx in formats that the demo model is not shipped in.

    ``mix`` is Q4_K_M or a type for all matrices.
    """
    import gguf

    state, config = read_folder(folder)
    writer = gguf.GGUFWriter(file, "deepseek2")
    add_architecture(writer, config, mix)
    add_tokenizer(writer, folder, config)
    for name, value in gguf_tensors(state, config):
        qtype = QTYPES[pick_type(name, value, mix, config["num_hidden_layers"])]
        rows = qtype.quantize(value.float().contiguous())
        if qtype.name == "F32":
            writer.add_tensor(name, value.float().numpy())
        else:
            writer.add_tensor(name, rows.numpy(), raw_dtype=gguf.GGMLQuantizationType(qtype.code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
