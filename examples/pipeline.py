"""transformers' pipelines on a model that ktx has loaded: text-generation takes it as it takes any other.

    python examples/pipeline.py [--model DIR --weights FILE] [--prompt TEXT]

Without --model it is the bundled demo model.
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import pipeline

import ktx
import ktx.demo


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """What the model says to one message of a chat; how it goes on with a text where it has no chat template."""
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    asked = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
    made = write(asked, max_new_tokens=tokens, do_sample=False, return_full_text=False)
    text: str = made[0]["generated_text"]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR")
    parser.add_argument("--weights", metavar="FILE", help="default: the demo model's, else what is in --model")
    parser.add_argument("--prompt", default="What is a rule file?", metavar="TEXT")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    print(answer(model, tokenizer, args.prompt))


if __name__ == "__main__":
    main()
