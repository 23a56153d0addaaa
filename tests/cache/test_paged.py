"""Where a forward's keys and values are stored in pools of pages, and what is known of recurrent states."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Qwen3NextConfig
from transformers.cache_utils import LinearAttentionLayer

from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.kv import KVCache
from ktx.cache.paged import PagedCache, PagedLayer, gather_pages, get_batch, get_paged_layer, scatter_kv
from ktx.errors import NoGradient, UsageError

META = torch.device("meta")
E4M3 = torch.float8_e4m3fn
LLAMA = LlamaConfig(num_hidden_layers=2)
HYBRID = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_experts=2)


def two_sequences(check=None):
    """Two tokens on page 3, then three that begin as the last one of page 1 and go on to page 2."""
    return BatchMetadata([SequenceSpan(7, 0, 2, [3]), SequenceSpan(8, 63, 3, [1, 2])], check)


SLOTS = [(3, 0), (3, 1), (1, 63), (2, 0), (2, 1)]  # page and position of each token of the two


def states(tokens=5, heads=2, width=4):
    return torch.arange(1, 1 + heads * tokens * width).float().view(1, heads, tokens, width)


def test_a_layer_of_pages_has_no_length_of_its_own():
    layer = PagedCache(LLAMA, 4).layers[0]
    assert not layer.is_sliding and not layer.is_croppable and layer.columns == (0, 0)
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(5) == (5, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    layer.lazy_initialization(states(), states())
    assert layer.buffers == []


def test_tokens_are_stored_in_their_slots_and_nowhere_else():
    cache, keys, values = PagedCache(LLAMA, 4, torch.float32), states(), states(width=8) * -1
    with cache.forward(two_sequences()):
        pools = cache.update(keys, values, 1)
    for pool, given in zip(pools, (keys, values), strict=True):
        assert pool.shape == (4, 2, 64, given.shape[3])
        for token, (page, position) in enumerate(SLOTS):
            assert torch.equal(pool[page, :, position], given[0, :, token])
        # torch's new memory is NaN during tests
        assert int(pool.isfinite().sum()) == 5 * 2 * given.shape[3]
    assert cache.layers[1].buffers == [*pools] and cache.layers[0].buffers == []


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (states(4), states(4)),
        (states(6), states(6)),
        (states().expand(2, -1, -1, -1), states().expand(2, -1, -1, -1)),
        (states()[:0], states()[:0]),
    ],
    ids=["fewer", "more", "two rows", "no row"],
)
def test_states_that_are_not_the_batch_s_are_refused(keys, values):
    cache = PagedCache(LLAMA, 4)
    with cache.forward(two_sequences()), pytest.raises(ValueError, match="do not match the current batch"):
        cache.update(keys, values, 0)


def test_states_without_a_batch_are_refused():
    with pytest.raises(ValueError, match="do not match the current batch"):
        PagedCache(LLAMA, 4).update(states(), states(), 0)


def test_states_that_do_not_fit_the_pools_are_refused():
    cache = PagedCache(LLAMA, 4)
    with cache.forward(two_sequences()):
        cache.update(states(), states(width=8), 0)
        for keys, values in (
            (states(width=8), states(width=8)),
            (states(), states()),
            (states(heads=1), states(heads=1, width=8)),
        ):
            with pytest.raises(ValueError, match=r"do not fit pools with columns \(4, 8\)"):
                cache.update(keys, values, 0)


def test_pools_are_allocated_once():
    cache = PagedCache(LLAMA, 3, "q8_0")
    layer = cache.layers[0]
    assert layer.prepare_buffers(2, (32, 40), torch.bfloat16)
    pools = list(layer.buffers)
    # 34 bytes are a block of 32 columns; 40 columns are no whole blocks
    assert [(tuple(pool.shape), pool.dtype) for pool in pools] == [
        ((3, 2, 64, 34), torch.uint8),
        ((3, 2, 64, 40), torch.float16),
    ]
    assert cache.key_pools == {id(pools[0])}
    assert layer.prepare_buffers(2, (32, 40), torch.bfloat16)
    assert layer.buffers[0] is pools[0] and len(layer.buffers) == 2
    for heads, columns in ((1, (32, 40)), (3, (32, 40)), (2, (40, 40)), (2, (32, 32))):
        assert not layer.prepare_buffers(heads, columns, torch.bfloat16)


def test_pools_that_are_not_allocated_can_store_floats():
    for store, floats in (("q8_0", torch.float16), ("fp8", E4M3), ("bf16", torch.bfloat16)):
        layer = PagedCache(LLAMA, 1, store).layers[0]
        layer.store_floats()
        assert layer.store_dtype == floats
    layer = PagedCache(LLAMA, 1, "q8_0").layers[0]
    layer.prepare_buffers(1, (32, 32), torch.float32)
    layer.store_floats()
    assert layer.store_dtype == "q8_0"


@pytest.mark.parametrize("dtype", [torch.float32, E4M3])
@pytest.mark.parametrize("strides", ["dense", "transposed", "every other column", "heads inside"])
def test_states_of_any_strides_are_scattered(dtype, strides):
    given = states(3) - 8  # -7..16
    given = {
        "dense": given,
        "transposed": given.transpose(2, 3).contiguous().transpose(2, 3),
        "every other column": given.repeat_interleave(2, 3)[..., ::2],
        "heads inside": given.transpose(1, 2).contiguous().transpose(1, 2),
    }[strides]
    pool = torch.zeros(3, 2, 64, 4).to(dtype)
    scatter_kv(given, pool, torch.tensor([2 * 64 + 5, 2 * 64 + 6, 64 + 63]))
    wanted = torch.zeros(3, 2, 64, 4)
    for token, (page, position) in enumerate(((2, 5), (2, 6), (1, 63))):
        wanted[page, :, position] = (states(3) - 8)[0, :, token]
    assert torch.equal(pool.float(), wanted)


def test_what_eight_bit_floats_cannot_hold_is_their_largest_value():
    pool = torch.zeros(1, 1, 64, 4).to(E4M3)
    scatter_kv(torch.tensor([1e4, -1e4, 448, 1]).view(1, 1, 1, 4), pool, torch.tensor([0]))
    assert pool[0, 0, 0].float().tolist() == [448, -448, 448, 1]


def test_a_gradient_would_be_lost():
    pool = torch.zeros(1, 1, 64, 4)
    with pytest.raises(NoGradient, match="a cache of pages"):
        scatter_kv(torch.zeros(1, 1, 1, 4, requires_grad=True), pool, torch.tensor([0]))


@pytest.mark.parametrize("count", [1, 64, 65, 100, 128])
def test_the_rows_of_a_sequence_are_gathered_from_its_pages(count):
    pool = torch.arange(4 * 64 * 2).float().view(4, 1, 64, 2)
    wanted = torch.cat([pool[3, 0], pool[1, 0]])[:count]
    assert torch.equal(gather_pages(pool, torch.tensor([3, 1, 0]), count), wanted[None])


def test_each_layer_is_followed_by_the_batch_s_check():
    calls = []
    cache = PagedCache(LLAMA, 4)
    cache.check_cancelled()
    with cache.forward(two_sequences()):
        cache.update(states(), states(), 0)
    with cache.forward(two_sequences(lambda: calls.append(1))):
        cache.update(states(), states(), 0)
        cache.update(states(), states(), 1)
    assert calls == [1, 1]

    def cancel():
        raise InterruptedError

    with pytest.raises(InterruptedError), cache.forward(two_sequences(cancel)):
        cache.update(states(), states(), 0)


def test_a_cache_has_the_model_s_layers_and_extra_ones():
    assert [type(layer) for layer in PagedCache(LLAMA, 4).layers] == [PagedLayer] * 2
    assert [type(layer) for layer in PagedCache(LLAMA, 4, extra_layers=1).layers] == [PagedLayer] * 3
    assert not PagedCache(LLAMA, 4).recurrent
    sliding = LlamaConfig(num_hidden_layers=1, sliding_window=8)
    assert [type(layer) for layer in PagedCache(sliding, 4).layers] == [PagedLayer]
    hybrid = PagedCache(HYBRID, 4)
    assert hybrid.recurrent and [type(layer) for layer in hybrid.layers] == [LinearAttentionLayer, PagedLayer]


def test_a_layer_of_an_unknown_kind_is_refused(monkeypatch):
    monkeypatch.setattr("ktx.cache.paged.STANDARD_LAYERS", ())
    with pytest.raises(UsageError, match="a cache of type DynamicLayer, which cannot be batched yet"):
        PagedCache(LLAMA, 4)


def test_only_a_cache_of_pages_has_paged_layers_and_a_batch():
    cache, batch = PagedCache(LLAMA, 4), two_sequences()
    assert get_paged_layer(cache, 1) is cache.layers[1] and get_batch(cache) is None
    with cache.forward(batch):
        assert get_batch(cache) is batch
    for other in (KVCache(LLAMA), DynamicCache(), None):
        assert get_paged_layer(other, 0) is None and get_batch(other) is None


def test_bytes_are_those_of_the_pools_and_can_leave_out_other_devices():
    cache = PagedCache(LLAMA, 3, torch.float16)
    assert cache.nbytes() == 0
    cache.layers[0].prepare_buffers(2, (4, 8), torch.float32)
    cache.layers[1].prepare_buffers(2, (4, 8), torch.float32, META)
    layer_bytes = 3 * 2 * 64 * (4 + 8) * 2
    assert cache.nbytes() == 2 * layer_bytes and cache.nbytes(host=True) == layer_bytes
    PagedCache(HYBRID, 3).nbytes()  # a recurrent layer has no pools


def batch(owner, past, count):
    return BatchMetadata([SequenceSpan(owner, past, count, [0])])


def hybrid_after(count, owner=1):
    cache = PagedCache(HYBRID, 4)
    cache.begin(batch(owner, 0, count))
    set_state(cache, owner, count)
    cache.end(batch(owner, 0, count))
    return cache


def set_state(cache, owner, value):
    layer = cache.state(owner).layers[0]
    layer.update_recurrent_state(torch.full((1, 2), float(value)))


def value_of(snapshot):
    return snapshot.layers[0].recurrent_states[0].tolist()


def test_states_continue_where_they_ended():
    cache = hybrid_after(5)
    assert cache.state_lengths == {1: 5}
    cache.begin(batch(1, 5, 2))
    assert cache.state_lengths == {}
    cache.end(batch(1, 5, 2))
    assert cache.state_lengths == {1: 7}
    with pytest.raises(RuntimeError, match="continues after 5 tokens, its recurrent states are those after 7"):
        cache.begin(batch(1, 5, 1))


def test_a_new_sequence_begins_at_its_first_token():
    cache = PagedCache(HYBRID, 4)
    with pytest.raises(RuntimeError, match="continues after 1 tokens"):
        cache.begin(batch(1, 1, 1))
    cache.begin(batch(1, 0, 1))


def test_the_states_of_an_unfinished_forward_are_unknown():
    cache = PagedCache(HYBRID, 4)
    cache.begin(batch(1, 0, 2))
    set_state(cache, 1, 2)
    for past in (0, 2):
        with pytest.raises(RuntimeError, match="are those after None"):
            cache.begin(batch(1, past, 2))
    assert cache.snapshot(1, 2) is None


def test_attention_alone_has_no_states():
    cache = PagedCache(LLAMA, 4)
    cache.begin(batch(1, 9, 2))
    cache.end(batch(1, 9, 2))
    assert cache.state_lengths == {} and cache.snapshot(1, 11) is None


def test_a_sequence_keeps_its_states_until_it_is_freed():
    cache = hybrid_after(5)
    kept = cache.state(1)
    assert cache.state(1) is kept and cache.state(2) is not kept
    cache.free(1)
    cache.free(3)
    assert cache.state(1) is not kept and cache.snapshot(1, 5) is None
    cache.free(1)
    cache.begin(batch(1, 0, 1))


def test_a_snapshot_is_a_copy_of_the_present_states():
    cache = hybrid_after(5)
    snapshot = cache.snapshot(1, 5)
    set_state(cache, 1, 9)
    assert value_of(snapshot) == [[5, 5]] and value_of(cache.state(1)) == [[9, 9]]
    assert cache.snapshot(1, 4) is None


def test_a_snapshot_within_the_latest_forward_lasts_until_the_next():
    cache = PagedCache(HYBRID, 4)
    cache.begin(batch(1, 0, 6))
    set_state(cache, 1, 4)
    cache.save_snapshot(1, 4, 0)
    set_state(cache, 1, 6)
    cache.end(batch(1, 0, 6))
    assert value_of(cache.snapshot(1, 4)) == [[4, 4]] and value_of(cache.snapshot(1, 6)) == [[6, 6]]
    assert cache.snapshot(1, 3) is None
    cache.begin(batch(1, 6, 1))
    cache.end(batch(1, 6, 1))
    assert cache.snapshot(1, 4) is None


def test_a_restored_snapshot_can_be_restored_again():
    cache = hybrid_after(5)
    snapshot = cache.snapshot(1, 5)
    cache.restore(2, snapshot, 5)
    cache.begin(batch(2, 5, 1))
    set_state(cache, 2, 6)
    cache.restore(3, snapshot, 5)
    assert value_of(cache.state(3)) == [[5, 5]] and cache.state_lengths == {1: 5, 3: 5}
