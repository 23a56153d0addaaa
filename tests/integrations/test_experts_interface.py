"""experts_implementation="ktx": experts of a model that transformers has loaded, by the CPU's kernels, in every family
that goes by transformers' interface.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import ktx
from ktx.errors import NoGradient, UsageError
from ktx.ops.experts_interface import PACKED_ATTRIBUTE
from tests.families.test_families import IDS, relative
from tests.support.tiny_models import FAMILIES, tiny

PROMPT = IDS[:, :20]
TYPICAL = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "_apply_gate") or hasattr(module, "has_gate")]


def computed(model, ids=PROMPT, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def packed(model):
    """The operators that its modules hold, by identity."""
    return [module.__dict__[PACKED_ATTRIBUTE].operator for module in experts_of(model)]


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


class Any:
    """A configuration that has a number for whatever an experts module reads."""

    _experts_implementation = "eager"
    NUMBERS = {
        "mlp_hidden_act": "relu2",
        "act": "silu",
        "limit": 7.0,
        "intermediate": 96,
        "hidden": 64,
        "per_tok": 2,
        "top": 2,
        "expert": 4,
    }

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return next((value for word, value in self.NUMBERS.items() if word in name), 64)


DECORATED = r"@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)"
CLASSES = {  # every class of experts that goes by transformers' interface, and its module
    found[1]: f"transformers.models.{file.parent.name}.{file.stem}"
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    for found in re.finditer(DECORATED, file.read_text(encoding="utf-8"))
}
CLAMPED = ["DeepseekV4", "Glm5Next", "HYV4", "Inkling2"]  # in a way that no kernel has
NORMED = ["MuseSpark"]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_computes_the_same_or_says_why_not(name):
    kind = getattr(importlib.import_module(CLASSES[name]), name)
    module = kind(Any(), **{word: 96 for word in inspect.signature(kind).parameters if word == "intermediate_size"})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        hidden, ids = torch.randn(9, 64), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
        weights = torch.rand(9, 2)
        right = module(hidden, ids, weights)
        module.config._experts_implementation = "ktx"
        if name.startswith((*CLAMPED, *NORMED)):
            with pytest.raises(
                UsageError, match="normalizes the output" if name.startswith(tuple(NORMED)) else "no kernel computes"
            ):
                module(hidden, ids, weights)
        else:
            assert relative(module(hidden, ids, weights), right) < 1e-5


def test_classes_are_found():
    assert len(CLASSES) > 40 and {"Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"} <= CLASSES.keys()


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
        with pytest.raises(UsageError, match="no kernel computes"):
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
    _right, mine = two
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
    with pytest.raises(UsageError, match="normalizes the output"):
        computed(model)
    monkeypatch.setattr(module, "has_post_expert_norm", False, raising=False)
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())
    with pytest.raises(UsageError, match="down_proj is not a parameter"):
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


def called(module, tokens=5, dtype=torch.float32, seed=3):
    """A layer's experts on random hidden states, as their block calls them."""
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 256).to(dtype)
    ids = torch.stack([torch.randperm(module.num_experts)[:2] for _ in range(tokens)]) if tokens else torch.zeros(0, 2)
    return module(hidden, ids.long(), torch.rand(tokens, 2))


@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_some_tokens_and_none(two, tokens):
    with torch.no_grad():
        right, mine = (called(experts_of(model)[0], tokens) for model in two)
    assert right.shape == mine.shape and torch.allclose(right, mine, atol=1e-5)


@pytest.mark.parametrize("ids", [0, 3])
def test_one_expert_has_all_tokens_and_others_none(two, ids):
    hidden, chosen = torch.randn(9, 256), torch.full((9, 2), ids)
    with torch.no_grad():
        right, mine = (experts_of(model)[0](hidden, chosen, torch.ones(9, 2)) for model in two)
    assert torch.allclose(right, mine, atol=1e-4)


def test_batches_with_padding(two):
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :7] = mask[2, :15] = 0
    right, mine = (computed(model, PROMPT.repeat(3, 1), attention_mask=mask)[mask.bool()] for model in two)
    assert relative(mine, right) < 1e-5


def test_a_shallow_copy_with_parameters_of_its_own(two):
    near(two)
    for change in (2.0, 0.5, 1.0):
        made = []
        for model in two:
            twin = copy.copy(experts_of(model)[0])
            twin._parameters = {n: nn.Parameter(p.detach() * change) for n, p in twin._parameters.items()}
            made.append(called(twin).detach())
        assert torch.allclose(*made, atol=1e-4)
    near(two)


