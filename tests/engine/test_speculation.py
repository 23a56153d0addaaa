"""Guessed tokens: answers stay what they are, and fewer forwards make them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktx
import ktx.demo
from ktx.engine.request import Request
from ktx.engine.sampler import SamplingParams
from ktx.engine.speculation import ForwardCostModel, PromptLookup, SpeculativeDecoder, choose_draft_lengths
from ktx.errors import UsageError
from tests.engine.test_batching import answers
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_chat_model import tokenizer, write_model
from tests.support.tiny_models import tiny

TALE = [9, 40, 41, 42, 43, 44, 45, 46, 47, 48]
PROMPTS = [TALE * 12, TALE * 5 + [77], [100, 101] * 70, list(range(9, 60)) * 2]


@pytest.fixture(scope="module", params=["llama", "deepseek_v3", "gpt_oss"])
def loaded(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("speculation") / request.param, request.param)
    return ktx.load(folder, folder / "model.gguf", progress=False)


@pytest.fixture(scope="module")
def demo():
    return ktx.load(ktx.demo.path(), ktx.demo.safetensors(), progress=False, mtp=True)


def eager(engine):
    """Guesses whatever a forward costs: a tiny model's are too quick for a guess to pay."""
    engine.speculation.cost_model.cost = lambda tokens: 1.0
    return engine


def asked(demo, *questions):
    words = demo[1]
    return [
        words.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in questions
    ]


QUESTIONS = ("What is a rule file?", "What is ktx?", "How do I serve a model?", "What is a rule file?")


# ---- how many


def pace(*seconds: float) -> ForwardCostModel:
    made = ForwardCostModel()
    for _ in range(20):
        for tokens, took in enumerate(seconds, 1):
            made.record(tokens, took)
    return made


def test_guesses_are_made_where_a_token_more_costs_little():
    assert choose_draft_lengths(pace(1.0, 1.05, 1.1), [0.9], [8]) == [8]
    assert choose_draft_lengths(pace(1.0, 2.0, 3.0), [0.95], [8]) == [0]
    assert choose_draft_lengths(pace(1.0, 1.3, 1.6), [0.2], [8]) == [0]
    assert 0 < choose_draft_lengths(pace(1.0, 1.3, 1.6), [0.7], [8])[0] < 8


def test_the_better_guesser_of_two_gets_the_longer_draft():
    first, second = choose_draft_lengths(pace(1.0, 1.2, 1.4), [0.9, 0.6], [8, 8])
    assert first > second


def test_no_draft_is_longer_than_there_is_room():
    assert choose_draft_lengths(pace(1.0, 1.0, 1.0), [0.99, 0.99], [3, -1]) == [3, 0]


def test_the_cost_of_a_forward_is_a_line_through_what_was_seen():
    made = pace(1.0, 1.5, 2.0)
    assert made.cost(2) == pytest.approx(1.5, rel=0.01)
    assert made.cost(5) == pytest.approx(3.0, rel=0.01)


def test_a_bad_start_is_tried_again():
    speculation, request = SpeculativeDecoder(PromptLookup()), Request([1], SamplingParams(), print)
    costs = pace(1.0, 1.3, 1.6)

    def rate():
        hits, tries = speculation.acceptance[request]
        return hits / tries

    for _ in range(10):
        speculation.record_verified(request, 3, 0)
    assert choose_draft_lengths(costs, [rate()], [8]) == [0]
    for _ in range(200):
        speculation.record_verified(request, 0, 0)
    assert choose_draft_lengths(costs, [rate()], [8]) != [0]


# ---- prompt lookup


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([1, 256, 65536, 1 << 24, 257, 0]), min_size=1, max_size=60), st.integers(1, 8))
def test_a_draft_is_what_followed_the_latest_equal_tail(ids, most):
    """Ids whose bytes look like other ids' one byte further on."""
    request = Request(list(ids), SamplingParams(), print)
    found = PromptLookup().lookup(request, most)
    for size in (4, 3, 2):
        places = [i for i in range(len(ids) - size) if ids[i : i + size] == ids[-size:]]
        if places:
            assert found == ids[places[-1] + size :][:most]
            return
    assert found == []


