"""Keys and values that a script changes in a cache, between a prompt and its first token or between tokens: what
transformers makes of them, or a named error.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ktx.cache.kv import GrowingLayer, KVCache
from ktx.errors import UsageError
from ktx.transformers_compat import cache_argument
from tests.families.test_families import IDS, Pair, relative

FAMILIES = {
    "llama": {"num_hidden_layers": 9},  # more layers than a call computes
    "qwen3_moe": {},
    "deepseek_v3": {},
    "gpt_oss": {},  # a layer that slides: a stock cache drops what it does not see
    "qwen3_next": {},  # layers with a state in place of keys
    "phi3": {},
}
HYBRID = ("gpt_oss", "qwen3_next")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp(request.param), request.param, "F32", FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("llama"), "llama", "F32", FAMILIES["llama"])


def attending(cache):
    """The layers with all keys."""
    return [layer for layer in cache.layers if hasattr(layer, "keys") and not layer.is_sliding]


def noise(like, positions):
    shape = (*like.shape[:2], positions, like.shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(positions))


def on_all(change):
    """A change of keys and of values, in all layers."""

    def changed(cache):
        for layer in attending(cache):
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return changed


def in_place(cache):
    for layer in attending(cache):
        layer.keys[:, :, 3] = 0
        layer.values[:, :, 5:9].mul_(-2)


def sliding_too(cache):
    for layer in cache.layers:
        if hasattr(layer, "keys"):
            layer.keys, layer.values = layer.keys * 0.5, layer.values.flip(2)


def values_only(cache):
    for layer in attending(cache):
        layer.values = layer.values.flip(2)


def in_one_layer(cache):
    layer = attending(cache)[-1]
    layer.keys, layer.values = layer.keys * 0.5, layer.values * 2


def another_layer(cache):
    index = max(i for i, layer in enumerate(cache.layers) if layer in attending(cache))
    old, cache.layers[index] = cache.layers[index], DynamicLayer()
    cache.layers[index].update(old.keys[:, :, :-2] * 0.5, old.values[:, :, :-2])
    for layer in attending(cache):
        if layer is not cache.layers[index]:
            layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]


def written_after_it_was_assigned(cache):
    for layer in attending(cache):
        keys = layer.keys[:, :, 4:].clone()
        layer.keys, layer.values = keys, layer.values[:, :, 4:]
        keys[:, :, 0] *= 3


CHANGES = {
    "heavy hitters": on_all(lambda x: x[:, :, [0, 1, 5, 9, 14, 17, 18]]),
    "sinks and the latest": on_all(lambda x: torch.cat([x[:, :, :2], x[:, :, -6:]], 2)),
    "views": on_all(lambda x: x[:, :, 4:]),
    "more": on_all(lambda x: torch.cat([noise(x, 3), x], 2)),
    "many more": on_all(lambda x: torch.cat([noise(x, 300), x], 2)),
    "others": on_all(lambda x: x * 0.5),
    "in place": in_place,
    "values only": values_only,
    "layers that slide too": sliding_too,
    "in one layer": in_one_layer,
    "another layer": another_layer,
    "written after it was assigned": written_after_it_was_assigned,
}


SAME_LENGTH = ("others", "in place", "values only", "in one layer")


def not_sliding(cache, config):
    """A cache of ours, which has all keys of layers that slide too, without those."""
    kinds = getattr(config, "layer_types", None) or [""] * len(cache.layers)
    return SimpleNamespace(
        layers=[layer for layer, kind in zip(cache.layers, kinds, strict=True) if kind != "sliding_attention"]
    )


def answered(model, cache, change, first=20, steps=3):
    """Lengths after a change and logits of what follows: single tokens, then three at once."""
    edited = not_sliding(cache, model.config) if isinstance(cache, KVCache) else cache
    out, lengths, at = [], [], first
    model(IDS[:, :first], **cache_argument(model, cache))
    for i in range(2):
        if i == 1:
            change(edited)
            lengths = [layer.get_seq_length() for layer in attending(edited)]
        for count in (*[1] * steps, 3):
            positions = torch.arange(at, at + count)[None]
            given = cache_argument(model, cache)
            out.append(model(IDS[:, at : at + count], position_ids=positions, **given).logits)
            at += count
    return lengths, torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_script_makes_of_keys_between_tokens_counts(pair, change):
    results = [
        answered(model, DynamicCache(config=model.config), CHANGES[change]) for model in (pair.model, pair.reference)
    ]
    assert results[0][0] == results[1][0]
    assert relative(results[0][1], results[1][1]) < 1e-4
    plain = answered(pair.model, DynamicCache(config=pair.model.config), lambda cache: None)
    assert relative(results[0][1], plain[1]) > 1e-3  # the change is one


@torch.no_grad()
@pytest.mark.parametrize("change", ["heavy hitters", "more", "in place", "values only"])
def test_between_the_prompt_and_its_first_token(pair, change):
    def after_the_prompt(model):
        cache = DynamicCache(config=model.config)
        model(IDS[:, :20], **cache_argument(model, cache))
        CHANGES[change](cache)
        positions = torch.arange(20, 24)[None]
        tokens = [
            model(IDS[:, i : i + 1], position_ids=positions[:, i - 20, None], **cache_argument(model, cache)).logits
            for i in range(20, 24)
        ]
        return torch.cat(tokens, 1)

    assert relative(after_the_prompt(pair.model), after_the_prompt(pair.reference)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "another layer"])
def test_a_cache_of_ours_too(pair, change):
    if pair.model.config.model_type == "gpt_oss" and change not in SAME_LENGTH:
        pytest.skip("it keeps all keys of layers that slide too, so that one mask would not fit both")
    found = answered(pair.model, KVCache(pair.model.config, None), CHANGES[change])
    wanted = answered(pair.reference, DynamicCache(config=pair.reference.config), CHANGES[change])
    assert found[0] == wanted[0] and relative(found[1], wanted[1]) < 1e-4


@torch.no_grad()
def test_sequences_are_repeated_and_chosen(pair):
    if pair.model.config.model_type == "qwen3_next":
        pytest.skip("transformers repeats no states")

    def rearranged(model, cache):
        model(IDS[:, :20], **cache_argument(model, cache))
        model(IDS[:, 20:21], **cache_argument(model, cache))
        cache.batch_repeat_interleave(3)
        several = torch.cat([IDS[:, 21:22], IDS[:, 31:32], IDS[:, 41:42]])
        out = [model(several, **cache_argument(model, cache)).logits]
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        out.append(model(several, **cache_argument(model, cache)).logits)
        if model.config.model_type not in HYBRID:
            cache.batch_select_indices(torch.tensor([0, 2]))
            out.append(model(several[:2], **cache_argument(model, cache)).logits)
        return torch.cat(out)

    wanted = rearranged(pair.reference, DynamicCache(config=pair.reference.config))
    assert relative(rearranged(pair.model, DynamicCache(config=pair.model.config)), wanted) < 1e-4
    if pair.model.config.model_type not in HYBRID:
        assert relative(rearranged(pair.model, KVCache(pair.model.config, None)), wanted) < 1e-4


@torch.no_grad()
def test_tokens_are_taken_back_and_snapshots_put_back(pair):
    """What a script has read stays as it was, whatever is computed after tokens were taken back."""
    if pair.model.config.model_type in HYBRID:
        pytest.skip("states and windows cannot be taken back")

    def there_and_back(model, cache):
        for at, end in ((0, 20), (20, 21)):
            model(IDS[:, at:end], **cache_argument(model, cache))
        saved = [(layer.keys, layer.values) for layer in cache.layers]
        for layer in cache.layers:
            layer.crop(-4)
        other = model(IDS[:, 50:53], **cache_argument(model, cache)).logits
        for layer, (keys, values) in zip(cache.layers, saved, strict=True):
            layer.keys, layer.values = keys, values
        return torch.cat([other, model(IDS[:, 21:22], **cache_argument(model, cache)).logits], 1)

    wanted = there_and_back(pair.reference, DynamicCache(config=pair.reference.config))
    for cache in (DynamicCache(config=pair.model.config), KVCache(pair.model.config, None)):
        assert relative(there_and_back(pair.model, cache), wanted) < 1e-4


@torch.no_grad()
def test_a_hook_changes_a_layer_that_was_computed_ahead(llama):
    """While a token is computed: of a layer further down, whose keys a stretch of layers has read already."""

    def run(model, how):
        cache = DynamicCache(config=model.config)
        model(IDS[:, :20], **cache_argument(model, cache))
        model(IDS[:, 20:21], **cache_argument(model, cache))

        def change(module, args, out):
            layer = cache.layers[6]
            if how == "in place":
                layer.keys[:, :, 2:9] = 0
            elif how == "assigned":
                layer.keys, layer.values = layer.keys.flip(2), layer.values * 0.5
            else:
                cache.layers[6] = copy.deepcopy(layer)
                cache.layers[6].values = layer.values * 0.5

        handle = model.model.layers[3].register_forward_hook(change)
        out = [model(IDS[:, i : i + 1], **cache_argument(model, cache)).logits for i in (21, 22)]
        handle.remove()
        return torch.cat(out, 1), cache.get_seq_length(6)

    for how in ("in place", "assigned", "exchanged"):
        found, wanted = run(llama.model, how), run(llama.reference, how)
        assert found[1] == wanted[1] == 23, how
        assert relative(found[0], wanted[0]) < 1e-4, how


@torch.no_grad()
def test_a_layer_with_other_lengths_than_the_first(llama):
    """A lone token sees all keys of its layer, as in transformers; for several, one mask does not fit both layers."""

    def shorter(cache):
        layer = cache.layers[4]
        layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]

    def run(model):
        cache = DynamicCache(config=model.config)
        model(IDS[:, :20], **cache_argument(model, cache))
        shorter(cache)
        out = [model(IDS[:, i : i + 1], **cache_argument(model, cache)).logits for i in range(20, 23)]
        assert [layer.get_seq_length() for layer in cache.layers[3:6]] == [23, 18, 23]
        return torch.cat(out, 1), cache

    found, cache = run(llama.model)
    assert relative(found, run(llama.reference)[0]) < 1e-4
    with pytest.raises(UsageError, match="other layers"):
        llama.model(IDS[:, 23:26], **cache_argument(llama.model, cache))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("new", [1, 2, 40])
def test_a_mask_for_more_keys_than_a_layer_has(llama, new, dtype):
    """transformers stops too; the first columns are not those of the keys that are there."""
    cache = DynamicCache(config=llama.model.config)
    llama.model(IDS[:, :20], **cache_argument(llama.model, cache))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]
    mask = torch.ones(1, 1, new, 20 + new).to(dtype)
    with pytest.raises(UsageError, match=rf"the mask is for {20 + new} keys, this layer's cache has {15 + new}"):
        llama.model(IDS[:, 20 : 20 + new], attention_mask=mask, **cache_argument(llama.model, cache))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "ktx"])
@pytest.mark.parametrize("length", [12, 40])
def test_a_prompt_in_a_static_cache(pair, implementation, length):
    if implementation == "sdpa" and pair.reference.config.model_type == "gpt_oss":
        pytest.skip("transformers' model has no SDPA")
    model, found = copy.copy(pair.model), []
    model.set_attn_implementation(implementation)
    try:
        for of in (model, pair.reference):
            cache = StaticCache(config=of.config, max_cache_len=64)
            parts = [(0, length), (length, length + 3), (length + 3, length + 4)]
            found.append([of(IDS[:, i:j], **cache_argument(of, cache)).logits for i, j in parts])
    finally:
        model.set_attn_implementation("ktx")
    for mine, right in zip(*found, strict=True):
        assert relative(mine, right) < 1e-4


@torch.no_grad()
def test_a_layer_stays_the_object_that_a_script_holds(llama):
    cache = DynamicCache(config=llama.model.config)
    llama.model(IDS[:, :20], **cache_argument(llama.model, cache))
    held = list(cache.layers)
    llama.model(IDS[:, 20:21], **cache_argument(llama.model, cache))
    assert all(mine is theirs for mine, theirs in zip(held, cache.layers, strict=True))
    assert all(type(layer) is GrowingLayer and layer.get_seq_length() == 21 for layer in held)


def layer_of(kind, positions=6):
    layer = GrowingLayer(kind)
    keys, values = torch.randn(1, 2, positions, 32), torch.randn(1, 2, positions, 64)
    layer.update(keys, values)
    return layer, keys, values


def test_one_half_of_another_length_is_an_error_that_names_both():
    layer, keys, _ = layer_of(None)
    layer.keys = keys[:, :, 2:]
    assert layer.get_seq_length() == 4
    with pytest.raises(UsageError, match=r"keys are \[1, 2, 4, 32\], its values \[1, 2, 6, 64\]"):
        layer.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 64))


@pytest.mark.parametrize("wrong", [torch.randn(2, 6, 32), torch.zeros(1, 2, 6, 32, dtype=torch.int64)])
def test_what_is_no_keys_is_an_error(wrong):
    layer, *_ = layer_of(None)
    with pytest.raises(UsageError, match="floats \\[batch, heads, positions, columns\\]"):
        layer.values = wrong


def test_another_batch_than_the_cache_has_is_an_error():
    layer, *_ = layer_of(None)
    with pytest.raises(ValueError, match="cannot be continued"):
        layer.update(torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 64))


def test_blocks_of_eight_bits_are_read_as_floats_and_replaced_by_them():
    layer, keys, values = layer_of("q8_0")
    for name in ("keys", "values"):
        with pytest.raises(UsageError, match=f"the {name} of this cache are blocks"):
            getattr(layer, name)
    assert relative(layer.copy_as_floats()[0], keys) < 1e-2 and relative(layer.copy_as_floats()[1], values) < 1e-2
    before = layer.buffers[0]
    layer.values = values[:, :, :6] * 3
    assert layer.values is layer.assigned[1]
    layer.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 64))
    assert layer.buffers[0] is before  # what was not assigned is not rounded again
    assert relative(layer.copy_as_floats()[1][:, :, :6], values * 3) < 1e-2
    layer.keys, layer.values = keys[:, :, 3:], values[:, :, 3:]
    assert layer.copy_as_floats()[0].shape == (1, 2, 3, 32) and layer.get_seq_length() == 3


@torch.no_grad()
def test_a_quantised_cache_is_evicted_from(llama):
    def evict(cache):
        for layer in cache.layers:
            layer.keys, layer.values = (states[:, :, 4:] for states in layer.copy_as_floats())

    lengths, found = answered(llama.model, KVCache(llama.model.config, "q8_0"), evict)
    _, wanted = answered(llama.reference, DynamicCache(config=llama.reference.config), CHANGES["views"])
    assert set(lengths) == {22} and relative(found, wanted) < 5e-2


def test_an_empty_layer_is_filled_by_assignment_and_emptied_by_none():
    layer, keys, values = GrowingLayer(None), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 4)
    layer.keys, layer.values = keys, values
    assert layer.get_seq_length() == 5
    more = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 4)
    found = layer.update(*more)
    assert torch.equal(found[0], torch.cat([keys, more[0]], 2)) and torch.equal(found[1][:, :, :5], values)
    layer.keys = None
    assert layer.get_seq_length() == 0 and layer.keys.shape[2] == 0


def test_a_reader_costs_a_copy_and_nobody_else_does():
    layer, *_ = layer_of(None)
    one = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 64)
    buffer = layer.buffers[0]
    layer.update(*one)
    assert layer.buffers[0] is buffer
    seen = layer.keys
    layer.update(*one)
    assert layer.buffers[0] is not buffer and torch.equal(seen, layer.keys[:, :, :7])
