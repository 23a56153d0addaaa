"""Layers that are computed before they are asked: nobody can tell, whatever happens between two of them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.kv import GrowingLayer, KVCache
from ktx.cache.paged import PagedCache
from ktx.kernels.cpu import ops
from ktx.ops.fusion import layer_group
from ktx.ops.fusion.layer import Layer
from ktx.ops.fusion.layer_group import GROUP_LAYERS, MAX_MISSES
from tests.families.test_families import IDS, Pair, load, logits
from tests.ops.test_fused_blocks import decode, modules, without

DEEP = {"num_hidden_layers": 11}
MADE = {
    "deepseek_v2": DEEP,
    "deepseek_v3": DEEP,
    "glm4_moe": DEEP,
    "llama": DEEP,
    "qwen2_moe": DEEP,
    "qwen3": DEEP | {"layer_types": ["full_attention"] * 11},
    "qwen3_moe": DEEP,
}


@pytest.fixture(scope="module", params=MADE)
def model(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp(request.param), request.param, "Q8_0", MADE[request.param]).model


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call computes."""
    found, really = [], layer_group.run_steps

    def counted(x, steps, outs, *args):
        found.append(len(outs))
        return really(x, steps, outs, *args)

    monkeypatch.setattr(layer_group, "run_steps", counted)
    return found


@pytest.fixture(autouse=True)
def trusted(request):
    if "model" in request.fixturenames:
        for layer in modules(request.getfixturevalue("model"), Layer):
            if layer.fused_group is not None:
                layer.fused_group.num_misses = layer.fused_group.num_unused = layer.fused_group.disabled_calls_left = 0


def one_by_one(model):
    return without(modules(model, Layer), "fused_group")


def test_a_token_is_one_call_and_a_long_piece_several(model, calls):
    cache = KVCache(model.config, None)
    logits(model, IDS[:, :40], past_key_values=cache)
    assert calls == []
    for at, count, expected in ((40, 1, [11]), (41, 4, [11]), (45, 30, [GROUP_LAYERS, 11 - GROUP_LAYERS])):
        calls.clear()
        logits(model, IDS[:, at : at + count], past_key_values=cache)
        assert calls == expected
    assert {layer.get_seq_length() for layer in cache.layers} == {75}


def test_the_same_bits_as_layer_by_layer(model):
    together = decode(model)
    with one_by_one(model):
        assert torch.equal(together, decode(model))


def test_off_by_variable_gives_the_same_bits(tmp_path, calls, monkeypatch):
    together = Pair(tmp_path, "qwen3_moe", "Q8_0", DEEP).model
    monkeypatch.setenv("KTX_FUSION", "off")
    alone = load(tmp_path, tmp_path / "model.gguf")
    assert all(layer.block is not None and layer.fused_group is None for layer in modules(alone, Layer))
    assert any(layer.fused_group is not None for layer in modules(together, Layer))
    for ids in (IDS[:, :1], IDS[:, :30], IDS):
        assert torch.equal(logits(together, ids), logits(alone, ids))
    calls.clear()
    decoded = decode(alone)
    assert calls == [] and torch.equal(decoded, decode(together)) and calls
    copied = copy.deepcopy(alone)
    assert all(layer.fused_group is None for layer in modules(copied, Layer)) and torch.equal(decode(copied), decoded)


def test_the_same_bits_on_pages(model, calls):
    def computed():
        cache, out = PagedCache(model.config, 8, None), []
        for past, count in ((0, 3), (3, 1), (4, 5), (9, 1)):
            spans = [SequenceSpan(0, past, count, [1]), SequenceSpan(1, past, count, [3])]
            batch = BatchMetadata(spans)
            ids = torch.cat([IDS[:, past : past + count], IDS[:, 50 + past : 50 + past + count]], 1)
            with cache.forward(batch):
                out.append(logits(model, ids, past_key_values=cache, position_ids=batch.position_ids))
        return torch.cat(out, 1)

    together = computed()
    assert calls == [GROUP_LAYERS, 11 - GROUP_LAYERS, 11] * 2
    with one_by_one(model):
        assert torch.equal(together, computed())


