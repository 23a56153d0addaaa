"""The engine on real models: an answer is the same alone, beside others, in a cache too small for all, and after a
failure.
"""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch

import ktx
from ktx.engine.request import Finished, PromptLogprobs, TokenEvent
from ktx.engine.sampler import SamplingParams
from ktx.errors import Overloaded, UsageError
from ktx.kernels import cpu
from tests.support.tiny_chat_model import write_model

FAMILIES = ["llama", "deepseek_v3", "qwen3_next", "gpt_oss"]
PROMPTS = [[(i * 37 + j * j) % 250 + 9 for j in range(length)] for i, length in enumerate((5, 150, 64, 1, 33, 128))]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("engine") / request.param, request.param)
    return ktx.load(folder, folder / "model.gguf", progress=False, kv_dtype="f32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("engine") / "llama")
    return ktx.load(folder, folder / "model.gguf", progress=False)


def answers(engine, prompts, sampling):
    """The Finished of each prompt, computed side by side; the text of its pieces must be its ids' text."""
    done, texts = {}, [""] * len(prompts)
    for i, event in engine.generate(prompts, sampling):
        if isinstance(event, TokenEvent):
            texts[i] += event.text
        elif isinstance(event, Finished):
            done[i] = event
            texts[i] += event.text
    engine.check_integrity()
    for i, event in done.items():
        assert texts[i] == engine.tokenizer.decode(event.ids, clean_up_tokenization_spaces=False)
    return [done[i] for i in range(len(prompts))]


def greedy(model, prompt, new):
    """What transformers' own loop answers."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def test_side_by_side_is_what_generate_says(loaded):
    model, _ = loaded
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    with model.ktx.engine(max_batch_size=3, chunk_size=100) as engine:
        found = [event.ids for event in answers(engine, PROMPTS, sampling)]
    assert found == [greedy(model, prompt, 20) for prompt in PROMPTS]


DRAWN = SamplingParams(max_new_tokens=100, ignore_eos=True, temperature=0.8, seed=3, top_p=0.9)


@pytest.fixture(scope="module")
def alone(loaded):
    """What each prompt is answered by itself."""
    with loaded[0].ktx.engine() as engine:
        return [answers(engine, [prompt], DRAWN)[0].ids for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options", [{"kv_cache_tokens": 320}, {"chunk_size": 64}, {"chunk_size": 400, "max_batch_size": 8}]
)
def test_a_small_cache_and_any_chunk_give_the_same(loaded, alone, options):
    with loaded[0].ktx.engine(**options) as engine:
        found = answers(engine, PROMPTS, DRAWN)
    assert [event.ids for event in found] == alone
    if "kv_cache_tokens" in options:
        assert sum(event.usage.preempted for event in found)


def test_a_prompt_that_was_seen_is_not_computed_again(loaded):
    model, _ = loaded
    sampling = SamplingParams(max_new_tokens=10, ignore_eos=True)
    prompt = [i % 200 + 9 for i in range(300)]
    with model.ktx.engine() as engine:
        first = answers(engine, [prompt], sampling)[0]
        second = answers(engine, [prompt], sampling)[0]
        longer = answers(engine, [prompt + first.ids + [11, 12]], sampling)[0]
    assert first.usage.cached == 0 and second.usage.cached >= 192 and longer.usage.cached >= 192
    assert second.ids == first.ids
    assert longer.ids == greedy(model, prompt + first.ids + [11, 12], 10)
    with model.ktx.engine(prefix_cache=False) as engine:
        assert [answers(engine, [prompt], sampling)[0].usage.cached for _ in range(2)] == [0, 0]


def test_echo_tells_the_log_probabilities_of_the_prompt(loaded):
    model, _ = loaded
    with model.ktx.engine(chunk_size=100) as engine:
        for new in (0, 1):
            events = [
                event
                for _, event in engine.generate([PROMPTS[1]], SamplingParams(max_new_tokens=new, logprobs=3, echo=True))
            ]
            told = next(event for event in events if isinstance(event, PromptLogprobs)).tokens
            assert events[-1].reason == "length" and len(events[-1].ids) == new
            with torch.inference_mode(), cpu.bf16_rows(0):  # as an echo's prompt is computed
                share = model(torch.tensor([PROMPTS[1]])).logits[0].float().log_softmax(-1)
            assert [choice.token for choice in told] == PROMPTS[1] and told[0].logprob is None
            for row, choice in zip(share, told[1:], strict=False):
                assert abs(choice.logprob - float(row[choice.token])) < 1e-3
                assert [round(value, 3) for _, value in choice.top] == pytest.approx(
                    row.topk(3).values.tolist(), abs=2e-3
                )


def test_a_stop_string_ends_the_answer_and_is_not_shown(llama):
    model, tokenizer = llama
    with model.ktx.engine() as engine:
        whole = answers(engine, [PROMPTS[0]], SamplingParams(max_new_tokens=30, ignore_eos=True))[0]
        text = tokenizer.decode(whole.ids)
        stop = text[12:15]
        events = [
            event
            for _, event in engine.generate(
                [PROMPTS[0]], SamplingParams(max_new_tokens=30, ignore_eos=True, stop=[stop])
            )
        ]
    shown = "".join(event.text for event in events if isinstance(event, TokenEvent | Finished))
    assert shown == text[: text.index(stop)] and events[-1].reason == "stop" and events[-1].stop == stop


def test_stop_ids_end_the_answer(llama):
    model, _ = llama
    with model.ktx.engine() as engine:
        whole = answers(engine, [PROMPTS[0]], SamplingParams(max_new_tokens=30, ignore_eos=True))[0]
        at = next(i for i, token in enumerate(whole.ids) if i > 4 and token not in whole.ids[:i])
        cut = answers(
            engine, [PROMPTS[0]], SamplingParams(max_new_tokens=30, ignore_eos=True, stop_ids=[whole.ids[at]])
        )[0]
    assert cut.ids == whole.ids[:at] and cut.reason == "stop" and cut.stop == whole.ids[at]


@pytest.mark.wall_clock
def test_cancelling_gives_everything_back_within_a_second(llama):
    model, _ = llama
    with model.ktx.engine(kv_cache_tokens=4096) as engine:
        heard = []
        requests = [
            engine.submit(prompt, SamplingParams(max_new_tokens=100000, ignore_eos=True), heard.append)
            for prompt in PROMPTS
        ]
        while not any(isinstance(event, TokenEvent) for event in heard):
            time.sleep(0.001)
        start = time.monotonic()
        for request in requests:
            engine.cancel(request)
        while engine.outputs:
            assert time.monotonic() - start < 1
            time.sleep(0.001)
        engine.check_integrity()
        assert engine.scheduler.pages.used == 0
        assert [event.reason for event in heard if isinstance(event, Finished)] == ["cancelled"] * len(PROMPTS)


def test_leaving_the_loop_cancels(llama):
    model, _ = llama
    with model.ktx.engine() as engine:
        for _, event in engine.generate(PROMPTS[:2], SamplingParams(max_new_tokens=400, ignore_eos=True)):
            if isinstance(event, TokenEvent):
                break
        while engine.outputs:
            time.sleep(0.001)
        engine.check_integrity()


def test_a_prompt_nobody_waits_for_is_left_between_two_layers(llama, monkeypatch):
    model, _ = llama
    with model.ktx.engine(chunk_size=300) as engine:
        layer = model.model.layers[0]
        slow = layer.register_forward_hook(lambda *args: time.sleep(0.2) or engine.cancel(request))
        heard = threading.Event()
        request = engine.submit([9] * 300, SamplingParams(), lambda event: heard.set())
        assert heard.wait(5)
        slow.remove()
        assert request.num_computed == 0 and not engine.outputs
        assert answers(engine, [[9] * 300], SamplingParams(max_new_tokens=3, ignore_eos=True))[0].ids == greedy(
            model, [9] * 300, 3
        )


def test_a_request_that_fails_takes_no_other_with_it(loaded):
    model, _ = loaded
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with model.ktx.engine() as engine:
        good = [event.ids for event in answers(engine, PROMPTS[:3], sampling)]
    with model.ktx.engine(prefix_cache=False) as engine:
        forward = engine.runner.model.forward

        def poisoned(input_ids, **kwargs):
            if 300 in input_ids:
                raise RuntimeError("poison")
            return forward(input_ids=input_ids, **kwargs)

        model.forward = poisoned
        try:
            found = answers(engine, [*PROMPTS[:2], [300, 9], PROMPTS[2]], sampling)
        finally:
            del model.forward
    assert [event.reason for event in found] == ["length", "length", "error", "length"]
    assert "poison" in found[2].error
    assert [found[i].ids for i in (0, 1, 3)] == good


def test_a_thread_that_dies_is_replaced_and_its_requests_hear_of_it(llama):
    model, _ = llama
    with model.ktx.engine() as engine:
        plan = engine.scheduler.schedule

        def broken():
            raise SystemError("broken")

        engine.scheduler.schedule = broken
        assert answers(engine, [PROMPTS[0]], SamplingParams())[0].reason == "error"
        assert engine.scheduler.schedule is not plan and engine.num_restarts == 1
        assert answers(engine, [PROMPTS[0]], SamplingParams(max_new_tokens=2))[0].reason != "error"
        for _ in range(3):
            engine.scheduler.schedule = broken
            assert answers_or_none(engine) in ("error", None)
        with pytest.raises(Overloaded, match="SystemError"):
            engine.submit([1], SamplingParams(), print)


def answers_or_none(engine):
    try:
        return [event for _, event in engine.generate([[9]], SamplingParams())][-1].reason
    except Overloaded:
        return None


def test_what_can_never_be_answered_is_refused_with_the_numbers(llama):
    model, _ = llama
    with model.ktx.engine(kv_cache_tokens=128, max_queue=2, max_batch_size=1) as engine:
        with pytest.raises(UsageError, match="129 tokens, the context holds 128"):
            engine.submit([9] * 129, SamplingParams(), print)
        with pytest.raises(UsageError, match="empty"):
            engine.submit([], SamplingParams(), print)
        with pytest.raises(UsageError, match="token id 320"):
            engine.submit([320], SamplingParams(), print)
        assert answers(engine, [[9] * 120], SamplingParams(max_new_tokens=1000, ignore_eos=True))[0].usage.answer == 8
        requests = [
            engine.submit([9], SamplingParams(max_new_tokens=100, ignore_eos=True), lambda event: None)
            for _ in range(3)
        ]
        with pytest.raises(Overloaded, match="3 requests"):
            engine.submit([9], SamplingParams(), print)
        for request in requests:
            engine.cancel(request)
    with pytest.raises(Overloaded, match="closed"):
        engine.submit([9], SamplingParams(), print)


@pytest.mark.parametrize("name", ["max_batch_size", "chunk_size", "kv_cache_tokens", "max_queue", "max_context"])
def test_options_out_of_range_are_refused(llama, name):
    with pytest.raises(UsageError, match=f"{name} is 0"):
        llama[0].ktx.engine(**{name: 0})


def test_closing_ends_what_is_open(llama):
    model, _ = llama
    heard = []
    engine = model.ktx.engine()
    engine.submit([9] * 50, SamplingParams(max_new_tokens=10000, ignore_eos=True), heard.append)
    engine.close()
    assert (
        isinstance(heard[-1], Finished) and heard[-1].reason in ("cancelled", "length") and not engine.thread.is_alive()
    )


def test_asyncio_hears_the_same_and_cancels_when_it_leaves(llama):
    model, _ = llama
    sampling = SamplingParams(max_new_tokens=10, ignore_eos=True)

    async def one(engine, prompt):
        async with engine.stream(prompt, sampling) as events:
            return [event async for event in events][-1].ids

    async def all_of_them(engine):
        return await asyncio.gather(*(one(engine, prompt) for prompt in PROMPTS))

    async def leave(engine):
        async with engine.stream([9], SamplingParams(max_new_tokens=400, ignore_eos=True)) as events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    break

    with model.ktx.engine() as engine:
        assert asyncio.run(all_of_them(engine)) == [event.ids for event in answers(engine, PROMPTS, sampling)]
        asyncio.run(leave(engine))
        while engine.outputs:
            time.sleep(0.001)
        engine.check_integrity()
