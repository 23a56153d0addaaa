"""Small programs as researchers write them, on odd modules, positions and settings: the numbers of transformers, or an
error that names the remedy.
"""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import ktx
from ktx.errors import NoGradient, UsageError
from ktx.ops.base import Operator
from ktx.transformers_compat import cache_argument
from tests.families.test_families import IDS, load, relative
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

FAMILIES = ["llama", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "gemma2"]
NEAR = 2e-5
PROMPT = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def two(folders):
    """transformers' model and ours of a family, after a forward."""

    def of(family):
        mine = load(folders(family), None, kv_dtype="f32")
        answered(mine)
        return tiny(family).requires_grad_(False), mine

    return of


@torch.no_grad()
def answered(model, tokens=2):
    """Logits of a prompt, of tokens behind it, and of three at once."""
    cache, out = DynamicCache(config=model.config), []
    ends = [0, *range(PROMPT, PROMPT + tokens + 1), PROMPT + tokens + 3]
    for first, last in itertools.pairwise(ends):
        out.append(model(input_ids=IDS[:, first:last], **cache_argument(model, cache)).logits)
    return torch.cat(out, 1)


def by_forward(module):
    whole = module.forward
    module.forward = lambda *args, **words: 0.5 * whole(*args, **words)
    return lambda: delattr(module, "forward")


def by_method(module):
    kind = type(module)
    module.forward = types.MethodType(lambda self, *args, **words: 0.5 * kind.forward(self, *args, **words), module)
    return lambda: delattr(module, "forward")


def by_class(module):
    kind = type(module)

    class Halved(kind):
        def forward(self, *args, **words):
            return 0.5 * super().forward(*args, **words)

    module.__class__ = Halved
    return lambda: setattr(module, "__class__", kind)


def by_call(module):
    kind = type(module)

    class Called(kind):
        def __call__(self, *args, **words):
            return 0.5 * super().__call__(*args, **words)

    module.__class__ = Called
    return lambda: setattr(module, "__class__", kind)


@pytest.mark.parametrize("way", [by_forward, by_method, by_class, by_call])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "ernie4_5_moe"])
def test_modules_that_are_no_operators_are_patched(two, family, way):
    """Activations, the expansion of a latent: nothing counts what is set on them."""
    right, mine = two(family)
    usual, found = answered(mine), 0
    for path, module in mine.named_modules():
        if isinstance(module, Operator) or not path.endswith(("act_fn", "kv_b_proj")) or ".1." not in path:
            continue
        found += 1
        undo = [way(model.get_submodule(path)) for model in (right, mine)]
        changed = answered(mine)
        assert relative(changed, answered(right)) < NEAR and relative(changed, usual) > 1e-3, path
        for back in undo:
            back()
        assert torch.equal(answered(mine), usual), path
    assert found >= {"llama": 1, "deepseek_v3": 3, "ernie4_5_moe": 2}[family]


def test_what_is_in_a_module_that_is_no_operator_is_exchanged(two):
    right, mine = two("ernie4_5_moe")
    for model in (right, mine):
        statics = model.model.layers[1].mlp.gate.moe_statics
        more = torch.linspace(-1, 1, statics.e_score_correction_bias.numel())
        statics.e_score_correction_bias = nn.Parameter(more.view_as(statics.e_score_correction_bias), False)
    assert relative(answered(mine), answered(right)) < NEAR
    for model in (right, mine):
        model.model.layers[1].mlp.experts.act_fn.beta = 2.0  # which SiLU does not read
    assert relative(answered(mine), answered(right)) < NEAR


