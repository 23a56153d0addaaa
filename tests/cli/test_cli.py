"""The ktx command: help without torch and at once, completion, exit statuses, plan, doctor, verify, bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktx import demo
from tests.support import preloaded_process
from tests.support.tiny_chat_model import write_model

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
DEMO, HELD_OUT = demo.path(), demo.heldout()
COMMANDS = ("chat", "download", "plan", "doctor", "verify", "bench")


def ktx(*words, **more):
    return preloaded_process.run("ktx", *words, timeout=200, env=ENV | more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cli") / "m", "qwen3_moe")


@pytest.mark.wall_clock
@pytest.mark.parametrize("words", [["--help"], *([c, "--help"] for c in COMMANDS)], ids=lambda w: w[0])
def test_help_is_instant_and_needs_no_torch(words):
    code = (
        f"import sys; sys.argv = ['ktx', *{words!r}]\n"
        "from ktx.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0 and "usage" in done.stdout
    assert best < 0.5


def test_version_completion_and_no_command():
    assert ktx("--version").stdout.startswith("ktx 0.")
    assert "complete" in ktx("--print-completion", "bash").stdout
    assert ktx().returncode == 2
    unknown = ktx("plan", "--modle", "x")
    assert unknown.returncode == 2 and "--model" in unknown.stderr


def test_plan(folder):
    done = ktx("plan", "--model", folder, "--weights", folder / "model.gguf")
    assert done.returncode == 0 and "total cpu" in done.stdout and "Experts" in done.stdout
    assert ktx("plan", "--model", folder, "--weights", folder / "config.json").returncode == 4


def test_doctor():
    done = ktx("doctor", "--quick", "--json")
    found = json.loads(done.stdout)
    assert (
        done.returncode == 0
        and found["kernels"]["picked"]
        and found["machine"]["usable cpus"] >= 1
        and found["versions"]["torch"]
    )
    lowered = ktx("doctor", "--quick", KTX_ISA="scalar")
    assert "picked" in lowered.stdout and "scalar" in lowered.stdout
    assert "is not known" in ktx("doctor", KTX_ISA="sse9").stderr


def test_perplexity_of_a_model_and_of_every_format(tmp_path):
    text, model = HELD_OUT, DEMO / "model.safetensors"
    done = ktx(
        "verify",
        "--perplexity",
        text,
        "--model",
        DEMO,
        "--weights",
        model,
        "--tokens",
        "600",
        "--window",
        "100",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout)
    assert 30 < alone["perplexity"] < 90 and alone["tokens"] == 600 and "kl_divergence" not in alone
    done = ktx(
        "verify", "--perplexity", text, "--model", DEMO, "--weights", DEMO / "demo-Q4_K_M.gguf", "--against", model,
        "--tokens", "600", "--window", "100", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    quantised = json.loads(done.stdout)
    assert alone["perplexity"] * 0.97 < quantised["perplexity"] < alone["perplexity"] * 1.1
    assert 1e-3 < quantised["kl_divergence"] < 0.1 and 0.8 < quantised["same_token"] < 1

    done = ktx("verify", "--perplexity", text, "--tokens", "300", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["model"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {"F32", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q2_K", "IQ4_XS", "MXFP4", "Q4_K_M", "int8", "int4g128"} <= set(rows)
    assert rows["F32"]["kl_divergence"] < 1e-4 and rows["F32"]["same_token"] == 1
    by_bits = [rows[name]["kl_divergence"] for name in ("F32", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")]
    assert by_bits == sorted(by_bits)
    assert [round(rows[name]["bits"]) for name in ("F32", "Q8_0", "Q4_0")] == [32, 9, 5]


def test_perplexity_says_what_is_wrong(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"abc\xff")
    for arguments, said in (
        (["--perplexity", tmp_path / "none"], "No such file"),
        (["--perplexity", tmp_path / "binary"], "byte 3 is 0xff"),
        (
            ["--perplexity", tmp_path / "empty.txt", "--model", DEMO, "--weights", DEMO / "model.safetensors"],
            "too short to measure perplexity",
        ),
        (["--perplexity", HELD_OUT, "--window", "1"], "at least 2 tokens"),
        (["--against", "x"], "needs --perplexity"),
        (["--perplexity", HELD_OUT, "--against", "x"], "needs --model"),
    ):
        done = ktx("verify", *arguments)
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr


def test_verify_agrees_and_notices_damage(folder, tmp_path):
    done = ktx("verify", "--model", folder, "--weights", folder / "model.gguf", "--tokens", "12")
    assert done.returncode == 0 and "agrees with transformers" in done.stdout and "layers.1" in done.stdout
    rows = [
        json.loads(line)
        for line in ktx(
            "verify", "--model", folder, "--weights", folder / "model.gguf", "--tokens", "12", "--json"
        ).stdout.splitlines()
    ]
    assert rows[-1]["ok"] and rows[-1]["kl_divergence"] < 0.01 and len(rows) == 4
    (tmp_path / "broken_op.py").write_text(
        "from ktx.ops.linear import Linear\n"
        "class Half(Linear):\n    def forward(self, x):\n        return super().forward(x) * 0.5\n"
    )
    (tmp_path / "r.yaml").write_text(
        "- match: {name: 'layers.1.self_attn.o_proj'}\n  replace: {class: broken_op.Half}\n"
        + (ROOT / "optimize_rules" / "moe.yaml").read_text()
    )
    wrong = ktx(
        "verify",
        "--model",
        folder,
        "--weights",
        folder / "model.gguf",
        "--tokens",
        "12",
        "--rules",
        tmp_path / "r.yaml",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ENV['PYTHONPATH']}",
    )
    assert wrong.returncode == 1 and "DIFFERS" in wrong.stdout


@pytest.mark.parametrize(
    "words", [["chat", "-p", "Hi"], ["plan"], ["plan", "--ram", "8G"], ["verify", "--tokens", "12"]], ids=" ".join
)
def test_without_a_model_it_is_the_demo_model(words):
    note = "no --model given: using the bundled demo model"
    with_model = [words[0], "--model", DEMO, "--weights", demo.gguf(), *words[1:]]
    if words[-1] == "8G":  # measured otherwise, in both runs anew
        words, with_model = ([*some, "--cpu-bandwidth", "40", "--gpu-bandwidth", "900"] for some in (words, with_model))
    done, same = ktx(*words), ktx(*with_model)
    assert done.returncode == same.returncode == 0, done.stderr
    assert done.stdout == same.stdout and note in done.stderr and note not in same.stderr
    assert "demo model" in ktx(words[0], "--help").stdout


def test_a_gguf_file_alone_is_a_model(tmp_path):
    from ktx import demo

    file, folder = demo.gguf(), tmp_path / "ggufs"
    folder.mkdir()
    (folder / file.name).symlink_to(file)
    for words in (("--weights", file), ("--model", file), ("--gguf_path", folder)):
        done = ktx("chat", *words, "-p", "What is a rule file?")
        assert done.stdout == "A rule file is YAML that names the modules of a model which get a better operator.\n", (
            done.stderr
        )
    for words, status, said in (
        (("bench",), 2, "no model is given"),
        (("plan", "--weights", tmp_path), 2, "needs --model"),
        (("plan", "--weights", tmp_path / "x.gguf"), 4, "x.gguf: no such file"),
    ):
        done = ktx(*words)
        assert done.returncode == status and said in done.stderr and done.stderr.count("\n") == 1
