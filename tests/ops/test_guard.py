"""What is patched, exchanged or edited on a loaded model counts, in a prompt and for each token behind it, as it does
in transformers; or it is refused by name.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import ktx
from ktx.cache.kv import KVCache
from ktx.errors import UsageError
from ktx.ops.base import Operator
from ktx.ops.float_views import Dequantized
from ktx.ops.fusion.layer import Layer
from ktx.ops.guard import valid_fast_path
from ktx.ops.linear import Linear
from tests.families.test_families import IDS, Pair, load, logits, relative
from tests.support.tiny_models import tiny

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "glm4_moe", "phi3"]
NEAR = 2e-5
PROMPT = 20


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    tiny(request.param).save_pretrained(made)
    return request.param, made


@pytest.fixture(scope="module")
def shared(folder):
    """A model that each test leaves as it was."""
    return load(folder[1], None)


@pytest.fixture
def two(folder):
    """transformers' model and ours, of the same weights, after a forward."""
    mine = load(folder[1], None)
    decode(mine)
    return tiny(folder[0]), mine


def decode(model, steps=4):
    """Logits of a prompt, of single tokens behind it, and of three at once."""
    cache = KVCache(model.config, None) if hasattr(model, "ktx") else None
    out = []
    with torch.no_grad():
        ends = [0, *range(PROMPT, PROMPT + steps + 1), PROMPT + steps + 3]
        for first, last in itertools.pairwise(ends):
            more = {} if cache is None else {"past_key_values": cache}
            made = model(IDS[:, first:last], use_cache=True, **more)
            cache = made.past_key_values
            out.append(made.logits)
    return torch.cat(out, 1)


def check(two, change, changes=True):
    """The same change to both: the same logits. `changes`: it does change them."""
    right, mine = two
    before = decode(right)
    with torch.no_grad():
        for model in two:
            change(model)
    expected = decode(right)
    assert not changes or relative(expected, before) > 100 * NEAR
    assert relative(decode(mine), expected) < NEAR


def last(model):
    return model.model.layers[-1]


def norms(model):
    return [path for path, module in model.named_modules() if "norm" in path.rpartition(".")[2] and path]


def paths(model):
    """Modules of the last layer whose results a patch can halve."""
    found = [path for path, module in last(model).named_modules() if path]
    return [path for path in found if not isinstance(last(model).get_submodule(path), nn.ModuleList)]


def patched(module, by=0.5):
    before = module.forward

    def forward(*args, **words):
        out = before(*args, **words)
        return (out[0] * by, *out[1:]) if isinstance(out, tuple) else out * by

    module.forward = forward


def test_a_patched_forward_counts(folder, shared):
    """On every module of a layer that transformers calls as a module too."""
    right = tiny(folder[0])
    usual, checked = decode(shared), 0
    for path in paths(right):
        theirs = last(right).get_submodule(path)
        calls = []
        handle = theirs.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        decode(right, 1)
        handle.remove()
        ours = dict(last(shared).named_modules()).get(path)
        if not calls or not isinstance(ours, Operator):
            continue
        checked += 1
        for module in (theirs, ours):
            patched(module)
        assert relative(decode(shared), decode(right)) < NEAR, path
        for module in (theirs, ours):
            del module.forward
    assert checked > 5
    assert torch.equal(decode(shared), usual)
    assert all(
        valid_fast_path(layer) is not None for layer in shared.modules() if isinstance(layer, Layer) and layer.block
    )


def test_a_norm_that_is_edited(two):
    for path in norms(two[0]):
        for change in (
            lambda m: m.weight.mul_(0.8),
            lambda m: m.weight.data.add_(0.2),
            lambda m: setattr(m.weight, "data", torch.full_like(m.weight, 0.4)),
            lambda m: setattr(m, "weight", nn.Parameter(torch.full_like(m.weight, 0.7), requires_grad=False)),
            lambda m: m.weight.__setitem__(3, 2.0),
            lambda m: m.load_state_dict({"weight": torch.full_like(m.weight, 0.6)}),
            lambda m: nn.init.constant_(m.weight, 0.9),
        ):
            with torch.no_grad():
                for model in two:
                    change(model.get_submodule(path))
        check(two, lambda model, path=path: model.get_submodule(path).weight.mul_(1.5))


def test_settings(two):
    """Scalars that modules of both have by the same name."""
    right, mine = two
    changed = 0
    for path, module in right.named_modules():
        ours = mine.get_submodule(path) if path in dict(mine.named_modules()) else None
        for name, value in (
            ("variance_epsilon", 0.3),
            ("eps", 0.3),
            ("scaling", 0.05),
            ("top_k", 1),
            ("norm_topk_prob", False),
            ("routed_scaling_factor", 0.7),
        ):
            if name in module.__dict__ and isinstance(ours, Operator) and "rotary" not in path:
                check(
                    two,
                    lambda model, path=path, name=name, value=value: setattr(model.get_submodule(path), name, value),
                    False,
                )
                changed += 1
    assert changed > 3


