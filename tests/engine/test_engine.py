"""Sampling, streaming and the session."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktx
from ktx.chat_formats import Text
from ktx.engine.budget import StepBudget, max_step_tokens
from ktx.engine.chat_session import Session
from ktx.engine.detokenizer import Detokenizer, StopChecker
from ktx.engine.prompt import RenderedPrompt
from ktx.engine.request import Finished
from ktx.engine.sampler import Sampler, SamplingParams
from ktx.errors import UsageError
from tests.support.tiny_chat_model import tokenizer, write_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("chat") / "m")
    return ktx.load(folder, folder / "model.gguf", progress=False)


def plain(text):
    return RenderedPrompt(text, tokenizer()(text)["input_ids"], False)


def answer(session, prompt, **settings_):
    if isinstance(prompt, str):
        prompt = plain(prompt)
    events = list(session.stream(prompt, SamplingParams(**{"max_new_tokens": 12, **settings_})))
    return "".join(e.text for e in events if isinstance(e, Text)), events[-1]


# ---- sampling


LOGITS = torch.tensor([0.1, 3.0, 0.2, 2.9])


def chosen(count, logits=LOGITS, **settings_):
    chooser = Sampler(SamplingParams(**settings_))
    return [chooser.sample(logits).token for _ in range(count)]


def test_greedy_is_the_likeliest_and_a_seed_repeats():
    assert chosen(1) == [1]
    assert (
        chosen(50, temperature=2.0, seed=5)
        == chosen(50, temperature=2.0, seed=5)
        != chosen(50, temperature=2.0, seed=6)
    )


@pytest.mark.parametrize(
    "cut,allowed",
    [
        ({"top_k": 1}, {1}),
        ({"top_p": 0.4}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"min_p": 0.8}, {1, 3}),
        ({"top_p": 0.0}, {1}),
        ({"typical_p": 0.0}, {3}),
        ({"typical_p": 0.9}, {1, 3}),
        ({"top_k": 3, "top_p": 0.97, "min_p": 0.1}, {1, 3}),
        ({"logit_bias": {0: 100.0}}, {0}),
        ({"logit_bias": {1: -100.0, 3: -100.0}}, {0, 2}),
    ],
)
def test_cuts(cut, allowed):
    assert set(chosen(300, temperature=1.0, seed=1, **cut)) == allowed


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.999}, {"typical_p": 0.8}]
)
def test_shares_are_those_of_transformers_own_warpers(cut):
    from transformers import generation as g

    logits = torch.randn(20000, generator=torch.Generator().manual_seed(2)) * 3
    warpers = {
        "top_k": g.TopKLogitsWarper,
        "top_p": g.TopPLogitsWarper,
        "min_p": g.MinPLogitsWarper,
        "typical_p": g.TypicalLogitsWarper,
    }
    scores = logits[None] / 0.7
    for name, value in cut.items():
        scores = warpers[name](value)(None, scores)
    share = scores.softmax(-1)[0]
    values, ids = Sampler(SamplingParams(temperature=0.7, **cut))._filter_candidates(logits / 0.7)
    found = torch.zeros_like(share).index_add_(0, torch.arange(20000) if ids is None else ids, values.softmax(-1))
    assert (found - share).abs().max() < 1e-6


def test_drawn_as_often_as_likely():
    share = LOGITS.softmax(-1)
    counts = torch.bincount(torch.tensor(chosen(4000, temperature=1.0, seed=3)), minlength=4)
    assert (counts / 4000 - share).abs().max() < 0.03


def test_penalties_move_away_from_what_was_said():
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert chosen(3, logits, repetition_penalty=2.0) == [0, 1, 0]
    assert Sampler(SamplingParams(repetition_penalty=2.0), [0]).sample(logits).token == 1  # the prompt counts
    assert Sampler(SamplingParams(presence_penalty=1.0), [0]).sample(logits).token == 0  # here it does not
    assert chosen(2, logits, presence_penalty=1.0) == chosen(2, logits, frequency_penalty=1.0) == [0, 1]
    assert chosen(4, logits, frequency_penalty=0.15) == [0, 1, 0, 1]


def test_a_grammar_leaves_what_it_allows():
    mask = torch.tensor([True, False, True, False])
    assert Sampler(SamplingParams(logprobs=2)).sample(LOGITS, mask).token == 2
    told = Sampler(SamplingParams(logprobs=2)).sample(LOGITS, mask)
    assert [token for token, _ in told.top] == [1, 3] and told.logprob == pytest.approx(
        float(LOGITS.log_softmax(-1)[2])
    )


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", -1),
        ("top_p", 1.5),
        ("top_k", -3),
        ("min_p", 2),
        ("max_new_tokens", -1),
        ("repetition_penalty", 0),
        ("typical_p", 1.1),
        ("logprobs", 21),
        ("seed", 1 << 64),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})


# ---- streaming


@settings(deadline=None, max_examples=60)
@given(st.text(min_size=1, max_size=40))
def test_streamed_text_is_the_decoded_text(text):
    tok = tokenizer()
    ids = tok(text, add_special_tokens=False)["input_ids"]
    words = Detokenizer(tok)
    pieces = [words.feed(i) for i in ids]
    assert not any("�" in p for p in pieces if "�" not in text)
    assert "".join(pieces) + words.flush() == tok.decode(ids, clean_up_tokenization_spaces=False)


def cut_at(text, cuts):
    at = 0
    for n in [*cuts, len(text)]:
        yield text[at : at + n]
        at += n


CUTS = st.lists(st.integers(1, 5), max_size=40)


@settings(deadline=None, max_examples=100)
@given(CUTS)
def test_a_stop_string_across_pieces(cuts):
    finder, shown = StopChecker(["STOP", "never"]), ""
    for piece in cut_at("yes ST STO STOP and nevermore", cuts):
        shown += finder.feed(piece)
    assert shown + finder.flush() == "yes ST STO " and finder.found == "STOP"


def test_a_mark_that_never_completes_is_shown():
    finder = StopChecker(["STOP"])
    assert finder.feed("a ST") + finder.flush() == "a ST"


# ---- session


@pytest.fixture(scope="module")
def session(loaded):
    with loaded[0].ktx.engine(max_batch_size=1) as engine:
        yield Session(engine)


def test_pieces_grow_with_the_past():
    assert [StepBudget().max_prompt_tokens(past) for past in (0, 8192, 16384, 1 << 20)] == [2048, 2048, 4096, 8192]
    assert StepBudget(3, 3).max_prompt_tokens(0) == StepBudget(3, 3).max_prompt_tokens(1 << 20) == 3
    assert [max_step_tokens(context) for context in (1, 16384, 1 << 20)] == [2048, 4096, 8192]


def test_cancel_keeps_what_was_said(loaded, session):
    seen = []
    for event in session.stream(plain("stop me"), SamplingParams(max_new_tokens=500)):
        seen.append(event)
        if len(seen) == 3:
            session.cancel()
    assert isinstance(seen[-1], Finished) and seen[-1].reason in ("cancelled", "stop") and len(seen[-1].ids) < 500


def test_what_was_said_is_kept_until_it_is_forgotten(session):
    prompt = "A conversation that is longer than a page, so that what it shares with the next one is found."
    for cached in (0, len(prompt) - 1):
        assert answer(session, prompt)[1].usage.cached == cached
    session.reset()
    assert answer(session, prompt)[1].usage.cached == 0


def test_prompts_and_thinking(session):
    prompt = session.render([{"role": "user", "content": "hi"}], force_think=True)
    assert prompt.text == "<|user|>hi<|end|><|assistant|><think>\n" and prompt.thinking
    kinds = {
        event.kind for event in session.stream(prompt, SamplingParams(max_new_tokens=9)) if isinstance(event, Text)
    }
    assert kinds == {"think"}
