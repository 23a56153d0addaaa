"""Scores answers with lm-evaluation-harness, whose `hf` model accepts a model loaded by ktx.

    python examples/evaluate.py [--model DIR --weights FILE]

Without --model it uses the bundled demo model. Needs lm_eval (pip install 'ktx-moe[eval]').
"""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import ktx
import ktx.demo

QUESTIONS = (
    ("What is a rule file?", (" A rule file is a list of rules.", " A rule file is a herring.")),
    ("Which types of weights are there?", (" Q4_K and Q8_0.", " Monday and lamp.")),
)


def scores(model: Any, tokenizer: Any) -> list[list[float]]:
    """Returns the log-likelihood of each answer to each question."""
    evaluator = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [(question, answer) for question, answers in QUESTIONS for answer in answers]
    requests = [Instance("loglikelihood", {}, arguments, i) for i, arguments in enumerate(pairs)]
    likelihoods = iter(evaluator.loglikelihood(requests, disable_tqdm=True))
    return [[next(likelihoods)[0] for _ in answers] for _, answers in QUESTIONS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    model, tokenizer = ktx.load(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    for (question, answers), answer_scores in zip(QUESTIONS, scores(model, tokenizer), strict=True):
        print(question)
        for answer, score in zip(answers, answer_scores, strict=True):
            print(f"{score:9.2f} {answer}")


if __name__ == "__main__":
    main()