def routers(model):
    return [
        path
        for path, module in model.named_modules()
        if path.endswith(("mlp.gate", "mlp.router")) and isinstance(getattr(module, "weight", None), nn.Parameter)
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.mul_(-1),
        lambda m: m.weight.data.mul_(-1),
        lambda m: m.weight.data[:4].mul_(-2),
        lambda m: setattr(m.weight, "data", -m.weight.detach()),
        lambda m: setattr(m, "weight", nn.Parameter(-m.weight.detach(), requires_grad=False)),
        lambda m: m.weight.__setitem__(1, 0.5),
    ],
    ids=["mul_", "data.mul_", "data[:4]", "data =", "Parameter", "weight[1]"],
)
def test_a_router_that_is_edited(two, change):
    for path in routers(two[0]):
        check(two, lambda model, path=path: change(model.get_submodule(path)))


def test_buffers_and_sinks(two):
    for path, module in two[0].named_modules():
        for name in ("e_score_correction_bias", "sinks"):
            if isinstance(tensor := getattr(module, name, None), torch.Tensor):
                more = torch.linspace(-1, 1, tensor.numel())
                check(
                    two,
                    lambda m, path=path, name=name, more=more: getattr(m.get_submodule(path), name).add_(more),
                    False,
                )
    check(two, lambda model: model.model.rotary_emb.inv_freq.mul_(0.5))
    check(two, lambda model: model.model.rotary_emb.inv_freq.data.mul_(3.0))


def test_data_that_is_assigned_is_packed(two):
    """As adapters are merged."""
    right, mine = two
    for path in [*linears(mine), "model.embed_tokens"]:
        values = right.get_submodule(path).weight.detach() * 1.5 - 0.01
        for model in two:
            model.get_submodule(path).weight.data = values.clone()
        assert relative(decode(mine), decode(right)) < NEAR, path
    with pytest.raises(UsageError, match="ktx.edit"):
        mine.lm_head.weight[3].data = values[3]


def linears(model):
    """Linear layers by path, one of each name."""
    found = {path.rpartition(".")[2]: path for path, module in model.named_modules() if isinstance(module, Linear)}
    return list(found.values())


def packed(path, values):
    """Assigns ours, and transformers' by hand."""

    def change(model):
        module = model.get_submodule(path)
        module.weight = nn.Parameter(values.clone(), requires_grad=False)

    return change


def test_a_linear_whose_weight_is_assigned(two):
    right, mine = two
    for path in linears(mine):
        weight = right.get_submodule(path).weight
        check(two, packed(path, (weight * 1.25 + 0.01).detach()))


def test_a_linear_in_its_place(two):
    """torch's own, by ktx.dequantize, computes the same, and its weights may be written to."""
    right, mine = two
    for path in linears(mine):
        if path == "lm_head" and right.config.tie_word_embeddings:
            continue  # torch's own has a matrix of its own
        parent, _, name = path.rpartition(".")
        plain = ktx.dequantize(mine.get_submodule(path))
        assert type(plain) is nn.Linear and torch.equal(plain.weight, right.get_submodule(path).weight)
        setattr(mine.get_submodule(parent), name, plain)
        check(two, lambda model, path=path: model.get_submodule(path).weight[:, 1::2].mul_(0.5))


def test_edits_of_a_linear_and_an_embedding(two):
    right, mine = two
    for path in [*linears(mine), "model.embed_tokens"]:
        with ktx.edit(mine.get_submodule(path)) as weight:
            weight += torch.outer(torch.linspace(-0.1, 0.1, weight.shape[0]), torch.ones(weight.shape[1]))
            weight[-1] *= 2
        with torch.no_grad():
            right.get_submodule(path).weight.copy_(weight)
        assert relative(decode(mine), decode(right)) < NEAR, path


def test_a_block_that_raises_edits_nothing(two):
    module = last(two[1]).get_submodule(next(p for p, m in last(two[1]).named_modules() if isinstance(m, Linear)))
    parts = module.parts
    with pytest.raises(ZeroDivisionError), ktx.edit(module) as weight:
        weight.zero_()
        _ = 1 / 0
    assert module.parts is parts


