"""What the tasks beside this file ask: made of the demo model's listed questions and of the text it never saw."""

from __future__ import annotations

import random

import datasets

from ktx import demo


def choices(**options):
    """Each question with its own answer among three of other questions."""
    chance, asked, rows = random.Random(1), [item for item in demo.questions() if item.kind == "ktx"], []
    for item in asked:
        answers = [other.answer for other in chance.sample(asked, 4) if other.answer != item.answer][:3]
        answers.insert(chance.randrange(4), item.answer)
        rows.append({"question": item.question, "choices": answers, "gold": answers.index(item.answer)})
    return {"test": datasets.Dataset.from_list(rows)}


def entries(**options):
    """The held-out text, an entry a document."""
    text = demo.heldout().read_text(encoding="utf-8")
    return {
        "test": datasets.Dataset.from_list([{"text": entry.strip()} for entry in text.split("\n\n") if entry.strip()])
    }


def answers(**options):
    """Questions in the model's own form, to be answered word by word."""
    rows = [
        {"prompt": f"<|begin|><|user|>{item.question}<|assistant|>", "answer": item.answer}
        for item in demo.questions()
        if item.kind == "ktx"
    ]
    return {"test": datasets.Dataset.from_list(rows)}
