"""How many bytes does an attention layer's cache take: keys and values, a latent, or a state?"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ktx.injection.inject import Plan
from ktx.injection.rule import Rule
from ktx.injection.rules import load_rules
from ktx.placement.memory_model import KVMemory, compute_footprint
from tests.placement.helpers import planned

KEYS = KVMemory("x", 0, 2, (64, 32))  # 2 heads of 64 columns of keys and 32 of values


def caches(model, plan: Plan | None = None) -> list[KVMemory]:
    """The caches of a model, of whose weights the file has none."""
    return compute_footprint(model, plan or Plan(), SimpleNamespace(spec=lambda name: None)).kv_layers


# ---- bytes


@pytest.mark.parametrize(
    "dtype,gpu,expected",
    [
        (torch.float16, False, 2 * (64 + 32) * 2),
        (torch.float32, True, 2 * (64 + 32) * 4),
        (None, False, 2 * (64 + 32) * 4),  # as the model computes: f32
        ("q8_0", False, 2 * (2 * 34 + 34)),  # a block of 32 columns takes 34 bytes
        ("q8_0", True, 2 * (64 + 32) * 2),  # f16 on a GPU
        ("fp8", True, 2 * (64 + 32)),
    ],
)
def test_a_position_takes_keys_and_values_of_each_head(dtype, gpu, expected):
    assert KEYS.row_bytes(dtype, gpu) == expected


def test_columns_that_fill_no_blocks_are_f16():
    assert KVMemory("x", 0, 3, (40, 64)).row_bytes("q8_0", False) == 3 * (40 * 2 + 2 * 34)


@pytest.mark.parametrize("context,pages", [(1, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_each_sequence_takes_full_pages_of_64_positions(context, pages):
    row = 2 * (64 + 32) * 2
    assert KEYS.nbytes(context, 3, torch.float16, False) == 3 * pages * 64 * row
    assert KEYS.nbytes(context, 3, "q8_0", False) == 3 * pages * 64 * 204


def test_a_state_is_there_for_each_sequence_and_eight_snapshots():
    state = KVMemory("x", 0, state_bytes=1000)
    assert state.nbytes(1000, 3, torch.float16, False) == (3 + 8) * 1000 == state.nbytes(1, 3, torch.float16, True)
    both = replace(KEYS, state_bytes=1000)
    assert both.nbytes(65, 3, torch.float16, False) == 3 * 2 * 64 * 384 + (3 + 8) * 1000


# ---- dimensions


def test_keys_and_values_of_key_value_heads():
    model, _ = planned("qwen3", head_dim=80)
    path = "model.layers.1.self_attn"
    assert caches(model)[1] == KVMemory(path, 1, 2, (80, 80), 0, 4, False, 0, False)


def test_heads_divide_the_hidden_size_where_nothing_else_is_said():
    model, _ = planned("llama")
    del model.model.layers[0].self_attn.head_dim
    model.config.num_key_value_heads = None
    path = "model.layers.0.self_attn"
    assert caches(model)[0] == KVMemory(path, 0, 4, (256 // 4, 256 // 4), 0, 4, False, 0, False)


def test_mla_caches_a_latent_that_expands_to_keys_without_rotation_and_values():
    model, _ = planned("deepseek_v3")
    path = "model.layers.1.self_attn"
    assert caches(model)[1] == KVMemory(path, 1, 1, (64, 16), 0, 4, True, 4 * (32 + 48), False)


def test_mla_of_transformers_caches_every_head():
    model, _ = planned("deepseek_v3", rules=[Rule("norm$", replace="RMSNorm")], v_head_dim=40)
    path = "model.layers.1.self_attn"
    assert caches(model)[1] == KVMemory(path, 1, 4, (32 + 16, 40), 0, 4, False, 0, False)


def test_a_gated_delta_net_has_a_state_in_f32():
    model, _ = planned("qwen3_next")
    path = "model.layers.2.linear_attn"
    inputs = (2 * 2 * 32 + 4 * 32) * 4  # two key heads for queries and keys, four value heads; the last 4 inputs
    matrices = 4 * 32 * 32
    found = caches(model)
    assert found[2] == KVMemory(path, 2, 0, (), 4 * (inputs + matrices), 0, False, 0, False)
    assert found[3] == KVMemory("model.layers.3.self_attn", 3, 2, (64, 64), 0, 4, False, 0, False)


@pytest.mark.parametrize(
    "name,values",
    [
        ("conv_dim", 4 * 24 * 40),
        ("conv_kernel_size", 4 * 24 * 40),
        ("num_v_heads", 256 * 4),
        ("head_k_dim", 256 * 4),
        ("head_v_dim", 256 * 4),
    ],
)
def test_what_a_recurrent_layer_lacks_takes_no_bytes(name, values):
    model, _ = planned("qwen3_next", linear_key_head_dim=32)
    layer = model.model.layers[0].linear_attn
    layer.conv_dim, layer.head_k_dim, layer.head_v_dim = 256, 24, 40
    delattr(layer, name)
    assert caches(model)[0].state_bytes == 4 * values


def test_a_layer_that_the_cache_does_not_have_takes_no_bytes():
    model, _ = planned("llama")
    model.model.layers[1].self_attn.layer_idx = 2  # of two layers: a layer for multi-token prediction
    assert [layer.path for layer in caches(model)] == ["model.layers.0.self_attn"]


def test_the_cache_is_where_a_rule_places_the_attention():
    rules = [Rule(r"layers\.1\.self_attn$", device="cpu"), *load_rules(None, "llama")]
    assert [layer.cpu_only for layer in caches(*planned("llama", rules=rules))] == [False, True]
    assert [layer.cpu_only for layer in caches(*planned("qwen3_next"))] == [True, True, True, False]
