"""Activations of a model that ktx has loaded, read and set by nnsight: what a layer adds, and the answer without it.

    python examples/tracing.py [--model DIR --weights FILE] [--text TEXT] [--layer 1]

Without --model it is the bundled demo model. Needs nnsight.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from nnsight import LanguageModel

import ktx
import ktx.demo


def without(model: Any, tokenizer: Any, text: str, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a layer's feed-forward part gives, and the last token's logits with it and with zeros in its place."""
    traced = LanguageModel(model, tokenizer=tokenizer)
    with torch.no_grad(), traced.trace(text):
        added = traced.model.layers[number].mlp.output.save()
        usual = traced.output.logits[0, -1].save()
    with torch.no_grad(), traced.trace(text):
        traced.model.layers[number].mlp.output[:] = 0
        changed = traced.output.logits[0, -1].save()
    return added, usual, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR")
    parser.add_argument("--weights", metavar="FILE", help="default: the demo model's, else what is in --model")
    parser.add_argument("--text", default="A rule file is a list of", metavar="TEXT")
    parser.add_argument("--layer", type=int, default=1, metavar="N")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    added, usual, changed = without(model, tokenizer, args.text, args.layer)
    print(f"layer {args.layer} adds {added.norm():.3f}")
    for name, logits in (("with it", usual), ("without", changed)):
        print(f"{name}: {tokenizer.decode([int(logits.argmax())])!r}")


if __name__ == "__main__":
    main()
