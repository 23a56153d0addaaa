"""What an engine's forwards read and take."""

from __future__ import annotations

import threading
import time

import pytest

import ktx
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.engine.engine import Engine, Options
from ktx.engine.request import Finished
from ktx.engine.runner import SequentialRunner
from ktx.engine.sampler import SamplingParams
from ktx.ops.experts import Experts
from ktx.ops.weight_traffic import WeightTraffic
from tests.support.tiny_chat_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("chat") / "m", "deepseek_v3")
    return ktx.load(folder, folder / "model.gguf", progress=False)


def asked(engine, *prompts, tokens=5):
    """Usage of the answers."""
    settings = SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=0.0)
    return [event.usage for _, event in engine.generate(prompts, settings) if isinstance(event, Finished)]


def test_an_engine_begins_with_nothing(model):
    with model[0].ktx.engine(kv_cache_tokens=256) as engine:
        done = engine.stats.snapshot()
        assert done.nbytes == done.expert_bytes == done.prompt_tokens == done.answer_tokens == 0 and done.seconds == 0
        assert done.layers == {1: (0,) * 16}


def test_bytes_are_those_of_every_forward(model):
    with model[0].ktx.engine(kv_cache_tokens=512, chunk_size=PAGE_TOKENS) as engine:
        (usage,) = asked(engine, "a" * 100, tokens=6)  # two forwards for the prompt, of which the second makes logits
        done, reads = engine.stats.snapshot(), WeightTraffic.from_model(model[0])
        assert (done.prompt_tokens, done.answer_tokens) == (usage.prompt, usage.answer) == (100, 6)
        assert engine.steps == 7
        assert done.nbytes - done.expert_bytes == reads.bytes(7, 105, 6)
        experts = next(module for module in model[0].modules() if isinstance(module, Experts))
        one = experts.weight_bytes()[0] // 16
        assert done.expert_bytes % one == 0 and 6 * 3 * one <= done.expert_bytes <= (3 * 16 + 5 * 3) * one
        assert sum(done.layers[1]) == 105 * 3
        assert 0 < max(done.node_seconds) <= done.expert_seconds <= done.seconds
        assert done.gpu_wait_s == 0


def test_what_is_shared_is_not_computed(model):
    with model[0].ktx.engine(kv_cache_tokens=1024) as engine:
        asked(engine, "b" * 200)
        before = engine.stats.snapshot()
        (usage,) = asked(engine, "b" * 200)
        assert usage.cached > 0
        assert engine.stats.snapshot().prompt_tokens - before.prompt_tokens == 200 - usage.cached


def test_sequences_one_after_another_read_the_weights_each(model):
    runner = SequentialRunner(model[0], 8)
    with Engine(*model, Options(max_batch_size=2), runner) as engine:
        usage = asked(engine, "c" * 30, "d" * 40, tokens=3)
        done, reads = engine.stats.snapshot(), WeightTraffic.from_model(model[0])
        forwards = sum(one.answer for one in usage)  # the prompts' make the first tokens
        assert done.nbytes - done.expert_bytes == reads.bytes(forwards, 70 + forwards - 2, forwards)


def test_it_can_be_read_while_answers_are_made(model):
    with model[0].ktx.engine(kv_cache_tokens=1024, max_batch_size=4) as engine:
        seen, stop = [], threading.Event()

        def look():
            while not stop.is_set():
                seen.append(engine.stats.snapshot())
                time.sleep(0.001)

        watcher = threading.Thread(target=look)
        watcher.start()
        usage = asked(engine, *(chr(97 + i) * 50 for i in range(6)), tokens=20)
        stop.set()
        watcher.join()
        last = engine.stats.snapshot()
        assert last.answer_tokens == sum(one.answer for one in usage) == 120
        assert len({done.answer_tokens for done in seen}) > 5  # it grows while they are made
        for before, after in zip(seen, [*seen[1:], last], strict=True):
            assert after.nbytes >= before.nbytes and after.seconds >= before.seconds
            assert all(a >= b for a, b in zip(after.layers[1], before.layers[1], strict=True))
