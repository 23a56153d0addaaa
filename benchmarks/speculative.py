"""Speculative decoding on the demo model: how often guesses are right, and what they bring. Ways alternate within each round.

python benchmarks/speculative.py [--rounds 5] [--new 64]
"""

from __future__ import annotations

import argparse
import statistics
import time

import ktx
import ktx.demo
from ktx.engine.request import Finished
from ktx.engine.sampler import SamplingParams

WAYS = (None, "prompt_lookup", "mtp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--questions", type=int, default=12)
    args = parser.parse_args()
    model, words = ktx.load(ktx.demo.path(), ktx.demo.safetensors(), progress=False, mtp=True)
    asked = [item.question for item in ktx.demo.questions() if item.kind == "ktx"][: args.questions]
    prompts = [
        words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in asked
    ]
    speeds: dict[str | None, list[float]] = {way: [] for way in WAYS}
    about: dict[str | None, str] = {}
    said: dict[str | None, list[list[int]]] = {}
    for _ in range(args.rounds):
        for way in WAYS:
            with model.ktx.engine(speculative=way, max_batch_size=1, prefix_cache=False) as engine:
                start, done = time.perf_counter(), []
                for prompt in prompts:  # one at a time, as one person asks
                    events = engine.generate([prompt], SamplingParams(max_new_tokens=args.new))
                    done += [event for _, event in events if isinstance(event, Finished)]
                tokens = sum(event.usage.answer for event in done)
                speeds[way].append(tokens / (time.perf_counter() - start))
                drafted, right = (sum(getattr(e.usage, name) for e in done) for name in ("drafted", "accepted"))
                about[way] = (
                    f"{drafted:8d} {right / max(1, drafted):8.0%} {tokens / (engine.steps - len(prompts)):10.2f}"
                )
                said[way] = [event.ids for event in done]
    assert all(ids == said[None] for ids in said.values()), "an answer has changed"
    print(f"{'':14s} {'tokens/s':>9s} {'ratio':>6s} {'guessed':>8s} {'right':>8s} {'a forward':>10s}")
    for way in WAYS:
        ratio = statistics.median(a / b for a, b in zip(speeds[way], speeds[None], strict=True))
        print(f"{way or 'none':14s} {statistics.median(speeds[way]):9.1f} {ratio:6.2f} {about[way]}")


if __name__ == "__main__":
    main()