def test_a_text_that_grows_is_looked_up_whole():
    lookup, request = PromptLookup(), Request([1, 2, 3, 4], SamplingParams(), print)
    assert lookup.lookup(request, 4) == []
    request.ids += [1, 2]
    assert lookup.lookup(request, 2) == [3, 4]


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.05}])
def test_answers_with_prompt_lookup_are_those_without(loaded, how):
    model, _ = loaded
    sampling = SamplingParams(max_new_tokens=60, ignore_eos=True, **how)
    with model.ktx.engine() as engine:
        plain, steps = [event.ids for event in answers(engine, PROMPTS, sampling)], engine.steps
    for options in ({}, {"kv_cache_tokens": 384, "max_batch_size": 3}):
        with model.ktx.engine(speculative="prompt_lookup", **options) as engine:
            found = answers(eager(engine), PROMPTS, sampling)
            if not how and not options:
                assert sum(event.usage.accepted for event in found) > 0
                assert engine.steps < steps
        assert [event.ids for event in found] == plain
        for event in found:
            assert event.usage.accepted <= event.usage.drafted


# ---- the model's own layer


def test_answers_with_mtp_are_those_without_in_fewer_forwards(demo):
    model, prompts, sampling = demo[0], asked(demo, *QUESTIONS), SamplingParams(max_new_tokens=40)
    with model.ktx.engine() as engine:
        plain, steps = [event.ids for event in answers(engine, prompts, sampling)], engine.steps
    with model.ktx.engine(speculative="mtp") as engine:
        found = answers(eager(engine), prompts, sampling)
        again = answers(engine, prompts, sampling)  # on pages that are there already
        assert engine.steps < 1.4 * steps  # of both rounds together
    assert [event.ids for event in found] == [event.ids for event in again] == plain
    drafted, accepted = (sum(getattr(event.usage, name) for event in found) for name in ("drafted", "accepted"))
    assert accepted > 0.3 * drafted > 0


def test_mtp_in_a_cache_too_small_for_all(demo):
    model, prompts = demo[0], [ids * 4 for ids in asked(demo, *QUESTIONS)]
    sampling = SamplingParams(max_new_tokens=100, temperature=0.8, seed=1, ignore_eos=True)
    with model.ktx.engine() as engine:
        plain = [event.ids for event in answers(engine, prompts, sampling)]
    with model.ktx.engine(speculative="mtp", kv_cache_tokens=320, draft_tokens=3) as engine:
        found = answers(eager(engine), prompts, sampling)
    assert [event.ids for event in found] == plain
    assert sum(event.usage.preempted for event in found)


def test_the_layer_on_pages_says_what_it_says_of_the_whole_text(demo):
    model, words = demo
    ids = words("ktx reads GGUF files and packs them for the kernels of this machine.")["input_ids"]
    body, row, guessed = model.get_decoder(), torch.tensor([ids]), []
    with torch.inference_mode():
        states = body(input_ids=row).last_hidden_state[:, :-1]
        embeds = body.embed_tokens(row[:, 1:])
        rope = body.rotary_emb(embeds, torch.arange(len(ids) - 1)[None])
        whole = model.mtp(embeds, states, position_embeddings=rope, attention_mask=None)[0]
    with model.ktx.engine(speculative="mtp", prefix_cache=False) as engine:
        step = engine.speculation.drafter._run_layer
        engine.speculation.drafter._run_layer = lambda *given: guessed.append(step(*given)) or guessed[-1]
        answers(engine, [ids], SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert torch.nn.functional.cosine_similarity(guessed[0][:-1], whole, dim=-1).min() > 0.999


# ---- what cannot be


def test_kinds_and_numbers_are_checked(loaded):
    model, _ = loaded
    with pytest.raises(UsageError, match=r"speculative 'prompt_lokup'.*prompt_lookup"):
        model.ktx.engine(speculative="prompt_lokup")
    with pytest.raises(UsageError, match="draft_tokens is 0"):
        model.ktx.engine(speculative="prompt_lookup", draft_tokens=0)
    with pytest.raises(UsageError, match="mtp=True"):
        model.ktx.engine(speculative="mtp")


def test_a_file_without_the_layer_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"has no MTP layer \(model.layers.3.eh_proj.weight\)"):
        ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False, mtp=True)
    folder = write_model(tmp_path / "llama")
    with pytest.raises(UsageError, match="has no MTP layer"):
        ktx.load(folder, folder / "model.gguf", progress=False, mtp=True)


