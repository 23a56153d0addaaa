"""Work with a limit of time: what overruns is refused and ended, and its thread does the next work as if nothing had been."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ktx.server import asked
from ktx.server.errors import Problem
from ktx.server.pools import PROMPTS, within
from tests.server.conftest import NAME, scripted, serving


class Endless:
    """Python that never ends by itself."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self) -> None:
        try:
            while True:
                self.begun.set()
        finally:
            self.ended.set()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as made:
        yield made


def test_what_overruns_is_ended(pool):
    async def check():
        endless = Endless()
        with pytest.raises(Problem, match="the prompt takes longer than 0 s") as refused:
            await within(0.3, pool, "the prompt", endless)
        assert refused.value.status == 400 and endless.begun.is_set()
        assert await within(10, pool, "the next", lambda a, b: a + b, 1, 2) == 3  # by the same thread
        assert endless.ended.is_set()

    asyncio.run(check())


def test_what_had_no_turn_in_time_is_not_done(pool):
    done = []

    async def check():
        with pytest.raises(Problem):
            await asyncio.gather(within(0.4, pool, "a", time.sleep, 0.8), within(0.2, pool, "b", done.append, "b"))
        assert await within(10, pool, "c", len, "abc") == 3

    asyncio.run(check())
    assert not done


def test_a_thread_outlives_a_hundred_of_them(pool):
    """Also where the end comes at the last moment of a work."""

    async def check():
        for i in range(100):
            with contextlib.suppress(Problem):
                await within(0.002, pool, "a", time.sleep, 0.0015 + i % 10 * 1e-4)
            assert await within(10, pool, "b", threading.get_ident) == thread

    thread = pool.submit(threading.get_ident).result()
    asyncio.run(check())


def test_what_cannot_be_done_is_a_problem(pool):
    def broken():
        raise ValueError("no such token")

    with pytest.raises(Problem, match="no such token"):
        asyncio.run(within(10, pool, "a", broken))


ENDLESS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)


def test_an_endless_template_is_refused_and_ended(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(asked, "RENDER", 0.5)
    engine = scripted(tmp_path_factory)
    engine.tokenizer.chat_template = ENDLESS
    with serving(engine) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        body = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}
        for _ in range(3):  # more than the pool has threads
            refused = http.post("/v1/chat/completions", json=body)
            assert refused.status_code == 400 and "the prompt takes longer" in refused.json()["error"]["message"]
        assert http.post("/v1/completions", json={"model": NAME, "prompt": "x", "max_tokens": 1}).status_code == 200
    both = threading.Barrier(2)
    for waiting in [PROMPTS.submit(both.wait, 5) for _ in range(2)]:
        waiting.result()
