"""Forced calls: the grammar takes what the family writes and nothing else, and the parser reads back what it took."""

from __future__ import annotations

import json
import random

import pytest

llguidance = pytest.importorskip("llguidance")

from ktx.chat_formats import CHAT_FORMATS, CallArguments, CallEnd, CallStart, forced_call_grammar  # noqa: E402
from tests.chat_formats.cases import TOOLS, parse  # noqa: E402
from tests.support.call_samples import WRITINGS  # noqa: E402

FAMILIES = [name for name, dialect in CHAT_FORMATS.items() if dialect.call_format]
FIRST = 256  # ids of marks lie above those of bytes


class Bytes:
    """A vocabulary of single bytes, with the family's marks as tokens above them."""

    def __init__(self, family: str, special: bool):
        format = CHAT_FORMATS[family].call_format
        found = (
            *format.starts,
            *format.ends,
            *format.sections,
            *format.separators,
            format.id_mark,
            *CHAT_FORMATS[family].reasoning_marks,
        )
        marks = [
            mark
            for mark in dict.fromkeys((*found, "<|message|>", "<|constrain|>"))
            if mark.startswith(("<|", "<｜", "["))
        ]
        self.special = {mark: FIRST + 1 + n for n, mark in enumerate(marks)} if special else {}
        self.eos_token_id, self.bos_token_id = FIRST, None
        self.special_token_ids = [FIRST, *self.special.values()]
        self.tokens = [bytes([n]) for n in range(256)] + [b"<eos>"] + [mark.encode() for mark in self.special]

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            mark = next((mark for mark in sorted(self.special, key=len, reverse=True) if text.startswith(mark)), None)
            ids += [self.special[mark]] if mark else list(text[0].encode())
            text = text[len(mark or text[0]) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.tokens[id] for id in ids).decode(errors="replace")


def matcher(family, special=True, **how):
    vocabulary = Bytes(family, special)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))
    grammar = forced_call_grammar(CHAT_FORMATS[family], TOOLS, special=vocabulary.special, **how)
    assert not llguidance.LLMatcher.validate_grammar(grammar, tokenizer), grammar
    return vocabulary, llguidance.LLMatcher(tokenizer, grammar)


def accepts(family, text, special=True, **how) -> bool:
    vocabulary, found = matcher(family, special, **how)
    ids = vocabulary.encode(text)
    return found.try_consume_tokens(ids) == len(ids) and found.is_accepting()


def text_of(family, *calls):
    text = WRITINGS[family].calls(*calls)
    if family == "gpt-oss":
        return text.removeprefix("<|start|>assistant").removesuffix("<|call|>")
    return text


PARIS = ("weather", {"city": "Paris", "days": 2})


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_takes_what_the_family_writes(family, special):
    assert accepts(family, text_of(family, PARIS), special)
    assert accepts(family, text_of(family, ("now", {})), special)
    assert accepts(family, text_of(family, ("write", {"path": "a b.txt", "content": "x < y\n\n{é}"})), special)
    assert accepts(family, text_of(family, ("search", {"query": "q", "filters": {"a": [1]}, "exact": True})), special)


@pytest.mark.parametrize("family", FAMILIES)
def test_takes_nothing_else(family):
    assert not accepts(family, "Hello")
    assert not accepts(family, "")
    assert not accepts(family, text_of(family, ("unknown", {})))
    assert not accepts(family, text_of(family, ("weather", {"city": "Paris", "days": "two"})))
    assert not accepts(family, text_of(family, PARIS), names=["now"])
    assert accepts(family, text_of(family, ("now", {})), names=["now"])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt-oss"])
def test_several_calls(family):
    two = text_of(family, PARIS, ("now", {}))
    assert accepts(family, two)
    assert not accepts(family, two, parallel=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thought_before(family):
    if family == "gpt-oss":
        before = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    else:
        before = f"Hm.{CHAT_FORMATS[family].reasoning_marks[1]}\n\n"
    assert accepts(family, before + text_of(family, PARIS), thinking=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_taken_is_read_back(family):
    """Walks at random through the grammar; the parser makes of it whole calls with arguments of the schema's kinds."""
    for seed in range(6):
        vocabulary, found = matcher(family, names=["weather", "now"])
        chance, ids = random.Random(seed), []
        while len(ids) < 700 and not found.is_stopped():
            mask = found.compute_logit_bias()
            allowed = [id for id in range(len(vocabulary.tokens)) if mask[id]]
            printable = [id for id in allowed if id >= 32 and id not in range(127, FIRST)] or allowed
            id = FIRST if FIRST in allowed and chance.random() < 0.5 else chance.choice(printable)
            # a string or number need not be long: its end is taken when it may
            closing = [id for id in printable if id < FIRST and chr(id) in '"},<']
            id = chance.choice(closing) if closing and id != FIRST and chance.random() < 0.3 else id
            if id == FIRST:
                break
            assert found.consume_token(id)
            ids.append(id)
        if not found.is_accepting():
            continue
        events, _ = parse(family, [vocabulary.decode(ids)])
        started = [event for event in events if isinstance(event, CallStart)]
        assert started and len(started) == sum(isinstance(event, CallEnd) for event in events), vocabulary.decode(ids)
        for event in events:
            assert not hasattr(event, "kind"), events
            if isinstance(event, CallArguments):
                arguments = json.loads(event.text)
                assert isinstance(arguments.get("city", ""), str) and isinstance(arguments.get("days", 0), int)


def test_no_calls():
    with pytest.raises(ValueError, match="plain"):
        forced_call_grammar(CHAT_FORMATS["plain"], TOOLS)
    with pytest.raises(ValueError, match="no functions"):
        forced_call_grammar(CHAT_FORMATS["qwen3"], [])
    with pytest.raises(KeyError):
        forced_call_grammar(CHAT_FORMATS["qwen3"], TOOLS, names=["unknown"])
