"""What the modules of a forward read from its ForwardContext, and that it ends with the forward."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LlamaConfig

from ktx.cache import forward_context
from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.forward_context import AdapterStep, ForwardContext, batch_of, current, enter, rows_part
from ktx.cache.paged import PagedCache
from ktx.kernels import cpu
from ktx.ops.lora import AdapterMapping
from ktx.weights.lora import AdapterUse


@pytest.fixture
def cache():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    return PagedCache(config, 4, torch.float32)


def batch_of_two():
    return BatchMetadata([SequenceSpan(0, 0, 2, [0]), SequenceSpan(1, 5, 1, [1])])


def test_a_forward_has_a_context_and_nothing_after_it(cache):
    batch = batch_of_two()
    assert current() is None and cache.batch is None
    with cache.forward(batch, (0, 2)):
        assert current() is cache.context and cache.batch is batch
        assert cpu.current_bf16_rows() == (3, (0, 2))
    assert current() is None and cache.batch is None and cpu.current_bf16_rows() == (-1, ())


def test_a_forward_that_fails_leaves_no_context(cache):
    with pytest.raises(ZeroDivisionError), cache.forward(batch_of_two()):
        raise ZeroDivisionError
    assert current() is None and cache.batch is None and cpu.current_bf16_rows() == (-1, ())


def test_only_the_cache_s_own_key_pools_belong_to_the_batch(cache):
    batch, states = batch_of_two(), torch.randn(1, 2, 3, 16)
    with cache.forward(batch):
        keys, values = cache.update(states, states, 1)
        assert batch_of(keys) is batch
        assert batch_of(values) is None and batch_of(keys.clone()) is None and batch_of(states) is None
    assert batch_of(keys) is None, "no forward runs"
    other = PagedCache(cache.config, 4, torch.float32)
    with other.forward(batch):
        assert batch_of(keys) is None, "the pools of another cache"


def test_another_thread_s_forward_is_not_seen(cache):
    seen = []
    with cache.forward(batch_of_two()):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_row_counts_are_those_of_the_batch_s_positions():
    context = ForwardContext(batch_of_two())
    assert context.row_counts(torch.zeros(1, 3)) == [2, 1]
    assert context.row_counts(torch.zeros(1, 4)) is None, "positions of something else"
    assert context.row_counts(torch.zeros(3, 1, 3)) is None, "multimodal positions"
    assert ForwardContext().row_counts(torch.zeros(1, 3)) is None


def test_a_part_keeps_the_rest_and_ends():
    first, second = (AdapterUse("a"),), (AdapterUse("b"),)
    mapping = AdapterMapping()
    spans = [(2, first), (1, second)]
    with enter(ForwardContext(batch_of_two(), adapters=AdapterStep(mapping, spans, spans))), cpu.bf16_rows(3, (0, 2)):
        with rows_part(2, 1):
            assert current().part == (2, 1) and current().batch.tokens == 3
            assert list(mapping.slices(1)) == [(slice(0, 1), second)]
            assert cpu.current_bf16_rows() == (1, ()), "the row is not one of those in bf16"
        with rows_part(0, 2):
            assert cpu.current_bf16_rows() == (2, (0, 2))
        assert current().part is None and list(mapping.slices(3)) == [(slice(0, 2), first), (slice(2, 3), second)]
        assert AdapterMapping().spans is None, "the step of another model"
    assert mapping.spans is None and mapping.logits_spans is None
    with forward_context.enter(ForwardContext()), rows_part(0, 1):
        assert mapping.spans is None
