"""The engine with a model on pretended GPUs: several requests at once, shared beginnings, and answers as on the CPU."""

from __future__ import annotations

import pytest
import torch

import ktx
from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.paged import PagedCache
from ktx.engine.sampler import SamplingParams
from ktx.ops.gpu import offload
from tests.engine.test_batching import answers
from tests.gpu.helpers import F32, SMALL, SMALLER, rules
from tests.support.tiny_chat_model import write_model

PROMPTS = [[(i * 37 + j * j) % 250 + 9 for j in range(length)] for i, length in enumerate((5, 20, 1))]
SHORT = SamplingParams(max_new_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module", params=["deepseek_v3", "gpt_oss"])
def pair(request, tmp_path_factory):
    family = request.param
    config = SMALL | SMALLER[family]
    if family == "deepseek_v3":
        config = config | {"first_k_dense_replace": 1}
    folder = write_model(tmp_path_factory.mktemp("gpu") / family, family, "F32", **config)
    load = lambda chosen: ktx.load(folder, folder / "model.gguf", chosen, progress=False, **F32)[0]  # noqa: E731
    return load(None), load(rules(family, layers={1: "cuda:1"}, Experts="cpu"))


def test_requests_of_different_lengths_at_once(pair):
    found = []
    for model in pair:
        with model.ktx.engine(max_batch_size=3, chunk_size=16) as engine:
            found.append([event.ids for event in answers(engine, PROMPTS, SHORT)])
            engine.check_integrity()
    assert found[0] == found[1]


def test_a_beginning_that_was_seen_is_shared(pair):
    cpu, placed = pair
    prompt = [i % 200 + 9 for i in range(66)]
    with cpu.ktx.engine() as engine:
        expected = answers(engine, [prompt], SHORT)[0].ids
    with placed.ktx.engine() as engine:
        first, second = (answers(engine, [prompt], SHORT)[0] for _ in range(2))
        engine.check_integrity()
    assert first.ids == second.ids == expected
    assert first.usage.cached == 0 and second.usage.cached >= 64


def test_experts_that_fail_end_their_request_alone(pair):
    model = pair[1]
    experts = model.model.layers[1].mlp.experts

    def fail(module, args):
        if len(args[0]) >= 20:
            raise RuntimeError("experts failed")

    with model.ktx.engine(chunk_size=64, prefix_cache=False) as engine:
        hook = experts.register_forward_pre_hook(fail)
        try:
            found = answers(engine, PROMPTS[:2], SHORT)
        finally:
            hook.remove()
        engine.check_integrity()
    assert [event.reason for event in found] == ["length", "error"] and "experts failed" in found[1].error


def test_tables_of_a_batch_are_moved_once_a_device():
    batch = BatchMetadata([SequenceSpan(0, 0, 3, [2]), SequenceSpan(1, 64, 1, [0, 1])])
    tables = batch.tables_on(torch.device("cpu"))
    assert batch.tables_on(torch.device("cpu")) is tables
    assert tables.slots.tolist() == [128, 129, 130, 64] and tables.sequences.tolist() == [[0, 3, 3], [3, 1, 65]]


@pytest.mark.parametrize("wish,kept", [("q8_0", torch.float16), ("fp8", torch.float8_e4m3fn)])
def test_keys_in_eight_bits_are_no_blocks_on_a_gpu(pair, wish, kept):
    model = pair[1]
    cache = PagedCache(model.config, 4, wish)
    batch = BatchMetadata([SequenceSpan(0, 0, 2, [1])])
    with torch.inference_mode(), cache.forward(batch):
        model(torch.tensor([[5, 6]]), position_ids=batch.position_ids, past_key_values=cache)
    assert {buffer.dtype for layer in cache.layers for buffer in layer.buffers} == {kept}
    offload.raise_offload_errors(model)
