"""Modules that compute in one kernel call: the same numbers as child by child, and only while the children are their
own.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from ktx.cache.kv import GrowingLayer, KVCache
from ktx.ops.attention import Attention
from ktx.ops.fusion.layer import Layer
from ktx.ops.mla import MLA
from ktx.ops.moe import MoE
from tests.families.test_families import IDS, Pair, logits, relative

FUSED = {  # the modules of a family that have a kernel of their own
    "deepseek_v2": (MLA, MoE),
    "deepseek_v3": (MLA, MoE),
    "glm4_moe": (Attention, MoE),
    "gpt_oss": (Attention,),
    "llama": (Attention,),
    "minimax_m2": (Attention, MoE),
    "mixtral": (Attention, MoE),
    "qwen2_moe": (Attention, MoE),
    "qwen3": (Attention,),
    "qwen3_moe": (Attention, MoE),
}


@pytest.fixture(scope="module", params=FUSED)
def fused(request, tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp(request.param), request.param, "F32")
    return pair.model, FUSED[request.param]


def modules(model, kinds):
    return [m for m in model.modules() if isinstance(m, kinds)]


@contextmanager
def without(found, name):
    """While an attribute of modules is None."""
    kept = [getattr(module, name) for module in found]
    try:
        for module in found:
            setattr(module, name, None)
        yield
    finally:
        for module, value in zip(found, kept, strict=True):
            setattr(module, name, value)


def decode(model, cache=None, steps=6, start=20):
    """Logits of single tokens, and of three at once, after a prompt."""
    cache = KVCache(model.config, None) if cache is None else cache
    logits(model, IDS[:, :start], past_key_values=cache)
    pieces = [IDS[:, start + i : start + i + 1] for i in range(steps)] + [IDS[:, start + steps : start + steps + 3]]
    return torch.cat([logits(model, piece, past_key_values=cache) for piece in pieces], 1)


def test_one_call_is_child_by_child(fused):
    model, kinds = fused
    found = modules(model, kinds)
    assert found and all(module.block for module in found)
    together = decode(model)
    with without(found, "block"):
        apart = decode(model)
    assert relative(together, apart) < 2e-6


def test_a_hook_on_a_child_is_called(fused):
    model, kinds = fused
    expected, called = decode(model, steps=1), []
    for module in modules(model, kinds):
        child = next(c for name, c in module.named_children() if name in ("o_proj", "gate"))
        handle = child.register_forward_hook(lambda *_: called.append(1))
        assert relative(decode(model, steps=1), expected) < 2e-6
        handle.remove()
        assert called, type(module)
        called.clear()


def test_a_child_that_was_exchanged_is_used(fused):
    model, kinds = fused
    module = next(m for m in modules(model, kinds) if "o_proj" in m._modules or "experts" in m._modules)
    name = "o_proj" if "o_proj" in module._modules else "experts"
    old = module._modules[name]

    class Silent(torch.nn.Module):
        def forward(self, x, *args):
            return torch.zeros_like(x) if name == "experts" else x.new_zeros(*x.shape[:-1], old.out_features)

    before = decode(model, steps=1)
    module._modules[name] = Silent()
    try:
        assert relative(decode(model, steps=1), before) > 1e-3
    finally:
        module._modules[name] = old
    assert relative(decode(model, steps=1), before) == 0


def test_a_stock_cache_grows_in_place(fused):
    model, _ = fused
    cache = DynamicCache(config=model.config)
    assert relative(decode(model, cache), decode(model)) < 2e-6
    grown = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
    assert len(grown) == len(
        [layer for layer in cache.layers if not layer.is_sliding or isinstance(layer, GrowingLayer)]
    )
    assert all(layer.get_seq_length() == layer.keys.shape[2] == 29 for layer in grown)


def usual(got, exact):
    """The median error of a token: a few choose other experts."""
    return ((got - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def test_a_cache_of_eight_bits(fused):
    """q8_0: near f16, by blocks and child by child, in half the memory; what are no whole blocks stays f16."""
    model, kinds = fused
    found = modules(model, kinds)
    small, wide = KVCache(model.config, "q8_0"), KVCache(model.config, "f16")
    expected = decode(model, wide)
    assert usual(decode(model, small), expected) < 2e-2
    for layer in small.layers:
        if isinstance(layer, GrowingLayer):
            for buffer, columns in zip(layer.buffers, layer.columns, strict=True):
                assert (buffer.dtype, buffer.shape[3]) == (
                    (torch.uint8, columns // 32 * 34) if columns % 32 == 0 else (torch.float16, columns)
                )
    with without(found, "block"):
        assert usual(decode(model, KVCache(model.config, "q8_0")), expected) < 2e-2
    small.truncate(20)
    again = logits(model, IDS[:, 20:21], past_key_values=small)
    assert relative(again, expected[:, :1]) < 0.1
    prompts = [
        logits(model, IDS, past_key_values=KVCache(model.config, kind)) for kind in ("q8_0", "f16")
    ]  # long enough to expand a latent
    assert usual(*prompts) < 2e-2


def test_a_batch_is_its_sequences(fused):
    model, _ = fused
    ids = torch.stack([IDS[0, :40], IDS[0, 60:100]])
    cache = KVCache(model.config, None)
    logits(model, ids[:, :39], past_key_values=cache)
    both = logits(model, ids[:, 39:], past_key_values=cache)
    for i in range(2):
        alone = KVCache(model.config, None)
        logits(model, ids[i : i + 1, :39], past_key_values=alone)
        assert relative(both[i], logits(model, ids[i : i + 1, 39:], past_key_values=alone)[0]) < 2e-6


def test_a_layer_is_its_children(fused):
    """Two calls instead of six, the same sums; a hook on a child, or a child that was exchanged, is heeded."""
    model, _ = fused
    layers = modules(model, Layer)
    usual = model.config.model_type != "gpt_oss"  # whose experts return two things
    assert len(layers) == model.config.num_hidden_layers * usual and all(layer.block is not None for layer in layers)
    together = decode(model)
    with without(layers, "block"):
        apart = decode(model)
    assert relative(together, apart) < 2e-6
    called = []
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp") if usual else ():
        handle = layers[1]._modules[name].register_forward_hook(lambda *_, name=name: called.append(name))
        assert relative(decode(model, steps=1)[:, :1], together[:, :1]) < 2e-6 and called and set(called) == {name}
        handle.remove()
        called.clear()


def test_hidden_states_are_those_of_the_layers(fused):
    model, _ = fused
    cache = KVCache(model.config, None)
    logits(model, IDS[:, :20], past_key_values=cache)
    with torch.inference_mode():
        out = model(IDS[:, 20:21], past_key_values=cache, output_hidden_states=True)
        plain = model(IDS[:, :21], output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for got, exact in zip(out.hidden_states, plain.hidden_states, strict=True):
        assert relative(got, exact[:, 20:]) < 1e-4
