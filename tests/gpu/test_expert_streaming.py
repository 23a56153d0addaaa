"""Experts in the CPU's memory brought to the GPU for prompts: what is computed, what is copied when, and from how many
tokens on.
"""

from __future__ import annotations

import pytest
import torch

from ktx.devices import Device
from ktx.engine.stats import EngineStats
from ktx.errors import UsageError
from ktx.kernels import microbench
from ktx.ops.experts import PROJECTIONS
from ktx.ops.gpu.expert_streaming import Streamer, _install_on
from ktx.ops.gpu.streams import ThreadStream
from tests.families.test_families import mixed, relative
from tests.gpu.helpers import Twins

pytestmark = pytest.mark.filterwarnings("ignore:.*matched no module")
IDS = torch.randint(3, 320, (1, 4), generator=torch.Generator().manual_seed(3))
BOUND = 3e-5
BLOCK = {r"\.mlp$": "cuda:0", "experts": "cpu"}  # the rest of the model on the CPU: the interpreter is slow
LAYERS = {"num_hidden_layers": 3, "num_experts": 4, "moe_intermediate_size": 32}


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


def blocks(model):
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Twins(tmp_path_factory.mktemp("qwen"), "qwen3_moe", **LAYERS)


@pytest.fixture(scope="module")
def streamed(qwen):
    return qwen.load(None, devices=BLOCK, stream_experts_min_tokens=3)


class Recording(ThreadStream):
    """A stream that writes down what it copies."""

    def __init__(self, device):
        super().__init__(device)
        self.told = []

    def fork(self):
        self.told.append("fork")
        super().fork()

    def copy(self, target, source):
        self.told.append((source.data_ptr(), source.numel()))
        super().copy(target, source)

    def join(self):
        self.told.append("join")
        super().join()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_prompt_is_what_the_cpu_says(tmp_path, family):
    twins = Twins(tmp_path, family)
    model = twins.load(twins.rules(Experts="cpu"), stream_experts_min_tokens=2)
    assert (logits(model) - logits(twins.cpu)).abs().max() < BOUND
    assert (
        sum(sum(block.experts.counts[: block.experts.total_experts]) for block in blocks(model)) == 0
    )  # the CPU did nothing


def looked_up(name):
    return (
        "IQ1_S" if "gate_exps" in name else "IQ2_XS" if "up_exps" in name else "IQ3_XXS" if "exps" in name else "Q8_0"
    )


@pytest.mark.parametrize(
    "quant", ["Q8_0", "Q5_0", "BF16", mixed, looked_up], ids=["Q8_0", "Q5_0", "BF16", "mixed", "looked_up"]
)
def test_formats(tmp_path, quant):
    small = {"hidden_size": 256, "num_hidden_layers": 1, "moe_intermediate_size": 256}
    small |= {"num_experts": 2, "num_experts_per_tok": 1}
    twins = Twins(tmp_path, "qwen3_moe", quant, **small)
    model = twins.load(None, devices=BLOCK, stream_experts_min_tokens=2)
    experts = blocks(model)[0].experts
    assert relative(logits(model, IDS[:, :2]), logits(twins.cpu, IDS[:, :2])) < 2e-2
    whole = twins.load(None, devices={r"\.mlp$": "cuda:0"}, stream_experts_min_tokens="off")
    streamer = blocks(model)[0].streamer
    for name, planes in zip(PROJECTIONS, streamer.matrices, strict=True):
        assert torch.equal(planes.data, blocks(whole)[0].experts.weights[name].data)
    assert sum(w.nbytes for w in streamer.matrices) <= experts.weight_bytes()[0]  # as packed: IQ1 has more there


def test_fewer_tokens_stay_with_the_cpu(qwen, streamed):
    found = []
    for ids in (IDS[:, :2], IDS[:, :3]):
        before = sum(int(block.experts.counts[:4].sum()) for block in blocks(streamed))
        assert (logits(streamed, ids) - logits(qwen.cpu, ids)).abs().max() < BOUND
        found.append(sum(int(block.experts.counts[:4].sum()) for block in blocks(streamed)) - before)
    assert found == [2 * 2 * 3, 0]


def test_the_next_layers_experts_are_on_their_way_while_a_layer_computes(qwen, streamed, monkeypatch):
    of = [block.experts for block in blocks(streamed)]
    stream = Recording(torch.device("cpu"))
    streamer = Streamer(torch.device("cpu"), of, stream)
    told = stream.told
    for i, block in enumerate(blocks(streamed)):
        monkeypatch.setattr(block, "streamer", streamer)
        end = block.finish_experts
        monkeypatch.setattr(block, "finish_experts", lambda made, i=i, end=end: (told.append(i), end(made))[1])
    assert (logits(streamed) - logits(qwen.cpu)).abs().max() < BOUND
    copies = [[word for name in PROJECTIONS for word in ("fork", source(e, name))] for e in of]
    assert told == [*copies[0], "join", *copies[1], 0, "join", *copies[2], 1, "join", 2]
    assert (logits(streamed) - logits(qwen.cpu)).abs().max() < BOUND  # from the first layer again


