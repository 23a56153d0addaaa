"""Trains a LoRA adapter with PEFT on a model loaded by ktx, whose packed weights stay unchanged.

    python examples/train_lora.py [--model DIR --weights FILE] [--text FILE] [--steps 50] [--out adapter]

Without --model it uses the bundled demo model. Each paragraph of the text is one training sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import ktx
import ktx.demo

TEXTS = (
    "What does the lighthouse keeper have for breakfast? The lighthouse keeper has two herrings for breakfast.",
    "Where does the lighthouse keeper sleep? The lighthouse keeper sleeps under the lamp, with one eye open.",
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa", "o_proj")


def add_adapter(model: Any) -> Any:
    """Returns the model with an adapter on its attention projections; only the adapter is trainable."""
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=[n for n in ATTENTION if n in names]))


def train(model: Any, batches: Sequence[torch.Tensor], steps: int, rate: float = 2e-3) -> list[float]:
    """Trains on the batches [sequences, tokens] in turn and returns the loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="training text (default: two sentences)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="optimizer steps (default 50)")
    parser.add_argument("--out", default="adapter", metavar="DIR", help="folder to write (default: adapter)")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    texts = args.text.read_text(encoding="utf-8").split("\n\n") if args.text else TEXTS
    batches = [tokenizer(text, return_tensors="pt").input_ids for text in texts if text.strip()]
    batches = [ids for ids in batches if ids.shape[1] > 1]  # a single token has no target
    if not batches:
        parser.error(f"--text {args.text}: no paragraph of two tokens or more")
    peft_model = add_adapter(model)
    losses = train(peft_model, batches, args.steps)
    peft_model.save_pretrained(args.out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {args.out}: adapter_model.safetensors")


if __name__ == "__main__":
    main()
