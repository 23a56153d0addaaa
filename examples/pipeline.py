"""Generates text with transformers' text-generation pipeline, which accepts a model loaded by ktx.

    python examples/pipeline.py [--model DIR --weights FILE] [--prompt TEXT]

Without --model it uses the bundled demo model.
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import pipeline

import ktx
import ktx.demo


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """Returns the answer to a chat message, or the continuation of a text if the model has no chat template."""
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    inputs = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
    outputs = generate(inputs, max_new_tokens=tokens, do_sample=False, return_full_text=False)
    text: str = outputs[0]["generated_text"]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument("--prompt", default="What is a rule file?", metavar="TEXT", help="message")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    print(answer(model, tokenizer, args.prompt))


if __name__ == "__main__":
    main()
