"""The demo network: transformers' DeepSeek-V3 and a multi-token prediction (MTP) layer, for training only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from tools.demo import tokenizer

CONTEXT = 2048  # maximum length in tokens
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
    """Returns the configuration: one dense and two MoE layers.

    Row lengths are multiples of 256 where those of DeepSeek-V3 are.
    """
    model_config = DeepseekV3Config(**SETTINGS)
    model_config._attn_implementation = "sdpa"
    model_config._experts_implementation = "eager"
    return model_config


class SharedHead(nn.Module):
    """The MTP layer's norm before the output head, which it shares with the main model.

    It is a module of its own so that the checkpoint has DeepSeek's name, `shared_head.norm`.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = DeepseekV3RMSNorm(width, eps)


class Mtp(DeepseekV3DecoderLayer):
    """DeepSeek's ``model.layers.{num_hidden_layers}``: predicts token t+2 from the hidden state at t and token t+1."""

    def __init__(self, model_config: DeepseekV3Config) -> None:
        super().__init__(model_config, model_config.num_hidden_layers)
        width, eps = model_config.hidden_size, model_config.rms_norm_eps
        self.enorm, self.hnorm = DeepseekV3RMSNorm(width, eps), DeepseekV3RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = SharedHead(width, eps)

    def predict(self, embeds: torch.Tensor, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Combines embeddings of the next tokens and hidden states, both [B,S,D]; returns [B,S,D] for the head."""
        mixed = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden)], dim=-1))
        return self.shared_head.norm(self(mixed, attention_mask=None, position_embeddings=rope))


class Trainee(nn.Module):
    """The main model and its MTP layer, trained together.

    Attributes:
        routers: the routers of all MoE layers, whose biases `balance` updates.
        load: per router, how many tokens selected each expert since the last update.
    """

    def __init__(self, model_config: DeepseekV3Config) -> None:
        """Initializes random weights, and counts the experts that the routers select in training.

        transformers does not initialize the MTP layer, which is no part of its model, so it is done here.
        """
        super().__init__()
        self.main = DeepseekV3ForCausalLM(model_config)
        self.mtp = Mtp(model_config)
        self.main.model._initialize_weights(self.mtp)
        for name, value in self.mtp.named_parameters():
            if value.dim() > 1:
                nn.init.normal_(value, std=model_config.initializer_range)
            elif "norm" in name:
                nn.init.ones_(value)
        self.routers = [module for module in self.modules() if type(module).__name__ == "DeepseekV3TopkRouter"]
        self.load = [torch.zeros(model_config.n_routed_experts) for _ in self.routers]
        for index, router in enumerate(self.routers):
            router.forward = torch.autocast("cpu", enabled=False)(router.forward)  # routing needs float32
            router.register_forward_hook(self._make_counter(index))

    def _make_counter(self, index: int) -> Any:
        """Returns a forward hook that adds the experts a router selected (its third output) to `load`."""

        def count(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.training:
                self.load[index] += torch.bincount(output[2].flatten().cpu(), minlength=len(self.load[index]))

        return count

    def balance(self, rate: float) -> float:
        """Updates the routers' biases by DeepSeek's auxiliary-loss-free rule: overloaded experts get a lower bias.

        Returns:
            The highest load of an expert since the last call, relative to the mean.
        """
        max_load = 0.0
        for router, load in zip(self.routers, self.load, strict=True):
            mean = load.mean().clamp_min(1)
            bias: Any = router.e_score_correction_bias
            bias += rate * (mean - load).sign().to(bias)
            max_load = max(max_load, float(load.max() / mean))
            load.zero_()
        return max_load

    def losses(self, ids: torch.Tensor, weight: torch.Tensor, with_mtp: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the next-token and the MTP cross entropy of ids [B,S]; weight [B,S] weights the *target* tokens.

        At position t the main model predicts token t+1 from the tokens up to t. The MTP layer predicts token t+2 from
        the main model's hidden state at t and the embedding of token t+1, so its targets are shifted by one more.
        """
        body, head = self.main.model, self.main.lm_head
        hidden = body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        main = weighted_loss(head(hidden), ids[:, 1:], weight[:, 1:])
        if not with_mtp:
            return main, main.new_zeros(())
        positions = torch.arange(ids.shape[1] - 2, device=ids.device)[None]
        rope = body.rotary_emb(hidden, positions)
        predicted = self.mtp.predict(body.embed_tokens(ids[:, 1:-1]), hidden[:, :-1], rope)
        return main, weighted_loss(head(predicted), ids[:, 2:], weight[:, 2:])


def weighted_loss(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the weighted mean of the tokens' cross entropies."""
    token_losses = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return (token_losses * weight.flatten()).sum() / weight.sum().clamp_min(1)


@torch.no_grad()
def fake_quantize(weight: torch.Tensor, block: int = 32, levels: int = 15) -> torch.Tensor:
    """Fake-quantizes a weight to 4-bit blocks; the last phase of training runs on it, so that Q4_K_M loses little."""
    blocks = weight.reshape(-1, block)
    low, high = blocks.amin(1, keepdim=True).clamp_max(0), blocks.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / levels).clamp_min(1e-8)
    return ((blocks - low) / step).round_().mul_(step).add_(low).reshape(weight.shape)
