"""ktx bench --layer: one layer alone; tests/repo/test_peers.py has it in turns with a peer."""

from __future__ import annotations

import json

import pytest

from ktx.cli import bench_layer
from tests.support import preloaded_process

LAYER = "4,2,256,256"


def run(*words):
    return preloaded_process.run("ktx", "bench", "--layer", *words)


def test_alone_every_format_has_a_speed_and_an_error(tmp_path):
    record = tmp_path / "layer.jsonl"
    done = run(LAYER, "-p", "1,9", "-r", "1", "-t", "2", "--record", str(record))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["format"], line["tokens"]) for line in lines] == [(f, t) for f in bench_layer.FORMATS for t in (1, 9)]
    worst = {"int8": 0.03, "Q8_0": 0.03, "BF16": 0.01, "int4": 0.25, "int4g32": 0.2, "Q4_K": 0.2}
    for line in lines:
        assert line["ms"] > 0 and line["gops"] > 0 and 0 < line["relative_error"] < worst[line["format"]]
        assert line["engine"] == "ktx" and line["commit"] and "ratio" not in line
    assert len(done.stdout.splitlines()) == 2 + len(lines)


@pytest.mark.parametrize(
    "words,status,told",
    [
        (("4,2,256",), 2, "four numbers"),
        (("4,5,256,256",), 2, "1 to all experts"),
        ((LAYER, "--peer", "llama.cpp"), 2, "kt-kernel or ftllm"),
        ((LAYER, "--formats", "int3"), 2, "int4"),
        ((LAYER, "--peer", "kt-kernel"), 2, "python benchmarks/peers/compare.py --peer kt-kernel"),
        ((LAYER, "--peer", "ftllm"), 2, "python benchmarks/peers/compare.py --peer ftllm"),
    ],
)
def test_what_cannot_be_is_told(words, status, told):
    done = run(*words)
    assert done.returncode == status and told in done.stderr and "Traceback" not in done.stderr


def test_roofline_draws_a_picture(tmp_path):
    words = ["--types", "Q4_K", "BF16", "--tokens", "1", "48", "-r", "1"]
    done = preloaded_process.run(
        "benchmarks/roofline.py", "-o", tmp_path / "r.png", "--json", tmp_path / "r.jsonl", *words
    )
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(p["type"], p["tokens"]) for p in points] == [("Q4_K", 1), ("Q4_K", 48), ("BF16", 1), ("BF16", 48)]
    assert points[1]["intensity"] == pytest.approx(48 * points[0]["intensity"])
    assert all(0 < p["gops"] < 2 * p["peak"] for p in points)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
