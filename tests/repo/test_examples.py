"""Each example runs on the demo model; one with another library gives what it gives on transformers' own model."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ktx
import ktx.demo
from tests.families.test_families import IDS, load, relative
from tests.support.tiny_chat_model import tokenizer, write_model
from tests.support.tiny_models import tiny

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "pipeline": "transformers",
    "attribution": "captum",
    "evaluate": "lm_eval",
    "tracing": "nnsight",
    "bridge": "transformer_lens",
}
BASIC = {  # a package that the script needs, and what its output has
    "generate": ("ktx", r"A rule file is YAML that"),
    "custom_operator": ("ktx", r"2 operators skipped [1-9]\d* \(token, expert\) pairs\nA rule file"),
    "stream_engine": ("ktx", r"(?s)0 ' better'.*0 finished: stop, \d+ tokens"),
    "serve_openai_client": ("openai", r"A rule file is YAML that"),
    "lora": ("peft", r"with the adapter: .* lamp.*\nwithout: "),
    "plan_gpu": ("ktx", r"cpu: .* of 64\.0 GB\ncuda:0: .* of 24\.0 GB\nall -> cuda:0"),
}
TEXT = "A rule file is a list of"


def example(name):
    needed = NEEDS.get(name, BASIC.get(name, ("peft",))[0])
    pytest.importorskip(needed, reason=f"examples/{name}.py needs {needed}, which is not installed")
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model's weights in f32, which transformers and ktx both have as they are, and its tokenizer."""
    made = tmp_path_factory.mktemp("floats")
    ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False)[0].save_pretrained(made, dtype=torch.float32)
    return made


@pytest.fixture
def two(folder):
    """transformers' model, ours, and the tokenizer."""
    mine, tokenizer = ktx.load(folder, progress=False, kv_dtype="f32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), mine, tokenizer


def test_every_example_is_here():
    paths = {path.stem: path for path in FOLDER.glob("*.py")}
    assert set(paths) == {*NEEDS, *BASIC, "train_lora"}
    assert all(len(paths[name].read_text().splitlines()) < 60 for name in {*NEEDS, *BASIC})
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", (FOLDER / "README.md").read_text(), re.M)) == sorted(
        paths
    )


@pytest.mark.parametrize(
    "name, seen",
    [
        ("pipeline", r"rule"),
        ("attribution", r"next: .*\n( *[+-]\d+\.\d+ .*\n){3,}"),
        ("evaluate", r"(?s)rule file.*-\d+\.\d+ .*-\d+\.\d+ "),
        ("tracing", r"adds \d+\.\d+\nwith it: .*\nwithout: "),
        ("bridge", r"looks at .*\nwith the head: .*\nwithout: "),
        *((name, seen) for name, (_, seen) in BASIC.items()),
    ],
)
def test_an_example_runs(name, seen):
    example(name)
    words = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert re.search(seen, done.stdout), done.stdout


def test_a_plan_for_a_gpu_that_is_too_small_says_what_would_fit(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="cuda:0 needs .* are missing. It would fit with --vram 0.7G"):
        ran("plan_gpu", ["--vram", "0.58"], monkeypatch, capsys)


def test_a_pipeline_answers_as_on_transformers_model(two):
    right, mine, tokenizer = two
    answer = example("pipeline").answer
    assert answer(mine, tokenizer, "What is a rule file?", 12) == answer(right, tokenizer, "What is a rule file?", 12)


def test_integrated_gradients_are_transformers(two):
    right, mine, tokenizer = two
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    theirs, ours = (example("attribution").attribute(model, ids, 4) for model in (right, mine))
    assert ours[1] == theirs[1] and relative(ours[0], theirs[0]) < 1e-3
    assert ours[2] == pytest.approx(theirs[2], rel=1e-2, abs=1e-3)


def test_saliency_by_embeddings_is_transformers(two):
    pytest.importorskip("captum", reason="captum is not installed")
    from captum.attr import InputXGradient, Saliency

    right, mine, tokenizer = two
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    for method in (Saliency, InputXGradient):
        made = []
        for model in (right, mine):
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            made.append(
                method(lambda x, of=model: of(inputs_embeds=x, use_cache=False).logits[:, -1, 7]).attribute(embeds)
            )
        assert relative(made[1], made[0]) < 1e-3