def test_packed_in_inference_mode_and_used_outside(two):
    for model in two:
        model.requires_grad_(False)
    with torch.inference_mode():
        right, mine = (model(PROMPT).logits for model in two)
    assert relative(mine, right) < 1e-5
    grads = []
    for model in two:
        embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.square().mean().backward()
        grads.append(embeds.grad)
    assert relative(grads[1], grads[0]) < 1e-3
    with torch.inference_mode():  # a model that was made there
        right, mine = (tiny(two[0].config.model_type) for _ in range(2))
        mine.set_experts_implementation("ktx")
        near((right, mine))


def test_other_defaults_of_torch(two):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        right, mine = (called(experts_of(model)[0]) for model in two)
    finally:
        torch.set_default_dtype(before)
    assert right.dtype is mine.dtype and relative(mine, right) < 1e-5


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(two, inside):
    """Hidden states of either type; the kernels compute in what they are given, transformers in bf16."""
    grads, results = [], []
    for model in two:
        module = experts_of(model)[0]
        for dtype in (torch.float32, torch.bfloat16):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = called(module, 9, dtype)
                if inside:
                    out.sum().backward()
            if not inside:
                out.sum().backward()
            results.append(out.detach().float())
            grads.append(module.down_proj.grad.clone())
    for mine, right in ((results[2], results[0]), (results[3], results[1]), (grads[2], grads[0]), (grads[3], grads[1])):
        assert relative(mine, right) < 0.03


def test_function_transforms_are_equal_or_an_error(two):
    _right, mine = two
    before = computed(mine)
    other = {name: value.detach() * 1.1 for name, value in mine.named_parameters()}
    with pytest.raises(UsageError, match="is a Tensor, ktx packs plain parameters"):
        torch.func.functional_call(mine, other, (PROMPT,))
    assert torch.equal(computed(mine), before)
    module = experts_of(mine)[0]
    ids, weights, hidden = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2), torch.randn(3, 256)
    for trained in (True, False):
        module.requires_grad_(trained)
        # A trained module's backward is a function of torch's, which says so itself.
        kind, words = (RuntimeError, "functorch") if trained else (NoGradient, "inside a transform of torch.func")
        with pytest.raises(kind, match=words):
            torch.func.grad(lambda x: module(x, ids, weights).sum())(hidden)
        with pytest.raises(kind, match=words):
            torch.func.vmap(lambda x: module(x, ids, weights))(hidden[None])
    with pytest.raises(NoGradient, match="tangent"):
        torch.func.jvp(lambda x: module(x, ids, weights), (hidden,), (hidden,))


def test_threads_share_a_model(two):
    right, mine = two
    truth, wrong = computed(right), []

    def work():
        for _ in range(3):
            try:
                if relative(computed(mine), truth) > 1e-4:
                    wrong.append("numbers")
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_back_and_forth(two):
    _right, mine = two
    for name in ("ktx", "eager", ktx.experts("F32"), "grouped_mm", "ktx", "batched_mm", ktx.experts("BF16"), "ktx"):
        mine.set_experts_implementation(name)
        near(two, 1e-2 if name == "ktx:BF16" else 1e-5)


def test_export_is_refused_by_name(two):
    with pytest.raises(UsageError, match="torch.export cannot export experts packed by ktx; use another"):
        torch.export.export(two[1], (PROMPT,), strict=False)


def test_a_pickle_brings_its_name_along(tmp_path):
    model = tiny("qwen3_moe")
    model.set_experts_implementation(ktx.experts("Q8_0"))
    right = computed(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    torch.save(right, tmp_path / "right")
    torch.save(model.state_dict(), tmp_path / "state")
    code = (
        "import pickle, torch\n"
        f"state = torch.load({str(tmp_path / 'state')!r})\n"
        f"model = pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))\n"
        f"right = torch.load({str(tmp_path / 'right')!r})\n"
        f"assert torch.equal(model(torch.tensor({PROMPT.tolist()})).logits, right)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gradient_checkpointing(two):
    grads = []
    for model in two:
        model.train()
        model.gradient_checkpointing_enable()
        model(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
        grads.append(experts_of(model)[0].down_proj.grad)
    assert relative(grads[1], grads[0]) < 1e-3
