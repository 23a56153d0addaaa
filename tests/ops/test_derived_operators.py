"""A user's operator that inherits from one of ktx: each call of the model calls its forward, in all ways of running."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ktx
from ktx import demo
from ktx.engine.sampler import SamplingParams
from ktx.injection.rules import load_rules
from ktx.ops import attention, embed, experts, linear, mla, mlp, moe, norm, rope, router
from ktx.ops.fusion import layer

DERIVED = {  # name of a module of the demo model -> the operator that the derived class inherits from
    "model.embed_tokens": embed.Embedding,
    "model.layers.0": layer.Layer,
    "model.layers.1": layer.Layer,
    "model.layers.0.input_layernorm": norm.RMSNorm,
    "model.layers.1.post_attention_layernorm": norm.RMSNorm,
    "model.layers.1.self_attn": mla.MLA,
    "model.layers.1.self_attn.kv_a_layernorm": norm.RMSNorm,
    "model.layers.1.self_attn.o_proj": linear.Linear,
    "model.layers.0.mlp": mlp.MLP,
    "model.layers.0.mlp.down_proj": linear.Linear,
    "model.layers.1.mlp": moe.MoE,
    "model.layers.1.mlp.gate": router.Router,
    "model.layers.1.mlp.experts": experts.Experts,
    "model.layers.1.mlp.shared_experts": mlp.MLP,
    "model.norm": norm.RMSNorm,
    "model.rotary_emb": rope.RotaryEmbedding,
    "lm_head": linear.Linear,
}
PROMPT = torch.tensor([[1, 40, 41, 42, 43]])


def derive(monkeypatch, base, scale=1.0):
    """A class of a module that a rule can name, which counts its calls and may scale its output."""

    class Derived(base):
        calls = 0

        def forward(self, *args, **kwargs):
            Derived.calls += 1
            out = super().forward(*args, **kwargs)
            return out if scale == 1.0 else out * scale

    module = types.ModuleType("operators_of_a_user")
    Derived.__module__, Derived.__qualname__ = module.__name__, "Derived"
    module.Derived = Derived
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Derived


def load(name, rules="mla-moe", **more):
    rule = ktx.Rule(name=f"^{name.replace('.', chr(92) + '.')}$", replace="operators_of_a_user.Derived")
    model, _ = ktx.load(demo.path(), weights=demo.gguf(), rules=[rule, *load_rules(rules)], progress=False, **more)
    return model


@pytest.fixture(scope="module")
def stock():
    return ktx.load(demo.path(), weights=demo.gguf(), progress=False)[0]


@pytest.mark.parametrize("name", DERIVED)
def test_each_forward_calls_it(name, stock, monkeypatch):
    derived = derive(monkeypatch, DERIVED[name])
    model = load(name)
    derived.calls = 0
    with torch.inference_mode():
        out = model(PROMPT).logits
    assert derived.calls == 1
    assert (out - stock(PROMPT).logits).abs().max() < 1e-3, "it computes the same"
    derived.calls = 0
    model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert derived.calls == 5
    with model.ktx.engine(max_batch_size=2, kv_cache_tokens=1024) as engine:
        derived.calls = 0
        params = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
        list(engine.generate([PROMPT[0].tolist()], params))
        assert derived.calls == 4


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.mlp", "model.layers.1.mlp.shared_experts", "model.layers.1.mlp"),
        *("model.layers.1.post_attention_layernorm", "model.layers.1.self_attn.kv_a_layernorm"),
    ],
)
def test_what_it_computes_is_what_generate_computes(name, stock, monkeypatch):
    derive(monkeypatch, DERIVED[name], scale=0.5)
    model = load(name)
    out = model.generate(
        PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with torch.inference_mode():
        whole = model(out.sequences[:, :-1]).logits[0, PROMPT.shape[1] - 1 :]
        of_stock = stock(out.sequences[:, :-1]).logits[0, PROMPT.shape[1] - 1 :]
    assert (torch.cat(out.logits) - whole).abs().max() < 2e-2 * whole.abs().max()
    assert (whole - of_stock).abs().max() > 2e-2 * whole.abs().max(), "and it is not what the stock model computes"


@pytest.mark.parametrize("name,base", [("self_attn", attention.Attention), ("mlp", mlp.MLP)])
def test_a_dense_model(name, base, monkeypatch, tmp_path):
    derived = derive(monkeypatch, base)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=64, **sizes)).save_pretrained(tmp_path)
    rule = ktx.Rule(name=rf"^model\.layers\.0\.{name}$", replace="operators_of_a_user.Derived")
    model = ktx.load(tmp_path, rules=[rule, *load_rules("dense")], progress=False, tokenizer=False)[0]
    derived.calls = 0
    model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert derived.calls == 5
