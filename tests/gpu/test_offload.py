"""Experts in the CPU's memory for a layer on a GPU: the order of what is done, buffers, and errors."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch

from ktx.cache.forward_context import ForwardContext, Padding, enter
from ktx.engine.runner import to_cpu
from ktx.ops.gpu import offload, streams
from ktx.ops.gpu.offload import ExpertOffload
from ktx.ops.gpu.padding import NO_EXPERT, mask_padding
from ktx.ops.gpu.streams import ThreadStream
from tests.gpu.helpers import Twins

CPU = torch.device("cpu")


class Recording:
    """A stream that writes down what it is given, and does it when it is waited for."""

    def __init__(self):
        self.told, self.open = [], []

    def fork(self):
        self.told.append("fork")

    def copy(self, target, source):
        self.told.append("copy")
        self.open.append(lambda: target.copy_(source))

    def call(self, function):
        self.told.append(function.__name__)
        self.open.append(function)

    def join(self):
        self.told.append("join")
        while self.open:
            self.open.pop(0)()


def twice(hidden, ids, weights):
    return hidden * 2 + ids.sum(1, keepdim=True) + weights.sum(1, keepdim=True)


def states(tokens, columns=4, dtype=torch.float32):
    return torch.randn(tokens, columns, dtype=dtype), torch.randint(0, 9, (tokens, 2)), torch.rand(tokens, 2)


@pytest.mark.parametrize("stream", [Recording, lambda: ThreadStream(CPU)], ids=["recording", "thread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_comes_back_is_what_the_experts_made(stream, dtype):
    way = ExpertOffload(stream())
    for tokens in (3, 1, 40, 2, 2):
        given = states(tokens, dtype=dtype)
        found = way.result(way.submit(twice, *given))
        assert found.dtype is dtype and torch.equal(found, twice(*given).to(dtype))


def test_nothing_is_overwritten_before_it_is_read():
    """A second call is given while the first is on its way, and a third when its buffers are used again."""
    way = ExpertOffload(Recording())
    first, second = states(5), states(5)
    under_way = way.submit(twice, *first), way.submit(twice, *second)
    assert under_way[0].buffer_set is not under_way[1].buffer_set
    assert torch.equal(way.result(under_way[0]), twice(*first))
    third = states(5)
    last = way.submit(twice, *third)
    assert last.buffer_set is under_way[0].buffer_set
    assert torch.equal(way.result(under_way[1]), twice(*second)) and torch.equal(way.result(last), twice(*third))


def test_a_result_nobody_comes_for_does_not_disturb_those_that_follow():
    way, slow = ExpertOffload(ThreadStream(CPU)), threading.Event()

    def waiting(*given):
        slow.wait(10)
        return twice(*given)

    way.submit(waiting, *states(4))
    given = [states(4) for _ in range(4)]
    timer = threading.Timer(0.1, slow.set)
    timer.start()
    assert all(torch.equal(way.result(way.submit(twice, *each)), twice(*each)) for each in given)


def test_an_error_of_the_experts_is_raised_where_their_result_is_wanted_and_once():
    way = ExpertOffload(ThreadStream(CPU))

    def broken(*given):
        raise RuntimeError("no such expert")

    under_way = way.submit(broken, *states(2))
    with pytest.raises(RuntimeError, match="no such expert"):
        way.result(under_way)
    given = states(2)
    assert torch.equal(way.result(way.submit(twice, *given)), twice(*given))


def test_a_stream_that_does_not_wait_tells_the_error_to_the_next_who_asks():
    stream = Recording()
    way, do = ExpertOffload(stream), stream.join
    stream.join = lambda: None
    under_way = way.submit(lambda *given: 1 / 0, *states(2))
    out = way.result(under_way)
    do()
    assert out.isnan().all()
    with pytest.raises(ZeroDivisionError):
        way.submit(twice, *states(2))
    way.check()


def test_a_job_can_be_done_again_as_a_graph_does():
    stream = Recording()
    way = ExpertOffload(stream)
    seen = []

    def counted(hidden, ids, weights):
        seen.append(hidden.clone())
        return hidden + len(seen)

    given = states(3)
    under_way = way.submit(counted, *given)
    recorded = list(stream.open)
    out = way.result(under_way)
    assert torch.equal(out, given[0] + 1)
    given[0].fill_(7.0)
    for step in [*recorded, under_way.job.sync]:
        step()
    assert torch.equal(under_way.job.out, torch.full((3, 4), 9.0))


def test_rows_that_stand_for_nothing_are_not_computed_and_their_number_is_read_at_each_start():
    way, seen = ExpertOffload(stream := Recording()), []

    def counted(hidden, ids, weights):
        seen.append(len(hidden))
        return hidden + 1

    padding, given = Padding(torch.tensor([2]), torch.tensor([1, 1, 0])), states(3)
    with enter(ForwardContext(padding=padding)):
        under_way = way.submit(counted, *given)
        assert mask_padding(given[1])[:2].equal(given[1][:2]) and mask_padding(given[1])[2].tolist() == [NO_EXPERT] * 2
    recorded = list(stream.open)
    out = way.result(under_way)
    assert torch.equal(out[:2], given[0][:2] + 1) and not out[2].any()
    padding.count[0] = 1
    for step in [*recorded, under_way.job.sync]:
        step()
    assert seen == [2, 1] and not under_way.job.out[1:].any()
    assert mask_padding(given[1]) is given[1]


def test_functions_of_a_graph_are_called_again_until_they_are_forgotten(monkeypatch):
    capturing, seen = [True], []
    monkeypatch.setattr(streams, "_load_cuda_function", lambda *types: lambda stream, function, number: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    launch, before = streams.host_functions(), set(streams._waiting)
    with streams.collect_graph_functions() as numbers:
        launch(0, lambda: seen.append("graph"))
    capturing[0] = False
    launch(0, lambda: seen.append("once"))
    (once,) = set(streams._waiting) - before - set(numbers)
    for number in (*numbers, once, *numbers):
        streams._run_registered(number)
    assert seen == ["graph", "once", "graph"] and len(numbers) == 1
    streams.unregister(numbers)
    assert set(streams._waiting) == before


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    twins = Twins(tmp_path_factory.mktemp("deepseek_v3"), "deepseek_v3")
    return twins, twins.on(Experts="cpu")


def test_shared_experts_are_computed_while_the_cpu_computes_the_others(hybrid, monkeypatch):
    _, model = hybrid
    block, stream = model.model.layers[1].mlp, Recording()
    monkeypatch.setattr(block, "offload", ExpertOffload(stream))
    shared = block.shared_experts.register_forward_hook(lambda *args: stream.told.append("shared"))
    experts = block.experts.register_forward_hook(lambda *args: stream.told.append("experts"))
    try:
        with torch.inference_mode():
            block(torch.randn(1, 2, 64))
    finally:
        shared.remove(), experts.remove()
    order = ["fork", "copy", "copy", "copy", "submit", "shared", "sync", "copy", "join"]
    assert [word for word in stream.told if word != "experts"] == order and stream.told.count("experts") == 1


def test_experts_that_are_put_off_run_while_the_device_goes_on_to_the_next_layer(tmp_path, monkeypatch):
    twins = Twins(tmp_path, "deepseek_v3", num_hidden_layers=4)
    rules, ids, stream = twins.rules(Experts="cpu"), torch.tensor([[5, 6, 7]]), Recording()
    on_cpu, model = twins.load(None, defer_experts=1), twins.load(rules, defer_experts=1)
    way, told = ExpertOffload(stream), stream.told
    blocks = [(i, layer) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "offload")]
    for i, layer in blocks:
        monkeypatch.setattr(layer.mlp, "offload", way)
        layer.self_attn.register_forward_hook(lambda *args, i=i: told.append(f"attention {i}"))
        layer.mlp.shared_experts.register_forward_hook(lambda *args, i=i: told.append(f"shared {i}"))
    with torch.inference_mode():
        assert (model(ids).logits - on_cpu(ids).logits).abs().max() < 3e-5
    order = [word for word in told if word not in ("fork", "copy", "join")]
    for i, _ in blocks[1:]:
        before = order.index(f"attention {i}")
        after = order[before : order.index(f"attention {i + 1}")] if f"attention {i + 1}" in order else order[before:]
        late = ["submit"] if i != blocks[-1][0] else []
        assert after == [f"attention {i}", "submit", f"shared {i}", "sync", *late, "sync"]  # first what was put off
    assert len(blocks) > 2


def test_experts_are_put_off_from_a_layer_on_a_gpu_to_one_on_the_cpu_and_back(tmp_path):
    twins = Twins(tmp_path, "deepseek_v3", num_hidden_layers=4)
    ids, rules = torch.tensor([[5, 6, 7]]), twins.rules(layers={2: "cpu"}, Experts="cpu")
    expected = twins.load(None, defer_experts=1)(ids).logits
    with torch.inference_mode():
        assert (twins.load(rules, defer_experts=1)(ids).logits - expected).abs().max() < 3e-5
        found = twins.load(rules, defer_experts=1, dtype=None)(ids).logits
    assert found.dtype is torch.bfloat16 and (found - expected).abs().max() < 3e-2 * expected.abs().max()


def test_an_error_inside_the_experts_reaches_who_called_the_model(hybrid):
    twins, model = hybrid
    ids = torch.tensor([[5, 6]])
    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="experts failed"):
        model(ids)
    hook.remove()
    with torch.inference_mode():
        assert (model(ids).logits - twins.cpu(ids).logits).abs().max() < 3e-5


def test_a_thread_stream_raises_what_a_copy_raised():
    stream = ThreadStream(CPU)
    stream.copy(torch.empty(2), torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):
        stream.join()
    stream.call(lambda: time.sleep(0.01))
    stream.join()


def test_the_cpus_waiting_for_the_device_is_counted_from_layer_to_layer_of_a_forward():
    way = ExpertOffload(ThreadStream(CPU))

    class Layer:
        def __init__(self, number):
            self.path, self.wait_s = f"model.layers.{number}.mlp.experts", 0.0

        def __call__(self, *given):
            return twice(*given)

    layers = [Layer(i) for i in (3, 4, 5)]
    for _ in range(2):
        for layer in layers:
            time.sleep(0.02)
            way.result(way.submit(layer, *states(2)))
    assert layers[0].wait_s == 0 and all(0.03 < layer.wait_s < 2 for layer in layers[1:])


def fail(*args):
    raise RuntimeError("experts failed")


@pytest.fixture(scope="module")
def two(hybrid):
    """Two models on the same pretended GPU, their tokens, and the logits of both."""
    twins, first = hybrid
    ids = torch.tensor([[5, 6, 7]])
    return first, twins.on(Experts="cpu"), ids, twins.cpu(ids).logits


def right(model, ids, expected):
    with torch.inference_mode():
        return (model(ids).logits - expected).abs().max() < 3e-5


def test_models_have_ways_of_their_own(two, tmp_path):
    first, second, *_ = two
    blocks = [
        [layer.mlp for layer in model.model.layers if getattr(layer.mlp, "offload", None)] for model in (first, second)
    ]
    ways = [{block.offload for block in of} for of in blocks]
    assert [len(of) for of in ways] == [1, 1] and not ways[0] & ways[1]
    assert [set(model.offloads) for model in (first, second)] == ways
    apart = Twins(tmp_path, "deepseek_v3", num_hidden_layers=4).on(layers={3: "cuda:1"}, Experts="cpu")
    assert len(apart.offloads) == 2  # one a device
    hybrid_on_cpu = Twins(tmp_path, "deepseek_v3").cpu
    assert not hasattr(hybrid_on_cpu, "offloads")
    offload.raise_offload_errors(hybrid_on_cpu), offload.reset_offloads(hybrid_on_cpu)


def test_an_error_nobody_came_for_is_not_another_models(two):
    first, second, ids, expected = two
    block = first.model.layers[1].mlp
    hook = block.experts.register_forward_pre_hook(fail)
    with torch.inference_mode():
        under_way = block.start_experts(torch.randn(2, 64), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
    assert under_way.cpu_job.job.finished.wait(60)
    hook.remove()
    assert right(second, ids, expected)
    assert to_cpu(second, expected) is expected  # as the engine asks when a forward's results are there
    with pytest.raises(RuntimeError, match="experts failed"):
        to_cpu(first, expected)
    assert right(first, ids, expected)


def test_models_that_take_turns_fail_and_answer_each_for_itself(two):
    first, second, ids, expected = two
    hook = first.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="experts failed"):
                right(first, ids, expected)
            assert right(second, ids, expected)
    finally:
        hook.remove()
    assert right(first, ids, expected)


def test_what_one_model_gives_up_the_other_still_waits_for(two):
    first, second, ids, expected = two
    first.offloads[0].all_buffers[0].job = second.offloads[0].all_buffers[0].job = job = object()
    offload.reset_offloads(first)
    assert first.offloads[0].all_buffers[0].job is None and second.offloads[0].all_buffers[0].job is job
    offload.reset_offloads(second)
    assert right(first, ids, expected) and right(second, ids, expected)


def test_a_ways_threads_end_with_it():
    before = set(threading.enumerate())
    way = ExpertOffload(ThreadStream(CPU))
    way.result(way.submit(twice, *states(2)))
    own = set(threading.enumerate()) - before
    assert {thread.name.split("_")[0] for thread in own} == {"ktx-handover", "ktx-experts"}
    del way
    gc.collect()
    for thread in own:
        thread.join(10)
        assert not thread.is_alive()


def test_a_forked_child_has_a_way_of_its_own():
    way, free = ExpertOffload(ThreadStream(CPU)), threading.Event()
    given = states(2)
    way.stream.call(lambda: free.wait(60))  # its thread is busy, and not in the child
    under_way = way.submit(twice, *given)
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = 0 if torch.equal(way.result(way.submit(twice, *given)), twice(*given)) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    free.set()
    assert torch.equal(way.result(under_way), twice(*given))
