"""Adapters of PEFT on packed experts (`target_parameters`): what peft computes and trains on transformers' own stacked
parameters.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.nn.utils import parametrize

from ktx.errors import UsageError
from ktx.ops import parameters
from ktx.ops.experts import Experts, experts_by_path
from ktx.ops.guard import valid_fast_path
from ktx.ops.moe import MoE
from tests.families.test_families import IDS, load, relative
from tests.loader.test_checkpoints import OTHERS
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

NEAR, PROMPT = 2e-5, IDS[:, :20]
FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "nemotron_h",
]  # transposed and with biases; few MoE layers; without a gate
GATED = "gate_up_proj", "down_proj"


def original(family):
    more = OTHERS[family][0] if family in OTHERS else {}
    model = tiny(family, **(more | {"tie_word_embeddings": False}))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    original(request.param).save_pretrained(made)
    return request.param, made


@pytest.fixture
def two(folder):
    return original(folder[0]), load(folder[1], None, kv_dtype="f32")


def targets(family):
    return ("up_proj", "down_proj") if family == "nemotron_h" else GATED


def config(family, names=None, **more):
    wanted = [f"experts.{name}" for name in names or targets(family)]
    return LoraConfig(
        **({"r": 3, "lora_alpha": 12, "target_modules": [], "init_lora_weights": False} | more),
        target_parameters=wanted,
    )


def adapted(two, family, names=None, **more):
    """Both with the same adapter."""
    made = []
    for model in two:
        torch.manual_seed(5)
        made.append(get_peft_model(model, config(family, names, **more)).eval())
    return made


def computed(model, ids=PROMPT):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def answer(model):
    ids = model.generate(input_ids=PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return ids[0, PROMPT.shape[1] :].tolist()


def gradients(model):
    model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(theirs, ours):
    right, mine = gradients(theirs), gradients(ours)
    assert right.keys() == mine.keys() and len(right) > 3
    for name, grad in right.items():
        assert relative(mine[name], grad) < 1e-4, name


def blocks(model):
    return [valid_fast_path(module) is not None for module in model.modules() if isinstance(module, MoE)]


def test_an_adapter_of_experts(two, folder, tmp_path):
    """Prompt, tokens, training, a file, and back."""
    before, usual = computed(two[0]), blocks(two[1])
    theirs, ours = adapted(two, folder[0])
    right = computed(theirs)
    assert relative(right, before) > 1e-2 and relative(computed(ours), right) < NEAR
    assert answer(ours) == answer(theirs)
    check_gradients(theirs, ours)
    with ours.disable_adapter():
        assert relative(computed(ours), before) < NEAR
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder[1], None, kv_dtype="f32"), tmp_path).eval()
    assert relative(computed(again), right) < NEAR
    mine, written = get_peft_model_state_dict(again), get_peft_model_state_dict(theirs)
    assert mine.keys() == written.keys() and all(torch.equal(mine[name], written[name]) for name in written)
    plain = ours.unload()
    assert relative(computed(plain), before) < NEAR and blocks(plain) == usual
    assert not any(isinstance(module, parametrize.ParametrizationList) for module in plain.modules())


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(two, folder, safe_merge):
    before, usual = computed(two[0]), blocks(two[1])
    theirs, ours = adapted(two, folder[0])
    right = computed(theirs)
    ours.merge_adapter()
    assert relative(computed(ours), right) < NEAR
    ours.unmerge_adapter()
    assert relative(computed(ours), right) < NEAR
    with ours.disable_adapter():
        assert relative(computed(ours), before) < NEAR
    merged = ours.merge_and_unload(safe_merge=safe_merge)
    assert relative(computed(merged), right) < NEAR and blocks(merged) == usual
    assert answer(merged) == answer(theirs)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_matrices(two, folder, which):
    names = [targets(folder[0])[which]]
    theirs, ours = adapted(two, folder[0], names, target_modules=["o_proj"])
    assert relative(computed(ours), computed(theirs)) < NEAR
    check_gradients(theirs, ours)


def test_several_adapters(two, folder):
    theirs, ours = adapted(two, folder[0])
    for model in (theirs, ours):
        torch.manual_seed(6)
        model.add_adapter("second", config(folder[0], r=2, use_rslora=True))
    for name in ("second", "default"):
        theirs.set_adapter(name), ours.set_adapter(name)
        assert relative(computed(ours), computed(theirs)) < NEAR
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    assert relative(computed(ours), computed(theirs)) < NEAR
    check_gradients(theirs, ours)
    for model in (theirs, ours):
        model.delete_adapter("default")
    assert relative(computed(ours), computed(theirs)) < NEAR
    right = computed(theirs)
    assert relative(computed(ours.merge_and_unload(adapter_names=["second"])), right) < NEAR


def test_training_goes_as_in_transformers(two, folder):
    losses = []
    for model in adapted(two, folder[0]):
        steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        losses.append([])
        for at in (0, 10, 20):
            ids = IDS[:, at : at + 16]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward(), steps.step(), steps.zero_grad()
            losses[-1].append(loss.item())
    assert all(abs(a - b) < 1e-3 * a for a, b in zip(*losses, strict=True))


def test_biases_of_experts(tmp_path):
    original("gpt_oss").save_pretrained(tmp_path)
    names = ["gate_up_proj", "gate_up_proj_bias", "down_proj_bias"]
    theirs, ours = adapted((original("gpt_oss"), load(tmp_path, None, kv_dtype="f32")), "gpt_oss", names)
    right = computed(theirs)
    assert relative(computed(ours), right) < NEAR
    check_gradients(theirs, ours)
    assert relative(computed(ours.merge_and_unload()), right) < NEAR


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_router_has_an_adapter_too(tmp_path, family):
    original(family).save_pretrained(tmp_path)
    more = LoraConfig(
        r=3,
        target_modules=["o_proj"],
        init_lora_weights=False,
        target_parameters=["mlp.gate.weight", "mlp.router.weight", "mlp.experts.down_proj"],
    )
    made = []
    for model in (original(family), load(tmp_path, None, kv_dtype="f32")):
        torch.manual_seed(5)
        made.append(get_peft_model(model, more).eval())
    assert relative(computed(made[1]), computed(made[0])) < NEAR
    check_gradients(*made)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_quantised_experts(tmp_path, family):
    """The adapter is added to products with the quantised weights; merging makes floats of them."""
    model = original(family)
    model.config.save_pretrained(tmp_path)
    oracle = write_gguf(tmp_path / "model.gguf", model, "Q8_0")
    model.load_state_dict(oracle, strict=False)
    mine = load(tmp_path, tmp_path / "model.gguf")
    theirs, ours = adapted((model, mine), family)
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(12, 256, generator=numbers)
    ids, weights = torch.rand(12, 4, generator=numbers).argsort(-1)[:, :2], torch.rand(12, 2, generator=numbers)
    with torch.no_grad(), theirs.disable_adapter():
        before = experts_of(theirs)(x, ids, weights)
    with torch.no_grad():
        right = experts_of(theirs)(x, ids, weights)
        assert relative(before, right) > 0.1 and relative(experts_of(ours)(x, ids, weights), right) < 0.02
        merged = ours.merge_and_unload()
        assert relative(experts_of(merged)(x, ids, weights), right) < 1e-5
    assert {w.qtype.name for _, own in experts_by_path(merged) for w in own.weights.values()} == {"F32"}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_activations_are_called_beside_an_adapter(tmp_path, family):
    original(family).save_pretrained(tmp_path)
    theirs, ours = adapted((original(family), load(tmp_path, None, kv_dtype="f32")), family)
    found = []
    for model in (theirs, ours):
        seen = []
        for path, module in model.named_modules():
            if path.endswith(".experts.base_layer.base_layer"):
                module.act_fn.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out) or 0.5 * out)
        found.append((computed(model), seen))
    (right, theirs), (mine, ours) = found
    assert relative(mine, right) < NEAR and len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and relative(a.sort(0).values, b.sort(0).values) < NEAR


class Doubled(nn.Module):
    """A parametrization of somebody's own."""

    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


