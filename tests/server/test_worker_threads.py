"""Worker threads refuse and end work that overruns its limit of time.

The thread does the next work as if nothing had been.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ktx.server import preprocess as asked
from ktx.server import worker_threads
from ktx.server.errors import APIError
from ktx.server.worker_threads import (
    COMPILE_THREADS,
    COMPILE_TIMEOUT_S,
    RENDER_THREADS,
    RENDER_TIMEOUT_S,
    run_with_timeout,
)
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


@contextlib.contextmanager
def filled(pool, count):
    """All its threads wait, until this ends or a call of what is given."""
    free = threading.Event()
    waiting = [pool.submit(free.wait, 60) for _ in range(count)]
    try:
        yield free.set
    finally:
        free.set()
        for one in waiting:
            one.result()


def test_what_overruns_is_ended(pool):
    async def check():
        endless = Endless()
        with pytest.raises(APIError, match="the prompt takes longer than 0 s") as refused:
            await run_with_timeout(0.3, pool, "the prompt", endless)
        assert refused.value.status == 400 and endless.begun.is_set()
        assert await run_with_timeout(10, pool, "the next", lambda a, b: a + b, 1, 2) == 3  # by the same thread
        assert endless.ended.is_set()

    asyncio.run(check())


def test_time_until_a_thread_is_free_is_not_ones_own(pool):
    async def check():
        works = [run_with_timeout(1.5, pool, "a", time.sleep, 0.5) for _ in range(5)]
        assert await asyncio.gather(*works) == [None] * 5

    asyncio.run(check())


def test_what_has_no_turn_in_time_is_told_so_and_never_done(pool, monkeypatch):
    monkeypatch.setattr(worker_threads, "QUEUE_TIMEOUT_S", 0.2)
    done = []

    async def check():
        with filled(pool, 1), pytest.raises(APIError, match="busy: no thread was free for b") as busy:
            await run_with_timeout(10, pool, "b", done.append, "b")
        assert (busy.value.status, busy.value.code, busy.value.retry) == (429, "queue_full", 1)
        assert await run_with_timeout(10, pool, "c", len, "abc") == 3

    asyncio.run(check())
    assert not done


def test_what_nobody_waits_for_is_ended(pool):
    """Begun or not."""
    done = []

    async def check():
        endless = Endless()
        tasks = [
            asyncio.ensure_future(run_with_timeout(60, pool, "a", endless)),
            asyncio.ensure_future(run_with_timeout(60, pool, "b", done.append, "b")),
        ]
        await asyncio.to_thread(endless.begun.wait, 10)
        for task in reversed(tasks):
            task.cancel()
        assert [type(told) for told in await asyncio.gather(*tasks, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 2
        assert await run_with_timeout(10, pool, "c", len, "abc") == 3
        assert endless.ended.is_set()

    asyncio.run(check())
    assert not done


def test_a_thread_outlives_a_hundred_of_them(pool):
    """Also where the end comes at the last moment of a work."""

    async def check():
        for i in range(100):
            with contextlib.suppress(APIError):
                await run_with_timeout(0.002, pool, "a", time.sleep, 0.0015 + i % 10 * 1e-4)
            assert await run_with_timeout(10, pool, "b", threading.get_ident) == thread
            left = asyncio.ensure_future(run_with_timeout(10, pool, "c", time.sleep, 0.001))
            await asyncio.sleep(0.0005 + i % 10 * 1e-4)
            left.cancel()
            assert await run_with_timeout(10, pool, "d", threading.get_ident) == thread

    thread = pool.submit(threading.get_ident).result()
    asyncio.run(check())


def test_what_cannot_be_done_is_a_problem(pool):
    def broken():
        raise ValueError("no such token")

    with pytest.raises(APIError, match="no such token"):
        asyncio.run(run_with_timeout(10, pool, "a", broken))


ENDLESS = (  # for one message
    "{% if messages[0].content == 'x' %}"
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)


def test_an_endless_template_is_refused_and_ended(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(asked, "RENDER_TIMEOUT_S", 0.5)
    engine = scripted(tmp_path_factory)
    engine.tokenizer.chat_template = ENDLESS
    with serving(engine) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        body = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}
        for _ in range(3):  # more than the pool has threads
            refused = http.post("/v1/chat/completions", json=body)
            assert refused.status_code == 400 and "the prompt takes longer" in refused.json()["error"]["message"]
        assert http.post("/v1/completions", json={"model": NAME, "prompt": "x", "max_tokens": 1}).status_code == 200
    both = threading.Barrier(2)
    for waiting in [RENDER_THREADS.submit(both.wait, 5) for _ in range(2)]:
        waiting.result()


def test_others_slow_grammars_are_nobody_elses_fault(tmp_path_factory, monkeypatch):
    asked = {"model": NAME, "prompt": "greet", "max_tokens": 9, "guided_regex": "[0-9]{3}"}
    with serving(scripted(tmp_path_factory)) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        with filled(COMPILE_THREADS, 4) as free:
            threading.Timer(COMPILE_TIMEOUT_S + 1, free).start()
            assert http.post("/v1/completions", json=asked).json()["choices"][0]["text"].isdigit()
        monkeypatch.setattr(worker_threads, "QUEUE_TIMEOUT_S", 0.3)
        with filled(COMPILE_THREADS, 4):
            busy = http.post("/v1/completions", json=asked)
            assert (busy.status_code, busy.headers["retry-after"]) == (429, "1"), busy.text
            assert busy.json()["error"]["code"] == "queue_full"
        assert http.post("/v1/completions", json=asked).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_template_with_it(tmp_path_factory, stream):
    engine = scripted(tmp_path_factory)
    engine.tokenizer.chat_template = ENDLESS
    asked = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "stream": stream}
    with serving(engine) as (base, _), httpx.Client(base_url=base, timeout=0.5) as http:
        for _ in range(4):  # more than the pool has threads
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=asked)
        begun = time.monotonic()
        assert http.post("/tokenize", json={"prompt": "x"}, timeout=60).status_code == 200
        assert time.monotonic() - begun < RENDER_TIMEOUT_S / 2


def test_a_forked_child_has_threads_of_its_own():
    """The parent's threads are busy, and are not in the child."""
    begun, free = threading.Event(), threading.Event()
    work = RENDER_THREADS.submit(lambda: (begun.set(), free.wait(60)))
    assert begun.wait(10)
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = 0 if asyncio.run(run_with_timeout(10, RENDER_THREADS, "a prompt", len, "abc")) == 3 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    free.set()
    assert work.result(10)[1]
