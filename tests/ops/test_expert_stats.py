"""What a model's experts are counted to have done: whichever way a call goes, it is what the router chose."""

from __future__ import annotations

import pytest
import torch

from ktx.cache.kv import KVCache
from ktx.ops.experts import Experts
from ktx.ops.fusion.layer import Layer
from ktx.ops.moe import MoE
from ktx.ops.weight_traffic import WeightTraffic, module_bytes
from tests.families.test_families import IDS, Pair, logits
from tests.ops.test_fused_blocks import modules, without

CALLS = (40, 1, 1, 3, 1, 33, 1)  # tokens of each: a prompt and longer pieces go module by module


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss"])
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp(request.param), request.param, "F32")


def routed(reference):
    """By path, ids [tokens, top] of what transformers' own model chooses."""
    found, handles = {}, []
    for path, module in reference.named_modules():
        if path.endswith(".experts"):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, path=path: found.update({path: args[1].detach()}))
            )
    logits(reference, IDS[:, : sum(CALLS)])
    for handle in handles:
        handle.remove()
    return found


def compute(model):
    cache = KVCache(model.config, None)
    for piece in IDS[:, : sum(CALLS)].split(CALLS, 1):
        logits(model, piece, past_key_values=cache)


def check(pair):
    for module in modules(pair.model, Experts):
        module.counts.zero_()
    compute(pair.model)
    after, expected = pair.model.ktx.activity(), routed(pair.reference)
    assert after.keys() == expected.keys() and len(after) > 0
    for path, ids in expected.items():
        module, done = pair.model.get_submodule(path), after[path]
        count = module.num_experts
        assert done.activations == tuple(torch.bincount(ids.flatten(), minlength=count).tolist())
        distinct = sum(len(part.unique()) for part in ids.split(CALLS))
        assert done.nbytes == distinct * (module.weight_bytes()[0] // count)
        assert done.seconds > 0 and max(done.node_seconds) > 0


def test_layers_in_two_calls_count(pair):
    check(pair)


def test_blocks_in_one_call_count(pair):
    with without(modules(pair.model, Layer), "block"):
        check(pair)


def test_modules_one_by_one_count(pair):
    with without(modules(pair.model, MoE), "block"):
        check(pair)


def test_two_models_count_apart(pair, tmp_path):
    other = Pair(tmp_path, "mixtral", "F32").model
    before = pair.model.ktx.activity()
    logits(other, IDS[:, :5])
    assert pair.model.ktx.activity() == before
    assert all(sum(one.activations) == 10 for one in other.ktx.activity().values())


def test_bytes_of_modules_are_those_of_the_model(pair):
    own = module_bytes(pair.model)
    assert sum(size.held_bytes for size in own) == pair.model.ktx.nbytes
    assert sum(size.bytes_per_token for size in own) == pair.model.ktx.bytes_per_token
    reads = WeightTraffic.from_model(pair.model)
    experts = sum(size.bytes_per_token for size in own if isinstance(size.module, Experts))
    assert reads.bytes(1, 1, 1) == pair.model.ktx.bytes_per_token - experts
    assert reads.bytes_per_logits == pair.model.lm_head.weight_bytes()[1] and reads.bytes_per_token == 256 * 4
    assert (
        reads.bytes(3, 50, 2) == 3 * reads.bytes_per_forward + 50 * reads.bytes_per_token + 2 * reads.bytes_per_logits
    )


class Far:
    """Hidden states on another device, as far as experts can tell."""

    device = torch.device("meta")

    def __init__(self, values):
        self.values = values

    def to(self, *where):
        return self.values.to(*where)


def test_what_comes_from_another_device_is_waited_for(pair):
    path, module = next((p, m) for p, m in pair.model.named_modules() if isinstance(m, Experts))
    hidden, weights = torch.randn(4, 256), torch.rand(4, 2)
    ids = torch.tensor([[0, 1]] * 4)
    waited, before = module.wait_s, sum(pair.model.ktx.activity()[path].activations)
    module(hidden, ids, weights)
    assert module.wait_s == waited
    assert module(Far(hidden), ids, weights).device.type == "meta"
    assert module.wait_s > waited
    assert sum(pair.model.ktx.activity()[path].activations) - before == 16
