"""Streams several requests from an engine, which computes them in the same forwards (continuous batching).

    python examples/stream_engine.py

Each line shows the index of a request and a piece of its text, in the order in which the engine emits them.
"""

from __future__ import annotations

import ktx
import ktx.demo
from ktx.engine.request import Finished, TokenEvent
from ktx.engine.sampler import SamplingParams

QUESTIONS = ("What is a rule file?", "Which weight types can ktx read?", "What can you do?")


def main() -> None:
    model, tokenizer = ktx.load(ktx.demo.path(), ktx.demo.gguf())
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]
    with model.ktx.engine(max_batch_size=len(prompts), cache_lens=4096) as engine:
        for index, event in engine.generate(prompts, SamplingParams(max_new_tokens=24)):
            if isinstance(event, TokenEvent):
                print(index, repr(event.text))
            elif isinstance(event, Finished):
                print(index, f"finished: {event.reason}, {event.usage.answer} tokens")


if __name__ == "__main__":
    main()
