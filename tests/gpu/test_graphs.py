"""Steps of one token a request as graphs: the same answers, from static buffers alone, and what happens where there can
be none.
"""

from __future__ import annotations

import gc
import json
import logging
import time
import weakref
from pathlib import Path

import pytest
import torch

import ktx
from ktx.__main__ import build_parser
from ktx.cli.serve import make_engine_options
from ktx.devices import gpus
from ktx.engine import graphs
from ktx.engine.request import TokenEvent
from ktx.engine.sampler import SamplingParams
from ktx.transformers_compat import default_cache_name
from tests.engine.test_batching import answers
from tests.gpu.helpers import F32, SMALL, SMALLER, rules
from tests.support.tiny_chat_model import write_model

PROMPTS = [[(i * 37 + j * j) % 250 + 9 for j in range(length)] for i, length in enumerate((5, 20, 1))]
NEW = 6
REAL = torch.cuda.is_available()
KIND = graphs.CudaGraph if REAL else graphs.EagerReplay
LONG, SHORT = (SamplingParams(max_new_tokens=new, ignore_eos=True) for new in (NEW, 3))
KINDS = {  # a latent, with experts in the CPU's memory; keys and values apart, all on the GPU but the embedding
    "deepseek_v3": (
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
        {"Experts": "cpu"},
    ),
    "glm4_moe": (
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        {"Embedding": "cpu"},
    ),
}


class Placed:
    """A model on one GPU, and what each prompt is answered on the CPU."""

    def __init__(self, folder, family):
        config, self.elsewhere = KINDS[family]
        self.family, self.folder = (
            family,
            write_model(
                folder / family, family, "F32", **(SMALL | SMALLER[family] | {"num_attention_heads": 2} | config)
            ),
        )
        self.cpu = self.load(None)
        self.expected = self.on_cpu(PROMPTS, LONG)
        self.model = self.load(rules(family, **self.elsewhere))

    def load(self, chosen):
        return ktx.load(self.folder, self.folder / "model.gguf", chosen, progress=False, **F32)[0]

    def on_cpu(self, prompts, sampling):
        with self.cpu.ktx.engine() as engine:
            return [event.ids for event in answers(engine, prompts, sampling)]

    def engine(self, **options):
        return self.model.ktx.engine(**({"max_batch_size": 4, "chunk_size": 16, "kv_cache_tokens": 512} | options))


@pytest.fixture(scope="module", params=list(KINDS))
def placed(request, tmp_path_factory):
    return Placed(tmp_path_factory.mktemp("graphs"), request.param)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return Placed(tmp_path_factory.mktemp("graphs"), "deepseek_v3")


class Steps:
    """What an engine's forwards were: sizes of graphs that were replayed, tokens of what was computed without."""

    def __init__(self, engine):
        self.replayed, self.eager, runner = [], [], engine.runner
        step, forward = runner.graphs.step, runner._forward

        def replayed(tokens):
            found = step(tokens)
            if found is not None:
                self.replayed.append(len(tokens))
            return found

        def computed(parts):
            self.eager.append([part.count for part in parts])
            return forward(parts)

        runner.graphs.step, runner._forward = replayed, computed


def test_requests_join_and_leave_and_prompts_are_computed_between(placed):
    """One request alone, a second one joins in the middle, then a third: steps of one, two, and three that are padded
    to four.
    """
    with placed.engine() as engine:
        steps, found = Steps(engine), {}
        waiting = [1, 2]

        def heard(index, event):
            if isinstance(event, TokenEvent):
                if waiting and len(found.setdefault(index, [])) == 1:
                    join(waiting.pop(0))
                found.setdefault(index, []).append(event.token.token)

        def join(index):
            engine.submit(PROMPTS[index], LONG, lambda event: heard(index, event))

        join(0)
        deadline = time.monotonic() + 120
        while engine.outputs or waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        engine.check_integrity()
    assert [found[i] for i in range(3)] == placed.expected
    assert set(steps.replayed) == {1, 2, 3}
    assert [1] * 3 not in steps.eager and any(max(counts) > 1 for counts in steps.eager)


