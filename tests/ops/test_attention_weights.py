"""Attention weights as transformers' eager attention gives them, however they are asked for, and attention functions of
a user's own.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ktx.cache.kv import KVCache
from ktx.engine.sampler import SamplingParams
from ktx.errors import UsageError
from ktx.ops import attention_weights
from ktx.ops.attention import Attention
from ktx.ops.fusion import fused, layer_group
from ktx.transformers_compat import cache_argument
from tests.families.test_families import IDS, Pair, load, relative
from tests.ops.test_fused_blocks import modules
from tests.support.tiny_chat_model import write_model
from tests.support.tiny_models import tiny

FAMILIES = {
    "llama": {"num_hidden_layers": 9},
    "qwen3_moe": {},
    "glm4_moe": {},
    "mixtral": {"sliding_window": 8},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "gpt_oss": {},
    "qwen3_next": {},
    "phi3": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    made = Pair(tmp_path_factory.mktemp(request.param), request.param, "F32", FAMILIES[request.param])
    made.reference.set_attn_implementation("eager")
    return made


@pytest.fixture(autouse=True)
def as_it_was(request):
    """Each test begins with the implementation that the model was made with."""
    yield
    if "pair" in request.fixturenames:
        for model in (request.getfixturevalue("pair").model, request.getfixturevalue("pair").reference):
            model.config._output_attentions = False
        request.getfixturevalue("pair").model.set_attn_implementation("ktx")


def collected(model, cache=None, **options):
    """Weights of a prompt, of two tokens, and of three at once, and all logits."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    weights, logits = [], []
    for at, end in ((0, 20), (20, 21), (21, 22), (22, 25)):
        out = model(IDS[:, at:end], **cache_argument(model, cache), **options)
        weights.append(out.attentions)
        logits.append(out.logits)
    return weights, torch.cat(logits, 1)


def same(found, wanted):
    """Tuples of weights, forward by forward and layer by layer."""
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert len(mine) == len(theirs) > 0
        for x, y in zip(mine, theirs, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            assert (x - y).abs().max() < 1e-4


@torch.no_grad()
def test_in_the_call(pair):
    (found, logits), (wanted, expected) = (collected(m, output_attentions=True) for m in (pair.model, pair.reference))
    same(found, wanted)
    assert relative(logits, expected) < 1e-4
    cache = DynamicCache(config=pair.model.config)
    assert pair.model(IDS[:, :5], **cache_argument(pair.model, cache)).attentions is None


@torch.no_grad()
def test_by_the_implementation(pair):
    """`set_attn_implementation("eager")`: attention modules return weights, whoever calls them; with the call's flag
    they are collected.
    """
    pair.model.set_attn_implementation("eager")
    same(*(collected(model, output_attentions=True)[0] for model in (pair.model, pair.reference)))
    seen = []
    path = next(name for name, module in pair.reference.named_modules() if name.endswith("self_attn"))
    for model in (pair.model, pair.reference):
        handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out[1]))
        collected(model)
        handle.remove()
    half = len(seen) // 2
    same([seen[:half]], [seen[half:]])
    pair.model.set_attn_implementation("ktx")
    assert collected(pair.model)[0] == [None] * 4


@torch.no_grad()
@pytest.mark.parametrize("how", ["model", "module"])
def test_by_the_configuration(pair, how):
    """Set by hand, as older programs do; a module's configuration is its model's."""
    path = next(name for name, module in pair.reference.named_modules() if name.endswith("self_attn"))
    config = pair.model.config if how == "model" else pair.model.get_submodule(path).config
    with pytest.raises(ValueError, match="eager"):  # transformers' own word on what kernels cannot
        config.output_attentions = True
    config._attn_implementation = "eager"
    assert pair.model.config._attn_implementation == "eager"
    config.output_attentions = pair.reference.config.output_attentions = True
    same(*(collected(model)[0] for model in (pair.model, pair.reference)))


@torch.no_grad()
@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 2}])
def test_in_generate(pair, how):
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "output_attentions": True, "return_dict_in_generate": True}
    found, wanted = (model.generate(IDS[:, :12], **asked, **how) for model in (pair.model, pair.reference))
    assert torch.equal(found.sequences, wanted.sequences)
    same(found.attentions, wanted.attentions)


@torch.no_grad()
def test_left_padding(pair):
    """Rows that are padding too: a query that sees nothing has the same weight for each key."""
    if pair.model.config.model_type == "qwen3_next":
        pytest.skip("states take no padding")
    ids = torch.stack([IDS[0, :12], IDS[0, 20:32]])
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    found, wanted = (
        model(ids, attention_mask=mask, output_attentions=True).attentions for model in (pair.model, pair.reference)
    )
    same([found], [wanted])