def stacked(right, path, name):
    """transformers' matrices [experts, n, k] of a projection, to be written to."""
    module = right.get_submodule(path)
    if name == "down_proj":
        return module.down_proj.transpose(1, 2) if getattr(module, "is_transposed", False) else module.down_proj
    both = module.gate_up_proj
    if getattr(module, "is_transposed", False):  # gpt-oss interleaves them
        return both.transpose(1, 2)[:, ("gate_proj", "up_proj").index(name) :: 2]
    half = both.shape[1] // 2
    return both[:, :half] if name == "gate_proj" else both[:, half:]


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_that_is_edited(two, name):
    right, mine = two
    for path, module in mine.named_modules():
        if not path.endswith("mlp.experts"):
            continue
        theirs = stacked(right, path, name)
        for number in range(module.num_experts):
            with ktx.edit(module, name, expert=number) as weight:
                assert torch.equal(weight, theirs[number])
                weight *= 1 + 0.1 * number
            with torch.no_grad():
                theirs[number] = weight
        assert relative(decode(mine), decode(right)) < NEAR


def test_the_expansion_of_a_latent_is_edited(tmp_path):
    for family in ("deepseek_v2", "deepseek_v3"):
        tiny(family).save_pretrained(tmp_path / family)
        right, mine = tiny(family), load(tmp_path / family, None)
        decode(mine)
        theirs = last(right).self_attn.kv_b_proj.weight
        with ktx.edit(last(mine).self_attn, "kv_b_proj") as weight, torch.no_grad():
            assert torch.equal(weight, theirs)
            weight *= torch.linspace(0.5, 1.5, weight.shape[1])
            theirs.copy_(weight)
        assert relative(decode(mine), decode(right)) < NEAR
        long = [model(IDS[:, :130]).logits for model in (mine, right)]  # where latents are expanded
        assert relative(*long) < NEAR


WRITES = {
    "mul_": lambda w: w.mul_(2),
    "part of data": lambda w: w.data[1:3].mul_(2),
    "row of data": lambda w: w.data.__setitem__(3, 0.0),
    "view of data": lambda w: w.data.t_(),
    "detach": lambda w: w.detach().zero_(),
    "item": lambda w: w.__setitem__(3, 0.0),
    "row": lambda w: w[3].zero_(),
    "view": lambda w: w.view(-1)[:5].fill_(1.0),
    "t": lambda w: w.t().add_(1),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
    "+=": lambda w: w.__iadd__(1),
    "out": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    "init": lambda w: nn.init.zeros_(w),
    "numpy": lambda w: w.numpy().__setitem__(3, 0.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_packed_weight_refuses_to_be_written(shared, write):
    before = decode(shared, 1)
    for module in (
        last(shared).get_submodule("self_attn.o_proj") if hasattr(last(shared), "self_attn") else shared.lm_head,
        shared.get_input_embeddings(),
    ):
        with torch.no_grad(), pytest.raises((UsageError, ValueError), match="ktx.edit|read-only"):
            write(module.weight)
    assert torch.equal(decode(shared, 1), before)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.mul_(0.5),
        lambda w: w.data.add_(torch.full_like(w, 0.01)),
        lambda w: torch.mul(w.data, 0.5, out=w.data),
        lambda w: w.data.index_fill_(0, torch.tensor([2]), 0.1),
        lambda w: setattr(w, "data", w.data + 0.01),
    ],
    ids=["mul_", "add_", "out", "index_fill_", "assigned"],
)
def test_the_data_of_a_packed_weight_can_be_written_as_a_whole(folder, write):
    right, mine = tiny(folder[0]), load(folder[1], None)
    for path in ("lm_head", "model.embed_tokens"):
        with torch.no_grad():
            for model in (right, mine):
                write(model.get_submodule(path).weight)
        assert torch.equal(mine.get_submodule(path).weight + 0, right.get_submodule(path).weight)
    assert relative(decode(mine, 1), decode(right, 1)) < NEAR


def test_a_packed_weight_can_be_read(folder, shared):
    right, mine = tiny(folder[0]).lm_head.weight.detach(), shared.lm_head.weight
    assert type(mine) is Dequantized and mine.shape == right.shape and mine.dtype == right.dtype
    assert torch.equal(mine + 0, right) and torch.equal(mine[7], right[7]) and mine.tolist() == right.tolist()
    assert torch.equal(torch.tensor(mine.numpy()), right) and type(mine * 2) is torch.Tensor
    x = torch.randn(3, right.shape[1], generator=torch.Generator().manual_seed(1))
    assert relative(nn.functional.linear(x, mine), nn.functional.linear(x, right)) < 1e-6
    assert torch.equal(copy.deepcopy(mine), right) and torch.equal(mine.data.clone(), right)
    assert f"{mine}".startswith("Dequantized(") and float(mine.norm()) == float(right.norm())


