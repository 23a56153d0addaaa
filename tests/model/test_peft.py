"""Adapters of PEFT on a loaded model: what they compute on transformers' own, in a prompt, in generate and in an
engine.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import ktx
import ktx.demo
from ktx.engine.sampler import SamplingParams
from ktx.ops.guard import valid_fast_path
from ktx.ops.linear import Linear
from tests.families.test_families import IDS, relative
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

ROOT = Path(__file__).resolve().parents[2]
NEAR = 2e-5
FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "phi3"]
PROMPT = IDS[:, :20]
KINDS = {
    "lora": lambda names: LoraConfig(r=4, lora_alpha=16, target_modules=names, init_lora_weights=False),
    "dora": lambda names: LoraConfig(r=4, use_dora=True, target_modules=names, init_lora_weights=False),
    "ia3": lambda names: IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    tiny(request.param, tie_word_embeddings=False).save_pretrained(made)
    return request.param, made


def names(model):
    """Linear layers of attention; an MLP's have the names of transformers' experts."""
    found = [path.split(".") for path, module in model.named_modules() if isinstance(module, Linear)]
    return sorted({path[-1] for path in found if path[-2:-1] in (["self_attn"], ["linear_attn"])})


def adapted(two, kind, folder, **more):
    """Both with the same adapter, ours from a file."""
    right, mine = two
    torch.manual_seed(5)
    config = KINDS[kind](names(mine))
    for key, value in more.items():
        setattr(config, key, value)
    theirs = get_peft_model(right, config).eval()
    theirs.save_pretrained(folder)
    return theirs, PeftModel.from_pretrained(mine, folder).eval()


def computed(model):
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def answer(model):
    ids = model.generate(input_ids=PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return ids[0, PROMPT.shape[1] :].tolist()


def likeliest(model):
    """The answer of an engine, which goes on behind an end of text where it is asked to."""
    ids = PROMPT
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_it_does_in_transformers(two, kind, tmp_path):
    before = computed(two[0])
    theirs, ours = adapted(two, kind, tmp_path)
    right = computed(theirs)
    assert relative(right, before) > 1e-2 and relative(computed(ours), right) < NEAR
    assert answer(ours) == answer(theirs)
    expected = likeliest(theirs)
    base = ours.get_base_model()
    base.ktx.tokenizer = tokenizer()
    with base.ktx.engine(max_batch_size=1, kv_cache_tokens=512) as engine:
        events = engine.generate([PROMPT[0].tolist()], SamplingParams(max_new_tokens=8, ignore_eos=True))
        assert [event.ids for _, event in events if hasattr(event, "reason")] == [expected]
    with ours.disable_adapter():
        assert relative(computed(ours), before) < NEAR


def test_layers_without_an_adapter_stay_one_call(two, tmp_path):
    theirs, ours = adapted(two, "lora", tmp_path, layers_to_transform=[1])
    layers = ours.get_base_model().model.layers
    assert relative(computed(ours), computed(theirs)) < NEAR
    for name in ("self_attn", "mlp"):
        blocks = [
            valid_fast_path(module) for layer in layers if getattr(module := layer._modules.get(name), "block", None)
        ]
        assert not blocks or (blocks[0] is not None and len([b for b in blocks if b is None]) <= 1)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_place_and_back(two, kind, tmp_path):
    before = computed(two[0])
    theirs, ours = adapted(two, kind, tmp_path)
    for _ in range(2):
        for model in (theirs, ours):
            model.merge_adapter()
        assert relative(computed(ours), computed(theirs)) < NEAR
        for model in (theirs, ours):
            model.unmerge_adapter()
        assert relative(computed(ours), computed(theirs)) < NEAR  # what IA3 multiplies is divided again
    ours.merge_adapter()
    with ours.disable_adapter():
        assert relative(computed(ours), before) < 1e-4


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(two, safe_merge, tmp_path):
    theirs, ours = adapted(two, "lora", tmp_path)
    right = computed(theirs)
    merged = ours.merge_and_unload(safe_merge=safe_merge)
    assert relative(computed(merged), right) < NEAR and type(merged.lm_head) is Linear


def test_two_adapters(two, tmp_path):
    wanted = names(two[1])
    theirs, ours = adapted(two, "lora", tmp_path / "one")
    torch.manual_seed(6)
    theirs.add_adapter("second", KINDS["lora"](wanted))
    theirs.save_pretrained(tmp_path / "two", selected_adapters=["second"])
    ours.load_adapter(tmp_path / "two" / "second", "second")
    for name in ("second", "default"):
        theirs.set_adapter(name), ours.set_adapter(name)
        assert relative(computed(ours), computed(theirs)) < NEAR


def example():
    spec = importlib.util.spec_from_file_location("train_lora", ROOT / "examples" / "train_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_goes_as_in_transformers(tmp_path):
    """Fifty steps on the demo model's weights in f32, which transformers and ktx both have as they are."""
    lora = example()
    model, tok = ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False)
    model.save_pretrained(tmp_path, dtype=torch.float32)
    batches = [tok(text, return_tensors="pt").input_ids for text in lora.TEXTS]
    mine = lora.train(lora.add_adapter(ktx.load(tmp_path, progress=False)[0]), batches, 50)
    right = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = lora.train(lora.add_adapter(right), batches, 50)
    assert expected[-1] < 0.2 * expected[0]
    assert all(abs(a - b) <= 0.02 * b for a, b in zip(mine, expected, strict=True))


def test_the_example_of_training(tmp_path):
    out = str(tmp_path / "adapter")
    words = [sys.executable, str(ROOT / "examples" / "train_lora.py"), "--steps", "20", "--out", out]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=os.environ)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert after < 0.5 * before
    adapted = PeftModel.from_pretrained(ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False)[0], out)
    assert adapted.active_adapter == "default"
    served, tok = ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False, lora=out)
    ids = tok("Where does the lighthouse keeper sleep?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert relative(served(ids).logits, adapted(ids).logits) < 1e-3
