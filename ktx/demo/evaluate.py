"""Check the demo model's answers to all listed questions and measure its perplexity, format by format.

Run as ``python -m ktx.demo.evaluate``.
"""

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

WINDOW_TOKENS = 512  # of a perplexity window, including the BOS token
MAX_ANSWER_TOKENS = 64  # no listed answer has more


@dataclass
class Report:
    """Result of one format."""

    format: str
    perplexity: float
    right: int
    asked: int
    seconds: float
    wrong: list[tuple[str, str]] = field(default_factory=list)  # question, the model's answer

    def __str__(self) -> str:
        score = f"perplexity {self.perplexity:8.3f}   answers {self.right}/{self.asked}"
        return "\n".join(
            [
                f"{self.format:12} {score}   {self.seconds:.0f} s",
                *(f"    {question}  ->  {answer}" for question, answer in self.wrong),
            ]
        )


def load_reference(folder: Path) -> tuple[Any, Any]:
    """Loads the model and tokenizer with plain transformers in float32, as the reference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it reports the MTP layer, which it does not use, as unexpected
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_packed(mix: str, folder: Path) -> tuple[Any, Any]:
    """Loads the model with ktx: the BF16 safetensors, the exported Q4_K_M, or a newly written GGUF of another mix."""
    import ktx
    from ktx.demo.gguf_writer import write_gguf

    shipped = {"BF16": folder / "model.safetensors", "Q4_K_M": folder / demo.gguf().name}
    if mix in shipped:
        return ktx.load(str(folder), weights=str(shipped[mix]), progress=False)
    with tempfile.TemporaryDirectory() as temp_dir:
        write_gguf(folder, Path(temp_dir) / "demo.gguf", mix)
        return ktx.load(str(folder), weights=str(Path(temp_dir) / "demo.gguf"), progress=False)


FORMATS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "transformers": load_reference,
    "BF16": lambda folder: load_packed("BF16", folder),
    "Q8_0": lambda folder: load_packed("Q8_0", folder),
    "Q4_K_M": lambda folder: load_packed("Q4_K_M", folder),
}


@torch.no_grad()
def measure_perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """Returns the exp of the mean cross entropy over the tokens of ``text``, in windows that begin with BOS."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    total = 0.0
    for start in range(0, len(ids), WINDOW_TOKENS - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + WINDOW_TOKENS - 1]]])
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return math.exp(total / len(ids))


@torch.no_grad()
def generate_answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Returns the greedy answer to a conversation."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def find_wrong_answers(model: Any, tokenizer: Any, questions: list[demo.Question]) -> list[tuple[str, str]]:
    """Returns (question, answer) where the answer differs from the listed one in any character.

    A model of ktx answers in batches of eight, by the engine; one of plain transformers has no engine.
    """
    conversations = [[{"role": "user", "content": item.question}] for item in questions]
    if hasattr(model, "ktx"):
        texts = generate_answers(model, tokenizer, conversations)
    else:
        texts = [generate_answer(model, tokenizer, messages) for messages in conversations]
    return [(item.question, text) for item, text in zip(questions, texts, strict=True) if text != item.answer]


def generate_answers(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Returns the greedy answers to several conversations, computed in batches by the engine."""
    from ktx.engine.sampler import SamplingParams

    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in conversations
    ]
    texts = [""] * len(prompts)
    with model.ktx.engine(max_batch_size=8) as engine:
        for i, event in engine.generate(prompts, SamplingParams(max_new_tokens=MAX_ANSWER_TOKENS, temperature=0.0)):
            texts[i] += getattr(event, "text", "")
    return texts


def evaluate(name: str, folder: Path) -> Report:
    """Measures one format of the model in ``folder``."""
    model, tokenizer = FORMATS[name](folder)
    start_s, questions = time.monotonic(), demo.questions()
    wrong = find_wrong_answers(model, tokenizer, questions)
    score = measure_perplexity(model, tokenizer, demo.heldout().read_text(encoding="utf-8"))
    return Report(name, score, len(questions) - len(wrong), len(questions), time.monotonic() - start_s, wrong)


def main() -> None:
    """Measures wrong answers and perplexity of the demo model in the chosen formats, and prints a report of each."""
    parser = argparse.ArgumentParser(prog="python -m ktx.demo.evaluate", description=__doc__)
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="formats to measure (default: all)"
    )
    parser.add_argument(
        "--model", type=Path, default=demo.path(), help="folder that tools.demo.export wrote (default: %(default)s)"
    )
    parser.add_argument("--answers", action="store_true", help="print all listed questions and their answers first")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    if args.answers:
        print("\n".join(f"{item.question}\n    {item.answer}" for item in demo.questions()))
    for name in args.formats:
        report = evaluate(name, args.model)
        print(json.dumps(asdict(report)) if args.json else report, flush=True)


if __name__ == "__main__":
    main()
