"""What a growing layer holds after each of its operations, and when it copies."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from ktx.cache.kv import GrowingLayer, KVCache, restore_stock_layer, to_growing_layer
from ktx.errors import UsageError

META = torch.device("meta")


def pair(positions, batch=1, heads=2, widths=(4, 8)):
    return tuple(torch.randn(batch, heads, positions, width) for width in widths)


def filled(positions=6, store=None, **shape):
    layer, states = GrowingLayer(store), pair(positions, **shape)
    layer.update(*states)
    return layer, *states


def held(layer):
    return layer.buffers[0], layer.buffers[1]


def same(some, others):
    return all(a is b for a, b in zip(some, others, strict=True))


def test_an_empty_layer_has_nothing():
    layer = GrowingLayer()
    assert layer.store_dtype == torch.float16
    assert (layer.get_seq_length(), layer.length, layer.columns) == (0, 0, (0, 0))
    assert layer.keys is None and layer.values is None
    assert not layer.is_initialized and not layer.is_sliding and layer.is_croppable
    with pytest.raises(UsageError, match="empty"):
        layer.copy_as_floats()
    layer.batch_repeat_interleave(2)
    layer.crop(-3)
    assert layer.buffers == [] and layer.get_seq_length() == 0


def test_the_first_allocation_is_256_positions_in_the_states_own_shapes():
    layer = GrowingLayer(None)
    layer.lazy_initialization(*pair(6, batch=3))
    assert layer.is_initialized and layer.columns == (4, 8) and layer.dtype == torch.float32
    assert [tuple(buffer.shape) for buffer in layer.buffers] == [(3, 2, 256, 4), (3, 2, 256, 8)]
    layer = GrowingLayer(None)
    layer.lazy_initialization(pair(6)[1])
    assert layer.columns == (8, 8)


def test_the_layer_s_type_is_that_of_its_keys():
    layer = GrowingLayer("q8_0")
    layer.update(*pair(1, widths=(32, 40)))
    assert layer.dtype == torch.uint8 and layer.buffers[1].dtype == torch.float16


def test_states_are_appended():
    layer, keys, values = filled(6)
    more = pair(2)
    found = layer.update(*more)
    assert torch.equal(found[0], torch.cat([keys, more[0]], 2))
    assert torch.equal(found[1], torch.cat([values, more[1]], 2))
    assert layer.get_seq_length() == 8
    assert layer.get_mask_sizes(3) == (8 + 3, 0)


@pytest.mark.parametrize(
    "states",
    [pair(1, batch=2), pair(1, heads=1), pair(1, widths=(5, 8)), pair(1, widths=(4, 7))],
    ids=["batch", "heads", "keys", "values"],
)
def test_states_of_another_shape_are_refused(states):
    layer, keys, values = filled()
    with pytest.raises(ValueError, match="cannot be continued"):
        layer.update(*states)
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_buffers_double_only_when_they_are_full():
    layer, keys, values = filled(255)
    before = held(layer)
    layer.update(*pair(1))
    assert same(held(layer), before)
    found = layer.update(*pair(1))
    assert [buffer.shape[2] for buffer in layer.buffers] == [512, 512]
    assert torch.equal(found[0][:, :, :255], keys) and torch.equal(found[1][:, :, :255], values)
    layer.reserve(512 - 257)
    assert layer.buffers[0].shape[2] == 512
    layer.reserve(512 - 257 + 1)
    assert layer.buffers[0].shape[2] == 1024 and layer.get_seq_length() == 257


def test_only_a_reader_makes_the_next_token_a_copy():
    layer, *_ = filled()
    before = held(layer)
    layer.reserve(1)
    assert same(held(layer), before)
    seen = layer.values
    layer.update(*pair(1))
    after = held(layer)
    assert after[0] is not before[0] and after[1] is not before[1] and seen.shape[2] == 6
    layer.update(*pair(1))
    assert same(held(layer), after)


def test_one_assigned_half_leaves_a_reader_of_the_other_alone():
    layer, keys, values = filled()
    seen = layer.keys
    layer.values = values * 2
    layer.crop(-1)
    layer.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 8))
    assert torch.equal(seen, keys)
    assert torch.equal(layer.values[:, :, :5], (values * 2)[:, :, :5])


def test_assigned_halves_are_copied_once():
    layer, keys, values = filled()
    _ = layer.keys
    layer.keys, layer.values = keys + 1, values + 1
    layer.reserve(1)
    before = held(layer)
    layer.update(*pair(1))
    assert same(held(layer), before), "nobody else has read the new buffers"
    layer.values = torch.cat([values, values[:, :, :1]], 2)
    layer.reserve(1)
    before = held(layer)
    layer.update(*pair(1))
    assert same(held(layer), before), "nobody has read the old buffer of the keys"


def test_space_is_reserved_after_what_was_assigned():
    layer, *_ = filled()
    keys, values = pair(256)
    layer.keys, layer.values = keys, values
    layer.reserve(1)
    assert layer.length == 256 and layer.assigned == {}
    assert torch.equal(layer.buffers[0][:, :, :256], keys) and torch.equal(layer.buffers[1][:, :, :256], values)
    assert layer.buffers[0].shape[2] == 512


def test_assigned_states_may_have_another_batch_and_other_widths():
    layer, *_ = filled()
    keys, values = pair(300, batch=3, heads=1, widths=(5, 6))
    layer.keys, layer.values = keys, values
    found = layer.copy_as_floats()
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert layer.columns == (5, 6) and layer.get_seq_length() == 300
    assert [tuple(buffer.shape) for buffer in layer.buffers] == [(3, 1, 512, 5), (3, 1, 512, 6)]


def test_assigned_states_are_stored_in_the_layer_s_type():
    layer = GrowingLayer(torch.float16)
    layer.update(*pair(1))
    layer.keys, layer.values = pair(2)
    layer.apply_assigned()
    assert [buffer.dtype for buffer in layer.buffers] == [torch.float16, torch.float16]
    layer, *_ = filled()
    layer.values = torch.zeros(1, 2, 6, 8, dtype=torch.float64)
    layer.apply_assigned()
    assert layer.buffers[1].dtype == torch.float32, "the model's, which the first states had"


@pytest.mark.parametrize(
    ("other", "shapes"),
    [
        ({"batch": 2}, r"keys are \[2, 2, 6, 4\], its values \[1, 2, 6, 8\]"),
        ({"heads": 1}, r"keys are \[1, 1, 6, 4\], its values \[1, 2, 6, 8\]"),
        ({"positions": 5}, r"keys are \[1, 2, 5, 4\], its values \[1, 2, 6, 8\]"),
    ],
)
def test_halves_that_differ_are_an_error_that_names_both(other, shapes):
    layer, *_ = filled()
    layer.keys = pair(**({"positions": 6} | other))[0]
    with pytest.raises(UsageError, match=shapes):
        layer.copy_as_floats()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("keys", r"keys are \[1, 2, 6, 4\], its values None"),
        ("values", r"keys are None, its values \[1, 2, 6, 8\]"),
    ],
)
def test_one_half_of_an_empty_layer_is_an_error(name, shapes):
    layer = GrowingLayer(None)
    setattr(layer, name, pair(6)[name == "values"])
    with pytest.raises(UsageError, match=shapes):
        layer.update(*pair(1))


def test_the_length_is_that_of_assigned_keys():
    layer, keys, values = filled()
    layer.values = values[:, :, 2:]
    assert layer.get_seq_length() == 6
    layer.keys = keys[:, :, 2:]
    assert layer.get_seq_length() == 4


@pytest.mark.parametrize("value", [None, torch.tensor([]), torch.zeros(0, dtype=torch.int64)])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_nothing_as_a_value_empties_the_layer(name, value):
    layer, keys, _ = filled()
    layer.keys = keys
    setattr(layer, name, value)
    assert layer.get_seq_length() == 0 and layer.assigned == {} and layer.buffers


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3),
        torch.zeros(2, 6, 4),
        torch.zeros(0, 4),
        torch.zeros(1, 1, 2, 6, 4),
        torch.zeros(1, 2, 6, 4, dtype=torch.int32),
    ],
)
def test_what_is_no_keys_is_refused(value):
    layer, keys, _ = filled()
    with pytest.raises(UsageError, match=r"keys are floats \[batch, heads, positions, columns\]"):
        layer.keys = value
    assert torch.equal(layer.keys, keys)


def test_copies_are_the_caller_s_own():
    layer, keys, values = filled()
    found = layer.copy_as_floats()
    found[0].zero_()
    found[1].zero_()
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_tokens_are_removed_from_the_end():
    layer, keys, values = filled(6)
    for wrong in (1, 2):
        with pytest.raises(ValueError, match="negative number"):
            layer.crop(wrong)
    layer.crop(0)
    assert layer.get_seq_length() == 6
    layer.crop(-2)
    assert torch.equal(layer.keys, keys[:, :, :4]) and torch.equal(layer.values, values[:, :, :4])
    layer.crop(-4)
    assert layer.get_seq_length() == 0
    layer.crop(-1)
    assert layer.get_seq_length() == 0


def test_tokens_are_removed_from_what_was_assigned():
    layer, *_ = filled(6)
    layer.keys, layer.values = keys, values = pair(9)
    layer.crop(-2)
    assert torch.equal(layer.keys, keys[:, :, :7]) and torch.equal(layer.values, values[:, :, :7])


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_sequences_are_rearranged_and_continued_in_place(change, rows):
    layer, *_ = filled(batch=3)
    layer.keys, layer.values = keys, values = pair(5, batch=3)
    _ = layer.values
    change(layer)
    before = held(layer)
    more = pair(1, batch=len(rows))
    found = layer.update(*more)
    assert torch.equal(found[0], torch.cat([keys[rows], more[0]], 2))
    assert torch.equal(found[1], torch.cat([values[rows], more[1]], 2))
    assert same(held(layer), before)


def test_rearranged_buffers_are_no_reader_s():
    layer, *_ = filled(batch=2)
    _ = layer.keys
    layer.batch_repeat_interleave(2)
    before = held(layer)
    layer.update(*pair(1, batch=4))
    assert same(held(layer), before)


def test_a_fused_caller_finds_buffers_of_its_shapes():
    layer = GrowingLayer(None)
    assert layer.prepare_buffers(2, 3, (4, 8), torch.bfloat16)
    assert [tuple(buffer.shape) for buffer in layer.buffers] == [(2, 3, 256, 4), (2, 3, 256, 8)]
    assert [buffer.dtype for buffer in layer.buffers] == [torch.bfloat16, torch.bfloat16]
    before = held(layer)
    assert layer.prepare_buffers(2, 3, (4, 8), torch.bfloat16)
    layer.reserve(256)
    assert same(held(layer), before)
    for batch, heads, columns in ((1, 3, (4, 8)), (2, 2, (4, 8)), (2, 3, (5, 8)), (2, 3, (4, 7))):
        assert not layer.prepare_buffers(batch, heads, columns, torch.bfloat16)
    layer = GrowingLayer(None)
    assert layer.prepare_buffers(1, 1, (4, 4), torch.float32, META) and layer.buffers[0].device == META


def test_a_fused_caller_finds_what_was_assigned():
    layer, *_ = filled()
    layer.keys, layer.values = keys, values = pair(3, batch=2)
    assert layer.prepare_buffers(2, 2, (4, 8), torch.float32)
    assert layer.length == 3 and layer.assigned == {}
    assert torch.equal(layer.buffers[0][:, :, :3], keys) and torch.equal(layer.buffers[1][:, :, :3], values)


def test_an_empty_layer_stores_floats_for_a_gpu():
    for store, floats in (("q8_0", torch.float16), ("fp8", torch.float8_e4m3fn), (None, None)):
        layer = GrowingLayer(store)
        layer.store_floats()
        assert layer.store_dtype == floats
    layer, *_ = filled(store="q8_0", widths=(32, 32))
    layer.store_floats()
    assert layer.store_dtype == "q8_0"


def stock(positions=6, **shape):
    cache, states = DynamicCache(), pair(positions, **shape)
    cache.update(*states, 0)
    return cache, *states


@pytest.mark.parametrize("store", ["q8_0", None, torch.float16])
def test_a_stock_layer_becomes_a_growing_one_with_its_content(store):
    cache, keys, values = stock(widths=(32, 64))
    layer = cache.layers[0]
    assert to_growing_layer(cache, 0, store) is layer is cache.layers[0]
    assert type(layer) is GrowingLayer and layer.get_seq_length() == 6
    kind = torch.uint8 if store == "q8_0" else torch.float32  # a float type is the stock layer's own
    assert [buffer.dtype for buffer in layer.buffers] == [kind, kind]
    found = layer.copy_as_floats()
    for mine, theirs in zip(found, (keys, values), strict=True):
        assert torch.allclose(mine.float(), theirs, atol=0.03 if store == "q8_0" else 0)
    assert to_growing_layer(cache, 0) is layer
    before = held(layer)
    cache.update(*pair(1, widths=(32, 64)), 0)
    assert same(held(layer), before)


def test_what_is_no_stock_layer_of_keys_stays():
    cache, *_ = stock()
    assert to_growing_layer(cache, 1) is None and to_growing_layer(None, 0) is None

    class Other(DynamicCache):
        pass

    other = Other()
    other.update(*pair(6), 0)
    assert to_growing_layer(other, 0) is None, "a cache of a class of its own"
    assert to_growing_layer(DynamicCache(config=LlamaConfig(num_hidden_layers=1)), 0) is None, "empty"
    config = LlamaConfig(num_hidden_layers=1, sliding_window=4)
    sliding = DynamicCache(config=config)
    sliding.update(*pair(6), 0)
    assert type(sliding.layers[0]) is not DynamicLayer and to_growing_layer(sliding, 0) is None, "a window"
    cache.offloading = True
    assert to_growing_layer(cache, 0) is None, "on its way to another device"
    assert type(cache.layers[0]) is DynamicLayer


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["recorded", "no heads", "none"])
def test_keys_that_are_recorded_or_of_another_kind_stay(which, kind):
    cache, *states = stock()
    value = {"recorded": states[which].requires_grad_(), "no heads": states[which][0], "none": None}[kind]
    setattr(cache.layers[0], ("keys", "values")[which], value)
    assert to_growing_layer(cache, 0) is None
    assert type(cache.layers[0]) is DynamicLayer


def test_a_growing_layer_of_a_stock_cache_becomes_transformers_own_again():
    cache, keys, values = stock()
    layer = to_growing_layer(cache, 0)
    restore_stock_layer(cache, 0)
    assert type(layer) is DynamicLayer and cache.layers[0] is layer and layer.is_initialized
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    assert not {"buffers", "assigned", "exported", "store_dtype"} & set(vars(layer))
    more = tuple(states.requires_grad_() for states in pair(1))
    found = cache.update(*more, 0)
    assert torch.equal(found[0], torch.cat([keys, more[0]], 2)) and found[1].requires_grad


def test_the_restored_layer_has_what_was_assigned():
    cache, *_ = stock()
    layer = to_growing_layer(cache, 0)
    layer.keys, layer.values = keys, values = pair(3)
    restore_stock_layer(cache, 0)
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_other_layers_are_not_restored():
    cache, *_ = stock()
    restore_stock_layer(cache, 1)
    restore_stock_layer(None, 0)
    before = cache.layers[0].keys
    restore_stock_layer(cache, 0)
    assert cache.layers[0].keys is before
    blocks, *_ = stock(widths=(32, 32))
    to_growing_layer(blocks, 0, "q8_0")
    restore_stock_layer(blocks, 0)
    assert type(blocks.layers[0]) is GrowingLayer, "transformers cannot read blocks"
    ours = KVCache(LlamaConfig(num_hidden_layers=1), None)
    ours.update(*pair(2), 0)
    restore_stock_layer(ours, 0)
    assert type(ours.layers[0]) is GrowingLayer, "a cache of ours"


def test_an_empty_layer_is_not_restored():
    cache = DynamicCache()
    cache.layers.append(GrowingLayer(None))
    restore_stock_layer(cache, 0)
    assert type(cache.layers[0]) is GrowingLayer


def test_a_cache_is_truncated_to_a_length_that_it_has():
    cache = KVCache(LlamaConfig(num_hidden_layers=2, sliding_window=3), None)
    assert cache.can_crop
    states = pair(6)
    for layer in (0, 1):
        cache.update(*states, layer)
    for length, left in ((7, 6), (6, 6), (4, 4), (0, 0), (1, 0)):
        cache.truncate(length)
        assert [cache.get_seq_length(layer) for layer in (0, 1)] == [left, left]


def test_the_bytes_of_a_cache_are_those_of_its_buffers():
    cache = KVCache(LlamaConfig(num_hidden_layers=2), "f16")
    assert cache.nbytes() == 0
    cache.update(*pair(6), 0)
    assert cache.nbytes() == 1 * 2 * 256 * (4 + 8) * 2
    cache.update(*pair(6), 1)
    assert cache.nbytes() == 2 * (1 * 2 * 256 * (4 + 8) * 2)
