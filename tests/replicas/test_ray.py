"""ktx serve --ray on a cluster of two nodes on this machine; a script answers in the place of a model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray Serve is not installed: pip install -e '.[ray]'"
)
ROOT = Path(__file__).resolve().parents[2]
KEY = {"authorization": "Bearer secret"}
SCRIPT = [{"match": "greet", "text": "Good day, to you!"}, {"match": "long story", "text": "word " * 400}]


class Running:
    """A server's process, its address, and what its replicas have logged."""

    def __init__(self, address, folder, *words):
        script = folder / "script.json"
        script.write_text(json.dumps(SCRIPT))
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.scripted_server", "--ray", "--ray-address", address),
                *("--script", script, "--pace", "0.005", "--port", "0", "--log_format", "json", "--api-key", "secret"),
                *words,
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        said = self.wait(lambda: next((line for line in self.lines if "listening on" in line), None), 60)
        self.base = said.partition("listening on ")[2].partition(",")[0]
        self.http = httpx.Client(base_url=self.base, headers=KEY, timeout=60)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def wait(self, what, seconds):
        until = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < until and self.process.poll() is None, "".join(self.lines[-30:])
            time.sleep(0.05)
        return found

    def health(self):
        return self.http.get("/health").json()

    def ready(self, count, seconds=90):
        self.wait(lambda: self.health()["replicas"] == {"ready": count, "wanted": count}, seconds)

    def ask(self, *texts, **more):
        messages = [{"role": "user", "content": text} for text in texts]
        answer = self.http.post("/v1/chat/completions", json={"model": "ktx-demo", "messages": messages, **more})
        assert answer.status_code == 200, answer.text
        return answer

    def both_answer(self):
        """Serve's router hears of a replica a moment after it is ready."""
        with ThreadPoolExecutor(2) as pool:
            return len({answer.headers["x-ktx-replica"] for answer in pool.map(self.ask, ["greet"] * 2)}) == 2

    def ended(self):
        """What replicas have logged of answers: dictionaries with `time` and `reason`."""
        return [json.loads(line[line.index("{") :]) for line in list(self.lines) if '"answered"' in line]


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False})
made.add_node(num_cpus=2, object_store_memory=100 << 20)
print(made.address, flush=True)
sys.stdin.read()
made.shutdown()
"""  # noqa: E501


@pytest.fixture(scope="module")
def address():
    """Of a cluster in a process of its own: Ray reads its settings once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", "0" * 64), ("RAY_USAGE_STATS_ENABLED", "0")):
            patch.setenv(name, value)
        cluster = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            made = cluster.stdout.readline().strip()
            assert made, "Ray's cluster did not start; what it said stands above"
            yield made
        finally:
            cluster.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(address, tmp_path_factory):
    made = Running(address, tmp_path_factory.mktemp("ray"))
    try:
        made.ready(2)
        made.wait(made.both_answer, 30)
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def test_both_replicas_work_under_load(server):
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: server.ask(f"greet {number} " + f"{number:03} " * 100), range(12)))
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"Good day, to you!"}
    names = [answer.headers["x-ktx-replica"] for answer in answers]
    assert len(set(names)) == 2 and min(names.count(name) for name in set(names)) >= 3


def test_a_conversation_stays_where_its_beginning_is_kept(server):
    talks = {"one": [f"greet one {'lion ' * 150}"], "two": [f"greet two {'bear ' * 150}"]}
    places, cached = {name: set() for name in talks}, {name: [] for name in talks}
    for turn in range(4):
        for name, texts in talks.items():
            answer = server.ask(*texts)
            places[name].add(answer.headers["x-ktx-replica"])
            cached[name].append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            texts.append(f"and then {turn} " + "more " * 100)
    assert all(len(place) == 1 for place in places.values())
    for found in cached.values():
        assert found[0] < found[1] < found[2] < found[3]


def test_a_stream_is_the_whole_answer(server):
    whole = server.ask("long story", max_tokens=60).json()
    with server.http.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "ktx-demo",
            "messages": [{"role": "user", "content": "long story"}],
            "stream": True,
            "max_tokens": 60,
        },
    ) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
    assert (
        "".join(pieces) == whole["choices"][0]["message"]["content"] and len([piece for piece in pieces if piece]) > 20
    )


