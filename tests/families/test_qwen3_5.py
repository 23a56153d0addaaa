"""Qwen3.5, dense and with experts, from files as llama.cpp's converter writes them: value heads tiled, norms as
1 + w.
"""

from __future__ import annotations

import pytest
import torch

from ktx.cache.kv import KVCache
from ktx.weights.open import open_weights
from tests.families.test_families import IDS, Pair, logits, per_token, relative, response_to_noise
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import LINEAR, MOE, tiny

FOUR = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
DENSE = ("qwen3_5_text", LINEAR | FOUR | {"head_dim": 64})
EXPERTS = ("qwen3_5_moe_text", MOE | LINEAR | FOUR | {"shared_expert_intermediate_size": 128})
MEMBERS = {
    "dense": DENSE,
    "experts": EXPERTS,
    "three values a key": (DENSE[0], DENSE[1] | {"linear_num_value_heads": 6}),
    "a value a key": (DENSE[0], DENSE[1] | {"linear_num_value_heads": 2}),
    "wide values": (EXPERTS[0], EXPERTS[1] | {"linear_value_head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8}),  # noqa: E501
    "tied": (DENSE[0], DENSE[1] | {"tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
def test_logits_of_a_file(tmp_path, member):
    family, config = MEMBERS[member]
    pair = Pair(tmp_path, family, "F32", config)
    whole = logits(pair.model, IDS[:, :60])
    assert relative(whole, logits(pair.reference, IDS[:, :60])) < 1e-4
    cache = KVCache(pair.model.config, dtype=None)
    with torch.inference_mode():
        steps = [pair.model(input_ids=IDS[:, i : i + 1], past_key_values=cache).logits for i in range(20)]
    assert relative(torch.cat(steps, 1), whole[:, :20]) < 1e-4


@pytest.mark.parametrize("quant", ["BF16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("member", ["dense", "experts"])
def test_quantised_logits(tmp_path, member, quant):
    """Blocks of 32 weights move whole with heads of 32 columns; blocks of 256 cannot and become f16."""
    family, config = MEMBERS[member]
    pair = Pair(tmp_path, family, quant, config | {"linear_num_value_heads": 16})
    error = per_token(logits(pair.model), logits(pair.reference))
    assert error < 0.03 or error < 1.5 * response_to_noise(pair.reference)


@pytest.mark.parametrize("quant,kept", [("Q8_0", "Q8_0"), ("Q4_K", "F16"), ("F32", "F32"), ("Q4_0", "Q4_0")])
def test_every_parameter_comes_back(tmp_path, quant, kept):
    family, config = EXPERTS
    model = tiny(family, **config | {"linear_num_value_heads": 16})
    oracle = write_gguf(tmp_path / "m.gguf", model, quant)
    source = open_weights(tmp_path / "m.gguf", model.config)
    for name, tensor in oracle.items():
        if ".experts." not in name:
            got = source.get(name).dequantize().reshape(tensor.shape)
            torch.testing.assert_close(got, tensor, rtol=2e-3 if ".out_proj." in name else 1e-5, atol=1e-6, msg=name)
    assert source.get("model.layers.0.linear_attn.out_proj.weight").qtype.name == kept
