"""Replaces the routed experts by an operator that skips experts with a low routing weight, and loads it by a rule.

    python examples/custom_operator.py

The operator extends ktx's `Experts`; docs/operators.md describes the interface of an operator written from scratch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import ktx
import ktx.demo
from ktx.injection.rules import load_rules
from ktx.ops.experts import Experts

if TYPE_CHECKING:  # torch is imported by ktx, after ktx has set its environment variables
    import torch


@ktx.register("SkipLowWeights")
class SkipLowWeights(Experts):
    """Experts that compute only the (token, expert) pairs whose routing weight reaches a threshold."""

    @classmethod
    def from_hf(cls, old: torch.nn.Module, ctx: ktx.Context, threshold: float = 0.05) -> SkipLowWeights:
        """Builds the operator on the meta device; `threshold` comes from the rule's options."""
        new = super().from_hf(old, ctx)
        new.threshold, new.num_skipped = threshold, 0
        return new

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        """Returns the weighted sums [tokens, width] of the experts `ids` [tokens, top-k]; an id of -1 is skipped."""
        low = weights < self.threshold
        self.num_skipped += int(low.sum())
        return super().forward(hidden, ids.masked_fill(low, -1), weights)


def main() -> None:
    experts = re.compile(r"\.mlp\.experts$")
    rule = ktx.Rule(name=experts, replace="SkipLowWeights", kwargs={"threshold": 0.2}, recursive=False)
    rules = [rule, *load_rules(None, "deepseek_v3")]  # the first rule that matches a module applies
    model, tokenizer = ktx.load(ktx.demo.path(), ktx.demo.gguf(), rules)
    chat = [{"role": "user", "content": "What is a rule file?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    operators = [module for module in model.modules() if isinstance(module, SkipLowWeights)]
    num_skipped = sum(operator.num_skipped for operator in operators)
    print(f"{len(operators)} operators skipped {num_skipped} (token, expert) pairs")
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
