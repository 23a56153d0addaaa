"""Rules that put a family's modules on devices, and models made by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ktx.rules import Rule, load_rules
from tests.gguf_writer import write_gguf
from tests.models.families import tiny
from tests.models.test_families import load

SMALL = {  # the interpreter is slow
    "qwen3_moe": {"num_experts": 4},
    "deepseek_v3": {"n_routed_experts": 8, "num_local_experts": 8},
    "glm4_moe": {"n_routed_experts": 4},
}


def rules(family: str, rest: str = "cuda:0", layers: Mapping[int, str] | None = None, **others: str) -> list[Rule]:
    """The shipped rules with `rest` as everything's device, but for some layers and (by the name of their operator) `others`."""
    shipped = load_rules(None, family)
    layer = "Layer" if any(rule.replace == "Layer" for rule in shipped) else None
    return [
        *(Rule(rf"^model\.layers\.{i}$", replace=layer, device=device) for i, device in (layers or {}).items()),
        Rule("^model$", device=rest),
        Rule("^lm_head$", replace="Linear", device=others.get("head", rest)),
        *(replace(rule, device=others.get(rule.replace or "")) for rule in shipped),
    ]


class Twins:
    """A tiny model as a file, loaded on the CPU and by other rules."""

    def __init__(self, folder, family: str, quant="F32", **config):
        original = tiny(family, **(SMALL.get(family, {}) | config))
        original.config.save_pretrained(folder)
        write_gguf(folder / "model.gguf", original, quant)
        self.folder, self.family = folder, family
        self.cpu = self.load(None)

    def load(self, chosen, **more):
        return load(self.folder, self.folder / "model.gguf", rules=chosen, **more)
