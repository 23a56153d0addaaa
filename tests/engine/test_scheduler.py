"""The scheduler without a model: a forward is what it plans, a token is drawn from its position."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx.cache.pages import PAGE, Pages
from ktx.engine.request import Request
from ktx.engine.sampling import Sampling
from ktx.engine.scheduler import Scheduler


class World:
    """Runs requests to their ends and keeps count of what is computed. `state` is what a recurrent layer would know."""

    def __init__(self, pages=64, max_batch=4, chunk=256, **more):
        self.state, self.wrote, self.computed, self.steps = {}, {}, 0, 0
        told = {
            "released": lambda r: self.state.pop(r, None),
            "resumed": self.state.__setitem__,
            "state": self.state.get,
        }
        self.scheduler = Scheduler(Pages(pages), max_batch, chunk, **told, **more)
        self.numbers = 0
        self.done = {}

    def add(self, prompt, new=4, **settings_):
        request = Request(list(prompt), Sampling(max_new_tokens=new, **settings_), lambda event: None)
        self.numbers += 1
        request.number = self.numbers
        self.scheduler.add(request)
        return request

    def step(self):
        """One forward; every position must have been written, by somebody with the same beginning, before it is read."""
        parts = self.scheduler.plan()
        self.steps += 1
        assert len({part.request for part in parts}) == len(parts) <= self.scheduler.max_batch
        for part in parts:
            r = part.request
            assert part.start == r.computed and part.count == len(part.ids) > 0
            for at in range(part.start + part.count):
                slot = (r.pages[at // PAGE], at % PAGE)
                if at >= part.start:
                    self.wrote[slot] = tuple(r.ids[max(0, at - 2) : at + 1]), at
                assert self.wrote[slot] == (tuple(r.ids[max(0, at - 2) : at + 1]), at), "another sequence's keys"
            self.computed += part.count
        for part in parts:
            r = part.request
            if self.scheduler.recurrent:
                assert self.state.get(r, 0) == part.start
                self.state[r] = part.start + part.count
            if part.start + part.count == len(r.ids):
                r.ids.append(sum(r.ids[-3:]) * 7919 % 1000 + len(r.ids) % 5)
            if self.scheduler.advance(r, part.count) and self.scheduler.recurrent:
                self.scheduler.pages.keep(r.keys[r.computed // PAGE - 1], r.computed)
            if r.answered >= r.sampling.max_new_tokens:
                self.scheduler.drop(r)
                self.done[r] = self.steps
        self.scheduler.check_integrity()
        return parts

    def run(self, limit=2000):
        while (self.scheduler.running or self.scheduler.waiting) and self.steps < limit:
            assert self.step(), "nothing moves"
        assert not self.scheduler.running and not self.scheduler.waiting
        assert self.scheduler.pages.used == 0


def prompt(length, seed=0):
    return [random.Random(seed * 100003 + i).randrange(1000) for i in range(length)]


def alone(ids, new):
    world = World()
    request = world.add(ids, new)
    world.run()
    return request.ids


@pytest.mark.parametrize("recurrent", [False, True])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mixture_is_answered_as_alone_and_in_a_small_cache(recurrent, data):
    lengths = data.draw(
        st.lists(st.tuples(st.integers(1, 300), st.integers(1, 70), st.integers(0, 2)), min_size=1, max_size=7)
    )
    pages = data.draw(st.integers(6, 20))
    world = World(pages, data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 7, 64, 256])), recurrent=recurrent)
    requests = []
    for length, new, seed in lengths:
        requests.append((world.add(prompt(length, seed), new), length, new, seed))
        for _ in range(data.draw(st.integers(0, 3))):
            world.step()
    world.run(20000)
    for request, length, new, seed in requests:
        assert request.ids == alone(prompt(length, seed), new)


def test_a_page_that_is_not_full_is_taken_over_by_one_that_goes_on_there():
    world = World()
    first = world.add(prompt(100), 10)
    world.run()
    again = world.add(prompt(100), 10)
    world.run()
    assert again.cached == 99 and again.ids == first.ids
    turn = world.add(first.ids + prompt(20, 3), 5)
    world.run()
    assert turn.cached == 109 and turn.ids == alone(turn.prompt, 5)
    other = world.add(prompt(70) + prompt(60, 9), 5)
    world.run()
    assert other.cached == 64 and other.ids == alone(other.prompt, 5)  # the page is full by now


def test_where_pages_have_two_forms_a_page_of_a_prompt_is_begun_by_its_own_conversation_only():
    world = World(two_forms=True)
    first = world.add(prompt(100), 10)
    world.run()
    for ids, cached in (
        (prompt(90) + prompt(60, 9), 64),
        (prompt(90) + prompt(10, 9), 90),
        (first.ids + prompt(60, 2), 64),
    ):
        request = world.add(ids, 5)
        world.run()
        assert request.cached == cached  # the last one comes too late: another has written where the first one ended
    request = world.add(request.ids + prompt(60, 2), 5)
    world.run()
    assert request.cached == len(request.prompt) - 61


def test_eight_equal_beginnings_are_computed_once():
    world, same = World(pages=200), prompt(2000)
    for i in range(8):
        world.add(same + prompt(20, i + 1), 3)
    world.run()
    assert world.computed < 2000 + 8 * (20 + 3 + PAGE)


def test_a_conversation_goes_on_where_it_was():
    world = World()
    first = world.add(prompt(500), 40)
    world.run()
    before = world.computed
    second = world.add(first.ids + prompt(30, 2), 1)
    world.run()
    assert world.computed - before < 30 + PAGE + 1 and second.cached > 400


def test_a_short_question_does_not_wait_for_a_long_one():
    world = World(pages=600)
    long = world.add(prompt(30000), 1)
    for _ in range(10):
        world.step()
    short = world.add(prompt(100, 1), 5)
    world.run()
    assert world.done[short] < 10 + 10 < 100 < world.done[long]


def test_the_oldest_prompt_is_served_first():
    world = World(pages=600)
    a, b = world.add(prompt(3000), 1), world.add(prompt(3000, 1), 1)
    world.run()
    assert world.done[a] < world.done[b] - 3


def test_answers_go_on_beside_a_prompt():
    world = World(pages=600)
    talking = world.add(prompt(10), 50)
    world.step()
    world.add(prompt(5000, 1), 1)
    before = talking.answered
    for _ in range(10):
        assert sum(part.count for part in world.step()) == 256 + 1
    assert talking.answered == before + 10


def test_the_youngest_gives_way_and_is_not_forgotten():
    world = World(pages=8)
    a, b = world.add(prompt(200), 200), world.add(prompt(200, 1), 200)
    world.run(3000)
    assert world.scheduler.preemptions > 0 == a.preempted and b.preempted
    assert a.ids == alone(prompt(200), 200) and b.ids == alone(prompt(200, 1), 200)


def test_a_cancelled_request_leaves_nothing():
    world = World()
    gone = world.add(prompt(1000), 5)
    stays = world.add(prompt(1000), 5)
    world.step()
    assert stays not in world.scheduler.running  # it waits for what the other one computes
    world.scheduler.drop(gone)
    world.run()
    assert stays.ids == alone(prompt(1000), 5)


def test_nothing_is_shared_where_sharing_is_off_or_every_logit_is_wanted():
    for more, settings_ in (({"share": False}, {}), ({}, {"echo": True})):
        world = World(**more)
        for _ in range(3):
            world.add(prompt(300), 2, **settings_)
        world.run()
        assert world.computed == 3 * (300 + 1)


def test_salted_prompts_share_only_among_themselves():
    world = World()
    for salt in (b"x", b"y", b"x"):
        request = Request(prompt(300), Sampling(max_new_tokens=1), lambda event: None, salt, number=world.numbers + 1)
        world.numbers += 1
        world.scheduler.add(request)
        world.run()
    assert world.computed == 2 * 300 + 1
