"""Models whose layers keep a running state: a forward that is given up, fails, or is computed again changes nobody's
answer.
"""

from __future__ import annotations

import os
import random
import threading
from contextlib import contextmanager

import pytest

from ktx.engine.request import Finished, PromptLogprobs, TokenEvent
from ktx.engine.sampler import SamplingParams
from ktx.errors import UsageError
from tests.families.test_families import load
from tests.loader.test_checkpoints import OTHERS
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

FAMILIES = ["qwen3_next", "lfm2_moe", "jamba", "falcon_h1", "minimax"]
ROUNDS = int(os.environ.get("CANCEL_ROUNDS", "5"))
NEW = 16  # tokens of an answer
PROMPTS = [
    [(i * 37 + j * j * (i + 1)) % 250 + 9 for j in range(length)] for i, length in enumerate((30, 7, 65, 128, 1, 100))
]
LONG = [(j * 13 + j * j) % 240 + 9 for j in range(390)]
PROMPTS += [LONG[:70], LONG[:200] + PROMPTS[0], LONG]  # a common beginning, of which pages are shared
WAIT = 120


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    more = OTHERS.get(request.param, ({}, None))[0]
    tiny(request.param, **(more | {"max_position_embeddings": 1024})).save_pretrained(folder)
    loaded = load(folder, None, kv_dtype="f32")
    loaded.ktx.tokenizer = tokenizer()
    return loaded


@pytest.fixture(scope="module")
def alone(model):
    """What each prompt is answered when nothing else is computed and nothing is shared: token ids."""
    with model.ktx.engine(max_batch_size=1, prefix_cache=False) as engine:
        return [Asked(engine, prompt).wait() for prompt in PROMPTS]


class Asked:
    """A request and what was heard of it."""

    def __init__(self, engine, prompt, sampling=None, constraint=None):
        self.engine, self.end, self.begun, self.over = engine, None, threading.Event(), threading.Event()
        self.prompts = []
        self.request = engine.submit(
            prompt, sampling or SamplingParams(max_new_tokens=NEW, ignore_eos=True), self.hear, constraint
        )

    def hear(self, event):
        if isinstance(event, Finished):
            self.end = event
            self.over.set()
        elif isinstance(event, PromptLogprobs):
            self.prompts.append(event)
        elif isinstance(event, TokenEvent):
            self.begun.set()

    def wait(self):
        assert self.over.wait(WAIT), "a request has no end"
        return self.end.ids

    def leave(self):
        self.engine.cancel(self.request)


