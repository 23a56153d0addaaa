"""The command line ignores nothing that a user writes.

What cannot be meant, or would not be read, is an error that says what was found and what there is.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import ktx
from ktx import demo
from ktx.__main__ import main
from ktx.cli import bench
from ktx.environment import ALLOWED, VARIABLES, check_environment, environment
from ktx.errors import UsageError
from tests.support import preloaded_process

MODEL = ["--model", str(demo.path()), "--weights", str(demo.gguf())]
LAYER = ["bench", "--layer", "4,2,256,512"]


def outcome(capsys, *words) -> tuple[int, str]:
    try:
        status = main([str(word) for word in words])
    except SystemExit as error:
        status = int(error.code or 0)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "words, told",
    [
        # numbers of tokens
        (["bench", *MODEL, "-n", "-1"], "must be at least 0, found -1"),
        (["bench", *MODEL, "-p", "512,-4"], "must be at least 0, found -4"),
        (["bench", *MODEL, "-p", "many"], "must be a number, found 'many'"),
        (["bench", *MODEL, "-p", "1e3"], "must be a number"),
        (["bench", *MODEL, "-p", "512,"], "must be a number, found ''"),
        (["bench", *MODEL, "-n", "99999999999"], "must be at most 16777216 tokens, found 99999999999"),
        (["bench", *MODEL, "-d", "-8"], "must be at least 0, found -8"),
        (["bench", *MODEL, "-p", "0", "-n", "0"], "-p 0 and -n 0 leave nothing to measure"),
        (["bench", *MODEL, "-p", "0,0", "-n", "0"], "leave nothing to measure"),
        (["bench", *MODEL, "-r", "0"], "must be at least 1"),
        ([*LAYER, "-p", "0"], "-p 0 leaves nothing to measure"),
        # options that would not be read
        ([*LAYER, *MODEL], "--model has no effect with --layer"),
        ([*LAYER, "-n", "4"], "--tokens has no effect with --layer"),
        ([*LAYER, "-d", "64"], "--depth has no effect with --layer"),
        ([*LAYER, "--json"], "--json has no effect with --layer"),
        ([*LAYER, "--quantize", "int4"], "--quantize has no effect with --layer"),
        (["bench", *MODEL, "--formats", "Q4_K"], "--formats needs --layer"),
        (["plan", *MODEL, "--ctx", "32K"], "--ctx needs a placement by budget"),
        (["plan", *MODEL, "--batch", "4"], "--batch needs a placement by budget"),
        (["plan", *MODEL, "--cpu-bandwidth", "50"], "--cpu-bandwidth needs a placement by budget"),
        (["plan", *MODEL, "--write", "there.yaml"], "--write needs a placement by budget"),
        (["plan", *MODEL, "--ram", "8G", "--all"], "--all has no effect on a placement by budget"),
        (
            ["plan", *MODEL, "--ram", "8G", "--stream-experts-min-tokens", "off"],
            "--stream-experts-min-tokens has no effect on a placement",
        ),
        (["plan", *MODEL, "--ram", "8G", "--cpu-bandwidth", "-5"], "must be more than 0"),
        (["plan", *MODEL, "--ram", "8G", "--cpu-bandwidth", "nan"], "must be more than 0"),
        (["plan", *MODEL, "--ram", "8G", "--gpu-bandwidth", "fast"], "must be a number, found 'fast'"),
        (["plan", *MODEL, "--kv-dtype", "q3"], "q3"),
        (["plan", *MODEL, "--num-experts-per-tok", "99"], "num_experts_per_tok=99: must be 1 to"),
        (["plan", *MODEL, "--defer-experts", "99"], "defer_experts=99: must be 0 to"),
        (["plan", *MODEL, "--defer-experts", "-1"], "defer_experts=-1: must be 0 to"),
        (
            ["plan", *MODEL, "--stream-experts-min-tokens", "some"],
            "stream_experts_min_tokens: must be auto, off or a number",
        ),
        (["verify", *MODEL, "--window", "64"], "--window needs --perplexity"),
        (["verify", *MODEL, "--against", "x"], "--against needs --perplexity"),
        (
            ["verify", *MODEL, "--perplexity", demo.heldout(), "--prompt", "hi"],
            "--prompt has no effect with --perplexity",
        ),
        (["verify", "--perplexity", demo.heldout(), "--quantize", "int4"], "--quantize needs --model or --weights"),
        (["verify", "--perplexity", demo.heldout(), "--rules", "generic"], "--rules needs --model"),
        (["verify", *MODEL, "--cpu-infer", "2"], "unrecognized arguments: --cpu-infer"),
        (["download", "owner/name:"], "give a quantization after the colon"),
        (["doctor", "--json", "maybe"], "must be true or false, found 'maybe'"),
    ],
    ids=lambda value: " ".join(str(word) for word in value if word not in MODEL) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_an_error(capsys, words, told):
    status, said = outcome(capsys, *words)
    assert status == 2 and told in said and "Traceback" not in said


def test_one_kind_of_tests_may_be_left_out(monkeypatch):
    """As llama-bench's: -p 0 measures tokens alone, -n 0 prompts alone."""
    taken = []

    class Found(Exception):
        pass

    def alternate(args, tests):
        taken.append(tests)
        raise Found

    monkeypatch.setattr(bench, "_best_peers", alternate)
    for words in (["-p", "0"], ["-n", "0"], ["-p", "16,0,16", "-n", "8,0"], ["-n", "0", "-p", "4", "-d", "0,32,0"]):
        with pytest.raises(Found):
            main(["bench", *MODEL, "--peer", "llama.cpp", *words])
    assert taken == [["tg32"], ["pp512"], ["pp16", "tg8"], ["pp4", "pp4@d32"]]