def test_layers_with_a_running_state_take_nothing_back(tmp_path):
    folder = write_model(tmp_path / "next", "qwen3_next")
    model, _ = ktx.load(folder, folder / "model.gguf", progress=False)
    with pytest.raises(UsageError, match="cannot be rolled back"):
        model.ktx.engine(speculative="prompt_lookup")


def test_a_drafter_that_fails_costs_nothing_but_speed(loaded):
    model, _ = loaded
    with model.ktx.engine(speculative="prompt_lookup") as engine:

        def broken(done, most):
            raise RuntimeError("no idea")

        engine.speculation.drafter.draft = broken
        found = answers(engine, PROMPTS[:2], SamplingParams(max_new_tokens=8, ignore_eos=True))
        assert [event.reason for event in found] == ["length"] * 2
        assert engine.speculation is None


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    """A GLM of three layers and an MTP layer in one GGUF file, loaded; transformers' layer, and the MTP layer's other
    tensors.
    """
    folder = tmp_path_factory.mktemp("glm")
    whole = tiny("glm4_moe", num_hidden_layers=4)
    norm = lambda: 1 + 0.1 * torch.randn(256)  # noqa: E731
    more = {"eh_proj": torch.randn(256, 512) / 20, "enorm": norm(), "hnorm": norm(), "shared_head.norm": norm()}
    prefix = "model.layers.3."
    state = whole.state_dict() | {f"{prefix}{name}.weight": value for name, value in more.items()}
    whole.state_dict = lambda: state
    write_gguf(folder / "model.gguf", whole, "F32", mangle={"nextn_predict_layers": 1})
    whole.config.num_hidden_layers, whole.config.num_nextn_predict_layers = 3, 1
    whole.config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ktx.load(folder, folder / "model.gguf", progress=False, mtp=True), whole.get_decoder().layers[3], more


def test_a_gguf_of_glm_holds_the_layer(glm):
    (model, _), layer, more = glm
    ids = torch.tensor([TALE * 3])
    body = model.get_decoder()
    with torch.inference_mode():
        states, embeds = body(input_ids=ids).last_hidden_state[:, :-1], body.embed_tokens(ids[:, 1:])
        rope = body.rotary_emb(embeds, torch.arange(ids.shape[1] - 1)[None])
        found = model.mtp(embeds, states, position_embeddings=rope, attention_mask=None)
        normed = lambda x, name: torch.nn.functional.rms_norm(x, (256,), more[name], model.config.rms_norm_eps)  # noqa: E731
        joined = torch.cat([normed(embeds, "enorm"), normed(states, "hnorm")], -1) @ more["eh_proj"].T
        causal = torch.full((29, 29), float("-inf")).triu(1)[None, None]
        expected = normed(layer(joined, position_embeddings=rope, attention_mask=causal), "shared_head.norm")
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_answers_with_the_layer_of_a_gguf_are_those_without(glm):
    model, sampling = glm[0][0], SamplingParams(max_new_tokens=24, ignore_eos=True)
    with model.ktx.engine() as engine:
        plain = [event.ids for event in answers(engine, PROMPTS, sampling)]
    with model.ktx.engine(speculative="mtp") as engine:
        found = answers(eager(engine), PROMPTS, sampling)
    assert [event.ids for event in found] == plain and sum(event.usage.drafted for event in found) > 0
