"""Notes on a model: a line where it is slow or does something else than was asked, at load, in `ktx plan`, in /health;
none where all is as it should be.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import httpx
import pytest
import torch

import ktx
from ktx import demo
from ktx.__main__ import main
from ktx.errors import UsageError
from ktx.injection.rules import load_rules
from ktx.model import notes
from ktx.model.notes import Note
from tests.server.conftest import serving
from tests.support.tiny_chat_model import tokenizer, write_model
from tests.support.tiny_models import tiny

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")
EXPERTS = [ktx.Rule(name="experts$", replace="Experts", recursive=False)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("notes") / "qwen", "qwen3_moe")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A family without a rule file, in floats."""
    folder = tmp_path_factory.mktemp("notes") / "granitemoeshared"
    tiny("granitemoeshared", num_local_experts=8, num_experts_per_tok=3).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def codes(of):
    return [note.code for note in of]


def loaded(folder, **more):
    weights = folder / "model.gguf"
    return ktx.load(folder, weights if weights.exists() else None, progress=False, **more)[0]


def test_a_family_with_rules_has_none(caplog):
    with caplog.at_level(logging.INFO, "ktx.model.notes"):
        model, _ = ktx.load(demo.path(), demo.gguf(), progress=False)
        with model.ktx.engine(kv_cache_tokens=2048, max_batch_size=1):
            assert model.ktx.notes == [] and not [r for r in caplog.records if r.name == "ktx.model.notes"]
    assert ktx.plan(demo.path(), demo.gguf()).model_notes == []


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "glm4_moe", "gpt_oss"])
def test_shipped_families_have_none(tmp_path, family):
    folder = write_model(tmp_path / "m", family, "Q8_0" if family != "gpt_oss" else "MXFP4")
    assert ktx.plan(folder, folder / "model.gguf").model_notes == []


def test_a_family_without_a_rule_file_is_told(stranger, caplog):
    (note,) = [note for note in ktx.plan(stranger).model_notes if note.code == "generic"]
    assert "no rule file for granitemoeshared" in note.text
    with caplog.at_level(logging.WARNING, "ktx.model.notes"):
        model = loaded(stranger)
    assert note in model.ktx.notes and note.text in caplog.text


def test_who_chose_the_generic_rules_knows(stranger):
    assert "generic" not in codes(ktx.plan(stranger, rules="generic").model_notes)


@pytest.mark.parametrize(
    "name, count", [(r"\.mlp\.gate$", 0), (r"\.self_attn\.(q|o)_proj$", 2), (r"\.self_attn\.k_proj$", 2)]
)
def test_modules_that_stay_plain_torch_are_told(qwen, name, count):
    rules = [ktx.Rule(name=name, recursive=False), *load_rules(None, "qwen3_moe")]
    kept = [note for note in ktx.plan(qwen, qwen / "model.gguf", rules).model_notes if note.code == "kept"]
    assert len(kept) == min(count, 1)  # a note a class; routers are small
    if count:
        assert "Linear (" in kept[0].text and "stay plain torch" in kept[0].text and "in f32" in kept[0].text


def test_attention_of_transformers_is_told_and_an_engine_that_is_serial_for_it(qwen):
    model = loaded(qwen, rules=EXPERTS)
    (note,) = [note for note in model.ktx.notes if note.code == "attention"]
    assert "model.layers.0.self_attn" in note.text and "serial" not in codes(model.ktx.notes)
    with model.ktx.engine(kv_cache_tokens=512, max_batch_size=2):
        (note,) = [note for note in model.ktx.notes if note.code == "serial"]
        assert "one after another" in note.text and "self_attn is transformers' own" in note.text
        before = list(model.ktx.notes)
    with model.ktx.engine(kv_cache_tokens=512, max_batch_size=2):
        assert model.ktx.notes == before  # once


@pytest.mark.parametrize(
    "options, holds", [({"kv_cache_tokens": 256}, 256), ({"kv_cache_tokens": 512, "max_context": 64}, 64)]
)
def test_a_context_that_is_cut_is_told_as_long_as_it_is(qwen, caplog, options, holds):
    model = loaded(qwen)
    limit = model.config.max_position_embeddings
    assert holds < limit
    with caplog.at_level(logging.WARNING, "ktx.model.notes"), model.ktx.engine(max_batch_size=1, **options):
        (note,) = model.ktx.notes
        assert note.code == "context" and f"at most {holds} of the model's {limit} tokens" in note.text
    assert note.text in caplog.text
    with model.ktx.engine(max_batch_size=1, kv_cache_tokens=limit):
        assert model.ktx.notes == []


@pytest.mark.parametrize(
    "options, told",
    [
        ({"quantize": "int8"}, "Linear weights should become int8, but none of them is a float matrix"),
        ({"quantize_experts": "int4"}, "Experts weights should become int4, but none of them is a float matrix"),
        ({"kv_dtype": "fp8"}, "kv_dtype fp8: layers on the CPU use q8_0"),
    ],
)
def test_an_option_without_effect_is_told(qwen, options, told):
    found = ktx.plan(qwen, qwen / "model.gguf", **options).model_notes
    assert codes(found)[0] == "flag" and told in found[0].text
    assert found == loaded(qwen, **options).ktx.notes