def test_the_guard_stands_before_ray(server):
    stranger = httpx.Client(base_url=server.base)
    assert stranger.get("/v1/models").status_code == 401 and stranger.get("/metrics").status_code == 401
    assert stranger.get("/health").json() == {"status": "ok", "replicas": {"ready": 2, "wanted": 2}, "loading": {}}
    assert server.http.post("/v1/chat/completions", content=b"x" * (17 << 20)).status_code == 413
    refused = server.http.post("/v1/chat/completions", json={"model": "other", "messages": []})
    assert refused.status_code in (400, 404) and refused.headers["x-ktx-replica"]
    assert server.http.get("/v1/nothing").status_code == 404
    named = server.http.post("/v1/messages", json={"model": "ktx-demo"}, headers={"x-request-id": "mine"})
    assert named.json()["request_id"] == named.headers["x-request-id"] == "mine"  # the replica knows it too


def test_keys_do_not_travel():
    from ktx.replicas.proxy import forwarded_scope

    headers = [(b"Authorization", b"Bearer k"), (b"x-api-key", b"k"), (b"cookie", b"k"), (b"accept", b"*/*")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "app": object()}
    assert forwarded_scope(scope) == {"method": "GET", "path": "/", "headers": [(b"accept", b"*/*")]}


def test_metrics_are_of_all_replicas(server):
    server.ask("greet")

    def counted():
        found = server.http.get("/metrics").text
        lines = [line for line in found.splitlines() if line.startswith("ktx:generation_tokens_total")]
        return (
            len(lines) == 2
            and all('replica="' in line for line in lines)
            and found.count("# TYPE ktx:engine_steps") == 1
        )

    server.wait(counted, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_within_a_second_of_its_clients_leaving(server, stream):
    asked, begun = (
        {"model": "ktx-demo", "messages": [{"role": "user", "content": "long story"}], "stream": stream},
        time.time(),
    )
    with (
        suppress(httpx.ReadTimeout),
        server.http.stream("POST", "/v1/chat/completions", json=asked, timeout=1.0) as answer,
    ):
        for number, _ in enumerate(answer.iter_lines()):
            if number == 10:
                break
    left = time.time()
    last = server.wait(lambda: next((one for one in server.ended() if one["time"] > begun), None), 10)
    assert last["reason"] == "cancelled" and last["time"] - left < 1


def test_strangers_cannot_join_the_cluster(address):
    code = f"import ray; ray.init({address!r}); print('let in', flush=True)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    words = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    stranger = subprocess.Popen([sys.executable, "-c", code], env=env | {"RAY_AUTH_MODE": "disabled"}, **words)
    try:
        heard = next(line for line in stranger.stdout if "let in" in line or "InvalidAuthToken" in line)
    finally:
        stranger.kill()
        stranger.wait()
    assert "Unauthenticated" in heard


def test_a_replica_that_is_killed_takes_only_its_own_answers_with_it(server):
    asked = {"model": "ktx-demo", "messages": [{"role": "user", "content": "long story"}], "stream": True}
    with ThreadPoolExecutor(4) as pool:
        names, ends = [], []

        def listen():
            with server.http.stream("POST", "/v1/chat/completions", json=asked) as answer:
                names.append(answer.headers["x-ktx-replica"])
                lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
            ends.append((answer.headers["x-ktx-replica"], lines))

        jobs = [pool.submit(listen) for _ in range(4)]
        server.wait(lambda: len(names) == 4, 20)
        assert len(set(names)) == 2
        replicas = [
            one
            for one in psutil.process_iter(["cmdline"])
            if "ServeReplica:ktx-ktx-demo" in " ".join(one.info["cmdline"] or ())
        ]
        assert len(replicas) == 2
        replicas[0].kill()
        again = [server.ask(f"greet {number}").json()["choices"][0]["message"]["content"] for number in range(4)]
        assert again == ["Good day, to you!"] * 4
        for job in jobs:
            job.result()
    broken = {name for name, lines in ends if "died" in lines[-2]}
    assert all(lines[-1] == "data: [DONE]" for _, lines in ends) and len(broken) == 1
    assert all(len(lines) > 300 for name, lines in ends if name not in broken)
    server.ready(2)


def test_sigterm_ends_streams_well_formed_and_leaves_the_cluster_clean(server, address):
    asked = {"model": "ktx-demo", "messages": [{"role": "user", "content": "long story"}], "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=asked) as answer:
        lines = answer.iter_lines()
        for line in lines:
            if "word" in line:
                break
        begun = time.monotonic()
        server.process.terminate()
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and "shutting down" in rest[-2]
    assert server.process.wait(timeout=20) == 0 and time.monotonic() - begun < 15
    assert not [
        one for one in psutil.process_iter(["cmdline"]) if "ServeReplica:" in " ".join(one.info["cmdline"] or ())
    ]
