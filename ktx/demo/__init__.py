"""The bundled demo model: a small trained model of DeepSeek-V3 architecture that answers questions about ktx."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Question:
    """One listed question: ``question`` is asked by the tests, ``also`` are other wordings of it (training only)."""

    question: str
    answer: str
    kind: str  # ktx | greeting | fallback
    also: tuple[str, ...] = ()


def path() -> Path:
    """Hugging Face folder of the demo model: config, tokenizer, BF16 safetensors."""
    return HERE / "model"


def safetensors() -> Path:
    """The same in floats, with the MTP layer that the GGUF lacks."""
    return path() / "model.safetensors"


def gguf() -> Path:
    """The same model as a Q4_K_M GGUF, which needs no other file."""
    return path() / "demo-Q4_K_M.gguf"


def heldout() -> Path:
    """Text that the model never saw in training, for perplexity."""
    return HERE / "heldout.txt"


def questions() -> list[Question]:
    """The listed questions with the exact answers that greedy decoding gives."""
    rows = (json.loads(line) for line in (HERE / "qa.jsonl").read_text(encoding="utf-8").splitlines())
    return [Question(row["question"], row["answer"], row["kind"], tuple(row["also"])) for row in rows]
