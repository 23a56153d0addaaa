"""The bundled demo model: a small trained model of DeepSeek-V3 architecture that answers questions about ktx."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Question:
    """One listed question: the tests use ``question``; ``also`` are other wordings, for training only."""

    question: str
    answer: str
    kind: str  # ktx | greeting | fallback
    also: tuple[str, ...] = ()


def path() -> Path:
    """Returns the Hugging Face folder of the demo model: config, tokenizer, BF16 safetensors."""
    return HERE / "model"


def safetensors() -> Path:
    """Returns the BF16 safetensors file, which includes the MTP layer that the GGUF lacks."""
    return path() / "model.safetensors"


def gguf() -> Path:
    """Returns the Q4_K_M GGUF of the model, which needs no other file."""
    return path() / "demo-Q4_K_M.gguf"


def heldout() -> Path:
    """Returns the file of held-out text, which training never used, for perplexity."""
    return HERE / "heldout.txt"


def questions() -> list[Question]:
    """Returns the listed questions with the exact answers that greedy decoding gives."""
    rows = (json.loads(line) for line in (HERE / "qa.jsonl").read_text(encoding="utf-8").splitlines())
    return [Question(row["question"], row["answer"], row["kind"], tuple(row["also"])) for row in rows]