@pytest.mark.slow
def test_a_bench_without_prompts_prints_tokens_alone():
    done = preloaded_process.run("ktx", "bench", *MODEL, "-p", "0", "-n", "2", "-r", "1")
    assert done.returncode == 0, done.stderr
    assert "\ntg2 " in done.stdout and "\npp" not in done.stdout


WRONG = [
    ("KTX_ISA", "foo", "scalar, avx2"),
    ("KTX_ISA", "AVX2", "scalar, avx2"),
    ("KTX_ISA", "avx2 ", "scalar, avx2"),
    ("KTX_NUMA", "bar", "auto, off or fake:N"),
    ("KTX_NUMA", "fake:0", "from 1 to 8"),
    ("KTX_NUMA", "fake:99", "from 1 to 8"),
    ("KTX_THREADS", "two", "1 to 1024"),
    ("KTX_THREADS", "-3", "1 to 1024"),
    ("KTX_THREADS", "2.5", "1 to 1024"),
    ("KTX_THREADS", "5000", "1 to 1024"),
    ("KTX_GPU", "fake", "fake:N"),
    ("KTX_GPU", "cuda:0", "split:N"),
    ("KTX_GPU", "fake:-1", "fake:N"),
]


@pytest.mark.parametrize("name, value, allowed", WRONG)
def test_a_variable_with_a_value_that_means_nothing_is_an_error(name, value, allowed):
    with pytest.raises(UsageError) as error:
        check_environment({name: value})
    assert f"{name}={value} is not known" in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("KTX_ISA", "amxmodel"),
        ("KTX_NUMA", "fake:8"),
        ("KTX_THREADS", "1024"),
        ("KTX_THREADS", "0"),
        ("KTX_GPU", "split:2"),
        ("KTX_GPU", "fake:12"),
        ("KTX_API_KEY", "one two\n three"),
        ("KTX_PEER_PATH", "/tmp"),
        ("KTX_ISA", ""),
    ],
)
def test_a_variable_with_a_value_of_its_own_is_none(name, value, recwarn):
    check_environment({name: value})
    assert not recwarn.list and environment(name, {name: value}) in (value, int(value or 0) if value.isdigit() else "")