def test_a_request_that_gave_its_pages_up_goes_on_the_same(hybrid):
    """Two sequences grow into a second page, for which there is no room: the younger one is computed again."""
    prompts = [[(i * 31 + j * 7) % 200 + 9 for j in range(63)] for i in range(2)]
    with hybrid.engine(max_batch_size=2, kv_cache_tokens=192, prefix_cache=False, chunk_size=128) as engine:
        steps = Steps(engine)
        found = answers(engine, prompts, SHORT)
    assert [event.ids for event in found] == hybrid.on_cpu(prompts, SHORT)
    assert sum(event.usage.preempted for event in found) and {1} <= set(steps.replayed)


def test_a_replay_reads_static_buffers_alone(hybrid, monkeypatch):
    """The model is called with the same tensors at each replay of a size, and nothing of the scheduler's is within
    reach.
    """
    with hybrid.engine(max_batch_size=2) as engine:
        called, inside, model = {}, [False], engine.model
        forward, step = model.forward, engine.runner.graphs.step

        def spied(**given):
            if inside[0]:
                tables = given[default_cache_name()].batch.tables_on(gpus()[0].torch)
                held = [given["input_ids"], given["position_ids"], tables.pages, tables.slots, tables.sequences]
                addresses = tuple(tensor.data_ptr() for tensor in held)
                called.setdefault(tables.pages.shape[0], set()).add(addresses)
            return forward(**given)

        def alone(tokens):
            """What the step was given is useless by the time that the graph is replayed."""
            fill = engine.runner.graphs.inputs.fill

            def filled(given, size):
                fill(given, size)
                if REAL:  # the copies read what is overwritten next
                    torch.cuda.synchronize()
                engine.runner.graphs.inputs.host_row_values.fill_(1 << 40)
                engine.runner.graphs.inputs.host_pages.fill_(1 << 20)
                for token in given:
                    object.__setattr__(token, "pages", None)

            monkeypatch.setattr(engine.runner.graphs.inputs, "fill", filled)
            inside[0] = True
            try:
                return step([graphs.DecodeToken(token.id, token.position, list(token.pages)) for token in tokens])
            finally:
                inside[0] = False
                monkeypatch.setattr(engine.runner.graphs.inputs, "fill", fill)

        monkeypatch.setattr(model, "forward", spied)
        monkeypatch.setattr(engine.runner.graphs, "step", alone)
        found = [event.ids for event in answers(engine, PROMPTS[:2], LONG)]
    assert found == hybrid.expected[:2]
    if not REAL:  # there it is not called at all
        assert set(called) == {1, 2} and all(len(addresses) == 1 for addresses in called.values())


@pytest.mark.skipif(REAL, reason="CUDA's graphs hold nothing")
def test_what_a_graph_works_on_lives_as_long_as_it(hybrid, monkeypatch):
    def capture(self, function):
        function()
        self.function = weakref.ref(function)

    monkeypatch.setattr(graphs.EagerReplay, "capture", capture)
    monkeypatch.setattr(graphs.EagerReplay, "replay", lambda self: self.function()())
    with hybrid.engine(max_batch_size=1) as engine:
        gc.collect()
        assert answers(engine, PROMPTS[:1], SHORT)[0].ids == hybrid.expected[0][:3]
        assert engine.runner.graphs.replays == 2