@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(12) - 5,
        torch.arange(12) * 0.25,
        torch.arange(12) + 3_000_000_000,
        torch.arange(12) + 700,
        torch.arange(12, dtype=torch.int32),
    ],
    ids=["negative", "fractions", "billions", "beyond the model's", "int32"],
)
def test_positions_that_no_table_has(two, family, positions):
    right, mine = two(family)
    with torch.no_grad():
        found = [model(input_ids=IDS[:, :12], position_ids=positions[None]).logits for model in (mine, right)]
    assert relative(*found) < NEAR
    rope = mine.model.rotary_emb
    assert rope.table is None or rope.table[0] <= 512


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_token_ids_that_there_are_not(two, tokens):
    right, mine = two("llama")
    for bad in (320, -1):
        ids = IDS[:, :tokens].clone()
        ids[0, -1] = bad
        for model in (right, mine):
            with pytest.raises(IndexError, match="index out of range|token ids 0 to 319, the input has"):
                model(input_ids=ids)
    with pytest.raises(UsageError, match="int64 or int32, not in torch.float32"):
        mine(input_ids=IDS[:, :tokens].float())
    mine.model.embed_tokens.embedding_dim = 128  # says nothing to who looks rows up
    assert relative(mine(input_ids=IDS[:, :tokens].int()).logits, right(input_ids=IDS[:, :tokens]).logits) < NEAR
    mine.model.embed_tokens.max_norm = 0.5
    with pytest.raises(UsageError, match="max_norm is 0.5: a lookup would modify"):
        mine(input_ids=IDS[:, :tokens])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gemma2", "gpt_oss"])
def test_attention_that_is_not_causal(two, family):
    """As scripts make encoders of decoders: where transformers gives its kernel no mask, the module's `is_causal`
    counts.
    """
    right, mine = two(family)
    usual = answered(mine)
    padded = torch.ones(2, 9, dtype=torch.int64)
    padded[1, :4] = 0
    for model in (right, mine):
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    assert relative(answered(mine), answered(right)) < NEAR
    if family not in ("gemma2", "gpt_oss"):  # whose masks are made anyway
        assert relative(answered(mine), usual) > 1e-2
    batch = [model(input_ids=IDS[:, :18].view(2, 9), attention_mask=padded).logits for model in (mine, right)]
    assert relative(batch[0][:, 4:], batch[1][:, 4:]) < NEAR
    if family in ("llama", "deepseek_v3"):
        mine.ktx.tokenizer = tokenizer()
        with pytest.raises(UsageError, match="is_causal is False"), mine.ktx.engine(kv_cache_tokens=512) as engine:
            list(engine.generate([IDS[0, :9].tolist()]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "ernie4_5_moe"])
def test_a_configuration_that_is_not_causal(two, family):
    right, mine = two(family)
    for model in (right, mine):
        model.config.is_causal = False
    for more in ({}, {"attention_mask": torch.ones(1, PROMPT, dtype=torch.int64)}):
        found = [model(input_ids=IDS[:, :PROMPT], use_cache=False, **more).logits for model in (mine, right)]
        assert relative(*found) < NEAR


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gemma2"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.vjp(f, x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.vmap(f)(x[None]),
    ],
    ids=["grad", "vjp", "jacrev", "hessian", "vmap"],
)
def test_transforms_of_functions_are_refused_by_name(two, family, transform):
    _, mine = two(family)
    x = mine.get_input_embeddings()(IDS[:, :4]).detach()
    with pytest.raises(NoGradient, match="torch.autograd"):
        transform(lambda x: mine(inputs_embeds=x, use_cache=False).logits, x)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss", "gemma2"])