class Halved(DynamicCache):
    """transformers' own, which stores what f16 holds."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.half().float(), value_states.half().float(), *args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_caches_of_ours(pair, kind):
    if pair.model.config.model_type in ("gpt_oss", "mixtral"):
        pytest.skip("it keeps all keys of layers that slide")
    found, _ = collected(pair.model, KVCache(pair.model.config, kind), output_attentions=True)
    stock = (Halved if kind == "f16" else DynamicCache)(config=pair.reference.config)
    wanted, _ = collected(pair.reference, stock, output_attentions=True)
    bound = {"f32": 1e-4, "f16": 2e-3, "q8_0": 3e-2}[kind]
    if kind == "f16" and pair.model.config.model_type == "qwen3_moe":
        bound = 4e-3  # norms of queries and keys make scores large, which are products of bf16 where the CPU has those
    for mine, theirs in zip(found, wanted, strict=True):
        assert all((x - y).abs().max() < bound for x, y in zip(mine, theirs, strict=True))


@torch.no_grad()
def test_a_static_cache(pair):
    if pair.model.config.model_type == "qwen3_next":
        pytest.skip("transformers has no static states for it")
    found, wanted = (
        collected(model, StaticCache(config=model.config, max_cache_len=32), output_attentions=True)[0]
        for model in (pair.model, pair.reference)
    )
    same(found, wanted)


@torch.no_grad()
def test_what_was_seen_does_not_slow_what_follows(pair, monkeypatch):
    """Weights cost what they cost while they are wanted: afterwards the fused steps are back."""
    steps = []
    for place in (layer_group, fused):
        really = place.run_steps

        def counted(x, made, outs, *attends, really=really):
            steps.append((len(made), bool(attends)))
            return really(x, made, outs, *attends)

        monkeypatch.setattr(place, "run_steps", counted)
    plain = collected(pair.model)[1]
    before, _ = list(steps), steps.clear()
    collected(pair.model, output_attentions=True)
    while_seen, _ = list(steps), steps.clear()
    pair.model.set_attn_implementation("eager")
    collected(pair.model)
    pair.model.set_attn_implementation("ktx")
    steps.clear()
    for _ in range(40):  # a stretch rests for a while after results that nobody asked for
        again = collected(pair.model)[1]
    assert steps[-len(before) :] == before and torch.equal(again, plain)
    if any(module.block for module in modules(pair.model, Attention)):
        assert before and not any(attends for _, attends in while_seen)


@torch.no_grad()
def test_a_function_of_the_users_own(pair):
    """Registered with transformers and chosen by name: it is given what transformers gives it, and what it returns
    counts.
    """
    heard = []

    def sharpened(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        heard.append(
            (query.shape, key.shape, value.shape, attention_mask is None, scaling, kwargs.get("sliding_window"))
        )
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * (scaling * 2)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("sharpened", sharpened)
    plain = collected(pair.model)[1]
    results = []
    for model in (pair.model, pair.reference):
        before = model.config._attn_implementation
        model.set_attn_implementation("sharpened")
        results.append(collected(model, output_attentions=True))
        model.set_attn_implementation(before)
    (found, logits), (wanted, expected) = results
    half = len(heard) // 2
    assert heard[:half] == heard[half:] and half
    same(found, wanted)
    assert relative(logits, expected) < 1e-4 and relative(logits, plain) > 1e-3
    assert torch.equal(collected(pair.model)[1], plain)


@torch.no_grad()
def test_one_module_by_itself(pair):
    """A program that calls an attention module and asks it for weights."""
    path = [name for name, module in pair.reference.named_modules() if name.endswith("self_attn")][-1]
    results = []
    for model in (pair.model, pair.reference):
        body = model.get_decoder()
        hidden = body.embed_tokens(IDS[:, :9])
        given = {
            "hidden_states": hidden,
            "position_embeddings": body.rotary_emb(hidden, torch.arange(9)[None]),
            "attention_mask": torch.zeros(1, 1, 9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), -1e30),
        }
        results.append(model.get_submodule(path)(**given, output_attentions=True))
    assert relative(results[0][0], results[1][0]) < 1e-4
    same([results[0][1:2]], [results[1][1:2]])


def test_copies_choose_for_themselves(tmp_path):
    """A copy's modules go by the copy's configuration, and what is set on a module's is set on its model's."""
    body = load(write_model(tmp_path / "llama", "llama"), None).get_decoder()
    config, own = body.config, [module.config for module in body.modules() if isinstance(module, Attention)]
    assert own
    for other, configs in (copy.deepcopy((config, own)), pickle.loads(pickle.dumps((config, own)))):
        assert other is not config
        other._attn_implementation = "eager"
        assert config._attn_implementation == "ktx"
        for one in configs:
            assert one._attn_implementation == "ktx" and one.hidden_size == config.hidden_size
            one._attn_implementation = "sdpa"
            assert other._attn_implementation == "sdpa" and config._attn_implementation == "ktx"


def test_it_is_said_once(tmp_path, caplog):
    model = load(write_model(tmp_path / "qwen3", "qwen3"), None)
    attention_weights._warn_once.cache_clear()
    with torch.no_grad():
        for _ in range(2):
            assert len(model(IDS[:, :6] % 100, output_attentions=True).attentions) == model.config.num_hidden_layers
    assert caplog.text.count("in addition to the kernel's results") == 1


@torch.no_grad()
def test_a_module_that_has_none_says_so(tmp_path, monkeypatch):
    """Attention that stays transformers' own behind an operator: with its kernel there are no weights, with eager there
    are.
    """
    from ktx.ops import attention

    monkeypatch.setattr(attention, "unsupported_requirements", lambda module: ["positions"])
    model = load(write_model(tmp_path / "llama", "llama"), None)
    model.set_attn_implementation("sdpa")
    ids = IDS[:, :6] % 100
    with pytest.raises(UsageError, match="returned no attention weights.*set_attn_implementation\\('eager'\\)"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    assert all(weights.shape[2:] == (6, 6) for weights in model(ids, output_attentions=True).attentions)


def test_an_engine_answers_whatever_was_chosen_and_refuses_a_function_that_reads_no_pages(tmp_path):
    import ktx

    model, _ = ktx.load(write_model(tmp_path / "qwen3", "qwen3"), progress=False)
    prompt, once = [5, 6, 7, 8, 9, 10], SamplingParams(temperature=0, max_new_tokens=5)

    def answer():
        with model.ktx.engine(max_batch_size=1, kv_cache_tokens=512) as engine:
            return [event for _, event in engine.generate([prompt], once)]

    plain = [getattr(event, "text", None) for event in answer()]
    model.set_attn_implementation("eager")
    assert [getattr(event, "text", None) for event in answer()] == plain
    AttentionInterface.register("of_a_user", lambda *args, **kwargs: None)
    model.set_attn_implementation("of_a_user")
    with pytest.raises(Exception, match="cannot read the paged KV cache"):
        answer()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_chosen_when_loading(tmp_path, family):
    """The same as `set_attn_implementation` after it, in what is read from a pickle too."""
    tiny(family).save_pretrained(tmp_path)
    calls = []

    def mine(module, query, key, value, mask, scaling=None, **kwargs):
        calls.append(query.shape)
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)

    AttentionInterface.register("mine_when_loading", mine)
    usual = load(tmp_path, None)
    if family == "gpt_oss":
        with pytest.raises(UsageError, match="'sdpa': GptOssForCausalLM does not support"):  # as in transformers
            load(tmp_path, None, attn_implementation="sdpa")
    for name in ("eager", *(["sdpa"] if family != "gpt_oss" else []), "ktx", "mine_when_loading"):
        found = load(tmp_path, None, attn_implementation=name, self_test=name != "mine_when_loading")
        usual.set_attn_implementation(name)
        again = pickle.loads(pickle.dumps(found))
        assert found.config._attn_implementation == again.config._attn_implementation == name
        calls.clear()
        ours = collected(found, output_attentions=True) if name == "eager" else (None, found(IDS[:, :9]).logits)
        assert bool(calls) == (name == "mine_when_loading")
        theirs = collected(usual, output_attentions=True) if name == "eager" else (None, usual(IDS[:, :9]).logits)
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(again(IDS[:, :9]).logits, usual(IDS[:, :9]).logits)
        if name == "eager":
            same(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eagre", "'eagre' is not an attention function registered with transformers.*did you mean 'eager'"),
        ("", "'' is not an attention function"),
        (3, "3 is not an attention function"),
        ("flash_attention_2", "flash_attention_2"),
    ],
)
def test_an_implementation_that_is_not_there(tmp_path, name, words):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=words):
        load(tmp_path, None, attn_implementation=name)
