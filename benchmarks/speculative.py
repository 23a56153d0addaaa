"""Acceptance rate and speedup of speculative decoding on the demo model. The methods alternate within each round.

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

METHODS = (None, "prompt_lookup", "mtp")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median is reported (default 5)")
    parser.add_argument("--new", type=int, default=64, help="max tokens of an answer (default 64)")
    parser.add_argument("--questions", type=int, default=12, help="number of prompts (default 12)")
    args = parser.parse_args()
    model, tokenizer = ktx.load(ktx.demo.path(), ktx.demo.safetensors(), progress=False, mtp=True)
    questions = [item.question for item in ktx.demo.questions() if item.kind == "ktx"][: args.questions]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in questions
    ]
    speeds: dict[str | None, list[float]] = {method: [] for method in METHODS}
    draft_stats: dict[str | None, str] = {}
    answers: dict[str | None, list[list[int]]] = {}
    for _ in range(args.rounds):
        for method in METHODS:
            with model.ktx.engine(speculative=method, max_batch_size=1, prefix_cache=False) as engine:
                start, finished = time.perf_counter(), []
                for prompt in prompts:  # one request at a time
                    events = engine.generate([prompt], SamplingParams(max_new_tokens=args.new))
                    finished += [event for _, event in events if isinstance(event, Finished)]
                tokens = sum(event.usage.answer for event in finished)
                speeds[method].append(tokens / (time.perf_counter() - start))
                drafted, accepted = (sum(getattr(e.usage, name) for e in finished) for name in ("drafted", "accepted"))
                draft_stats[method] = (
                    f"{drafted:8d} {accepted / max(1, drafted):8.0%} {tokens / (engine.steps - len(prompts)):10.2f}"
                )
                answers[method] = [event.ids for event in finished]
    assert all(ids == answers[None] for ids in answers.values()), "speculative decoding changed an answer"
    print(f"{'':14s} {'tokens/s':>9s} {'ratio':>6s} {'drafted':>8s} {'accepted':>8s} {'tok/step':>10s}")
    for method in METHODS:
        ratio = statistics.median(a / b for a, b in zip(speeds[method], speeds[None], strict=True))
        print(f"{method or 'none':14s} {statistics.median(speeds[method]):9.1f} {ratio:6.2f} {draft_stats[method]}")


if __name__ == "__main__":
    main()