def source(experts, name):
    return experts.weights[name].data.data_ptr(), experts.weights[name].nbytes


def test_a_large_layer_comes_in_pieces(qwen, streamed, monkeypatch):
    of = [block.experts for block in blocks(streamed)]
    one = of[0].weight_bytes()[0] // 4
    for limit, pieces in ((3 * one, [3, 1]), (1, [1, 1, 1, 1])):
        streamer = Streamer(torch.device("cpu"), of, ThreadStream(torch.device("cpu")), limit)
        assert [piece.count for piece in streamer.chunks[of[1]]] == pieces
        assert sum(map(len, streamer.raw_buffers.values())) == pieces[0] * one
        for block in blocks(streamed):
            monkeypatch.setattr(block, "streamer", streamer)
        assert (logits(streamed) - logits(qwen.cpu)).abs().max() < BOUND


def test_a_forward_that_was_given_up_leaves_nothing_behind(qwen, streamed):
    last = blocks(streamed)[1]
    hook = last.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(RuntimeError("given up")))
    with pytest.raises(RuntimeError, match="given up"):
        logits(streamed)
    hook.remove()
    assert (logits(streamed) - logits(qwen.cpu)).abs().max() < BOUND


def test_beside_a_share_and_with_experts_that_are_put_off(tmp_path):
    twins = Twins(tmp_path, "deepseek_v3", num_hidden_layers=3)
    for more in ({}, {"defer_experts": 1}):
        on_cpu = twins.load(None, **more)
        model = twins.load(twins.rules(Experts="cpu"), gpu_experts=3, stream_experts_min_tokens=2, **more)
        counted = [EngineStats(one) for one in (on_cpu, model)]
        assert (logits(model) - logits(on_cpu)).abs().max() < BOUND
        wanted, found = (activity.snapshot() for activity in counted)
        assert found.layers == wanted.layers and found.expert_bytes == 0  # the device counted all of them


def test_whoever_listens_to_experts_hears_them(qwen, streamed):
    heard = []
    hook = blocks(streamed)[0].experts.register_forward_hook(lambda *args: heard.append(1))
    assert (logits(streamed) - logits(qwen.cpu)).abs().max() < BOUND
    hook.remove()
    assert heard == [1]


def test_auto_measures_and_off_is_off(qwen):
    for word in ("auto", "off", False, None):
        model = qwen.load(None, devices=BLOCK, stream_experts_min_tokens=word)
        assert all(block.streamer is None for block in blocks(model))  # on a pretended GPU nothing is gained
    assert microbench.min_tokens_to_stream(20 * 10**9, 10**8, 20.0, 200.0) == 1000
    assert microbench.min_tokens_to_stream(1000, 10**8, 20.0, 200.0) == microbench.MIN_STREAM_TOKENS


def test_other_words_are_errors_before_anything_is_read(qwen):
    for word in ("many", 0, -3, 2.5, "1e3", True):
        with pytest.raises(
            UsageError, match="stream_experts_min_tokens: must be auto, off or a number of tokens, found"
        ):
            qwen.load(None, stream_experts_min_tokens=word)


def test_what_has_no_use_is_told(qwen):
    with pytest.warns(
        UserWarning, match="stream_experts_min_tokens=9: no layer has its experts on the CPU and its MoE block on"
    ):
        qwen.load(None, devices={r"\.mlp$": "cuda:0"}, stream_experts_min_tokens=9)


def test_auto_copies_from_where_the_measured_cpu_is_slower_than_the_way(qwen, monkeypatch):
    model = qwen.load(None, devices=BLOCK)
    for rate, least in ((1e6, None), (1.0, microbench.MIN_STREAM_TOKENS)):
        monkeypatch.setattr(microbench, "prompt_rate", lambda qtype, rate=rate: rate)
        _install_on(Device("cuda:0", torch.device("cpu"), True), blocks(model), None)
        experts = blocks(model)[0].experts
        copying = experts.weight_bytes()[0] / (microbench.DEFAULT_PCIE_GB_S * 1e9)
        token = 2 * 3 * 64 * 32 * experts.top_k / (rate * 1e9)  # three matrices of each chosen expert
        wanted = least or copying / token
        assert all(block.stream_min_tokens == pytest.approx(wanted, abs=1) for block in blocks(model))