def test_attention_weights_have_gradients(two, family):
    """Relevance by gradients of attention, in eager attention as there."""
    right, mine = two(family)
    x, found = right.get_input_embeddings()(IDS[:, :12]).detach(), []
    for model in (mine, right):
        model.set_attn_implementation("eager")
        given = x.clone().requires_grad_()
        out = model(inputs_embeds=given, output_attentions=True, use_cache=False)
        for weights in out.attentions:
            weights.retain_grad()
        (out.logits.logsumexp(-1).sum() + out.attentions[0].square().sum()).backward()
        found.append((*(weights.grad for weights in out.attentions), given.grad, out.logits))
    assert all(relative(own, there) < 1e-4 for own, there in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_second_derivatives(two, family):
    """Through a norm, projections and eager attention; elsewhere they are refused."""
    right, mine = two(family)
    x, found = right.get_input_embeddings()(IDS[:, :6]).detach(), []
    for model in (mine, right):
        model.set_attn_implementation("eager")
        layer, given = model.model.layers[1], x.clone().requires_grad_()
        tables = model.model.rotary_emb(given, torch.arange(6)[None])
        out = layer.self_attn(layer.input_layernorm(given), position_embeddings=tables, attention_mask=None)[0]
        (first,) = torch.autograd.grad(out.pow(3).sum(), given, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), given)[0])
    assert relative(*found) < 1e-3
    for name, said in (("eager", "feed-forward layers"), ("ktx", "set_attn_implementation")):
        mine.set_attn_implementation(name)
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(
            mine(inputs_embeds=given, use_cache=False).logits.square().sum(), given, create_graph=True
        )
        with pytest.raises(NoGradient, match=said):
            first.square().sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v2"])
def test_a_trace(two, family):
    right, mine = two(family)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mine

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    traced = torch.jit.trace(Logits(), (IDS[:, :9],), check_trace=False)
    assert relative(traced(IDS[:, 9:18]), right(input_ids=IDS[:, 9:18]).logits) < NEAR


@pytest.mark.parametrize(
    "take",
    [
        lambda m: torch.func.functional_call(m, {"lm_head.weight": m.lm_head.weight.clone()}, (IDS[:, :5],)),
        lambda m: nn.utils.weight_norm(m.model.layers[1].self_attn.o_proj),
        lambda m: nn.utils.spectral_norm(m.model.layers[1].self_attn.o_proj),
        lambda m: nn.utils.weight_norm(m.lm_head),
    ],
    ids=["functional_call", "weight_norm", "spectral_norm", "weight_norm of the output layer"],
)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_a_packed_weight_is_not_taken_out_of_its_module(two, family, take):
    _, mine = two(family)
    usual = answered(mine)
    with pytest.raises(UsageError, match="ktx.edit"):
        take(mine)
    assert torch.equal(answered(mine), usual)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss"])
def test_functional_call_with_other_norms(two, family):
    right, mine = two(family)
    usual = answered(mine)
    other = {"model.layers.1.input_layernorm.weight": right.model.layers[1].input_layernorm.weight * 1.5}
    for tokens in (12, 1):
        ids = IDS[:, :tokens]
        found = [torch.func.functional_call(model, other, (ids,)).logits for model in (mine, right)]
        assert relative(*found) < NEAR
    assert torch.equal(answered(mine), usual)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_evaluated_as_the_model_is(two, family):
    """Parametrizations go by that: a spectral norm iterates while its module is trained."""
    right, mine = two(family)
    assert not any(module.training for module in mine.modules())
    assert not ktx.dequantize(mine.model.layers[1].self_attn.o_proj).training
    for model in (right, mine):
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(model.model.layers[1].self_attn.o_proj)
    found = answered(mine)
    assert relative(found, answered(right)) < NEAR and torch.equal(answered(mine), found)
    mine.train(), mine.eval()
    assert not any(module.training for module in mine.modules())


