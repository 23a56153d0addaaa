"""ktx bench serve measures the pace of a server of known pace.

Errors are counted, and the prompts are as long as they were asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from ktx.__main__ import main
from ktx.cli import bench_serve, serve
from ktx.cli.arguments import Parser
from ktx.cli.bench_child import serve_arguments
from ktx.cli.bench_clients import Load, Prompts, Timing
from tests.server.conftest import scripted, serving

ROOT = Path(__file__).resolve().parents[2]
PACE = 0.025  # seconds a token: long beside what a request costs a busy machine


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    with serving(scripted(tmp_path_factory, pace=PACE, max_batch_size=4)) as (base, _):
        yield base


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with serving(scripted(tmp_path_factory)) as (base, _):
        yield base


def measured(capsys, *words):
    """The JSON lines of a run that succeeds, and what it said beside them."""
    assert main(["bench", "serve", "--json", *map(str, words)]) == 0
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines()], said.err


@pytest.mark.wall_clock
def test_the_numbers_are_the_servers_pace(slow, capsys):
    """The server takes PACE for a token of a prompt or an answer.

    Four answers side by side take four times that for each of theirs.
    """
    words = ("--url", slow, "-c", "1,4", "--requests", 4, "--prompt-tokens", 10, "--answer-tokens", 12)
    words += ("--seed", 7)  # none of these begins like another one here
    (one, four), _ = measured(capsys, *words)
    for line, share in ((one, 1), (four, 4)):
        assert (line["requests"], line["errors"], line["concurrency"]) == (4, 0, share)
        assert (line["prompt_tokens"], line["answer_tokens"], line["cached_tokens"]) == (40, 48, 0)
        assert line["seconds"] >= 4 * 21 * PACE
        assert 0.9 * share * PACE <= line["itl_p50"] <= 2.5 * share * PACE
        assert line["itl_p50"] <= line["itl_p99"] and line["ttft_p50"] <= line["ttft_p99"] <= line["latency_p99"]
        assert 0.4 / PACE <= line["decode_tok_s"] <= 1.1 / PACE
        assert line["tok_s"] == pytest.approx(88 / line["seconds"])
    assert 10 * PACE <= one["ttft_p50"] <= 25 * PACE and 21 * PACE <= one["latency_p50"] <= 53 * PACE
    assert one["ratio"] == one["decode_ratio"] == 1 and four["ratio"] == pytest.approx(four["tok_s"] / one["tok_s"])


def test_a_shared_prefix_is_computed_once(quick, capsys, monkeypatch):
    """The moments from which prompts are made are set: by chance a first token may be the same in two of them."""
    moments = iter((11, 12, 13))
    monkeypatch.setattr(bench_serve, "time", SimpleNamespace(time_ns=lambda: next(moments)))
    words = ("--url", quick, "-c", "2", "--requests", 3, "--prompt-tokens", 150, "--answer-tokens", 1)
    (line,), _ = measured(capsys, *words, "--shared-prefix", 128)
    assert (line["prompt_tokens"], line["cached_tokens"]) == (450, 256) and line["itl_p50"] is None
    for seed, found in ((("--seed", 1), False), (("--seed", 1), True), ((), False), ((), False)):
        (line,), _ = measured(capsys, *words, *seed)
        assert (line["cached_tokens"] >= 3 * 128) is found and bool(line["cached_tokens"]) is found


def test_the_same_of_all_is_one_prompt_a_level():
    load = Load("m", 40, 8, shared_prefix=30)
    various, again = Prompts(500, 7).make(load, 3, 1), Prompts(500, 7).make(load, 3, 2)
    assert all(len(prompt) == 40 and prompt[:30] == various[0][:30] for prompt in various)
    assert len({tuple(prompt) for prompt in various + again}) == 6 and various[0][:30] != again[0][:30]
    load.same = True
    assert len({tuple(prompt) for prompt in Prompts(500, 7).make(load, 3, 1)}) == 1
    assert load.body([1], 5)["seed"] == load.body([1], 6)["seed"] and load.body([1], 0)["ignore_eos"] is True


def test_figures_of_known_times():
    """Two clients: one answers from 1 to 3, the other from 2 to 4; both together from 2 to 3."""
    first = Timing(0.0, 3.0, [(1.0, 1), (2.0, 1), (3.0, 2)], prompt=10, answer=4, finished=True)
    second = Timing(0.0, 4.0, [(2.0, 1), (2.5, 1), (4.0, 1)], prompt=10, cached=8, answer=3, finished=True)
    failed = Timing(0.0, 5.0, error="500 broken")
    found = bench_serve.summarize([first, second, failed], 2)
    assert (found["requests"], found["errors"], found["error"], found["seconds"]) == (3, 1, "500 broken", 5.0)
    assert (found["prompt_tokens"], found["cached_tokens"], found["answer_tokens"]) == (20, 8, 7)
    assert (found["ttft_p50"], found["ttft_p99"], found["latency_p50"]) == (1.0, 2.0, 3.0)
    assert first.inter_token_s == [1.0, 0.5, 0.5] and second.inter_token_s == [0.5, 1.5]
    assert (found["itl_p50"], found["itl_p99"]) == (0.5, 1.5)
    assert found["decode_tok_s"] == 3.0  # the piece of 2.5 and the two tokens of 3.0
    assert found["prompt_tok_s"] == 4.0 and found["answer_tok_s"] == 1.4 and found["tok_s"] == 5.4
    nothing = bench_serve.summarize([failed], 1)
    assert nothing["ttft_p50"] is None and nothing["decode_tok_s"] is None and nothing["tok_s"] == 0


class Strange(BaseHTTPRequestHandler):
    """Another maker's server takes no ids and counts 1.5 tokens a word and one before.

    Of its streams the second breaks off, the third tells of an error, the fourth is refused.
    """

    seen: list[dict] = []
    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        return

    def _send(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_GET(self):
        if self.headers["authorization"] != "Bearer k":
            return self._send({"error": {"message": "no key"}}, 401)
        models = {"data": [{"id": "strange"}]}
        self._send(models if self.path == "/v1/models" else {}, 200 if self.path == "/v1/models" else 404)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        tokens = 1 + int(1.5 * len(asked["prompt"].split()))
        if not asked.get("stream"):
            return self._send({"choices": [{"text": "x"}], "usage": {"prompt_tokens": tokens, "completion_tokens": 1}})
        self.seen.append(asked | {"tokens": tokens})
        events = [
            {"choices": [{"text": "x", "finish_reason": None}]},
            {"choices": [{"text": "y", "finish_reason": "length"}]},
        ]
        usage = {"choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": 2}}
        number = len(self.seen) - 1  # the first one is the warm-up
        if number == 4:
            return self._send({"error": {"message": "too many"}}, 429)
        events = {2: events[:1], 3: [events[0], {"error": {"message": "broken"}}]}.get(number, [*events, usage])
        self._send(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))


@contextlib.contextmanager
def strange():
    Strange.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_another_makers_server_and_its_errors(capsys):
    with strange() as base:
        words = ("--url", f"{base}/v1/", "--api-key", "k", "-c", "1", "--requests", 5, "--prompt-tokens", 61)
        (line,), said = measured(capsys, *words, "--answer-tokens", 2)
    assert (line["model"], line["requests"], line["errors"]) == ("strange", 5, 3)
    assert line["answer_tokens"] == 4 and line["prompt_tokens"] == 2 * 61
    assert {asked["tokens"] for asked in Strange.seen} == {61} and Strange.seen[0]["max_tokens"] == 2
    assert line["error"] == "the stream ended before the answer was complete" and "3 errors in serve p61 n2 c1" in said


def test_what_cannot_be_measured_is_told(capsys):
    with strange() as base:
        assert main(["bench", "serve", "--url", base, "--api-key", "wrong"]) == 1
        assert "401 no key" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", base]) == 1
    assert "no OpenAI-compatible server answers" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "localhost"]) == 2 and "http://" in capsys.readouterr().err
    assert main(["bench", "serve", "--shared-prefix", "300"]) == 2 and "256" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["bench", "-p", "64", "serve"])
    assert ended.value.code == 2 and "-p must come after serve" in capsys.readouterr().err


def test_every_answer_lost_is_a_failure(quick, capsys):
    words = ["--url", quick, "-c", "1", "--requests", "2", "--prompt-tokens", "40000"]
    assert main(["bench", "serve", *words]) == 1
    said = capsys.readouterr()
    assert "2 errors" in said.err and "context holds" in said.err and " - " in said.out


def test_a_server_of_its_own_from_the_command_line(tmp_path):
    """The options of `ktx serve` reach it; the record and the picture are written."""
    record, picture = tmp_path / "results.jsonl", tmp_path / "plots" / "load.png"
    words = [
        "-c",
        "1,2",
        "--requests",
        "2",
        "--prompt-tokens",
        "8",
        "--answer-tokens",
        "8",
    ]
    words += ["--record", str(record), "--plot", str(picture)]
    command = [sys.executable, "-m", "ktx", "bench", "serve", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert rows[1].startswith("clients") and [row.split()[0] for row in rows[2:]] == ["1", "2"]
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["test"] for line in lines] == ["serve p8 n8 c1", "serve p8 n8 c2"]
    assert all(line["machine"] and line["commit"] and line["server"] == "ktx serve" for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_server_that_does_not_start_says_why(capsys):
    assert main(["bench", "serve", "--model", "/nothing/here"]) == 4
    assert "/nothing/here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--kv-dtype", "q8_0", "--no-prefix-cache", "--cpu_infer", "2", "--max-batch-size", "3"],
        [
            "--model",
            "m",
            "--weights",
            "w",
            "--rules",
            "r",
            "--quantize-experts",
            "int4",
            "--trust-remote-code",
            "--prefix-cache-gb",
            "0.5",
        ],
    ],
)
def test_options_arrive_at_the_server_as_they_were_given(words):
    bench, own = Parser(), Parser()
    bench_serve.add_arguments(bench)
    serve.add_arguments(own)
    given = bench.parse_args(words)
    given.max_batch_size = given.max_batch_size or 4
    arrived, meant = own.parse_args(serve_arguments(given)), own.parse_args(words)
    assert isinstance(arrived, argparse.Namespace) and vars(arrived) == vars(meant)