@pytest.mark.parametrize("command", ["doctor", "plan", "verify", "bench", "download", "chat", "serve"])
def test_every_command_looks_at_the_environment(command, monkeypatch, capsys):
    monkeypatch.setenv("KTX_NUMA", "bar")
    more = ["owner/name"] if command == "download" else []
    assert outcome(capsys, command, *more) == (2, f"ktx: KTX_NUMA=bar is not known: use {ALLOWED['KTX_NUMA'][1]}\n")


def test_python_finds_it_too():
    code = "import ktx; ktx.load"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"KTX_THREADS": "-3", "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode and done.stderr.splitlines()[-1].endswith(ALLOWED["KTX_THREADS"][1])


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_a_team_that_cannot_be_is_an_error(threads):
    with pytest.raises(UsageError, match=f"threads is {threads}, it must be from 1 to 1024"):
        ktx.load(demo.path(), weights=demo.gguf(), threads=threads)


RULE = "- match: {name: 'mlp.experts$'}\n  replace: {class: Experts, kwargs: {%s}}\n"


@pytest.mark.parametrize(
    "text, told",
    [
        ("- match: {name: x}\n  replce: {class: Linear}\n", "unknown key 'replce' (did you mean 'replace'?)"),
        ("- match: {nam: x}\n", "unknown key 'nam' in match (did you mean 'name'?)"),
        ("- match: {name: x}\n  replace: {clas: Linear}\n", "unknown key 'clas' in replace"),
        ("- match: {name: x}\n  replace: {class: Linaer}\n", "Linaer"),
        ("- match: {name: x}\n  recursive: sometimes\n", "recursive must be true or false"),
        ("devcies: {all: cpu}\n", "unknown key 'devcies' in a rule file (did you mean 'devices'?)"),
        ("devices: {layers 0-x: cpu}\n", "not a range of layers"),
        ("devices: {all: gpu}\n", "'gpu' is not a device; use cpu, cuda or cuda:N"),
        ("devices: {experts: [cpu, cpu]}\n", "takes one device"),
        ("gpu_experts: some\n", "must be a number of experts per layer"),
        ("stream_experts_min_tokens: maybe\n", "must be auto, off or a number of tokens"),
        (RULE % "bits: 4", "bits"),
        (RULE % "out_device: cpu", "out_device"),
    ],
)
def test_what_a_rule_file_says_is_read_or_refused(tmp_path, text, told):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        ktx.plan(demo.path(), demo.gguf(), path)
    assert told in str(error.value) and "rules.yaml:" in str(error.value)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"devices": {"layrs 0-1": "cpu"}}, "layrs 0-1"),
        ({"devices": {"all": "tpu"}}, "'tpu' is not a device"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"moe_device": "nuna"}, "'nuna' is not a device"),
        ({"gpu_experts": -1}, "must be a number of experts per layer"),
        ({"gpu_experts": True}, "must be a number of experts per layer"),
        ({"quantize": "int3"}, "int3"),
        ({"quantize_experts": "fp4"}, "fp4"),
        ({"rules": [ktx.Rule(name="mlp$", replace="MLP", kwargs={"fast": True})]}, "fast"),
        ({"rules": [ktx.Rule(name="mlp$", replace="Mlp")]}, "Mlp"),
    ],
    ids=str,
)
def test_what_python_says_is_read_or_refused(wrong, told):
    with pytest.raises(UsageError) as error:
        ktx.plan(demo.path(), demo.gguf(), **wrong)
    assert told in str(error.value)


def test_an_argument_that_nobody_knows_is_an_error():
    for call in (ktx.plan, ktx.load):
        with pytest.raises(TypeError, match="source"):
            call(source=demo.path())


def test_values_are_of_variables():
    assert set(ALLOWED) <= set(VARIABLES)