def test_tied_weights_change_together(tmp_path):
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    for owner in ("model.embed_tokens", "lm_head"):
        right, mine = tiny("llama", tie_word_embeddings=True), load(tmp_path, None)
        with ktx.edit(mine.get_submodule(owner)) as weight, torch.no_grad():
            weight *= 0.5
            right.get_submodule(owner).weight.mul_(0.5)
        assert relative(decode(mine), decode(right)) < NEAR
        values = torch.full_like(weight, 0.01) + 0.5 * weight.flip(0)
        for model in (right, mine):
            model.get_submodule(owner).weight = nn.Parameter(values.clone(), requires_grad=False)
        assert relative(decode(mine), decode(right)) < NEAR


def test_quantised_matrices_that_are_edited(tmp_path):
    from tests.support.tiny_chat_model import write_model

    folder = write_model(tmp_path, "qwen3_moe", "Q4_K")
    mine = load(folder, folder / "model.gguf")
    module = last(mine).self_attn.o_proj
    for dtype, kind in ((None, "F16"), ("Q8_0", "Q8_0"), ("F32", "F32")):
        with ktx.edit(module, dtype=dtype) as weight:
            weight *= 1.01
        assert module.parts[0].qtype.name == kind and relative(module.weight, weight) < 2e-2
    experts = last(mine).mlp.experts
    with ktx.edit(experts, "up_proj", expert=1) as weight:
        weight.zero_()
    with ktx.edit(experts, "up_proj", expert=1) as weight:
        assert not weight.any() and experts.weights["up_proj"].qtype.name == "Q4_K"
    with ktx.edit(experts, "up_proj", expert=2) as weight:
        assert weight.any()


@pytest.mark.parametrize(
    "ask,said",
    [
        (lambda m: ktx.edit(last(m).mlp.experts), "experts have gate_proj up_proj down_proj, not 'weight'"),
        (lambda m: ktx.edit(last(m).mlp.experts, "up_proj", expert=8), "expert=8, this module has experts 0 to 7"),
        (lambda m: ktx.edit(last(m).mlp.experts, "up_proj"), "expert=None, this module has experts"),
        (lambda m: ktx.edit(last(m).self_attn.q_proj, "bias"), "has one matrix, `weight`"),
        (lambda m: ktx.edit(last(m).input_layernorm), "has no packed weights"),
        (lambda m: ktx.edit(last(m).self_attn.q_proj, dtype="Q9"), "'Q9' is not a weight type"),
        (lambda m: ktx.edit(last(m).self_attn, "kv_b_proj"), "has no packed weights"),
        (lambda m: ktx.dequantize(last(m).mlp.experts), "nothing to dequantize"),
        (lambda m: setattr(last(m).self_attn.q_proj, "weight", torch.zeros(3, 3)), r"cannot be \[3, 3\]"),
        (lambda m: setattr(m.model.embed_tokens, "weight", "zeros"), "takes a tensor, not str"),
    ],
)
def test_what_cannot_be_edited_is_said(tmp_path, ask, said):
    tiny("qwen3_moe").save_pretrained(tmp_path)
    mine = load(tmp_path, None)
    with pytest.raises(UsageError, match=said):
        made = ask(mine)
        with made:
            pass


def test_replaced_children_of_other_kinds(two):
    """An activation that was put in the place of another."""
    right, _mine = two
    for path, module in right.named_modules():
        if (
            path.endswith((".mlp", ".shared_expert", ".shared_experts"))
            and isinstance(getattr(module, "act_fn", None), nn.Module)
            and hasattr(module, "down_proj")
        ):
            check(two, lambda model, path=path: setattr(model.get_submodule(path), "act_fn", nn.Tanh()))


def test_a_hook_that_comes_and_goes_leaves_the_same(shared):
    before = decode(shared)
    for module in list(shared.modules()):
        if isinstance(module, Operator):
            module.note = "seen"
            del module.note
    assert torch.equal(decode(shared), before)
    assert logits(shared, IDS[:, :3]).shape[1] == 3


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_numpy_writes_to_a_router_count_with_a_word(tmp_path, family):
    """As docs/research.md says: nothing counts what numpy writes, so somebody has to."""
    pair = Pair(tmp_path, family, "F32", {})
    for model in (pair.model, pair.reference):
        mlp = model.model.layers[1].mlp
        router = mlp.gate if hasattr(mlp, "gate") else mlp.router
        router.weight.data.numpy()[:] *= -1
        router.weight.data.add_(0)
    for tokens in (20, 1):
        assert relative(pair.model(IDS[:, :tokens]).logits, pair.reference(IDS[:, :tokens]).logits) < 1e-4
