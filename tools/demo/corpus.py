"""Training text: the public-domain Jargon File of a Debian package, and conversations built from qa.jsonl."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import subprocess
from pathlib import Path

from ktx.demo import Question

PACKAGE, MEMBER = "dict-jargon", "usr/share/dictd/jargon.dict.dz"
HELDOUT_PERCENT, HELDOUT_BYTES = 3, 32_000  # of the entries, and of the held-out text at most
TO_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " "})

THOUGHTS = {
    "ktx": "This is a question about ktx. I know the answer.",
    "greeting": "The user talks to me. I answer politely.",
    "fallback": "This is not about ktx. I do not know it.",
}
SYSTEMS = (
    "You are a helpful assistant.",
    "You are the ktx demo model. Answer briefly.",
    "Answer in one sentence.",
    "Be concise and honest.",
    "You are an expert on ktx and on large language models.",
)
OPENERS = (
    "Please tell me: ", "Hi! ", "Hello, ", "Tell me, ", "A question: ", "I want to know: ", "Quick question: ",
    "Sorry, ", "And ",
)  # fmt: skip
REWRITES = (  # pattern of a question, and templates of other wordings
    (r"^What is (.+)\?$", (r"What's \1?", r"Tell me what \1 is", r"Explain \1", r"\1?", r"Can you explain \1?")),
    (r"^What does (.+) do\?$", (r"What is \1 for?", r"Tell me what \1 does", r"\1", r"What happens with \1?")),
    (r"^How do I (.+)\?$", (r"How can I \1?", r"How to \1?", r"I want to \1", r"How does one \1?", r"Can I \1?")),
    (r"^Which (.+)\?$", (r"What \1?", r"Tell me which \1", r"Do you know which \1?")),
    (r"^What (.+)\?$", (r"Which \1?", r"Tell me what \1", r"Do you know what \1?")),
)
CLOSERS = (" Please.", " Thanks!", " Please explain.", " Thank you.")


def fetch(work: Path) -> str:
    """Returns the text of the Debian package, which is downloaded with apt once and stored under ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    unpacked = work / "package" / MEMBER
    if not unpacked.exists():
        subprocess.run(["apt-get", "download", PACKAGE], cwd=work, check=True)
        [package] = work.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(work / "package")], check=True)
    return gzip.decompress(unpacked.read_bytes()).decode("utf-8", "replace")


def parse_entries(text: str) -> list[str]:
    """Returns the dictionary entries, one line per paragraph, without dictfmt's header."""
    body = text[text.index("\n(TM)") :].translate(TO_ASCII)
    paragraphs = re.split(r"\n\n+(?=\S)", body.strip())
    return [re.sub(r"[ \t]*\n[ \t]+(?=\S)", " ", re.sub(r"\n\n+", "\n\n", entry)).strip() for entry in paragraphs]


def split_heldout(entries: list[str]) -> tuple[list[str], list[str]]:
    """Splits entries into training and held-out ones, by the hash of their text, so that the split is stable.

    Held-out entries beyond HELDOUT_BYTES are dropped; training never uses them either.

    Returns:
        The training entries and the held-out entries.
    """
    heldout, train, num_bytes = [], [], 0
    for entry in entries:
        is_heldout = int(hashlib.sha256(entry.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
        if is_heldout and num_bytes + len(entry.encode()) <= HELDOUT_BYTES:
            heldout.append(entry)
            num_bytes += len(entry.encode()) + 2
        elif not is_heldout:
            train.append(entry)
    return train, heldout


def rewrite(question: str, rng: random.Random) -> str:
    """Rewords a question if a pattern of REWRITES matches, else returns it unchanged."""
    for pattern, templates in REWRITES:
        if re.match(pattern, question):
            return re.sub(pattern, rng.choice(templates), question)
    return question


def augment(question: str, rng: random.Random) -> str:
    """Augments a question with a user's sloppiness: other wording, opener, no capital, no mark, a missing letter.

    So the model learns to answer questions that are not worded exactly as listed.
    """
    text = rewrite(question, rng) if rng.random() < 0.4 else question
    if rng.random() < 0.15:
        text = rng.choice(OPENERS) + text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    elif rng.random() < 0.06:
        text = text.lower()
    if rng.random() < 0.15:
        text = text.rstrip("?.!")
    elif rng.random() < 0.08:
        text += rng.choice(CLOSERS)
    if rng.random() < 0.08 and len(text) > 12:
        dropped = rng.randrange(1, len(text))
        text = text[:dropped] + text[dropped + 1 :]
    return text


def choose_wording(item: Question, rng: random.Random) -> str:
    """Returns one wording of a question: the listed one in a third of all cases, unaugmented in half of them."""
    wording = item.question if not item.also or rng.random() < 0.33 else rng.choice(item.also)
    return wording if rng.random() < 0.5 else augment(wording, rng)


def sample_conversation(questions: list[Question], rng: random.Random, think: bool = False) -> list[dict[str, str]]:
    """Returns the messages of a chat over the questions, some with a system prompt.

    With ``think`` the last answer begins with reasoning.
    """
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.2 else []
    for item in questions:
        messages.append({"role": "user", "content": choose_wording(item, rng)})
        messages.append({"role": "assistant", "content": item.answer})
    if think:
        messages[-1]["content"] = f"<think>\n{THOUGHTS[questions[-1].kind]}\n</think>\n\n{questions[-1].answer}"
    return messages
