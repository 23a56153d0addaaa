"""Sampling, streaming and the session."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktx
from ktx.engine.sampling import Sampling
from ktx.engine.stream import Detokeniser, Router, Text
from ktx.engine.text import Done, Session, piece_of
from ktx.errors import UsageError
from tests.small_chat import tokenizer, write_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("chat") / "m")
    return ktx.load(folder, folder / "model.gguf", progress=False)


def answer(session, ids, **settings_):
    events = list(session.answer(ids, Sampling(**{"max_new_tokens": 12, **settings_})))
    return "".join(e.text for e in events if isinstance(e, Text)), events[-1]


# ---- sampling


def test_greedy_is_the_likeliest_and_a_seed_repeats():
    logits = torch.tensor([0.1, 3.0, 0.2, 2.9])
    assert Sampling().choose(logits, [], Sampling().generator()) == 1
    hot = Sampling(temperature=2.0, seed=5)
    assert [hot.choose(logits, [], hot.generator()) for _ in range(5)] == [
        hot.choose(logits, [], hot.generator()) for _ in range(5)
    ]


@pytest.mark.parametrize(
    "cut,allowed",
    [
        ({"top_k": 1}, {1}),
        ({"top_p": 0.4}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"min_p": 0.8}, {1, 3}),
        ({"top_p": 0.0}, {1}),
    ],
)
def test_cuts(cut, allowed):
    logits, hot = torch.tensor([0.1, 3.0, 0.2, 2.9]), Sampling(temperature=1.0, seed=1, **cut)
    source = hot.generator()
    assert {hot.choose(logits, [], source) for _ in range(200)} == allowed


def test_penalties_move_away_from_what_was_said():
    logits = torch.tensor([2.0, 1.9, -1.0])
    for settings_ in ({"repetition_penalty": 2.0}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}):
        assert Sampling(**settings_).choose(logits, [0], Sampling().generator()) == 1


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", -1),
        ("top_p", 1.5),
        ("top_k", -3),
        ("min_p", 2),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})


# ---- streaming


@settings(deadline=None, max_examples=60)
@given(st.text(min_size=1, max_size=40))
def test_streamed_text_is_the_decoded_text(text):
    tok = tokenizer()
    ids = tok(text, add_special_tokens=False)["input_ids"]
    words = Detokeniser(tok)
    pieces = [words.feed(i) for i in ids]
    assert not any("�" in p for p in pieces if "�" not in text)
    assert "".join(pieces) + words.rest() == tok.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 5), max_size=40))
def test_marks_across_pieces(cuts):
    text = "<think>\nhm, </thin k</think>\n\nyes<STOP>never"
    router, events, at = Router(["<STOP>"]), [], 0
    for n in [*cuts, len(text)]:
        events += router.feed(text[at : at + n])
        at += n
    events += router.finish()
    shown = {kind: "".join(e.text for e in events if e.kind == kind) for kind in ("think", "answer")}
    assert shown == {"think": "hm, </thin k", "answer": "yes"} and router.stopped


def test_a_mark_that_never_completes_is_shown():
    router = Router(["STOP"])
    assert "".join(e.text for e in [*router.feed("a ST"), *router.finish()]) == "a ST"


# ---- session


def test_pieces_grow_with_the_past():
    assert [piece_of(past) for past in (0, 2048, 4096, 1 << 20)] == [512, 512, 1024, 2048]
    assert piece_of(0, 3) == piece_of(1 << 20, 3) == 3


def test_cache_reuse_and_chunks_change_nothing(loaded):
    model, tok = loaded
    prompt = tok("A long enough prompt to be cut into several chunks.")["input_ids"]
    whole, done = answer(Session(model, tok), prompt)
    for chunk in (1, 7, 512, None):
        session = Session(model, tok, chunk_size=chunk)
        assert answer(session, prompt)[0] == whole
        longer = prompt + done.ids + tok("And more.")["input_ids"]
        text, second = answer(session, longer)
        assert second.stats.cached_tokens >= len(prompt)
        assert text == answer(Session(model, tok), longer)[0]
        changed = prompt[:10] + longer
        text, third = answer(session, changed)
        assert third.stats.cached_tokens == 10 and text == answer(Session(model, tok), changed)[0]


def test_the_same_prompt_again_computes_one_token(loaded):
    session = Session(*loaded)
    prompt = loaded[1]("twice")["input_ids"]
    first = answer(session, prompt)[0]
    again, done = answer(session, prompt)
    assert again == first and done.stats.cached_tokens == len(prompt) - 1


def test_cancel_keeps_what_was_said(loaded):
    session, seen = Session(*loaded), []
    for event in session.answer(loaded[1]("stop me")["input_ids"], Sampling(max_new_tokens=500)):
        seen.append(event)
        if len(seen) == 3:
            session.cancel()
    assert isinstance(seen[-1], Done) and seen[-1].stats.end in ("cancelled", "stop") and len(seen[-1].ids) < 500


def test_limits(loaded):
    model, tok = loaded
    prompt = tok("0123456789")["input_ids"]
    assert answer(Session(model, tok), prompt, max_new_tokens=3)[1].stats.answer_tokens <= 3
    small = Session(model, tok, max_context=16)
    done = answer(small, prompt, max_new_tokens=100)[1]
    assert done.stats.end in ("context", "stop") and done.stats.used <= 16
    with pytest.raises(UsageError, match="the context holds 16"):
        answer(small, prompt * 3)
    with pytest.raises(UsageError, match="empty"):
        answer(small, [])


def test_stop_strings(loaded):
    model, tok = loaded
    text, _ = answer(Session(model, tok), tok("abc")["input_ids"], max_new_tokens=30)
    at = next(i for i, c in enumerate(text) if c not in "\ufffd\n")  # a random model says few whole characters
    cut, done = answer(Session(model, tok), tok("abc")["input_ids"], max_new_tokens=30, stop=[text[at]])
    assert cut == text[:at].lstrip("\n") and done.stats.end == "stop"


def test_a_cache_that_cannot_be_cropped_is_rebuilt(tmp_path):
    folder = write_model(tmp_path / "m", "qwen3_next")
    model, tok = ktx.load(folder, folder / "model.gguf", progress=False)
    session = Session(model, tok)
    one, two = tok("first prompt")["input_ids"], tok("second")["input_ids"]
    answer(session, one)
    text, done = answer(session, two)
    assert done.stats.cached_tokens == 0 and text == answer(Session(model, tok), two)[0]


def test_prompts_and_thinking(loaded):
    session = Session(*loaded)
    ids = session.prompt([{"role": "user", "content": "hi"}], force_think=True)
    assert loaded[1].decode(ids) == "<|user|>hi<|end|><|assistant|><think>\n"
