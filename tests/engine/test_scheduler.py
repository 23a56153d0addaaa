"""The scheduler without a model: a forward is what it plans, a token is drawn from its position."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx.cache.batch import SequenceSpan
from ktx.cache.page_pool import PAGE_TOKENS, PagePool
from ktx.engine.budget import StepBudget
from ktx.engine.request import Request
from ktx.engine.sampler import SamplingParams
from ktx.engine.scheduler import Scheduler


class World:
    """Runs requests to their ends and keeps count of what is computed. `state` is what a recurrent layer would know,
    `copied` how many tokens its copies stand for.
    """

    def __init__(self, pages=64, max_batch=4, chunk=256, seconds=1e9, **more):
        self.state, self.copied, self.wrote, self.computed, self.steps = {}, {}, {}, 0, 0
        told = {
            "on_free": lambda r: self.state.pop(r, None),
            "on_restore": self.state.__setitem__,
            "on_snapshot": lambda r, tokens: tokens if tokens in self.copied.get(r, {self.state.get(r)}) else None,
        }
        self.budget = StepBudget(chunk, chunk, seconds)
        self.budget.fitting_tokens = chunk  # tests of time learn it
        self.scheduler = Scheduler(PagePool(pages), max_batch, self.budget, **told, **more)
        self.numbers = 0
        self.done = {}

    def add(self, prompt, new=4, **settings_):
        request = Request(list(prompt), SamplingParams(max_new_tokens=new, **settings_), lambda event: None)
        self.numbers += 1
        request.id = self.numbers
        self.scheduler.add(request)
        return request

    def give_up(self):
        """A forward that some layers have computed."""
        parts = self.scheduler.schedule()
        self.copied = {part.request: set() for part in parts}
        for part in parts:
            if self.scheduler.recurrent:
                self.state[part.request] = "other tokens in each layer"
        self.scheduler.undo(parts)
        self.scheduler.check_integrity()

    def step(self, refused=None):
        """One forward; every position must have been written, by somebody with the same beginning, before it is read.
        `refused` fails behind it.
        """
        parts = self.scheduler.schedule()
        self.steps += 1
        assert len({part.request for part in parts}) == len(parts) <= self.scheduler.max_batch
        for part in parts:
            r = part.request
            assert part.start == r.num_computed and part.count == len(part.ids) > 0
            for at in range(part.start + part.count):
                slot = (r.pages[at // PAGE_TOKENS], at % PAGE_TOKENS)
                if at >= part.start:
                    self.wrote[slot] = tuple(r.ids[max(0, at - 2) : at + 1]), at
                assert self.wrote[slot] == (tuple(r.ids[max(0, at - 2) : at + 1]), at), "another sequence's keys"
            self.computed += part.count
        self.copied = {}
        for part in parts:
            r = part.request
            if self.scheduler.recurrent:
                assert self.state.get(r, 0) == part.start
                self.state[r] = part.start + part.count
                marks = SequenceSpan(
                    r.id, part.start, part.count, (), part.num_prompt_tokens, shared=True
                ).snapshot_lengths
                self.copied[r] = {*marks, self.state[r]}
            if r is refused:
                self.scheduler.remove(r)
                self.done[r] = self.steps
                continue
            if part.start + part.count == len(r.ids):
                r.ids.append(sum(r.ids[-3:]) * 7919 % 1000 + len(r.ids) % 5)
            self.scheduler.commit(r, part.count)
            if r.num_output >= r.sampling.max_new_tokens:
                self.scheduler.remove(r)
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
    requests, gone = [], set()
    for length, new, seed in lengths:
        requests.append((world.add(prompt(length, seed), new), length, new, seed))
        for what in data.draw(st.lists(st.sampled_from(["step", "step", "give up", "refuse", "leave"]), max_size=4)):
            if what == "leave":
                leaving = requests[-1][0]
                if leaving not in world.done:
                    world.scheduler.remove(leaving)
                    world.done[leaving] = world.steps
                    gone.add(leaving)
            elif what == "give up":
                world.give_up()
            else:
                refused = requests[-1][0] if what == "refuse" and requests[-1][0] in world.scheduler.running else None
                world.step(refused)
                gone |= {refused} & world.done.keys()
    world.run(20000)
    for request, length, new, seed in requests:
        if request in gone:
            continue
        assert request.ids == alone(prompt(length, seed), new)


def test_a_forward_that_was_given_up_leaves_no_state_and_takes_no_page_that_was_kept():
    world = World(recurrent=True)
    first = world.add(prompt(300), 40)
    for _ in range(5):
        world.step()
    world.give_up()
    assert not first.pages and first.preempted == 1 and not world.scheduler.pages.partial_pages
    world.run()
    assert first.ids == alone(prompt(300), 40)
    again = world.add(prompt(300), 1)
    world.run()
    assert again.cached == 256  # where the prompt's last page ends


def test_a_request_refused_behind_its_forward_leaves_no_state_of_a_token_that_it_has_not():
    world = World(recurrent=True)
    refused = world.add(prompt(100), 9)
    world.step()
    world.step()
    world.step(refused)
    assert not world.scheduler.pages.partial_pages
    again = world.add(refused.ids, 5)
    world.run()
    assert again.cached == 64 and again.ids == alone(refused.prompt, 9)[: len(again.ids)]


def test_states_are_copied_on_the_way_of_a_long_prompt():
    world = World(chunk=2048, recurrent=True)
    world.add(prompt(1000), 1)
    world.run()
    assert world.computed == 1000  # one step
    for begins, cached in ((700, 512), (990, 960), (255, 0)):
        request = world.add(prompt(begins) + prompt(50, 9 + begins), 1)
        world.run()
        assert request.cached == cached and request.ids == alone(request.prompt, 1)


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
    world = World(page_kernels_differ=True)
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
    assert world.computed < 2000 + 8 * (20 + 3 + PAGE_TOKENS)


def test_a_conversation_goes_on_where_it_was():
    world = World()
    first = world.add(prompt(500), 40)
    world.run()
    before = world.computed
    second = world.add(first.ids + prompt(30, 2), 1)
    world.run()
    assert world.computed - before < 30 + PAGE_TOKENS + 1 and second.cached > 400


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
    before = talking.num_output
    for _ in range(10):
        assert sum(part.count for part in world.step()) == 256 + 1
    assert talking.num_output == before + 10


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
    world.scheduler.remove(gone)
    world.run()
    assert stays.ids == alone(prompt(1000), 5)


def test_nothing_is_shared_where_sharing_is_off_or_every_logit_is_wanted():
    for more, settings_ in (({"prefix_caching": False}, {}), ({}, {"echo": True})):
        world = World(**more)
        for _ in range(3):
            world.add(prompt(300), 2, **settings_)
        world.run()
        assert world.computed == 3 * (300 + 1)


def test_salted_prompts_share_only_among_themselves():
    world = World()
    for salt in (b"x", b"y", b"x"):
        request = Request(prompt(300), SamplingParams(max_new_tokens=1), lambda event: None, salt, id=world.numbers + 1)
        world.numbers += 1
        world.scheduler.add(request)
        world.run()
    assert world.computed == 2 * 300 + 1


# ---- how many tokens of prompts a step computes


class Timed(World):
    """Steps take `fixed` seconds, `each` a token more, and `deep` more for a token after each thousand others; the
    budget learns from them.
    """

    def __init__(self, seconds=0.5, fixed=0.1, each=0.005, deep=0.0, budget=None, **more):
        super().__init__(pages=2000, **more)
        self.budget = self.scheduler.budget = budget or StepBudget(target_s=seconds)
        self.fixed, self.each, self.deep = fixed, each, deep

    def timed(self):
        """A step: tokens of prompts, answers beside them, and seconds."""
        kinds, plan = [], self.scheduler.schedule
        self.scheduler.schedule = lambda: [kinds.append((part, part.is_decode)) or part for part in plan()]
        try:
            self.step()
        finally:
            self.scheduler.schedule = plan
        answers = sum(answer for _, answer in kinds)
        tokens = sum(part.count for part, answer in kinds if not answer)
        past = max(part.start for part, _ in kinds)
        seconds = self.fixed + (tokens + answers) * (self.each + self.deep * past / 1000)
        self.budget.record(tokens, answers > 0, seconds)
        return tokens, answers, seconds

    def prefill(self, request):
        """Steps until the request has its first token."""
        done = []
        while not request.num_output and request not in self.done:
            done.append(self.timed())
        return done


def talking(world, count=1):
    """Requests whose answers go on."""
    made = [world.add(prompt(10, 90 + i), 100000) for i in range(count)]
    while not all(request.num_output for request in made):
        world.timed()
    return made


def test_a_prompt_is_one_step_where_nobody_is_answered():
    for length, steps in ((2048, [2048]), (700, [700]), (5000, [2048, 2048, 904])):
        world = Timed()
        assert [tokens for tokens, _, _ in world.prefill(world.add(prompt(length), 1))] == steps


def test_a_step_grows_with_the_past_up_to_what_memory_allows():
    for longest in (8192, 4096):
        world = Timed(budget=StepBudget(2048, longest))
        steps = [tokens for tokens, _, _ in world.prefill(world.add(prompt(60000), 1))]
        assert steps[0] == 2048 and sorted(steps[:-1]) == steps[:-1] and max(steps) == longest
    world = Timed(budget=StepBudget(512, 512))  # as it was asked for
    assert {tokens for tokens, _, _ in world.prefill(world.add(prompt(5120), 1))} == {512}


@pytest.mark.parametrize("fixed,each", [(0.1, 0.005), (0.02, 0.0004), (0.3, 0.001), (0.0, 0.006)])
def test_beside_answers_a_step_takes_what_the_measured_rate_allows(fixed, each):
    world = Timed(fixed=fixed, each=each)
    [answer] = talking(world)
    before = answer.num_output
    steps = world.prefill(world.add(prompt(8000, 1), 1))
    assert answer.num_output - before == len(steps)  # a token in each
    best = min(8192, int((0.5 - fixed) / each) // PAGE_TOKENS * PAGE_TOKENS)
    assert max(seconds for _, _, seconds in steps) <= 0.5 + 2 * each  # never more, also while it learns
    late = [tokens for tokens, _, _ in steps[8:-1]] or [steps[-1][0]]
    assert min(late) >= min(best, 2048) - 2 * PAGE_TOKENS, "it does not find what fits"


def test_what_was_learnt_serves_the_next_prompt_and_follows_a_machine_that_becomes_slower():
    world = Timed(each=0.001)
    talking(world)
    world.prefill(world.add(prompt(8000, 1), 1))
    again = world.prefill(world.add(prompt(8000, 2), 1))
    assert again[0][2] > 0.35 and max(seconds for _, _, seconds in again) <= 0.51
    world.each *= 2
    slower = world.prefill(world.add(prompt(8000, 3), 1))
    assert sum(seconds > 0.52 for _, _, seconds in slower) == 1  # the step that shows it
    world.each /= 2
    faster = world.prefill(world.add(prompt(8000, 4), 1))
    assert faster[-2][2] > 0.35


def test_a_long_past_makes_steps_shorter():
    world = Timed(fixed=0.05, each=0.001, deep=0.0005)
    talking(world)
    steps = world.prefill(world.add(prompt(5000, 1), 1))
    assert max(seconds for _, _, seconds in steps) <= 0.6
    assert max(tokens for tokens, _, _ in steps) >= 2 * steps[-2][0] >= 2 * PAGE_TOKENS


def test_a_machine_too_slow_for_the_budget_computes_a_page_at_once(caplog):
    world = Timed(fixed=2.0)
    talking(world)
    with caplog.at_level("WARNING", "ktx.engine"):
        steps = world.prefill(world.add(prompt(640, 1), 1))
    assert [tokens for tokens, _, _ in steps] == [PAGE_TOKENS] * 10
    assert [record.getMessage() for record in caplog.records if "--max-itl-ms" in record.getMessage()] == [
        "a step with 64 prompt tokens and decode tokens takes 2.3 s, more than the 0.5 s of --max-itl-ms; steps get no smaller, so it is computed all the same: raise --max-itl-ms for faster prompts"  # noqa: E501
    ]


def test_the_end_of_a_prompt_says_nothing_of_a_whole_step():
    world = Timed(each=0.001)
    talking(world)
    world.prefill(world.add(prompt(8000, 1), 1))
    known = world.budget.max_prompt_tokens(decoding=True)
    for i in range(5):
        world.prefill(world.add(prompt(3, i + 2), 1))  # 0.1 s for three tokens
    assert world.budget.max_prompt_tokens(decoding=True) == known > PAGE_TOKENS


@pytest.mark.parametrize("recurrent,granularity", [(False, PAGE_TOKENS), (True, PAGE_TOKENS), (True, 4 * PAGE_TOKENS)])
def test_no_stream_of_short_prompts_starves_a_long_one(recurrent, granularity):
    """Where a page is all that fits, and each step brings another prompt that is shorter than a page."""
    world = Timed(
        fixed=2.0,
        budget=StepBudget(target_s=0.5, min_tokens=granularity),
        max_batch=6,
        recurrent=recurrent,
        granularity=granularity,
    )
    talking(world)
    long = world.add(prompt(20 * granularity, 1), 1)
    for i in range(60):
        short = world.add(prompt(40, i + 2), 1)
        tokens, _, _ = world.timed()
        assert tokens <= 2 * granularity
        if long in world.done:
            break
    assert long in world.done and world.done[long] <= 30
    world.prefill(short)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_every_prompt_ends_whatever_steps_take(data):
    world = Timed(
        seconds=data.draw(st.sampled_from([0.01, 0.5, 5.0])),
        fixed=data.draw(st.floats(0, 3)),
        each=data.draw(st.sampled_from([1e-6, 0.002, 0.1])),
        deep=data.draw(st.sampled_from([0.0, 0.01])),
        recurrent=data.draw(st.booleans()),
        max_batch=data.draw(st.integers(2, 5)),
    )
    lengths = data.draw(st.lists(st.integers(1, 1000), min_size=1, max_size=5))
    talking(world)
    requests = [world.add(prompt(length, i), 3) for i, length in enumerate(lengths)]
    bound = 50 + sum(length // PAGE_TOKENS + 6 for length in lengths)
    for _ in range(bound):
        if all(request in world.done for request in requests):
            break
        world.timed()
    assert all(request.ids == alone(request.prompt, 3) for request in requests)


def test_logits_of_a_whole_prompt_are_asked_for_in_small_parts():
    world = Timed()
    steps = world.prefill(world.add(prompt(1000), 1, echo=True))
    assert [tokens for tokens, _, _ in steps] == [256, 256, 256, 232]