def test_an_option_with_effect_is_not(stranger):
    assert "flag" not in codes(
        ktx.plan(stranger, quantize="int8", quantize_experts="int8", kv_dtype="q8_0").model_notes
    )


def test_blocks_that_a_gpu_does_not_keep_are_told(qwen, monkeypatch):
    monkeypatch.setenv("KTX_GPU", "fake:1")
    found = ktx.plan(qwen, qwen / "model.gguf", kv_dtype="q8_0", device="cuda").model_notes
    assert found == [Note("flag", "kv_dtype q8_0: layers on a GPU use f16")]
    assert ktx.plan(qwen, qwen / "model.gguf", kv_dtype="fp8", device="cuda").model_notes == []


def test_an_instruction_set_that_this_cpu_lacks_is_told(qwen, monkeypatch):
    monkeypatch.setattr(notes, "cpu", type("Cpu", (), {"ops": type("Ops", (), {"isa": lambda: "avx2"})}))
    monkeypatch.setenv("KTX_ISA", "amx")
    found = [note.text for note in ktx.plan(qwen, qwen / "model.gguf").model_notes]
    assert found[0] == "KTX_ISA=amx: this CPU supports at most avx2, which is used"
    monkeypatch.setenv("KTX_ISA", "avx2")
    assert ktx.plan(qwen, qwen / "model.gguf").model_notes == []


def test_what_loading_warns_of_is_a_note_too(qwen):
    rules = [ktx.Rule(name="nothing_is_called_so$", replace="Linear"), *load_rules(None, "qwen3_moe")]
    with pytest.warns(UserWarning, match="nothing_is_called_so.*matched no module"):
        model = loaded(qwen, rules=rules)
    assert codes(model.ktx.notes) == ["warning"]
    assert "nothing_is_called_so" in model.ktx.notes[0].text


def test_health_returns_them(qwen):
    model, _words = ktx.load(qwen, qwen / "model.gguf", EXPERTS, progress=False)
    with model.ktx.engine(kv_cache_tokens=256, max_batch_size=1) as engine, serving(engine) as (base, _):
        told = httpx.get(f"{base}/health").json()["notes"]
    assert told == [{"code": note.code, "text": note.text} for note in model.ktx.notes]
    assert list(dict.fromkeys(note["code"] for note in told)) == ["attention", "kept", "serial", "context"]


def test_plan_prints_them(stranger, capsys):
    assert main(["plan", "--model", str(stranger)]) == 0
    assert "note: no rule file for granitemoeshared" in capsys.readouterr().out
    assert main(["plan", "--model", str(stranger), "--json"]) == 0
    assert "generic" in [note["code"] for note in json.loads(capsys.readouterr().out)["notes"]]


def test_the_page_explains_every_code():
    table = PAGE.partition("| code | about |")[2].partition("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines() if "`" in line] == list(notes.CODES)


def test_a_warning_is_heard_although_an_error_follows(qwen, monkeypatch):
    monkeypatch.setenv("KTX_THREDS", "2")
    rules = [
        ktx.Rule(name="experts$", replace="Experts", kwargs={"bits": 4}),
    ]
    with pytest.warns(UserWarning, match="KTX_THREDS"), pytest.raises(UsageError, match="bits"):
        loaded(qwen, rules=rules)


def test_a_librarys_deprecation_is_no_note_and_is_passed_on():
    with pytest.warns(DeprecationWarning, match="old"), notes.capture_warnings() as found:
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("yours", stacklevel=1)
    assert found == [Note("warning", "yours")]


LATE = "torch was imported before ktx: its OpenMP threads spin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imports", "more", "said"),
    [
        ("torch, ktx", {}, True),
        ("transformers, torch, ktx", {}, True),
        ("ktx, torch", {}, False),
        ("torch, ktx", {"OMP_WAIT_POLICY": "ACTIVE"}, False),  # somebody wants it so
        ("torch, ktx", {"GOMP_SPINCOUNT": "0"}, False),
        ("torch, ktx", {"OMP_NUM_THREADS": "1"}, False),  # no threads that could
    ],
)
def test_torch_before_ktx(imports, more, said):
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    program = f"import {imports}; import ktx.model.notes; print([note.text for note in ktx.model.notes.openmp_notes()])"
    env |= {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.getcwd()} | more
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert (LATE in out) == said and ("import ktx first" in out) == said


def test_loading_says_it(monkeypatch, caplog):
    monkeypatch.setattr("ktx.utils.openmp.TORCH_CAME_FIRST", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, _ = ktx.load(demo.path(), demo.gguf(), progress=False)
    assert [note.code for note in model.ktx.notes if LATE in note.text] == ["flag"] and LATE in caplog.text