@pytest.mark.parametrize("way", ["another tensor", "in place"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_hook_makes_of_hidden_states_counts(model, way, mode):
    """Also where they are written to in place: the layers behind compute what was not foreseen."""
    push = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def steer(module, args, out):
        return out.add_(push) if way == "in place" else out + push

    def steered():
        cache = KVCache(model.config, None)
        with mode():
            out = [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        assert {layer.get_seq_length() for layer in cache.layers} == {3}
        return torch.cat(out, 1)

    plain = steered()
    handle = model.model.layers[4].register_forward_hook(steer)
    try:
        got = steered()
        with one_by_one(model):
            expected = steered()
    finally:
        handle.remove()
    assert torch.equal(got, expected) and not torch.equal(got, plain)


def test_a_hook_inside_the_fifth_layer_is_called(model):
    expected, called = decode(model, steps=2), []
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        handle = model.model.layers[4]._modules[name].register_forward_hook(lambda *_: called.append(1))
        got = decode(model, steps=2)
        handle.remove()
        assert len(called) == 4, name  # the prompt and three pieces
        assert (got - expected).norm() < 1e-5 * expected.norm()
        called.clear()


@pytest.fixture(scope="module")
def exact(model, tmp_path_factory):
    """The model with weights in f32 where a hook on all modules has keys expanded (MLA), or a gate computed, as
    transformers does: activations in eight bits would be rounded otherwise.
    """
    family = model.config.model_type
    if family not in ("deepseek_v2", "deepseek_v3", "qwen2_moe"):
        return model
    return Pair(tmp_path_factory.mktemp(f"{family}-f32"), family, "F32", MADE[family]).model


def test_a_hook_on_all_modules_is_called(exact):
    model = exact
    expected, called = decode(model, steps=2), []
    handle = register_module_forward_hook(lambda module, args, out: called.append(type(module).__name__))
    got = decode(model, steps=2)
    handle.remove()
    assert called.count("RMSNorm") >= 4 * 23  # two a layer and the last, at every call
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_every_layer_returns_its_own_hidden_states(model):
    def seen():
        cache, found = KVCache(model.config, None), []
        handles = [
            layer.register_forward_hook(lambda module, args, out: found.append(out.clone()))
            for layer in modules(model, Layer)
        ]
        logits(model, IDS[:, :5], past_key_values=cache)
        for handle in handles:
            handle.remove()
        return torch.stack(found)

    together = seen()
    with one_by_one(model):
        assert torch.equal(together, seen())


class Alone:
    """A script that calls layers by itself."""

    def __init__(self, model):
        self.model, self.cache = model, KVCache(model.config, None)
        self.hidden = model.model.embed_tokens(IDS[:, :2])
        self.tables = model.model.rotary_emb(self.hidden, torch.arange(2)[None])

    def __call__(self, number, hidden):
        return self.model.model.layers[number](
            hidden, position_embeddings=self.tables, past_key_values=self.cache, attention_mask=None
        )


@torch.no_grad()
def test_a_script_that_asks_for_one_layer_gets_one(model, calls):
    alone = Alone(model)
    outs = [alone(0, alone.hidden) for _ in range(MAX_MISSES + 2)]
    lengths = [layer.get_seq_length() for layer in alone.cache.layers]
    assert lengths == [2 * len(outs)] + [0] * 10
    assert calls == [11]  # from then on its cache is longer than the others'
    with one_by_one(model):
        again = Alone(model)
        assert all(torch.equal(out, again(0, again.hidden)) for out in outs)


def test_who_changes_hidden_states_every_time_is_not_run_ahead_of(model, calls, monkeypatch):
    """But for once in a while: the hook may be gone."""
    monkeypatch.setattr(layer_group, "DISABLED_CALLS", 6)
    handle = model.model.layers[4].register_forward_hook(lambda module, args, out: out * 1.0)
    decode(model, steps=5)
    assert len(calls) - calls.count(11 - GROUP_LAYERS) == MAX_MISSES and calls.count(11 - GROUP_LAYERS) == 7
    handle.remove()
    calls.clear()
    decode(model, steps=5)
    assert calls == [11 - GROUP_LAYERS] + [11] * 6


def test_who_keeps_hidden_states_keeps_no_others(model):
    kept, others = [], []
    handles = [
        model.model.layers[1].register_forward_hook(lambda module, args, out: kept.append(out)),
        model.model.layers[2].register_forward_hook(lambda module, args, out: others.append(weakref.ref(out))),
    ]
    cache = KVCache(model.config, None)
    gone = weakref.ref(cache)
    for i in range(3):
        logits(model, IDS[:, i : i + 1], past_key_values=cache)
    for handle in handles:
        handle.remove()
    del cache
    assert len(kept) == 3 and len(others) == 3 and gone() is None and all(other() is None for other in others)


@torch.no_grad()
def test_a_layer_that_is_left_out_or_asked_twice(model):
    def computed():
        alone = Alone(model)
        hidden = alone(1, alone(0, alone.hidden))
        twice = alone(3, hidden)  # the third is left out
        return alone(4, alone(3, twice)), [layer.get_seq_length() for layer in alone.cache.layers]

    got, lengths = computed()
    assert lengths == [2, 2, 0, 4, 2] + [0] * 6
    with one_by_one(model):
        assert torch.equal(got, computed()[0])


@torch.no_grad()
def test_another_cache_or_mask_is_heeded(model):
    alone, other = Alone(model), Alone(model)
    first = alone(0, alone.hidden)
    alone.cache, kept = other.cache, alone.cache
    second = alone(1, first)
    assert [kept.layers[i].get_seq_length() for i in (0, 1)] == [2, 0]
    assert [other.cache.layers[i].get_seq_length() for i in (0, 1)] == [0, 2]
    with one_by_one(model):
        again = Alone(model)
        assert torch.equal(second, again(1, again(0, again.hidden)))
    third = Alone(model)
    first = third(0, third.hidden)
    blind = torch.tensor([[[[True, False], [True, False]]]])
    masked = model.model.layers[1](
        first, position_embeddings=third.tables, past_key_values=third.cache, attention_mask=blind
    )
    assert not torch.equal(masked, second)


def test_layers_of_another_kind_begin_a_stretch(tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"] * 2
    config = {
        "num_hidden_layers": 8,
        "layer_types": kinds,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 0,
    }
    model = Pair(tmp_path, "qwen3", "Q8_0", config).model
    assert [layer.fused_group and len(layer.fused_group.layers) for layer in modules(model, Layer)] == [
        None, 3, None, None, None, 3, None, None,
    ]  # fmt: skip
    together = decode(model)
    with one_by_one(model):
        assert torch.equal(together, decode(model))


def numbers(model):
    return {step.step_id for layer in modules(model, Layer) if layer.fused_group for step in layer.fused_group.steps}


def test_a_copied_body_is_one_of_its_own(model):
    def hidden(body):
        cache = KVCache(model.config, None)
        with torch.inference_mode():
            return [body(input_ids=IDS[:, i : i + 1], past_key_values=cache).last_hidden_state for i in range(2)]

    expected = hidden(model.model)
    twin = copy.deepcopy(model.model)
    assert numbers(twin) and not numbers(twin) & numbers(model)
    assert all(map(torch.equal, hidden(twin), expected))
    del twin
    gc.collect()
    assert all(map(torch.equal, hidden(model.model), expected))


def test_steps_go_with_their_model(tmp_path):
    model = Pair(tmp_path, "qwen3_moe", "Q8_0").model
    decode(model)
    step = modules(model, Layer)[0].fused_group.steps[0].step_id
    weights = weakref.ref(next(m for m in model.modules() if type(m).__name__ == "Experts"))
    del model
    gc.collect()
    assert weights() is None
    with pytest.raises(RuntimeError, match=f"there is no step {step}"):
        ops.run_steps(torch.zeros(1, 1, 256), [torch.zeros(1, 1, 256)], [step], [])


def test_a_call_that_does_not_fit_says_so(model):
    steps = [step.step_id for step in modules(model, Layer)[0].fused_group.steps]
    width = model.config.hidden_size
    x, out = torch.zeros(1, 1, width), torch.zeros(1, 1, width)
    for wrong, said in (
        ((torch.zeros(1, width), [out], steps[:2], []), "x must be contiguous float32"),
        ((x.half(), [out], steps[:2], []), "x must be contiguous float32"),
        ((x, [torch.zeros(1, 2, width)], steps[:2], []), "shape and type of x"),
        ((x, [out], steps[:3], []), "3 steps"),
        ((x, [], [], []), "0 steps"),
        ((x, [out], steps[:2], []), "keep 2 tensors, found 0"),
        ((x, [out], steps[:2], [x, x]), "cos and sin are needed"),
        ((torch.zeros(1, 1, 32), [torch.zeros(1, 1, 32)], steps[:2], []), "a step takes"),
    ):
        with pytest.raises(RuntimeError, match=said):
            ops.run_steps(*wrong)


def test_a_cache_grows_by_what_was_asked_for(model):
    cache = KVCache(model.config, None)
    for i in range(300):  # beyond the first buffers
        logits(model, IDS[:, i % 60 : i % 60 + 1], past_key_values=cache, logits_to_keep=1)
    assert {layer.get_seq_length() for layer in cache.layers if isinstance(layer, GrowingLayer)} == {300}
