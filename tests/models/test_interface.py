"""experts_implementation="ktx": experts of a model that transformers has loaded, by the CPU's kernels, in every family that goes by transformers' interface."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ktx
from ktx.errors import UsageError
from ktx.ops.interface import HELD
from tests.models.families import FAMILIES, tiny
from tests.models.test_families import IDS, relative

PROMPT = IDS[:, :20]
TYPICAL = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "_apply_gate") or hasattr(module, "has_gate")]


def computed(model, ids=PROMPT, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def packed(model):
    """The operators that its modules hold, by identity."""
    return [module.__dict__[HELD].operator for module in experts_of(model)]


@pytest.fixture(params=TYPICAL)
def two(request):
    right, mine = tiny(request.param), tiny(request.param)
    right.set_experts_implementation("eager")
    mine.set_experts_implementation("ktx")
    return right, mine


def near(two, bound=1e-5):
    right, mine = two
    assert relative(computed(mine), computed(right)) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_or_says_why_not(family):
    right = tiny(family)
    if not experts_of(right):
        pytest.skip(f"{family} has no experts that transformers' interface knows")
    mine = copy.deepcopy(right)
    right.set_experts_implementation("eager")
    mine.set_experts_implementation("ktx")
    near((right, mine))
    assert all(isinstance(operator, nn.Module) for operator in packed(mine))


def test_answers_token_by_token(two):
    right, mine = (model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False) for model in two)
    assert torch.equal(right, mine)


def test_in_half_precision(two):
    right, mine = (model.to(torch.bfloat16) for model in two)
    exact = tiny(right.config.model_type)
    exact.load_state_dict({name: value.float() for name, value in right.state_dict().items()})
    truth = computed(exact)
    assert relative(computed(mine).float(), truth) < 1.2 * relative(computed(right).float(), truth) + 1e-3
    assert packed(mine)[0].weights["down_proj"].qtype.name == "BF16"


def test_weights_are_packed_once_and_again_when_they_change(two):
    right, mine = two
    near(two)
    before = packed(mine)
    near(two)
    assert all(now is then for now, then in zip(packed(mine), before, strict=True))

    def in_place(module):
        module.down_proj.mul_(1.5)

    def by_data(module):
        module.down_proj.data.mul_(0.5)
        module.down_proj.data[0] += 0.01

    def exchanged(module):
        module.down_proj = nn.Parameter(module.down_proj * 1.25)

    def one_row(module):
        next(iter(module.parameters()))[:, 3] = 0.02

    def bias(module):
        for name, value in module.named_parameters():
            if name.endswith("_bias"):
                value += 0.1

    for change in (in_place, by_data, exchanged, one_row, bias):
        was = computed(mine)
        with torch.no_grad():
            for model in two:
                change(experts_of(model)[-1])
        near(two)
        if change is not bias or right.config.model_type == "gpt_oss":
            assert relative(computed(mine), was) > 1e-5, change.__name__
    state = {name: value * 0.9 for name, value in right.state_dict().items()}
    for model in two:
        model.load_state_dict(state)
    near(two)


def test_what_lies_between_the_projections_counts(two):
    right, mine = two
    near(two)
    if right.config.model_type == "gpt_oss":
        for model in two:
            for module in experts_of(model):
                module.limit = 0.5
    else:
        for model in two:
            for module in experts_of(model):
                module.act_fn = nn.GELU()
    was = computed(mine)
    near(two)
    if right.config.model_type != "gpt_oss":
        for model in two:
            experts_of(model)[0].act_fn.register_forward_hook(lambda module, args, out: out * 0.5)
        near(two)
        assert relative(computed(mine), was) > 1e-5
        for module in experts_of(mine):
            module.act_fn = nn.Softsign()
        with pytest.raises(UsageError, match="in no kernel"):
            computed(mine)


@pytest.mark.parametrize("trained", ["all", "none", "experts", "router"])
def test_gradients(two, trained):
    for model in two:
        for name, parameter in model.named_parameters():
            mine = {
                "all": True,
                "none": False,
                "experts": ".experts." in name,
                "router": ".gate." in name or "router" in name,
            }
            parameter.requires_grad_(mine[trained])
    made = []
    for model in two:
        embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=PROMPT).loss.backward()
        made.append({"embeds": embeds.grad} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    right, mine = made
    assert right.keys() == mine.keys() and (trained == "none") == (len(right) == 1)
    for name, grad in right.items():
        assert (mine[name] is None) == (grad is None), name
        if grad is not None and grad.norm() > 0:
            assert relative(mine[name], grad) < 1e-3, name


def test_training_goes_as_in_transformers(two):
    losses = []
    for model in two:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        own = []
        for _ in range(4):
            loss = model(PROMPT, labels=PROMPT).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.item())
        losses.append(own)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


def test_a_second_derivative_is_an_error():
    model = tiny("qwen3_moe")
    model.set_experts_implementation("ktx")
    model.set_attn_implementation("eager")  # which has one
    embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_type_of_weights():
    model = tiny("qwen3_moe")
    model.set_experts_implementation("eager")
    right = computed(model)
    seen = {}
    for dtype in ("F32", "BF16", "Q8_0", "Q4_0"):
        model.set_experts_implementation(ktx.experts(dtype))
        seen[dtype] = relative(computed(model), right)
        assert packed(model)[0].weights["up_proj"].qtype.name == dtype
    assert seen["F32"] < 1e-5 < seen["BF16"] < seen["Q8_0"] < seen["Q4_0"] < 0.2
    model.set_experts_implementation(ktx.experts())
    assert relative(computed(model), right) < 1e-5
    with pytest.raises(UsageError, match="Q8_0"):
        ktx.experts("Q8_O")
    model.set_experts_implementation(ktx.experts("Q4_K"))
    with pytest.raises(UsageError, match="blocks of 256"):
        computed(model)
    model.set_experts_implementation("eager")
    assert torch.equal(computed(model), right)


def test_copies_and_pickles_pack_their_own(two):
    near(two)
    right, mine = two
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert packed(twin)[0] is None and torch.equal(computed(twin), computed(mine))
        with torch.no_grad():
            experts_of(twin)[0].down_proj.zero_()
        assert not torch.equal(computed(twin), computed(mine))
    near(two)


def test_a_model_that_is_read_from_a_folder(tmp_path):
    tiny("qwen3_moe").save_pretrained(tmp_path)
    code = (
        "import sys, {first}, {then}, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"made = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, experts_implementation='ktx')\n"
        f"right = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, experts_implementation='eager')\n"
        "ids = torch.arange(3, 20)[None]\n"
        "assert made.config._experts_implementation == 'ktx'\n"
        "assert torch.allclose(made(ids).logits, right(ids).logits, atol=1e-4)\n"
    )
    for first, then in (("ktx", "transformers.modeling_utils"), ("transformers.modeling_utils", "ktx")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(first=first, then=then)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_what_is_not_computed_is_named(monkeypatch):
    model = tiny("qwen3_moe")
    model.set_experts_implementation("ktx")
    module = experts_of(model)[0]
    monkeypatch.setattr(module, "has_post_expert_norm", True, raising=False)
    with pytest.raises(UsageError, match="norms the output"):
        computed(model)
    monkeypatch.setattr(module, "has_post_expert_norm", False, raising=False)
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())
    with pytest.raises(UsageError, match="down_proj is no parameter"):
        computed(model)
    with pytest.raises(UsageError, match="float64"):
        computed(tiny_in_f64())
    other = tiny("mixtral")
    other.set_experts_implementation("ktx")
    held = experts_of(other)[0]
    held.down_proj = type("Sharded", (nn.Parameter,), {})(held.down_proj.detach())
    with pytest.raises(UsageError, match="is a Sharded"):
        computed(other)


def test_choices_of_no_expert_add_nothing(two):
    """As transformers marks those that another process computes."""
    module = experts_of(two[1])[0]
    hidden, ids = torch.randn(5, 256), torch.randint(0, 4, (5, 2))
    weights = torch.rand(5, 2)
    less = torch.where(torch.arange(2) == 0, 0.0, weights)
    with torch.no_grad():
        right = module(hidden, ids, less)
        ids[:, 0] = module.num_experts
        assert torch.allclose(module(hidden, ids, weights), right, atol=1e-6)


def tiny_in_f64():
    model = tiny("mixtral").double()
    model.set_experts_implementation("ktx")
    return model


def test_in_a_compiled_model(two):
    right, mine = two
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative(torch.compile(mine, backend="eager")(PROMPT).logits, computed(right)) < 1e-5


def test_the_rules_of_a_loaded_model_may_leave_experts_to_it(tmp_path):
    tiny("qwen3_moe").save_pretrained(tmp_path)
    rules = [ktx.Rule(name=r"\.experts$", recursive=False)]
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=ktx.KtxConfig(rules=rules, progress=False), experts_implementation="ktx"
    )
    assert relative(computed(made), computed(tiny("qwen3_moe"))) < 1e-4 and packed(made)[0] is not None
