"""Rules that put a family's modules on devices, and models made by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ktx.families import BY_MODEL_TYPE
from ktx.injection.rules import Rule, load_rules
from tests.families.test_families import load
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

SMALL = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4}  # the interpreter is slow
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
SMALLER = {
    "deepseek_v3": MOE | {"n_routed_experts": 8, "num_local_experts": 8, "q_lora_rank": 32, "kv_lora_rank": 32},
    "glm4_moe": MOE | {"n_routed_experts": 4, "head_dim": 32},
    "qwen3_moe": MOE | {"num_experts": 4, "head_dim": 32},
    "gpt_oss": {"head_dim": 32, "intermediate_size": 32, "sliding_window": 4},
}
F32 = {"dtype": torch.float32, "kv_dtype": "f32"}


def rules(family: str, rest: str = "cuda:0", layers: Mapping[int, str] | None = None, **others: str) -> list[Rule]:
    """The shipped rules with `rest` as everything's device, but for some layers and (by the name of their operator,
    `head`) `others`.
    """
    shipped = load_rules(None, family)
    layer = "Layer" if BY_MODEL_TYPE[family].layers else None
    return [
        *(Rule(rf"^model\.layers\.{i}$", replace=layer, device=device) for i, device in (layers or {}).items()),
        Rule("^model$", device=rest),
        Rule("^lm_head$", replace="Linear", device=others.get("head", rest)),
        *(replace(rule, device=others.get(rule.replace or "")) for rule in shipped),
    ]


class Twins:
    """A tiny model as a file: transformers' own on the same weights, ktx's on the CPU, and others by other rules."""

    def __init__(self, folder, family: str, quant="F32", **config):
        original = tiny(family, **(SMALL | SMALLER.get(family, {}) | config))
        original.config.save_pretrained(folder)
        original.load_state_dict(write_gguf(folder / "model.gguf", original, quant), strict=False)
        self.folder, self.family, self.reference = folder, family, original
        self.cpu = self.load(None)

    def load(self, chosen, **more):
        more = {"self_test": False} | F32 | more  # the interpreter is slow; tests/gpu/test_share.py asks for it
        return load(self.folder, self.folder / "model.gguf", rules=chosen, **more)

    def on(self, rest="cuda:0", layers=None, **others):
        return self.load(self.rules(rest, layers, **others))

    def rules(self, *args, **others):
        return rules(self.family, *args, **others)