def test_scalars_of_experts(two):
    for family in ("gpt_oss", "deepseek_v3", "ernie4_5_moe"):
        right, mine = two(family)
        theirs, ours = (model.model.layers[1].mlp.experts for model in (right, mine))
        scalars = {n: v for n, v in vars(theirs).items() if isinstance(v, bool | int | float) and n[0] != "_"}
        assert len(scalars) > 4 and all(getattr(ours, name) == value for name, value in scalars.items())
        ours.is_transposed = theirs.is_transposed
        with pytest.raises(UsageError, match="packed experts depend on it"):
            ours.is_transposed = not theirs.is_transposed
        with pytest.raises(UsageError, match="packed experts depend on it"):
            ours.has_bias = not theirs.has_bias


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "ernie4_5_moe", "qwen3_moe"])
def test_parameters_of_experts_are_assigned(two, family):
    right, mine = two(family)
    names = [name for name, _ in right.model.layers[1].mlp.experts.named_parameters()]
    assert {"gate_up_proj", "down_proj"} <= set(names)
    for name in names:
        for change in (
            lambda module, name=name: setattr(module, name, nn.Parameter(getattr(module, name) * -0.5, False)),
            lambda module, name=name: setattr(getattr(module, name), "data", getattr(module, name) * 1.5),
            lambda module, name=name: getattr(module, name).data.mul_(-1.1),
        ):
            before = answered(mine)
            for model in (right, mine):
                change(model.model.layers[1].mlp.experts)
            assert relative(answered(mine), answered(right)) < NEAR and relative(answered(mine), before) > 1e-4, name
        with pytest.raises(UsageError, match="cannot be"):
            setattr(mine.model.layers[1].mlp.experts, name, torch.zeros(2, 2))


def test_the_clamp_of_experts_is_changed(two):
    right, mine = two("gpt_oss")
    for name, value in (("limit", 0.05), ("alpha", 0.3), ("limit", 7.0)):
        before = answered(mine)
        for model in (right, mine):
            setattr(model.model.layers[1].mlp.experts, name, value)
        assert getattr(mine.model.layers[1].mlp.experts, name) == value
        assert relative(answered(mine), answered(right)) < NEAR and relative(answered(mine), before) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_counted(two, family):
    """As of transformers' eager attention, whose products torch counts."""
    right, mine = two(family)
    right.set_attn_implementation("eager")
    if hasattr(right.model.layers[1].mlp, "experts"):
        right.set_experts_implementation("eager")
    x = right.get_input_embeddings()(IDS[:, :12]).detach()
    usual, found = answered(mine), []
    for model in (mine, right):
        counts = []
        for tokens in (12, 1):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(input_ids=IDS[:, :tokens], use_cache=False)
            counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=x.clone().requires_grad_(), use_cache=False).logits.sum().backward()
        found.append([*counts, counter.get_total_flops()])
    (prompt, token, trained), (prompt_there, token_there, trained_there) = found
    assert abs(prompt / prompt_there - 1) < 0.03 and abs(token / token_there - 1) < 0.03
    assert abs(trained / trained_there - 1) < 0.1
    assert torch.equal(answered(mine), usual)


@torch.no_grad()
def test_the_expansion_of_a_latent_as_a_linear_layer(two):
    right, mine = two("deepseek_v3")
    theirs, ours = (model.model.layers[1].self_attn.kv_b_proj for model in (right, mine))
    assert torch.equal(ours.state_dict()["weight"].clone(), theirs.weight)
    for change in (
        lambda module: setattr(module, "weight", nn.Parameter(module.weight * 0.5, requires_grad=False)),
        lambda module: setattr(module.weight, "data", module.weight * -1.0),
        lambda module: module.weight.data.mul_(0.7),
        lambda module: module.load_state_dict({"weight": module.weight * 1.5}),
    ):
        before = answered(mine)
        change(theirs), change(ours)
        assert relative(answered(mine), answered(right)) < NEAR and relative(answered(mine), before) > 1e-3
    with pytest.raises(UsageError, match="cannot be"):
        ours.weight = torch.zeros(3, 3)
    mine.model.layers[1].self_attn.num_heads = 2  # says nothing to a forward of transformers'
    assert relative(answered(mine), answered(right)) < NEAR
    with ktx.edit(mine.model.layers[0].self_attn, "kv_b_proj") as weight:
        weight.mul_(0.5)
        right.model.layers[0].self_attn.kv_b_proj.weight.mul_(0.5)
    assert relative(answered(mine), answered(right)) < NEAR
