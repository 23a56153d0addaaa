"""Loads a model and generates an answer with transformers' `generate`.

    python examples/generate.py [--model DIR --weights FILE] [--prompt TEXT]

Without --model it uses the bundled demo model.
"""

from __future__ import annotations

import argparse

import ktx
import ktx.demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument("--prompt", default="What is a rule file?", metavar="TEXT", help="the user's message")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": args.prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
