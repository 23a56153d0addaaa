"""Loading, leaving clients, overload, failures, the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from ktx.server.log import LogFormatter
from ktx.server.state import ServerSettings, ServerState
from tests.server.conftest import NAME, scripted, serving, settled

ROOT = Path(__file__).resolve().parents[2]


def body(text, **more):
    return {"model": NAME, "messages": [{"role": "user", "content": text}], **more}


def test_health_while_loading():
    with serving() as (base, served):
        served.progress.total, served.progress.done = 1000, 250
        answer = httpx.get(f"{base}/health")
        assert answer.status_code == 503 and answer.json()["percent"] == 25.0 and answer.json()["eta_seconds"] >= 0
        asked = httpx.post(f"{base}/v1/chat/completions", json=body("greet"))
        assert asked.status_code == 503 and "25 %" in asked.json()["error"]["message"] and asked.headers["retry-after"]
        assert httpx.get(f"{base}/v1/models").status_code == 503
        served.load_error = "no such file"
        assert "no such file" in httpx.get(f"{base}/health").json()["error"]["message"]


@pytest.mark.wall_clock
@pytest.mark.parametrize(
    "path,more",
    [
        ("/v1/chat/completions", {"stream": True}),
        ("/v1/chat/completions", {}),
        ("/v1/completions", {}),
        ("/v1/messages", {}),
        ("/api/chat", {"stream": True}),
    ],
)
@pytest.mark.parametrize("text", ["long story", "long story " + "x" * 3000])
def test_a_client_that_leaves_costs_nothing_more(slow, path, more, text):
    """In the middle of an answer and of a prompt."""
    base, served = slow
    asked = body(text, **more) | ({"max_tokens": 300} if path == "/v1/messages" else {})
    if path == "/v1/completions":
        asked = {"model": NAME, "prompt": text, "max_tokens": 300}
    start = time.monotonic()
    with contextlib.suppress(httpx.ReadTimeout), httpx.stream("POST", base + path, json=asked, timeout=0.4) as answer:
        next(piece for piece in answer.iter_raw() if time.monotonic() - start > 0.4)  # comments come in time
    assert time.monotonic() - start < 2  # and not because the answer was over: that takes four seconds
    assert settled(served)


@pytest.mark.wall_clock
def test_a_storm_of_leaving_clients_harms_nobody(slow):
    base, served = slow
    alone = httpx.post(f"{base}/v1/chat/completions", json=body("greet"), timeout=60).json()["choices"]
    found = []
    stayer = threading.Thread(
        target=lambda: found.append(
            httpx.post(f"{base}/v1/chat/completions", json=body("greet"), timeout=60).json()["choices"]
        )
    )

    def leave(number):
        try:
            httpx.post(f"{base}/v1/chat/completions", json=body(f"long story {number}"), timeout=0.1 + 0.01 * number)
        except httpx.TimeoutException:
            return

    leavers = [threading.Thread(target=leave, args=(number,)) for number in range(64)]
    for thread in [*leavers[:32], stayer, *leavers[32:]]:
        thread.start()
    for thread in [*leavers, stayer]:
        thread.join(timeout=60)
    assert found == [alone] and settled(served, 3)


@pytest.mark.wall_clock
def test_comments_keep_a_silent_stream_alive(slow):
    base, _ = slow
    with httpx.stream(
        "POST", f"{base}/v1/chat/completions", json=body("greet" + " " * 300, stream=True), timeout=30
    ) as answer:
        text = "".join(answer.iter_text())
    assert text.count(": ping") >= 3 and text.rstrip().endswith("data: [DONE]")


def test_more_than_the_queue_holds_is_told_to_come_again(tmp_path_factory):
    with serving(scripted(tmp_path_factory, pace=0.01, max_queue=2, max_batch_size=1)) as (base, served):
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(httpx.post(f"{base}/v1/chat/completions", json=body("greet"), timeout=60))
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert codes.count(200) >= 3 and codes.count(429) == 8 - codes.count(200) > 0
        full = next(answer for answer in answers if answer.status_code == 429)
        assert full.headers["retry-after"] and full.json()["error"]["type"] == "rate_limit_error"
        assert settled(served)


@pytest.mark.wall_clock
def test_500_requests_from_16_clients_in_a_small_cache(tmp_path_factory):
    """Each hears its own prompt's end; the first word of none takes twenty times as long as the median."""
    with serving(scripted(tmp_path_factory, pace=0.0, kv_cache_tokens=1024, max_batch_size=4)) as (base, served):
        firsts, wrong = [], []

        def ask(client):
            with httpx.Client(base_url=base, timeout=60) as http:
                for number in range(client, 500, 16):
                    text = f"request {number} of client {client} " + "y" * (number * 7 % 200)
                    start, said = time.monotonic(), ""
                    with http.stream(
                        "POST",
                        "/v1/completions",
                        json={"model": NAME, "prompt": text, "max_tokens": 64, "stream": True},
                    ) as answer:
                        for line in answer.iter_lines():
                            if line.startswith("data: {"):
                                firsts.append(time.monotonic() - start) if not said else None
                                said += json.loads(line[6:])["choices"][0]["text"]
                    if said != text[-64:]:
                        wrong.append((text, said))

        threads = [threading.Thread(target=ask, args=(client,)) for client in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        firsts.sort()
        assert not wrong and len(firsts) == 500
        assert max(firsts) <= 20 * firsts[250]
        assert settled(served)
        metrics = httpx.get(f"{base}/metrics").text
        assert f'ktx:request_success_total{{finished_reason="length",model_name="{NAME}"}}' in metrics
        counted = [
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith("ktx:generation_tokens_total")
        ]
        assert counted == [sum(min(64, len(f"request {n} of client {n % 16} ") + n * 7 % 200) for n in range(500))]


@pytest.mark.wall_clock
def test_a_dead_engine_thread_is_told_and_replaced(tmp_path_factory):
    with serving(scripted(tmp_path_factory, pace=0.01)) as (base, served):
        found = []
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(f"{base}/v1/chat/completions", json=body("long story"), timeout=30))
        )
        thread.start()
        time.sleep(0.5)
        start = time.monotonic()

        def die():
            raise SystemError("planned")

        served.engine.inbox.put(die)
        thread.join()
        assert time.monotonic() - start < 5 and found[0].status_code == 500
        assert httpx.post(f"{base}/v1/chat/completions", json=body("greet"), timeout=30).status_code == 200
        assert httpx.get(f"{base}/health").json()["restarts"] == 1


