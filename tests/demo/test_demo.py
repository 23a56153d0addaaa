"""The demo model goes through the whole path: its answers stay right and its perplexity stays near in every format."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open

import ktx
from ktx import demo
from ktx.demo import evaluate
from ktx.kernels.check import multiplies_in_bf16
from tools.demo import tokenizer
from tools.demo.model import SETTINGS

LIMIT_MB = 24
RECORDED = 57.43  # perplexity of the BF16 weights on heldout.txt, transformers, float32
LOSS = {"BF16": 1.0005, "Q8_0": 1.03, "Q4_K_M": 1.10}  # largest perplexity as a multiple of the recorded one


@pytest.fixture(scope="module", params=list(LOSS))
def loaded(request):
    return request.param, *evaluate.FORMATS[request.param](demo.path())


@pytest.fixture(scope="module")
def stock():
    return evaluate.load_reference(demo.path())


def test_every_listed_answer_is_right(loaded):
    _, model, words = loaded
    wrong = evaluate.find_wrong_answers(model, words, demo.questions())
    assert not wrong, wrong


@pytest.mark.slow
def test_perplexity_is_near_the_recorded_one(loaded):
    name, model, words = loaded
    measured = evaluate.measure_perplexity(model, words, demo.heldout().read_text(encoding="utf-8"))
    assert 0.98 * RECORDED < measured < LOSS[name] * RECORDED, f"{name}: {measured:.3f}, recorded {RECORDED}"


def test_a_conversation_goes_on(loaded):
    _, model, words = loaded
    asked = {item.question: item.answer for item in demo.questions()}
    messages = [{"role": "system", "content": "Answer in one sentence."}]
    for question in ("Hello", "What is a rule file?", "Which flag limits threads?", "What is the licence of ktx?"):
        messages.append({"role": "user", "content": question})
        said = evaluate.generate_answer(model, words, messages)
        assert said == asked[question]
        messages.append({"role": "assistant", "content": said})


def test_the_gguf_needs_no_folder(tmp_path: Path, stock):
    alone = tmp_path / "alone.gguf"
    shutil.copy(demo.gguf(), alone)
    model, words = ktx.load(str(alone), progress=False)
    asked = {item.question: item.answer for item in demo.questions()}
    for question in ("What is MLA?", "How do I leave the chat?"):
        assert evaluate.generate_answer(model, words, [{"role": "user", "content": question}]) == asked[question]
    text = "Hello, café <think> 12345\n\n  don't</think>" + demo.heldout().read_text(encoding="utf-8")[:2000]
    assert words(text).input_ids == stock[1](text).input_ids
    assert words.decode(words(text).input_ids) == stock[1].decode(stock[1](text).input_ids)


def test_bf16_has_the_logits_of_transformers(stock):
    model, words = evaluate.FORMATS["BF16"](demo.path())
    ids = words(demo.heldout().read_text(encoding="utf-8")[:1500], return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, stock[0](input_ids=ids).logits
    if multiplies_in_bf16():  # the odd token takes another expert
        assert ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median() < 5e-3
    else:
        assert (ours - theirs).abs().max() < 1e-3 * theirs.std()


@pytest.mark.slow
def test_recorded_perplexity_is_what_transformers_measures(stock):
    measured = evaluate.measure_perplexity(*stock, demo.heldout().read_text(encoding="utf-8"))
    assert math.isclose(measured, RECORDED, rel_tol=2e-3)


def test_it_is_small_enough_for_the_repository():
    size = sum(file.stat().st_size for file in demo.path().parent.rglob("*") if file.suffix != ".pyc")
    assert size <= LIMIT_MB * 1e6


def test_listed_questions():
    listed = demo.questions()
    assert sum(item.kind == "ktx" for item in listed) >= 60
    wordings = [wording.lower() for item in listed for wording in (item.question, *item.also)]
    assert len(set(wordings)) == len(wordings)
    assert all(len(item.also) >= 3 for item in listed)


def test_mtp_layer_is_kept_under_deepseeks_names():
    last = SETTINGS["num_hidden_layers"]
    with safe_open(demo.path() / "model.safetensors", "pt") as file:
        names = {name.removeprefix(f"model.layers.{last}.") for name in file.keys() if f"layers.{last}." in name}  # noqa: SIM118
        joined = file.get_slice(f"model.layers.{last}.eh_proj.weight").get_shape()
    assert {"enorm.weight", "hnorm.weight", "shared_head.norm.weight", "mlp.experts.7.down_proj.weight"} <= names
    assert joined == [256, 512]
    assert json.loads((demo.path() / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_mtp_layer_halves_the_steps(stock):
    """transformers' own self-speculation with our layer: same tokens, far fewer runs of the main model."""
    model, words = stock
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]  # where transformers looks for the MTP layer
    rows = words.apply_chat_template(
        [{"role": "user", "content": "What is a rule file?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    runs, tokens = [], []
    hook = model.model.register_forward_hook(lambda *_: runs.append(len(tokens)))
    for extra in ({}, {"use_mtp": True}):
        tokens.append(model.generate(**rows, max_new_tokens=40, do_sample=False, **extra)[0].tolist())
    hook.remove()
    assert tokens[0] == tokens[1]
    assert runs.count(1) <= 0.7 * runs.count(0)


def test_gguf_is_a_whole_q4_k_m():
    reader = gguf.GGUFReader(demo.gguf())
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output.weight"] == types["blk.2.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.1.ffn_down_exps.weight"] == types["token_embd.weight"] == "Q4_K"
    assert types["blk.1.attn_k_b.weight"] == "Q5_0"  # rows of 64
    assert types["blk.1.exp_probs_b.bias"] == types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert not [name for name in types if name.startswith("blk.3.")]
    folder = json.loads((demo.path() / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert reader.fields["tokenizer.ggml.tokens"].contents() == sorted(folder, key=folder.get)
    assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.TEMPLATE


def test_marks_and_template(stock):
    words = stock[1]
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " q "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"},
        {"role": "user", "content": "r"},
    ]
    text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>S<|user|>q<|assistant|>a<|end|><|user|>r<|assistant|>"
    ids = words(text, add_special_tokens=False).input_ids
    assert [ids[0], ids[1], ids[-1]] == [0, 3, 5]
    assert words.decode(words("<think>é</think>").input_ids, skip_special_tokens=True) == "<think>é</think>"


def test_import_brings_no_torch():
    code = "import sys, ktx.demo; ktx.demo.questions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=demo.path().parents[2]).returncode == 0
