"""Which words of a prompt decide the next token, by captum, on a model that ktx has loaded: gradients go through its packed weights.

    python examples/attribution.py [--model DIR --weights FILE] [--text TEXT] [--steps 16]

Without --model it is the bundled demo model. Needs captum.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from captum.attr import LayerIntegratedGradients

import ktx
import ktx.demo


def attributed(model: Any, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, int, float]:
    """For tokens [1, n]: each one's share [n] in the logit of the likeliest next token, that token, and what the shares miss of it."""
    with torch.no_grad():
        chosen = int(model(ids).logits[0, -1].argmax())

    def logit(tokens: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model(tokens, use_cache=False).logits[:, -1, chosen]
        return made

    method = LayerIntegratedGradients(logit, model.get_input_embeddings())
    blank = torch.full_like(ids, model.config.pad_token_id or 0)
    shares, missed = method.attribute(ids, blank, n_steps=steps, internal_batch_size=1, return_convergence_delta=True)
    return shares.sum(-1)[0], chosen, missed.abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR")
    parser.add_argument("--weights", metavar="FILE", help="default: the demo model's, else what is in --model")
    parser.add_argument("--text", default="A rule file is a list of", metavar="TEXT")
    parser.add_argument("--steps", type=int, default=16, metavar="N")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    ids = tokenizer(args.text, return_tensors="pt").input_ids
    shares, chosen, missed = attributed(model, ids, args.steps)
    print(f"next: {tokenizer.decode([chosen])!r}, missed {missed:.3g}")
    for token, share in zip(ids[0].tolist(), shares.tolist(), strict=True):
        print(f"{share:+9.3f} {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    main()