@contextlib.contextmanager
def started(*options, **environment):
    """A server of its own that echoes, ready, and its address; it is gone behind this, whatever happens."""
    command = [sys.executable, "-m", "tests.support.scripted_server", "--port", "0", "--log_format", "json", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
    ) as process:
        try:
            line = next((line for line in process.stderr if "listening on" in line), "")
            assert line, f"the server ended with {process.wait()}"
            base = json.loads(line)["message"].partition("listening on ")[2].partition(",")[0]
            until = time.monotonic() + 60
            while httpx.get(f"{base}/health", timeout=30).status_code != 200:
                assert time.monotonic() < until, "the server did not get ready"
                time.sleep(0.1)
            yield process, base
        finally:
            process.kill()


@pytest.mark.wall_clock
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_well_formed(sig):
    """In the middle of an answer of twenty seconds."""
    asked = {**body("tell " * 200), "model": "ktx-demo", "stream": True}
    with started("--pace", "0.02") as (process, base):
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=asked, timeout=30) as answer:
            lines = answer.iter_lines()
            for line in lines:
                if '"content":"' in line and '"content":""' not in line:
                    break
            begun = time.monotonic()
            process.send_signal(sig)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and "shutting down" in rest[-2]
        assert process.wait(timeout=10) == 0 and time.monotonic() - begun < 10


def test_flags_by_file_and_keys_by_environment(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("model_name: [one, two]\nmax_batch_size: 2\nlog_prompts: false\n")
    with started("--config", str(config), KTX_API_KEY="k1 k2") as (process, base):
        models = httpx.get(f"{base}/v1/models", headers={"authorization": "Bearer k2"}).json()["data"]
        assert [model["id"] for model in models] == ["one", "two"]
        assert httpx.get(f"{base}/v1/models").status_code == 401
        process.terminate()
        assert process.wait(timeout=15) == 0


def test_a_server_that_fails_to_load_says_why():
    served = ServerState(("x",))
    served.load(lambda served: (_ for _ in ()).throw(__import__("ktx").errors.BadFile("x.gguf: is no model"))).join()
    assert served.health()[0] == 503 and "is no model" in served.load_error


@pytest.mark.parametrize("logged", [False, True])
def test_prompts_are_in_the_log_only_when_asked_for(tmp_path_factory, caplog, logged):
    caplog.set_level("INFO", "ktx.server")
    with serving(scripted(tmp_path_factory), settings=ServerSettings(log_prompts=logged)) as (base, _):
        httpx.post(f"{base}/v1/chat/completions", json=body("greet, secretly"))
    said = [vars(record) for record in caplog.records]
    assert any("secretly" in str(one.get("prompt")) for one in said) is logged
    answered = next(one for one in said if one["msg"] == "answered")
    assert answered["reason"] == "stop" and answered["answer_tokens"] == len("Good day, to you!")
    lines = [LogFormatter(True).format(record) for record in caplog.records]
    assert all(json.loads(line)["logger"] for line in lines) and ("secretly" in "".join(lines)) is logged
