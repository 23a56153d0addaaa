"""Reads and sets activations with nnsight on a model loaded by ktx: the output of an MLP, and the logits without it.

    python examples/tracing.py [--model DIR --weights FILE] [--text TEXT] [--layer 1]

Without --model it uses the bundled demo model. Needs nnsight.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from nnsight import LanguageModel

import ktx
import ktx.demo


def ablate_mlp(model: Any, tokenizer: Any, text: str, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the output of a layer's MLP, and the last token's logits with it and with zeros in its place."""
    traced = LanguageModel(model, tokenizer=tokenizer)
    with torch.no_grad(), traced.trace(text):
        mlp_output = traced.model.layers[layer].mlp.output.save()
        original = traced.output.logits[0, -1].save()
    with torch.no_grad(), traced.trace(text):
        traced.model.layers[layer].mlp.output[:] = 0
        ablated = traced.output.logits[0, -1].save()
    return mlp_output, original, ablated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument("--text", default="A rule file is a list of", metavar="TEXT", help="prompt")
    parser.add_argument("--layer", type=int, default=1, metavar="N", help="index of the layer (default: 1)")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    mlp_output, original, ablated = ablate_mlp(model, tokenizer, args.text, args.layer)
    print(f"layer {args.layer} adds {mlp_output.norm():.3f}")
    for name, logits in (("with it", original), ("without", ablated)):
        print(f"{name}: {tokenizer.decode([int(logits.argmax())])!r}")


if __name__ == "__main__":
    main()
