"""A tiny random model of each family: odd expert widths, groups, biases, everything its real members have."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "head_dim": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "rope_theta": 10000.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "head_dim": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **MLA,
        "n_routed_experts": 8,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "rope_parameters": YARN,
    },
    "deepseek_v3": {**MLA, "n_routed_experts": 16, "num_local_experts": 16, "rope_parameters": YARN},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 128, "norm_topk_prob": False},
    "qwen3_moe": {**MOE, "norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3_next": {
        **MOE,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "norm_topk_prob": True,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 160},
    "glm4_moe": {
        **MOE,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 2.0,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
    },
    "minimax_m2": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 96,
        "head_dim": 64,
        "rotary_dim": 32,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 96,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "use_bias": False,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "head_dim": 64,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "phi3": {},
}


def tiny(family: str, **more: Any) -> Any:
    """A transformers model with random weights that are neither all alike nor so small that nothing would show."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction" in n)]:
            if name.endswith(("A_log", "dt_bias")):
                p.copy_(torch.rand_like(p) * 2)
            elif "norm" in name:
                p.add_(torch.randn_like(p) * 0.1)
            elif p.dim() < 2 or "correction" in name or name.endswith("_bias"):
                p.copy_(torch.randn_like(p) * 0.1)
            else:
                p.copy_(torch.randn_like(p) * (0.5 / p.shape[-1] ** 0.5 if "gate.weight" not in name else 0.3))
    return model
