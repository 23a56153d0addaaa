"""How many bytes do forwards need on a device beside weights and caches?"""

from __future__ import annotations

import pytest

from ktx.devices import CPU, gpus
from ktx.injection.device_map import parse_entry
from ktx.placement import workspace
from ktx.placement.memory_model import KVMemory
from tests.placement.helpers import experts, footprint, part, planned

MIB = 1 << 20


def block(layer: int | None, columns: int, group: str = "attention"):
    return part(group, layer, 0, activation_columns=columns)


def matrix(weights: int):
    return part("attention", 0, 0, max_matrix_weights=weights)


# ---- activations


def test_a_chunk_takes_four_hidden_states_and_the_widest_block():
    parts = [block(0, 100), block(0, 50), block(1, 120), block(0, 149, "dense layers")]
    columns = 4 * 10 + (100 + 50)  # of the attention of layer 0
    assert workspace.activation_bytes(footprint(hidden=10), parts, 3, gpu=False) == 3 * columns * 4
    assert workspace.activation_bytes(footprint(hidden=10), parts, 3, gpu=True) == 3 * columns * 2


def test_modules_outside_layers_are_no_block():
    assert workspace.activation_bytes(footprint(hidden=10), [block(0, 5), block(None, 900)], 2, False) == 2 * 45 * 4
    assert workspace.activation_bytes(footprint(hidden=10), [block(None, 900)], 2, False) == 2 * 40 * 4


# A tiny llama's attention projects to 256 + 128 + 128 + 256 columns, its MLP to 320 + 320 + 256.
ATTENTION, MLP, HIDDEN = 768, 896, 4 * 256


def test_a_loaded_model_takes_its_widest_block_and_no_logits():
    assert workspace.decode_step_bytes(planned("llama", vocab_size=5000)[0]) == {CPU: (HIDDEN + MLP) * 4}


def test_each_device_takes_the_widest_block_that_it_has(monkeypatch):
    monkeypatch.setenv("KTX_GPU", "fake:1")
    found = workspace.decode_step_bytes(planned("llama", parse_entry(r"layers\.1\.self_attn$", "cuda:0"))[0])
    assert found == {CPU: (HIDDEN + MLP) * 4, gpus()[0]: (HIDDEN + ATTENTION) * 2}


def test_a_device_with_norms_only_takes_nothing(monkeypatch):
    monkeypatch.setenv("KTX_GPU", "fake:1")
    assert set(workspace.decode_step_bytes(planned("llama", parse_entry("norm$", "cuda:0"))[0])) == {CPU}


# ---- logits, transfers, dequantized chunks


def test_logits_are_f32_and_twice_there():
    assert workspace.logits_bytes(footprint(vocab=1000), 3) == 2 * 3 * 1000 * 4


def test_hidden_states_cross_in_bf16_with_ids_and_weights_of_experts():
    routed = footprint(experts(0, 9, top_k=6), experts(1, 9, top_k=2), hidden=10)
    assert workspace.transfer_bytes(routed, 5) == 5 * (10 * 2 + 10 * 2 + 6 * (8 + 4))
    assert workspace.transfer_bytes(footprint(block(0, 9), hidden=10), 5) == 5 * (10 * 2 + 10 * 2)
    assert workspace.transfer_bytes(footprint(hidden=10), 5) == 5 * (10 * 2 + 10 * 2)


def test_the_largest_matrix_is_dequantized_to_bf16_in_chunks():
    assert workspace.dequantized_bytes([matrix(700), matrix(900)]) == 900 * 2
    assert workspace.dequantized_bytes([matrix((1 << 26) + 1)]) == (1 << 26) * 2
    assert workspace.dequantized_bytes([]) == 0


# ---- experts that are brought to a GPU


def test_small_experts_are_brought_whole_in_both_layouts():
    assert workspace.streaming_bytes([experts(0, 1000, 2000), experts(0, 1500, 1400)]) == 1000 + 2000
    assert workspace.streaming_bytes([experts(0, 512 * MIB, 512 * MIB - 1)]) == 512 * MIB + 512 * MIB - 1


def test_large_experts_are_brought_in_chunks_of_at_least_one():
    one_gib, quarter_gib = 8 * 1024 * MIB, 8 * 256 * MIB  # of each of 8 experts
    assert workspace.streaming_bytes([experts(0, one_gib, quarter_gib)]) == 1024 * MIB + 512 * MIB


