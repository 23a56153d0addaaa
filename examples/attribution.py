"""Attributes the next token to the tokens of a prompt with captum: gradients pass through ktx's packed weights.

    python examples/attribution.py [--model DIR --weights FILE] [--text TEXT] [--steps 16]

Without --model it uses the bundled demo model. Needs captum.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from captum.attr import LayerIntegratedGradients

import ktx
import ktx.demo


def attribute(model: Any, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, int, float]:
    """Attributes the logit of the most probable next token to the input tokens `ids` [1, n].

    Returns the attributions [n], that token, and the convergence error of the attributions' sum.
    """
    with torch.no_grad():
        next_token = int(model(ids).logits[0, -1].argmax())

    def logit(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, use_cache=False).logits[:, -1, next_token]
        return logits

    method = LayerIntegratedGradients(logit, model.get_input_embeddings())
    baseline = torch.full_like(ids, model.config.pad_token_id or 0)
    attributions, error = method.attribute(
        ids, baseline, n_steps=steps, internal_batch_size=1, return_convergence_delta=True
    )
    return attributions.sum(-1)[0], next_token, error.abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument("--text", default="A rule file is a list of", metavar="TEXT", help="prompt")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="integration steps (default: 16)")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    ids = tokenizer(args.text, return_tensors="pt").input_ids
    attributions, next_token, error = attribute(model, ids, args.steps)
    print(f"next: {tokenizer.decode([next_token])!r}, convergence error {error:.3g}")
    for token, attribution in zip(ids[0].tolist(), attributions.tolist(), strict=True):
        print(f"{attribution:+9.3f} {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    main()
