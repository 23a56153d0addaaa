"""Reads an attention pattern and ablates a head with TransformerLens, whose bridge accepts a model loaded by ktx.

    python examples/bridge.py [--model DIR --weights FILE] [--text TEXT] [--layer 1 --head 0]

Without --model it uses the bundled demo model. Needs transformer_lens.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

import ktx
import ktx.demo


def make_bridge(model: Any, tokenizer: Any) -> Any:
    """Returns a bridge around an already loaded model."""
    name = model.config.name_or_path or "model"
    return TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu")


def ablate(bridge: Any, ids: torch.Tensor, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns a head's attention pattern [queries, keys], and the last token's logits with and without the head."""
    pattern = f"blocks.{layer}.attn.hook_pattern"

    def zero_head(weights: torch.Tensor, hook: Any) -> torch.Tensor:
        weights[:, head] = 0
        return weights

    with torch.no_grad():
        original, cache = bridge.run_with_cache(ids, names_filter=pattern)
        ablated = bridge.run_with_hooks(ids, fwd_hooks=[(pattern, zero_head)])
    return cache[pattern][0, head], original[0, -1], ablated[0, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument("--text", default="A rule file is a list of", metavar="TEXT", help="prompt")
    parser.add_argument("--layer", type=int, default=1, metavar="N", help="index of the layer (default: 1)")
    parser.add_argument("--head", type=int, default=0, metavar="N", help="index of the head (default: 0)")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    ids = tokenizer(args.text, return_tensors="pt").input_ids
    pattern, original, ablated = ablate(make_bridge(model, tokenizer), ids, args.layer, args.head)
    print(f"the last token looks at {tokenizer.decode([ids[0, pattern[-1].argmax()].item()])!r}")
    for name, logits in (("with the head", original), ("without", ablated)):
        print(f"{name}: {tokenizer.decode([int(logits.argmax())])!r}")


if __name__ == "__main__":
    main()