def test_bits_that_were_moved_take_temporary_memory_once():
    assert workspace.streaming_bytes([experts(0, 1000, 2000, needs_repacking=True)]) == 3000 + 12 * 8 * MIB


def test_what_has_no_experts_is_not_brought():
    assert workspace.streaming_bytes([part("dense layers", 0, 1000)]) == 0
    assert workspace.streaming_bytes([experts(0, 1000, 1000, num_weights=0)]) == 0
    assert workspace.streaming_bytes([]) == 0


# ---- attention


def mla(expanded: int, columns: tuple[int, int] = (512, 64)) -> KVMemory:
    return KVMemory("x", 0, 1, columns, num_heads=128, is_mla=True, expanded=expanded)


def test_prefill_of_mla_takes_latents_twice_and_what_they_expand_to():
    latents = 2 * 100 * (512 + 64) * 2
    assert workspace.mla_expansion_bytes([mla(1000), mla(900)], 100) == 100 * 1000 * 2 + latents
    assert workspace.mla_expansion_bytes([mla(1000, (448, 64)), mla(900)], 100) == 100 * 900 * 2 + latents
    assert workspace.mla_expansion_bytes([KVMemory("x", 0, 1, (512, 64), is_mla=True)], 100) == latents


def test_what_mla_expands_at_a_time_is_limited():
    assert workspace.mla_expansion_bytes([mla(1000)], 200_000) == 256 * MIB + 2 * 200_000 * 576 * 2


def test_other_attention_expands_nothing():
    assert workspace.mla_expansion_bytes([KVMemory("x", 0, 8, (128, 128), num_heads=32)], 100) == 0
    assert workspace.mla_expansion_bytes([], 100) == 0


# On 132 multiprocessors. A program leaves parts of two tiles, of each row `columns` values and a logarithm in f32.
def partial_results(tile_rows: int, programs: int, divisions: int, columns: int) -> int:
    return 2 * tile_rows * programs * divisions * (columns + 1) * 4


@pytest.mark.parametrize(
    "heads,kv_heads,columns,is_mla,expected",
    [
        (8, 2, (64, 64), False, partial_results(16, 3 * 132 // 2, 2, 64)),  # tiles of 16 rows, 3 programs at once
        (8, 2, (192, 128), False, partial_results(16, 2 * 132 // 2, 2, 128)),  # wide keys: 2 programs at once
        (32, 2, (64, 64), False, partial_results(16, 3 * 132 // 2, 2, 64)),  # 16 rows fill the tile
        (34, 2, (64, 64), False, partial_results(64, 2 * 132 // 2, 2, 64)),  # 17 do not
        (128, 1, (512, 64), True, partial_results(64, 132 // 2, 2, 512)),  # 2 x 64 heads, each key is a value too
    ],
)
def test_a_token_takes_the_partial_results_of_all_programs(heads, kv_heads, columns, is_mla, expected):
    layer = KVMemory("x", 0, kv_heads, columns, num_heads=heads, is_mla=is_mla)
    assert workspace.attention_bytes([layer], 1, 1) == expected


def test_a_chunk_takes_larger_tiles_and_the_largest_layer_counts():
    narrow, wide = (KVMemory("x", 0, 2, (n, n), num_heads=8) for n in (64, 128))
    assert workspace.attention_bytes([narrow], 100, 3) == partial_results(128, 132 // 2, 2, 64)
    assert workspace.attention_bytes([narrow, wide], 100, 1) == partial_results(128, 132 // 2, 2, 128)


def test_layers_with_a_state_have_no_partial_results():
    state = KVMemory("x", 0, state_bytes=1000)
    assert workspace.attention_bytes([state], 100, 1) == 0 == workspace.attention_bytes([], 100, 1)


# ---- CUDA graphs


def test_graphs_hold_activations_transfers_partial_results_and_logits():
    parts = [block(0, 100), block(0, 60, "dense layers"), block(1, 90), block(None, 1000)]
    layer = KVMemory("x", 0, 2, (64, 64), num_heads=32)  # 16 rows a token: two tokens would take larger tiles
    found = workspace.cuda_graph_bytes(footprint(*parts, hidden=10, vocab=1000), parts, [layer], 3)
    activations = 3 * (4 * 10 + 100) * 2
    transfers = 2 * 3 * (2 * 10 * 2)  # in each of two layers
    assert found == activations + transfers + partial_results(16, 3 * 132 // 2, 2, 64) + 3 * 1000 * 2
