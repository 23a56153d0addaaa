"""Ask every listed question and measure perplexity, format by format: ``python -m ktx.demo.evaluate``."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ktx import demo

WINDOW = 512  # tokens of a perplexity window, the first of which is the begin mark
LONGEST = 64  # no listed answer has more tokens


@dataclass
class Report:
    """What one format scored."""

    format: str
    perplexity: float
    right: int
    asked: int
    seconds: float
    wrong: list[tuple[str, str]] = field(default_factory=list)  # question, what the model said

    def __str__(self) -> str:
        score = f"perplexity {self.perplexity:8.3f}   answers {self.right}/{self.asked}"
        return "\n".join(
            [
                f"{self.format:12} {score}   {self.seconds:.0f} s",
                *(f"    {question}  ->  {said}" for question, said in self.wrong),
            ]
        )


def stock(folder: Path) -> tuple[Any, Any]:
    """Plain transformers in float32: what the injected model is compared with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it reports the MTP layer, which it does not use, as unexpected
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def packed(mix: str, folder: Path) -> tuple[Any, Any]:
    """Through ktx: the BF16 safetensors, the exported Q4_K_M, or a GGUF of another mix that is written now."""
    import ktx
    from ktx.demo.export import write_gguf

    shipped = {"BF16": folder / "model.safetensors", "Q4_K_M": folder / demo.gguf().name}
    if mix in shipped:
        return ktx.load(str(folder), weights=str(shipped[mix]), progress=False)
    with tempfile.TemporaryDirectory() as scratch:
        write_gguf(folder, Path(scratch) / "demo.gguf", mix)
        return ktx.load(str(folder), weights=str(Path(scratch) / "demo.gguf"), progress=False)


FORMATS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "transformers": stock,
    "BF16": lambda folder: packed("BF16", folder),
    "Q8_0": lambda folder: packed("Q8_0", folder),
    "Q4_K_M": lambda folder: packed("Q4_K_M", folder),
}


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """exp of the mean cross entropy over the tokens of ``text``, cut in windows that each begin with the begin mark."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    total = 0.0
    for start in range(0, len(ids), WINDOW - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + WINDOW - 1]]])
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return math.exp(total / len(ids))


@torch.no_grad()
def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Greedy answer to a conversation."""
    rows = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**rows, max_new_tokens=LONGEST, do_sample=False)
    return tokenizer.decode(made[0, rows["input_ids"].shape[1] :], skip_special_tokens=True)


def wrong_answers(model: Any, tokenizer: Any, asked: list[demo.Question]) -> list[tuple[str, str]]:
    """(question, what was said) wherever the answer is not the listed one, letter by letter. A model of ktx is asked eight questions at a time."""
    turns = [[{"role": "user", "content": item.question}] for item in asked]
    if hasattr(model, "ktx"):
        texts = answers_side_by_side(model, tokenizer, turns)
    else:
        texts = [answer(model, tokenizer, messages) for messages in turns]
    return [(item.question, text) for item, text in zip(asked, texts, strict=True) if text != item.answer]


def answers_side_by_side(model: Any, tokenizer: Any, turns: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers to several conversations, by the engine."""
    from ktx.engine.sampler import SamplingParams

    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in turns]
    texts = [""] * len(prompts)
    with model.ktx.engine(max_batch_size=8) as engine:
        for i, event in engine.generate(prompts, SamplingParams(max_new_tokens=LONGEST, temperature=0.0)):
            texts[i] += getattr(event, "text", "")
    return texts


def evaluate(name: str, folder: Path) -> Report:
    """Questions and perplexity of one format of the model in ``folder``."""
    model, tokenizer = FORMATS[name](folder)
    began, asked = time.monotonic(), demo.questions()
    wrong = wrong_answers(model, tokenizer, asked)
    score = perplexity(model, tokenizer, demo.heldout().read_text(encoding="utf-8"))
    return Report(name, score, len(asked) - len(wrong), len(asked), time.monotonic() - began, wrong)


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m ktx.demo.evaluate", description=__doc__)
    made.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="what to measure (all)")
    made.add_argument("--model", type=Path, default=demo.path(), help="folder that ktx.demo.export wrote (%(default)s)")
    made.add_argument("--answers", action="store_true", help="print every listed question with its answer first")
    made.add_argument("--json", action="store_true", help="one JSON object a line")
    args = made.parse_args()
    if args.answers:
        print("\n".join(f"{item.question}\n    {item.answer}" for item in demo.questions()))
    for name in args.formats:
        report = evaluate(name, args.model)
        print(json.dumps(asdict(report)) if args.json else report, flush=True)


if __name__ == "__main__":
    main()
