"""The demo network: transformers' DeepSeek-V3 with a multi-token-prediction layer beside it, for training only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from ktx.demo import tokenizer

CONTEXT = 2048
Rope = tuple[torch.Tensor, torch.Tensor]  # cos, sin


SETTINGS: dict[str, Any] = {
    "vocab_size": tokenizer.VOCAB, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 256,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "routed_scaling_factor": 2.0, "rms_norm_eps": 1e-6, "initializer_range": 0.03,
    "max_position_embeddings": CONTEXT, "rope_interleave": True, "tie_word_embeddings": False,
    "bos_token_id": tokenizer.BOS, "eos_token_id": tokenizer.EOS, "pad_token_id": tokenizer.PAD,
    "num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
    "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip  # the keys of DeepSeek's own config.json


def config() -> DeepseekV3Config:
    """One dense and two MoE layers; every row length is a multiple of 256 where DeepSeek-V3's own are."""
    made = DeepseekV3Config(**SETTINGS)
    made._attn_implementation = "sdpa"
    made._experts_implementation = "eager"
    return made


class SharedHead(nn.Module):
    """The norm before the head that the MTP layer shares with the main model."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = DeepseekV3RMSNorm(width, eps)


class Mtp(DeepseekV3DecoderLayer):
    """DeepSeek's ``model.layers.{num_hidden_layers}``: guesses token t+2 from the state at t and token t+1."""

    def __init__(self, made: DeepseekV3Config) -> None:
        super().__init__(made, made.num_hidden_layers)
        width, eps = made.hidden_size, made.rms_norm_eps
        self.enorm, self.hnorm = DeepseekV3RMSNorm(width, eps), DeepseekV3RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = SharedHead(width, eps)

    def guess(self, embeds: torch.Tensor, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        """[B,S,D] embeddings of the next tokens and states -> [B,S,D] ready for the head."""
        mixed = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden)], dim=-1))
        return self.shared_head.norm(self(mixed, attention_mask=None, position_embeddings=rope))


class Trainee(nn.Module):
    """Main model and MTP layer under one roof."""

    def __init__(self, made: DeepseekV3Config) -> None:
        super().__init__()
        self.main = DeepseekV3ForCausalLM(made)
        self.mtp = Mtp(made)
        self.main.model._initialize_weights(self.mtp)
        for name, value in self.mtp.named_parameters():
            if value.dim() > 1:
                nn.init.normal_(value, std=made.initializer_range)
            elif "norm" in name:
                nn.init.ones_(value)
        self.gates = [module for module in self.modules() if type(module).__name__ == "DeepseekV3TopkRouter"]
        self.load = [torch.zeros(made.n_routed_experts) for _ in self.gates]
        for index, gate in enumerate(self.gates):
            gate.forward = torch.autocast("cpu", enabled=False)(gate.forward)  # the choice of experts needs float32
            gate.register_forward_hook(self._counter(index))

    def _counter(self, index: int) -> Any:
        def count(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.training:
                self.load[index] += torch.bincount(output[2].flatten().cpu(), minlength=len(self.load[index]))

        return count

    def balance(self, rate: float) -> float:
        """DeepSeek's rule without an auxiliary loss: busy experts get a lower bias. Returns the worst overload."""
        worst = 0.0
        for gate, load in zip(self.gates, self.load, strict=True):
            mean = load.mean().clamp_min(1)
            bias: Any = gate.e_score_correction_bias
            bias += rate * (mean - load).sign().to(bias)
            worst = max(worst, float(load.max() / mean))
            load.zero_()
        return worst

    def losses(self, ids: torch.Tensor, weight: torch.Tensor, with_mtp: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Next-token and MTP cross entropy of ids [B,S]; weight [B,S] says how much each *target* token counts."""
        body, head = self.main.model, self.main.lm_head
        hidden = body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        main = weighted_loss(head(hidden), ids[:, 1:], weight[:, 1:])
        if not with_mtp:
            return main, main.new_zeros(())
        positions = torch.arange(ids.shape[1] - 2, device=ids.device)[None]
        rope = body.rotary_emb(hidden, positions)
        guess = self.mtp.guess(body.embed_tokens(ids[:, 1:-1]), hidden[:, :-1], rope)
        return main, weighted_loss(head(guess), ids[:, 2:], weight[:, 2:])


def weighted_loss(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the weighted tokens."""
    each = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return (each * weight.flatten()).sum() / weight.sum().clamp_min(1)


@torch.no_grad()
def coarse(weight: torch.Tensor, block: int = 32, levels: int = 15) -> torch.Tensor:
    """The weight as 4-bit blocks would hold it: what the last phase of training runs on, so Q4_K_M costs little."""
    parts = weight.reshape(-1, block)
    low, high = parts.amin(1, keepdim=True).clamp_max(0), parts.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / levels).clamp_min(1e-8)
    return ((parts - low) / step).round_().mul_(step).add_(low).reshape(weight.shape)
