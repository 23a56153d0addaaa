"""An output layer tied to an embedding that stays torch's own: both are one matrix, as in transformers, whichever is
changed.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ktx
from ktx.injection.rules import Rule, load_rules
from ktx.ops.tied import TiedLinear
from tests.families.test_families import IDS, load, relative
from tests.support.tiny_models import tiny

FAMILIES = ["gemma3_text", "qwen2"]  # an embedding that scales, and one that a rule leaves alone
MORE = {"gemma3_text": {"head_dim": 64, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """transformers' model, ktx's, and how to load it again."""
    original = tiny(request.param, **{"tie_word_embeddings": True} | MORE.get(request.param, {})).requires_grad_(False)
    original.save_pretrained(tmp_path / "model")
    rules = None
    if request.param == "qwen2":
        rules = [Rule(name=r"embed_tokens$", replace=None), *load_rules("generic")]

    def again(folder, **more):
        return load(folder, None, rules=rules, **more)

    mine = again(tmp_path / "model")
    assert type(mine.lm_head) is TiedLinear
    return original, mine, again


def in_place(model):
    model.model.embed_tokens.weight.mul_(1.5)


def data(model):
    model.model.embed_tokens.weight.data.mul_(1.5)


def state(model):
    model.load_state_dict({"model.embed_tokens.weight": 1.5 * model.model.embed_tokens.weight}, strict=False)


def state_of_the_head(model):
    model.load_state_dict({"lm_head.weight": 1.5 * model.lm_head.weight}, strict=False)


def head(model):
    if isinstance(model.lm_head, TiedLinear):
        with ktx.edit(model.lm_head, dtype="F32") as weight:
            weight.mul_(1.5)
    else:
        model.lm_head.weight.mul_(1.5)


def head_data(model):
    model.lm_head.weight.data += 0.5


def another_embedding(model):
    model.model.embed_tokens.weight = nn.Parameter(1.5 * model.model.embed_tokens.weight, False)
    model.model.embed_tokens.weight.mul_(1.1)


def another_head(model):
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight, False)
    model.model.embed_tokens.weight.mul_(1.1)


def tied_again(model):
    another_embedding(model)
    model.tie_weights()
    model.model.embed_tokens.weight.mul_(1.1)


def resized(model):
    torch.manual_seed(2)
    model.resize_token_embeddings(330, mean_resizing=False)
    in_place(model)


CHANGES = [in_place, data, state, state_of_the_head, head, head_data, another_embedding, another_head, tied_again]
CHANGES += [resized]


def answers(model):
    return model(IDS[:, :12]).logits


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_one_of_them_changes_the_other(pair, change):
    original, mine, _ = pair
    assert relative(answers(mine), answers(original)) < 1e-4
    twins = copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))
    for model in (original, mine, *twins):
        before = answers(model)
        change(model)
        assert relative(answers(model)[..., :320], before) > 1e-2
    for model in (mine, *twins):
        assert relative(answers(model), answers(original)) < 1e-4
    late = copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))
    assert all(relative(answers(model), answers(original)) < 1e-4 for model in late)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_they_are_written_once_and_read_tied(pair, tmp_path, packed):
    original, mine, again = pair
    for model in (original, mine):
        in_place(model)
    mine.save_pretrained(tmp_path / "written", packed=packed)
    read = again(tmp_path / "written")
    for model in (original, read):
        in_place(model)
    assert type(read.lm_head) is TiedLinear and relative(answers(read), answers(original)) < 1e-4
    if not packed:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32).eval()
        in_place(theirs)
        assert relative(answers(theirs), answers(original)) < 1e-4


@torch.no_grad()
def test_one_that_is_quantised_is_written_as_it_is(pair, tmp_path):
    original, _, again = pair
    original.save_pretrained(tmp_path / "floats")
    mine = again(tmp_path / "floats", quantize="int8")
    mine.save_pretrained(tmp_path / "packed", packed=True)
    assert torch.equal(answers(again(tmp_path / "packed")), answers(mine))


@pytest.mark.parametrize("which", ["embedding", "head"])
def test_gradients_are_of_both_uses(pair, which):
    found = []
    for model in pair[:2]:
        module = model.model.embed_tokens if which == "embedding" else model.lm_head
        module.requires_grad_(True)
        model(IDS[:, :12], labels=IDS[:, :12], use_cache=False).loss.backward()
        found.append(model.model.embed_tokens.weight.grad)
    assert relative(found[1], found[0]) < 1e-3