@contextmanager
def at_layers(model, action):
    """`action(n)` after the n-th layer from now on, on the engine's thread."""
    count = 0

    def hook(*args):
        nonlocal count
        count += 1
        action(count)

    hooks = [layer.register_forward_hook(hook) for layer in model.get_decoder().layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def leaving_in_its_prompt(model, engine, at, prompt=LONG):
    """Somebody asks, and leaves after `at` layers of forwards that compute the prompt."""
    seen = 0

    def look(_):
        nonlocal seen
        if gone.request in engine.scheduler.running:
            seen += 1
            if seen == at:
                gone.leave()

    with at_layers(model, lambda n: None if gone is None else look(n)):
        gone = None
        gone = Asked(engine, prompt)
        gone.wait()
    assert gone.end.reason == "cancelled"


@pytest.mark.parametrize("at", [1, 2])
def test_who_leaves_in_a_prompt_changes_no_neighbour_and_no_later_answer(model, alone, at):
    with model.ktx.engine(max_batch_size=4, chunk_size=512) as engine:
        neighbours = [Asked(engine, PROMPTS[i]) for i in (0, 2, 3)]
        for one in neighbours:
            assert one.begun.wait(WAIT)
        leaving_in_its_prompt(model, engine, at)
        assert [one.wait() for one in neighbours] == [alone[i] for i in (0, 2, 3)]
        assert Asked(engine, LONG).wait() == alone[-1]  # its own retry
        assert [Asked(engine, PROMPTS[i]).wait() for i in (0, 2, 3)] == [
            alone[i] for i in (0, 2, 3)
        ]  # from what is kept
        engine.check_integrity()


def test_who_leaves_while_others_are_computed_again_changes_nothing(model, alone):
    with model.ktx.engine(max_batch_size=3, chunk_size=512) as engine:
        neighbours = [Asked(engine, PROMPTS[i]) for i in (0, 1)]
        for one in neighbours:
            assert one.begun.wait(WAIT)
        for at in (2, 1):
            leaving_in_its_prompt(model, engine, at, LONG[at:])
        assert [one.wait() for one in neighbours] == alone[:2]
        assert Asked(engine, LONG).wait() == alone[-1]


def test_several_leave_at_once_and_while_they_are_answered(model, alone):
    with model.ktx.engine(max_batch_size=5, chunk_size=128) as engine:
        leaving = [Asked(engine, PROMPTS[i]) for i in (3, 5, 8)]
        stays = [Asked(engine, PROMPTS[i]) for i in (0, 2)]
        for one in (leaving[0], *stays):
            assert one.begun.wait(WAIT)
        with at_layers(model, lambda n: n == 3 and [one.leave() for one in leaving]):
            assert [one.wait() for one in stays] == [alone[i] for i in (0, 2)]
        for one, i in zip(leaving, (3, 5, 8), strict=True):
            assert one.wait() == alone[i][: len(one.end.ids)]
        assert [Asked(engine, PROMPTS[i]).wait() for i in (8, 3, 5)] == [alone[i] for i in (8, 3, 5)]
        engine.check_integrity()


@pytest.mark.parametrize("at", [2, 5])
def test_a_forward_that_fails_halfway_is_computed_again(model, alone, at):
    def fail(n):
        if n == at:
            raise RuntimeError("a layer fails once")

    with model.ktx.engine(max_batch_size=4, chunk_size=512) as engine:
        neighbours = [Asked(engine, PROMPTS[i]) for i in (0, 2, 3)]
        for one in neighbours:
            assert one.begun.wait(WAIT)
        with at_layers(model, fail):
            last = Asked(engine, LONG)
            assert [one.wait() for one in neighbours] == [alone[i] for i in (0, 2, 3)]
            assert last.wait() == alone[-1]
        assert Asked(engine, PROMPTS[3]).wait() == alone[3]


class Refusing:
    """A grammar that refuses the n-th token, as one does that grows beyond its bounds."""

    ended = False

    def __init__(self, at):
        self.left = at

    def mask(self):
        self.left -= 1
        if not self.left:
            raise UsageError("this grammar is at its end")

    def accept(self, token):
        pass


def test_a_request_that_fails_after_its_forward_leaves_nothing_wrong(model, alone):
    """Its layers have seen a token that it was never given credit for."""
    with model.ktx.engine(max_batch_size=2) as engine:
        for at in (1, 5):
            refused = Asked(engine, PROMPTS[5], constraint=Refusing(at))
            assert refused.wait() == alone[5][: at - 1] and refused.end.reason == "error"
            assert Asked(engine, PROMPTS[5]).wait() == alone[5]
            said = PROMPTS[5] + alone[5][: at - 1] + [11]
            with model.ktx.engine(max_batch_size=1, prefix_cache=False) as other:
                right = Asked(other, said).wait()
            assert Asked(engine, said).wait() == right


def test_pages_given_up_by_a_small_cache_change_nothing(model, alone):
    with model.ktx.engine(max_batch_size=3, kv_cache_tokens=448, chunk_size=128) as engine:
        which = [3, 5, 2, 0]
        asked = [Asked(engine, PROMPTS[i]) for i in which]
        leaving = Asked(engine, LONG[:300])
        assert asked[0].begun.wait(WAIT)
        leaving.leave()
        assert [one.wait() for one in asked] == [alone[i] for i in which]


def test_log_probabilities_of_a_prompt_are_told_once(model):
    with model.ktx.engine(max_batch_size=3, chunk_size=512) as engine:
        if getattr(engine.runner, "in_chunks", True) is False:
            pytest.skip("this family has no log-probabilities of prompts")
        echo = Asked(engine, PROMPTS[3], SamplingParams(max_new_tokens=NEW, ignore_eos=True, logprobs=0, echo=True))
        assert echo.begun.wait(WAIT)
        with at_layers(model, lambda n: n == 2 and (_ for _ in ()).throw(RuntimeError("once"))):
            echo.wait()
        assert echo.end.usage.preempted == 1 and [len(event.tokens) for event in echo.prompts] == [128]


def test_a_neighbour_loses_less_than_the_others_computation_saves(model):
    """Who has left is computed to the end where giving up would have the rest computed again for longer."""
    with model.ktx.engine(max_batch_size=2, chunk_size=512) as engine:
        stays = Asked(engine, PROMPTS[8])
        assert stays.begun.wait(WAIT)
        leaving_in_its_prompt(model, engine, 1, PROMPTS[3])
        stays.wait()
        assert stays.end.usage.preempted == 0


def test_any_order_of_asking_leaving_and_failing_gives_each_its_own_answer(model, alone):
    """Five rounds, or as many as CANCEL_ROUNDS says."""
    with model.ktx.engine(max_batch_size=4, chunk_size=192, kv_cache_tokens=1536) as engine:
        layers = len(model.get_decoder().layers)
        for number in range(ROUNDS):
            dice = random.Random(number)
            which = [dice.randrange(len(PROMPTS)) for _ in range(dice.randint(2, 6))]
            asked = []
            leave = {dice.randint(1, 12 * layers): dice.randrange(len(which)) for _ in range(dice.randint(1, 3))}
            fails = dice.randint(1, 15 * layers) if dice.random() < 0.2 else 0

            def act(n, asked=asked, leave=leave, fails=fails):
                if (one := leave.get(n)) is not None and one < len(asked):
                    asked[one].leave()
                if n == fails:
                    raise RuntimeError("a layer fails once")

            with at_layers(model, act):
                for i in which:
                    length = dice.randint(1, NEW)
                    asked.append(Asked(engine, PROMPTS[i], SamplingParams(max_new_tokens=length, ignore_eos=True)))
                for one, i in zip(asked, which, strict=True):
                    one.wait()
                    allowed = ("length", "cancelled") + ("error",) * bool(fails)
                    assert one.end.reason in allowed, (number, one.end)
                    assert one.end.ids == alone[i][: len(one.end.ids)], f"round {number}, prompt {i}"
                    if one.end.reason == "length":
                        assert len(one.end.ids) == one.request.sampling.max_new_tokens
            engine.check_integrity()
