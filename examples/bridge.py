"""Attention patterns and a patched head of a model that ktx has loaded, by TransformerLens, whose bridge takes it as transformers' own.

    python examples/bridge.py [--model DIR --weights FILE] [--text TEXT] [--layer 1 --head 0]

Without --model it is the bundled demo model. Needs transformer_lens.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

import ktx
import ktx.demo


def bridged(model: Any, tokenizer: Any) -> Any:
    """The bridge around a model that is there."""
    name = model.config.name_or_path or "model"
    return TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu")


def looked_at(bridge: Any, ids: torch.Tensor, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head's pattern [queries, keys], and the last token's logits with the head and without it."""
    pattern = f"blocks.{layer}.attn.hook_pattern"

    def silent(weights: torch.Tensor, hook: Any) -> torch.Tensor:
        weights[:, head] = 0
        return weights

    with torch.no_grad():
        usual, cache = bridge.run_with_cache(ids, names_filter=pattern)
        changed = bridge.run_with_hooks(ids, fwd_hooks=[(pattern, silent)])
    return cache[pattern][0, head], usual[0, -1], changed[0, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR")
    parser.add_argument("--weights", metavar="FILE", help="default: the demo model's, else what is in --model")
    parser.add_argument("--text", default="A rule file is a list of", metavar="TEXT")
    parser.add_argument("--layer", type=int, default=1, metavar="N")
    parser.add_argument("--head", type=int, default=0, metavar="N")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    ids = tokenizer(args.text, return_tensors="pt").input_ids
    pattern, usual, changed = looked_at(bridged(model, tokenizer), ids, args.layer, args.head)
    print(f"last token looks at {tokenizer.decode([ids[0, pattern[-1].argmax()].item()])!r}")
    for name, logits in (("with the head", usual), ("without", changed)):
        print(f"{name}: {tokenizer.decode([int(logits.argmax())])!r}")


if __name__ == "__main__":
    main()