def test_padding_is_on_a_page_of_its_own_and_reaches_no_expert(hybrid):
    experts, seen = hybrid.model.model.layers[1].mlp.experts, []
    with hybrid.engine() as engine:
        runner = engine.runner
        runner.graphs.inputs.fill([graphs.DecodeToken(7, 1, [2])] * 3, 4)
        inputs = runner.graphs.inputs
        assert inputs.field("slots", 4).tolist() == [129, 129, 129, runner.pages * 64]
        assert inputs.pages[3, 0] == runner.pages and inputs.field("keys", 4).tolist() == [2, 2, 2, 1]
        for layer in runner.cache.layers:
            assert all(len(buffer) == runner.pages + 1 for buffer in layer.buffers)
        before = [buffer[:-1].nan_to_num() for layer in runner.cache.layers for buffer in layer.buffers]
        hook = experts.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        counted = experts.counts.clone()
        try:
            with torch.inference_mode():
                runner.graphs.step([graphs.DecodeToken(7, 1, [2])] * 3)
        finally:
            hook.remove()
        after = [buffer[:-1].nan_to_num() for layer in runner.cache.layers for buffer in layer.buffers]
        changed = [(a != b).flatten(1).any(1).nonzero().flatten().tolist() for a, b in zip(before, after, strict=True)]
        assert all(pages in ([2], []) for pages in changed) and any(changed)
        assert seen == [3] and not torch.equal(experts.counts, counted)


def test_experts_that_fail_in_a_replay_end_their_request(hybrid):
    experts = hybrid.model.model.layers[1].mlp.experts
    calls = []

    def fail(module, args):
        calls.append(len(args[0]))
        if len(calls) > 2:
            raise RuntimeError("experts failed")

    with hybrid.engine(max_batch_size=1, prefix_cache=False) as engine:
        steps = Steps(engine)
        hook = experts.register_forward_pre_hook(fail)
        try:
            found = answers(engine, PROMPTS[:1], LONG)[0]
        finally:
            hook.remove()
        assert found.reason == "error" and "experts failed" in found.error and len(found.ids) == 2
        assert steps.replayed[0] == 1
        assert answers(engine, PROMPTS[:1], LONG)[0].ids == hybrid.expected[0]


