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
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
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
        **LINEAR,
        "shared_expert_intermediate_size": 128,
        "norm_topk_prob": True,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 160},
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 96,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
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

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
MEMBERS: list[tuple[str, dict[str, Any]]] = [  # what other members of the families have
    ("deepseek_v2", {"q_lora_rank": 64}),
    ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None}),
    ("deepseek_v2", {"hidden_size": 192, "moe_intermediate_size": 40, "n_shared_experts": 2}),
    ("deepseek_v2", {"qk_nope_head_dim": 24, "v_head_dim": 24, "kv_lora_rank": 48, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"norm_topk_prob": False, "rope_interleave": False}),
    ("deepseek_v3", {"qk_nope_head_dim": 24, "v_head_dim": 40, "kv_lora_rank": 48, "attention_bias": True}),
    ("deepseek_v3", {"num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": True}),
    ("qwen2_moe", {"shared_expert_intermediate_size": 33, "norm_topk_prob": True}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3_moe", {"attention_bias": True, "head_dim": 80, "num_experts_per_tok": 1}),
    ("qwen3_moe", {"num_key_value_heads": 1, "num_experts": 5}),
    ("qwen3_next", {"partial_rotary_factor": 0.5, "num_experts": 5}),
    ("mixtral", {"sliding_window": 8, "num_local_experts": 3, "head_dim": 48}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "n_group": 1, "topk_group": 1}),
    ("glm4_moe", {"partial_rotary_factor": 0.5, "n_shared_experts": 2}),
    ("minimax_m2", {"rotary_dim": 64, "num_key_value_heads": 1, "num_local_experts": 5}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0, "use_bias": True}),
    ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_num_shared_experts": 2}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "intermediate_size": 100}),
    ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 48, "tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "head_dim": 80}),
    ("phi3", {"sliding_window": 8, "partial_rotary_factor": 0.5}),
]


def tiny(family: str, **more: Any) -> Any:
    """A transformers model with random weights that are neither all alike nor so small that nothing would show."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES.get(family, {}) | more))
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