class Plus(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.more = nn.Parameter(torch.full(shape, 0.01))

    def forward(self, weight):
        return weight + self.more


def experts_of(model):
    return [module for path, module in model.named_modules() if path.endswith(".experts")][-1]


def test_other_parametrizations(two, folder, caplog):
    """They are computed as a whole, and the log says so once."""
    before, name = computed(two[0]), targets(folder[0])[-1]
    parameters._logged.clear()
    for model in two:
        own = experts_of(model)
        parametrize.register_parametrization(own, name, Plus(getattr(own, name).shape))
    with caplog.at_level(logging.WARNING, "ktx"):
        computed(two[1])
        assert relative(computed(two[1]), computed(two[0])) < NEAR
    assert len([r for r in caplog.records if "is computed as a full matrix, which is slow and takes" in r.message]) == 1
    for model in two:
        model(input_ids=PROMPT, use_cache=False).logits.square().mean().backward()
    right, mine = (experts_of(model).parametrizations[name][0].more.grad for model in two)
    assert relative(mine, right) < 1e-4
    for model in two:
        parametrize.remove_parametrizations(experts_of(model), name, leave_parametrized=False)
    assert relative(computed(two[1]), before) < NEAR and type(experts_of(two[1])) is Experts
    for model in two:
        parametrize.register_parametrization(experts_of(model), name, Doubled())
        parametrize.remove_parametrizations(experts_of(model), name, leave_parametrized=True)
    assert relative(computed(two[1]), computed(two[0])) < NEAR


def test_experts_name_their_parameters_when_they_are_asked(two):
    right, mine = experts_of(two[0]), experts_of(two[1])
    theirs, ours = dict(right.named_parameters(recurse=False)), dict(mine.named_parameters(recurse=False))
    assert list(ours) == list(theirs) and mine.is_transposed == right.is_transposed
    for name, value in theirs.items():
        assert torch.equal(ours[name] + 0, value) and torch.equal(getattr(mine, name)[1], value[1])
    listed = dict(two[1].named_parameters())
    assert not any(name.endswith(tuple(f"experts.{own}" for own in theirs)) for name in listed)
    assert two[1].num_parameters() == two[0].num_parameters()
    with pytest.raises(UsageError, match="packed and cannot be trained itself.*target_parameters"):
        mine.requires_grad_(True)
    with pytest.raises(AttributeError):
        mine.other_proj  # noqa: B018


def test_a_sum_with_a_packed_weight_says_that_what_was_added_has_changed(tmp_path):
    """Sums are computed where they are read; torch's parametrize only looks at their shape."""
    original("qwen3_moe").save_pretrained(tmp_path)
    packed, right = experts_of(load(tmp_path, None)).down_proj, experts_of(original("qwen3_moe")).down_proj
    more, a, b = torch.ones(right.shape), torch.randn(8, 256, 2), torch.randn(8, 2, 96)
    added, product = packed + more, torch.baddbmm(packed, a, b, alpha=0.5)
    assert torch.equal(added * 1, right + more)
    assert torch.allclose(product[3], torch.baddbmm(right, a, b, alpha=0.5)[3], atol=1e-6)
    assert torch.equal((packed + more[0]) * 1, right + more[0]) and torch.equal(packed + 1, right + 1)
    more.zero_()
    with pytest.raises(UsageError, match="has changed since"):
        added.sum()


def test_nothing_is_warned_of(two, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        adapted(two, folder[0])