def test_what_cannot_be_captured_is_computed_without_and_told(hybrid, monkeypatch, caplog):
    def broken(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(KIND, "capture", broken)
    with caplog.at_level(logging.WARNING, "ktx.engine"), hybrid.engine(max_batch_size=1) as engine:
        assert engine.runner.graphs is None
        assert answers(engine, PROMPTS[:1], LONG)[0].ids == hybrid.expected[0]
    assert "RuntimeError: operation not permitted when stream is capturing" in caplog.text
    assert "kernel by kernel" in caplog.text


def test_a_capture_that_breaks_off_inside_a_layer_leaves_nothing_that_is_waited_for(hybrid, monkeypatch):
    """On a CUDA device nothing runs while it is recorded: a hand-over would be waited for that never began."""
    way = hybrid.model.model.layers[1].mlp.offload

    def broken(self, function):
        way.all_buffers[0].job = object()
        raise RuntimeError("no")

    monkeypatch.setattr(KIND, "capture", broken)
    with hybrid.engine(max_batch_size=1):
        assert all(slot.job is None for slot in way.all_buffers)


def test_what_is_captured_is_told_and_an_option_switches_it_off(hybrid, caplog):
    with caplog.at_level(logging.INFO, "ktx.engine"), hybrid.engine(max_batch_size=3):
        assert "CUDA graphs of steps with 1, 2, 3 requests" in caplog.text
    with hybrid.engine(cuda_graphs=False) as engine:
        assert engine.runner.graphs is None
        buffers = [buffer for layer in engine.runner.cache.layers for buffer in layer.buffers]
        assert all(len(buffer) == engine.runner.pages for buffer in buffers)
    for words, wanted in ([], True), (["--no_cuda_graphs"], False), (["--cuda-graphs"], True):
        assert make_engine_options(build_parser().parse_args(["serve", *words]))["cuda_graphs"] is wanted


def test_drafts_and_modules_that_are_listened_to_are_computed_without(hybrid):
    with hybrid.engine(max_batch_size=1) as engine:
        steps, seen = Steps(engine), []
        hook = hybrid.model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
        assert answers(engine, PROMPTS[:1], LONG)[0].ids == hybrid.expected[0]
        assert not steps.replayed and len(seen) == NEW
        hook.remove()
        answers(engine, PROMPTS[:1], SHORT)
        assert steps.replayed
    hook = hybrid.model.model.register_forward_hook(
        lambda *args: None
    )  # as one that guesses tokens by a layer of the model
    with hybrid.engine(max_batch_size=1) as engine:
        assert not engine.runner.graphs.graphs
    hook.remove()
    repeated = [5, 6, 7, 8] * 4
    with hybrid.engine(max_batch_size=1, speculative="prompt_lookup") as engine:
        steps = Steps(engine)
        answers(engine, [repeated], LONG)
        assert all(part == [1] for part in steps.eager if len(part) > 1) and steps.eager


def test_models_that_are_not_on_one_gpu_say_why(hybrid):
    assert graphs.unsupported_reason(hybrid.model) == ""
    spread = hybrid.load(rules("deepseek_v3", layers={1: "cuda:1"}, Experts="cpu"))
    assert graphs.unsupported_reason(spread) == "model.layers.1 is on cuda:1, other modules are on cuda:0"
    assert (
        graphs.unsupported_reason(hybrid.load(rules("deepseek_v3", head="cpu")))
        == "lm_head is on cpu, other modules are on cuda:0"
    )
    inside = hybrid.load(rules("deepseek_v3", MLP="cpu"))
    assert "mlp is on cpu, other modules are on cuda:0" in graphs.unsupported_reason(inside)
    scaled = hybrid.model.model.rotary_emb
    scaled.fixed = False
    try:
        assert graphs.unsupported_reason(hybrid.model) == "the tables of model.rotary_emb depend on a sequence's length"
    finally:
        scaled.fixed = True
    with hybrid.cpu.ktx.engine(max_batch_size=1) as engine:
        assert engine.runner.graphs is None and graphs.first_gpu(engine.model) is None


def test_sizes_are_powers_of_two_and_the_most():
    assert graphs.capture_sizes(1) == [1] and graphs.capture_sizes(4) == [4, 2, 1]
    assert graphs.capture_sizes(6) == [6, 4, 2, 1] and graphs.capture_sizes(32) == [32, 16, 8, 4, 2, 1]


def test_the_benchmark_compares_both_ways(hybrid, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
    import gpu_graphs

    record = tmp_path / "graphs.jsonl"
    words = [
        "--model",
        str(hybrid.folder),
        "--weights",
        str(hybrid.folder / "model.gguf"),
        "-b",
        "1,2",
        "-p",
        "2",
        "-n",
        "1",
    ]
    assert gpu_graphs.main([*words, "--placements", "hybrid", "--record", str(record)], **F32) == 0
    first, second = (json.loads(line) for line in record.read_text().splitlines())
    assert [first["requests"], first["graph"], second["requests"], second["graph"]] == [1, 1, 2, 2]
    assert first["alike"] == second["alike"] == 1 and first["graph ms"] > 0 and "eager ms" in capsys.readouterr().out


def test_beside_a_share_of_the_experts_and_prompts_that_bring_the_others(hybrid):
    weights, options = (
        hybrid.folder / "model.gguf",
        {"device": "cuda", "gpu_experts": 3, "stream_experts_min_tokens": 2},
    )
    model = ktx.load(hybrid.folder, weights, progress=False, **F32, **options)[0]
    block = model.model.layers[1].mlp
    with model.ktx.engine(max_batch_size=4, chunk_size=16, kv_cache_tokens=512) as engine:
        replayed = engine.runner.graphs
        assert block.should_stream(torch.zeros(2, 64)) and not block.should_stream(torch.zeros(1, 64))
        before = block.experts.counts[: block.experts.total_experts].clone()
        assert [event.ids for event in answers(engine, PROMPTS, LONG)] == hybrid.expected
        assert (
            replayed is not None and replayed.replays > 0
        )  # of several requests: by the CPU, although prompts of as many tokens are not
        assert (block.experts.counts[: block.experts.total_experts] > before).any()
        engine.check_integrity()
