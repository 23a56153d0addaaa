"""The scripts of benchmarks/ whose figures the README and the notes quote: they run on the demo model and say what they
measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ktx.demo
from ktx.ops.gpu.offload import ExpertOffload, Job
from ktx.ops.gpu.streams import ThreadStream
from tests.support import preloaded_process
from tests.support.random_model import script

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "words,positive",
    [
        (("scaling.py", "-p", "64", "-r", "1", "-t", "2"), ("one", "all", "ratio", "int8_probe")),
        (("depth.py", "-d", "500", "-n", "2", "-r", "1"), ("near_ms", "far_ms", "share", "bytes")),
        (
            ("depth.py", "-d", "500", "-n", "2", "-r", "1", "--kv-dtype", "q8_0"),
            ("near_ms", "far_ms", "share", "bytes"),
        ),
    ],
)
def test_a_script_says_what_it_measured(words, positive):
    done = preloaded_process.run(f"benchmarks/{words[0]}", *words[1:], "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(found[name] > 0 for name in positive)


def test_first_tokens_alone_and_beside_answers():
    words = ["--model", ktx.demo.path(), "--weights", ktx.demo.gguf(), "-p", "300", "-r", "1", "--answers", "2"]
    done = preloaded_process.run("benchmarks/first_token.py", *words, "--longest", "1000", "--json")
    assert done.returncode == 0, done.stderr
    [line] = map(json.loads, done.stdout.splitlines())
    assert (line["checkout"], line["prompt"], line["answers"]) == (ROOT.name, 300, 2)
    assert 0 < line["usual"] <= line["gap"] and line["alone"] > 0 and line["beside"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_attention_is_not_measured():
    done = preloaded_process.run("benchmarks/gpu_attention.py")
    assert done.returncode == 1 and "no CUDA device" in done.stderr and not done.stdout


def test_a_model_is_measured_where_it_is_put(tmp_path):
    """On the CPU, here; tests/gpu has what other placements compute."""
    record = tmp_path / "lines.jsonl"
    words = ["--model", str(ktx.demo.path()), "--weights", str(ktx.demo.gguf()), "-p", "8", "-n", "2", "-r", "1"]
    words += ["--placements", "cpu", "--record", str(record), "--of", "61"]
    done = preloaded_process.run("benchmarks/gpu_hybrid.py", *words)
    assert done.returncode == 0, done.stderr
    line = json.loads(record.read_text())
    assert line["placement"] == "cpu" and line["layers"] == 3 and "vram used" not in line
    assert line["prompt 8 tok/s"] > 0 and line["token ms"] > 0 and done.stdout.splitlines()[1].split()[0] == "cpu"
    expected = line["token ms"] + 58 * line["token ms a layer"]
    assert line["token ms of 61 layers, extrapolated"] == pytest.approx(expected)
    assert "prompt 8 tok/s of 61 layers, extrapolated: " in done.stdout


def test_a_step_is_drawn_with_what_is_busy_in_it(tmp_path, monkeypatch):
    trace = script("gpu_trace")
    mark = {"ph": "X", "cat": "user_annotation", "name": trace.MARK, "tid": 1, "ts": 1000.0, "dur": 10_000.0}
    spans = [("kernel", 2000, 1000), ("kernel", 2500, 1500), ("gpu_memcpy", 4000, 100), ("kernel", 500, 100)]
    events = [mark, {"ph": "M", "name": "thread_name"}]
    events += [{"ph": "X", "cat": cat, "name": "k", "tid": 7, "ts": ts, "dur": dur} for cat, ts, dur in spans]
    found = trace.parse_events(events, 5_000_000, [(7_000_000, 11_000_000), (4_000_000, 4_500_000)], False)
    assert found.length == 10 and found.rows[trace.EXPERTS] == [(2, 6)]
    assert (found.busy(trace.GPU), found.busy(trace.COPIES), found.busy(trace.EXPERTS)) == (2, pytest.approx(0.1), 4)
    assert found.limit == pytest.approx(1.1 * 4 + 1) and "step 10.00 ms · GPU 2.00 ms" in trace.summary(found)
    trace.draw(found, "a step", str(tmp_path / "deep" / "trace.png"))
    assert (tmp_path / "deep" / "trace.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.wall_clock
def test_experts_are_timed_where_they_run_beside_the_profilers_clock():
    trace, way = script("gpu_trace"), ExpertOffload(ThreadStream(torch.device("cpu")))

    def step():
        given = torch.randn(2, 4), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        way.result(way.submit(lambda hidden, *_: time.sleep(0.05) or hidden, *given))

    run = Job.run
    found = trace.profile_step(step, fake_gpu=True)
    ((begin, end),) = found.rows[trace.EXPERTS]
    assert begin >= 0 and end - begin >= 45 and end <= found.length + 1 and Job.run is run
    assert 0 < found.busy(trace.GPU) < found.length


@pytest.mark.wall_clock
def test_a_short_soak_finds_nothing_wrong():
    """What needs a longer time is left out: growth, and every kind of work.

    Of sixty first tokens one may be behind two prompts that fill the cache, thirty medians long; one that starves waits
    for the load's end, some hundreds.
    """
    long = ("requests preempted", "kinds")
    words = [
        sys.executable,
        "benchmarks/soak.py",
        "--seconds",
        "10",
        "--clients",
        "8",
        "--rest",
        "1",
        "--growth",
        "1000",
        "--wait",
        "100",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    rows = [line for line in done.stdout.splitlines() if line.endswith(("  ok", "FAILED"))]
    failed = [row for row in rows if row.endswith("FAILED") and not row.startswith(long)]
    assert len(rows) == 14 and not failed, done.stdout + done.stderr
    assert done.returncode == any(row.endswith("FAILED") for row in rows)


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import soak

    return soak


GOOD = {"num_preemptions_total": 3.0, "engine_restarts_total": 0.0} | dict.fromkeys(
    ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), 0.0
)


def checked(soak, wrong=(), firsts=(0.1, 0.1, 0.3), statuses=None, sick=(), slope=0.5, files=9, threads=4, **metrics):
    """The names of the checks that failed after so much went wrong; memory grows by `slope` MB for 1000 requests, from
    rest to rest.
    """
    tally = soak.Tally(firsts=list(firsts), wrong=list(wrong), fixed={0: "x"})
    tally.done.update(dict.fromkeys(soak.ACTIONS, 10))
    tally.statuses.update(statuses or {200: 9, 400: 1, 501: 1})
    watch = soak.Watch(None, None, tally, 10.0)
    watch.unhealthy = list(sick)
    watch.samples = [soak.Sample(float(t), 20 * t, 500.0 + slope * t / 50, 9, 4) for t in range(100)]
    watch.samples[0] = soak.Sample(0.0, 0, 100.0, 5, 2)  # the warm-up's growth does not count
    after = soak.Sample(100.0, 2000, 500.0 + 2 * slope, files, threads)
    bounds = argparse.Namespace(growth=1.0, wait=20.0)
    found = soak.checks(watch, watch.samples[20], after, GOOD | metrics, bounds)
    return [row.name for row in found if not row.good]


@pytest.mark.parametrize(
    "broken,name",
    [
        ({"wrong": ["said 'a', then 'b'"]}, "answers that were wrong"),
        ({"statuses": {200: 9, 503: 1}}, "answers with status 5xx"),
        ({"firsts": (0.1, 0.1, 2.1)}, "first token, largest / median"),
        ({"slope": 1.1}, "memory for 1000 requests"),
        ({"files": 10}, "open files, rest to rest"),
        ({"threads": 5}, "threads, rest to rest"),
        ({"sick": ["503 "]}, "/health"),
        ({"engine_restarts_total": 1.0}, "engine's restarts"),
        ({"kv_cache_usage_perc": 0.01}, "idle at the end"),
        ({"num_preemptions_total": 0.0}, "requests preempted"),
    ],
)
def test_a_soak_sees_each_fault(soak, broken, name):
    assert checked(soak) == [] and checked(soak, **broken) == [name]


def test_a_soak_compares_first_tokens_with_those_around_them(soak):
    """A machine that is slow for minutes is slow for all of them; one that waits while others do not is seen in any
    minute.
    """
    quick, slow = [0.1] * 1000, [1.0] * 300
    assert checked(soak, firsts=[*quick, *slow, 4.0, *slow, *quick]) == []
    for firsts in ([*quick, *slow, 21.0, *slow], [*quick, 2.1], [2.1, *quick, *slow]):
        assert checked(soak, firsts=firsts) == ["first token, largest / median"]


def test_a_soak_knows_the_text_of_every_protocol(soak):
    """Streams and whole answers say the same of the same text."""
    from soak_protocols import PROTOCOLS

    whole = {
        "/v1/chat/completions": {"choices": [{"message": {"reasoning_content": "a", "content": "b"}}]},
        "/v1/completions": {"choices": [{"text": "ab"}]},
        "/v1/responses": {"output": [{"type": "message", "content": [{"type": "output_text", "text": "ab"}]}]},
        "/v1/messages": {"content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "b"}]},
        "/api/chat": {"message": {"thinking": "a", "content": "b"}},
    }
    lines = {
        "/v1/chat/completions": 'data: {"choices":[{"delta":{"content":"ab"}}]}',
        "/v1/completions": 'data: {"choices":[{"text":"ab"}]}',
        "/v1/responses": 'data: {"type":"response.output_text.delta","delta":"ab"}',
        "/v1/messages": 'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"ab"}}',
        "/api/chat": '{"message":{"content":"ab"},"done":false}',
    }
    for protocol in PROTOCOLS:
        assert protocol.answer_text(whole[protocol.path]) == "ab"
        assert [protocol.event_text(event) for event in protocol.events(lines[protocol.path])] == ["ab"]
        assert protocol.events("data: [DONE]") == protocol.events(": ping") == protocol.events("") == []
