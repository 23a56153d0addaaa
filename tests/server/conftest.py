"""Servers in this process: the application on a real socket, a script or a small model behind it."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import httpx
import pytest

from ktx.engine.engine import Options
from ktx.server.app import make_app
from ktx.server.auth import AccessPolicy
from ktx.server.run import listen, make_server
from ktx.server.state import ServerSettings, ServerState
from tests.support.scripted_engine import read_script, scripted_engine
from tests.support.tiny_chat_model import tokenizer

NAME = "test-model"


@contextlib.contextmanager
def serving(engine=None, access=None, settings=None, names=(NAME, "alias"), adapters=()):
    """The base address of a running server, and its Served."""
    served = ServerState(names, settings or ServerSettings(keepalive_s=0.2), adapters)
    app = make_app(served, access or AccessPolicy())
    if engine is not None:
        served.set_engine(engine)
    where = listen("127.0.0.1", 0)
    server = make_server(app, served)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [where]}, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{where.getsockname()[1]}"
    try:
        for _ in range(200):
            if server.started:
                break
            time.sleep(0.02)
        yield base, served
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


SCRIPT = [
    {"match": "greet", "text": "Good day, to you!"},
    {"match": "think", "text": "<think>Let me see.</think>It is four."},
    {
        "match": "call the tool",
        "text": 'Well.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "<b>\\"x\\"</b>"}}\n</tool_call>',
    },
    {"match": "broken call", "text": 'Now <tool_call>\n{"name": "weather", "arguments": [1, 2'},
    {
        "match": "look at the sky",
        "text": '<tool_call>\n{"name": "sky__weather", "arguments": {"city": "x"}}\n</tool_call>',
    },
    {
        "match": "beyond numbers",
        "text": '<tool_call>\n{"name": "weather", "arguments": {"city": "x", "days": 1e999}}\n</tool_call>',
    },
    {"match": "emoji", "text": "a 🙂 b"},
    {"match": "long story", "text": "word " * 400},
]

QWEN = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    " write <tool_call> and </tool_call><|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def scripted(tmp_path_factory, pace=0.0, **options):
    path = tmp_path_factory.mktemp("script") / "script.json"
    path.write_text(json.dumps(SCRIPT))
    words = tokenizer()
    words.chat_template = QWEN
    return scripted_engine(words, Options(**options), read_script(path, words), pace)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(scripted(tmp_path_factory)) as (base, _):
        yield base


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Twenty tokens a second."""
    with serving(scripted(tmp_path_factory, pace=0.01)) as (base, served):
        yield base, served


def settled(served, seconds=1.0):
    """Whether nothing runs any more and all pages are back."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        engine = served.engine
        if not engine.outputs and not engine.scheduler.pages.used:
            engine.check_integrity()
            return True
        time.sleep(0.01)
    return False


def sent(http, path, **body):
    answer = http.post(path, json={"model": NAME, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(http, path, **body):
    """What an error says; Ollama's have no more than that."""
    answer = http.post(path, json={"model": NAME, **body})
    assert answer.status_code in (400, 501), answer.text
    error = answer.json()["error"]
    return error if isinstance(error, str) else error["message"]