def test_scores_of_an_evaluation_are_transformers(two):
    right, mine, tokenizer = two
    theirs, ours = (example("evaluate").scores(model, tokenizer) for model in (right, mine))
    assert ours == [pytest.approx(of, rel=1e-4) for of in theirs]
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [Instance("generate_until", {}, (TEXT, {"until": ["."], "max_gen_toks": 8}), 0)]
    answers = [
        HFLM(pretrained=model, tokenizer=tokenizer).generate_until(asked, disable_tqdm=True) for model in (right, mine)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_traces_are_transformers(two, number):
    right, mine, tokenizer = two
    theirs, ours = (example("tracing").ablate_mlp(model, tokenizer, TEXT, number) for model in (right, mine))
    assert all(relative(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))
    assert relative(ours[1], ours[2]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_weights_that_a_bridge_folds_count(tmp_path, family):
    """It exchanges what is an nn.Parameter by isinstance, and leaves other tensors alone."""
    right = tiny(family, tie_word_embeddings=False)
    right.save_pretrained(tmp_path)
    mine, tokenizer = load(tmp_path, None, kv_dtype="f32"), AutoTokenizer.from_pretrained(ktx.demo.path())
    bridges = [example("bridge").make_bridge(model, tokenizer) for model in (right, mine)]
    before = bridges[0](IDS[:, :12])
    for bridge in bridges:
        bridge.enable_compatibility_mode()
    after, mine = (bridge(IDS[:, :12]) for bridge in bridges)
    assert relative(mine, after) < 1e-5 < relative(after, before)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_traces_of_modules_inside_gradients_and_answers(tmp_path, family):
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    right, tokenizer = tiny(family, tie_word_embeddings=False), AutoTokenizer.from_pretrained(ktx.demo.path())
    right.save_pretrained(tmp_path)
    found = []
    for model in (right, load(tmp_path, None, kv_dtype="f32")):
        model.enable_input_require_grads()
        traced = nnsight.LanguageModel(model, tokenizer=tokenizer)
        with torch.no_grad(), traced.trace(IDS[:, :12]):
            norm = traced.model.layers[1].input_layernorm.output.save()
            query = traced.model.layers[1].self_attn.q_proj.output.save()
        with torch.no_grad(), traced.trace(IDS[:, :12]):
            traced.model.layers[1].self_attn.q_proj.output[:, :, :64] = 0
            changed = traced.output.logits.save()
        with traced.trace(IDS[:, :12]):
            hidden = traced.model.layers[0].output
            hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).save()
            hidden.retain_grad()
            traced.output.logits[0, -1].sum().backward()
        with torch.no_grad(), traced.generate(IDS[:, :12], max_new_tokens=4, do_sample=False):
            answer = traced.generator.output.save()
        found.append((norm, query, changed, hidden.grad, answer))
    theirs, ours = found
    assert all(relative(a, b) < 1e-4 for a, b in zip(ours[:-1], theirs[:-1], strict=True))
    assert torch.equal(ours[-1], theirs[-1])


def test_a_bridge_shows_and_changes_what_transformers_does(two):
    right, mine, tokenizer = two
    module = example("bridge")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    theirs, ours = (module.ablate(module.make_bridge(model, tokenizer), ids, 1, 0) for model in (right, mine))
    assert all(relative(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))
    assert relative(ours[1], ours[2]) > 1e-5


def own(kind, folder, family="qwen3_moe"):
    """A model of somebody's own, and the words that name it: weights in the folder, elsewhere, or nothing but a GGUF
    file.
    """
    if kind == "safetensors":
        tiny(family).save_pretrained(folder / "own")
        tokenizer().save_pretrained(folder / "own")
        return ["--model", str(folder / "own")]
    write_model(folder / "own", family)
    if kind == "beside":
        return ["--model", str(folder / "own")]
    (folder / "own/model.gguf").rename(folder / "elsewhere.gguf")
    return ["--model", str(folder / "own"), "--weights", str(folder / "elsewhere.gguf")]


def ran(name, words, monkeypatch, capsys, text=None):
    module = example(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, *(text or [])])
    module.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["safetensors", "beside", "elsewhere"])
@pytest.mark.parametrize("name", [*NEEDS, "generate", "plan_gpu"])
def test_an_example_takes_a_model_of_ones_own(name, kind, tmp_path, monkeypatch, capsys):
    words = own(kind, tmp_path)
    assert ran(name, words, monkeypatch, capsys).strip("\n") or name in ("pipeline", "generate")


@pytest.mark.parametrize("template", [True, False])
def test_a_pipeline_without_a_chat_template(tmp_path, monkeypatch, capsys, template):
    words = own("safetensors", tmp_path)
    if not template:
        for file in (tmp_path / "own").glob("chat_template*"):
            file.unlink()
    model, words_of = ktx.load(tmp_path / "own", progress=False)
    assert bool(words_of.chat_template) == template
    ids = words_of("<|user|>abc<|end|><|assistant|>" if template else "abc", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    out = ran("pipeline", words, monkeypatch, capsys, ["--prompt", "abc"])
    assert out.rstrip("\n") == words_of.decode(made, skip_special_tokens=True).rstrip("\n")


@pytest.mark.parametrize("family, kind", [("phi3", "safetensors"), ("deepseek_v3", "elsewhere"), ("gpt_oss", "beside")])
def test_an_adapter_for_a_model_of_ones_own(tmp_path, monkeypatch, capsys, family, kind):
    words = own(kind, tmp_path, family)
    (tmp_path / "text").write_text("What the keeper says.\n\na\n\n \n\nWhat the lamp says.\n")
    words += ["--text", str(tmp_path / "text"), "--steps", "4", "--out", str(tmp_path / "adapter")]
    losses = re.findall(r"\d+\.\d+", ran("train_lora", words, monkeypatch, capsys))
    assert float(losses[1]) < float(losses[0])
    loaded, _ = ktx.load(
        *words[1:4:2] if kind == "elsewhere" else words[1:2], lora=tmp_path / "adapter", progress=False
    )
    assert loaded.ktx.loras
    (tmp_path / "text").write_text("a\n\n\n")
    with pytest.raises(SystemExit):
        ran("train_lora", words, monkeypatch, capsys)
    assert "no paragraph of two tokens" in capsys.readouterr().err
