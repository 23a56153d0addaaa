"""What researchers do to a model, on each kind of family: a prompt and tokens behind it are as in transformers (the
table of docs/research.md).
"""

from __future__ import annotations

import copy
import gc
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import ktx
from ktx.transformers_compat import cache_argument
from tests.families.test_families import IDS, load, relative
from tests.support.tiny_models import tiny

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"]
NEAR = {"float": 2e-5, "gradient": 1e-3}
PROMPT, TOKENS = 20, 3
PAGE = Path(__file__).resolve().parents[2] / "docs" / "research.md"


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    tiny(request.param, tie_word_embeddings=False).save_pretrained(made)
    return request.param, made


class Two:
    """transformers' model and ours."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder
        self.right, self.mine = tiny(family, tie_word_embeddings=False), load(folder, None)
        computed(self.mine)

    def __iter__(self):
        return iter((self.right, self.mine))

    def layer(self, model):
        """One that attends."""
        return model.model.layers[-1]


def computed(model, between=lambda cache: None):
    """Logits of a prompt, and of tokens behind it; what a function does to the cache counts for these."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = [model(input_ids=IDS[:, :PROMPT], **cache_argument(model, cache)).logits]
        between(cache)
        for i in range(PROMPT, PROMPT + TOKENS):
            out.append(model(input_ids=IDS[:, i : i + 1], **cache_argument(model, cache)).logits)
    return out[0], torch.cat(out[1:], 1)


def patch(two):
    for model in two:
        module = two.layer(model).mlp
        whole = module.forward

        def halved(*args, whole=whole, **words):
            out = whole(*args, **words)
            return (0.5 * out[0], *out[1:]) if isinstance(out, tuple) else 0.5 * out

        module.forward = halved
    return computed(two.mine), computed(two.right)


def hook(two):
    for model in two:
        two.layer(model).self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 0.5)
    return computed(two.mine), computed(two.right)


def edit(two):
    with torch.no_grad():
        for model in two:
            two.layer(model).input_layernorm.weight.mul_(1.5)
    module = two.layer(two.mine).self_attn.o_proj
    with ktx.edit(module) as weight, torch.no_grad():
        weight *= torch.linspace(0.5, 1.5, weight.shape[1])
        two.layer(two.right).self_attn.o_proj.weight.copy_(weight)
    return computed(two.mine), computed(two.right)


def replace(two):
    for model in two:
        attention = two.layer(model).self_attn
        old = attention.o_proj
        torch.manual_seed(3)
        attention.o_proj = nn.Linear(old.in_features, old.out_features, bias=False).requires_grad_(False)
    return computed(two.mine), computed(two.right)


def gradient(two):
    found = []
    for model in two:
        out = []
        for past in (0, PROMPT):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                if past:
                    model(input_ids=IDS[:, :past], **cache_argument(model, cache))
                embeds = model.get_input_embeddings()(IDS[:, past : past + (1 if past else PROMPT)])
            embeds = embeds.clone().requires_grad_()
            words = cache_argument(model, cache) if past else {"use_cache": False}
            loss = model(inputs_embeds=embeds, **words).logits[:, -1].logsumexp(-1).sum()
            if past and two.family == "qwen3_next":  # whose states are written in place, in transformers too
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
                embeds.grad = torch.ones_like(embeds)
            else:
                loss.backward()
            out.append(embeds.grad)
        found.append(tuple(out))
    return found[1], found[0]


def lora(two):
    from peft import LoraConfig, get_peft_model

    adapted = []
    for model in two:
        names = [n for n in ("q_proj", "q_a_proj", "o_proj") if n in dict(two.layer(model).self_attn.named_children())]
        torch.manual_seed(4)
        adapted.append(get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval())
    adapted[1].load_state_dict({k: v for k, v in adapted[0].state_dict().items() if "lora_" in k}, strict=False)
    return computed(adapted[1]), computed(adapted[0])


def deepcopy(two):
    twin = copy.deepcopy(two.mine)
    two.mine = None
    gc.collect()
    return computed(twin), computed(two.right)


def compiled(two):
    torch._dynamo.reset()
    two.mine.forward = torch.compile(two.mine.forward, backend="eager")
    try:
        return computed(two.mine), computed(two.right)
    finally:
        torch._dynamo.reset()


def save(two):
    written = two.folder / "written"
    two.mine.save_pretrained(written)
    again = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    return computed(again), computed(two.right)


def cache(two):
    def change(cache):
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None and hasattr(layer, "values"):
                layer.keys, layer.values = layer.keys * 0.5, layer.values.flip(2)

    return computed(two.mine, change), computed(two.right, change)


ACTIONS = {
    "patch a forward": patch,
    "hook": hook,
    "edit a weight": edit,
    "replace a child": replace,
    "gradient": gradient,
    "LoRA": lora,
    "deepcopy": deepcopy,
    "compile": compiled,
    "save and load": save,
    "edit keys and values": cache,
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_prompt_and_tokens_are_as_in_transformers(folder, action):
    two = Two(*folder)
    plain = computed(two.right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's
        mine, right = ACTIONS[action](two)
    near = NEAR["gradient" if action == "gradient" else "float"]
    for what, own, wanted, before in zip(("prompt", "tokens"), mine, right, plain, strict=True):
        assert relative(own, wanted) < near, what
        unchanged = action in ("gradient", "deepcopy", "compile", "save and load") or (
            action == "edit keys and values" and what == "prompt"
        )
        assert unchanged or relative(wanted, before) > 1e-3, f"{what}: nothing was changed"


def test_the_page_has_the_table():
    rows = re.findall(r"^\| ([^|]+?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert all(action in rows for action in ACTIONS)
    header = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| | llama"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:] == FAMILIES
