"""torch.compile and torch.export of a loaded model: the same numbers, few breaks of the graph, no error from inside the
compiler.
"""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch._dynamo

from ktx.cache.kv import KVCache
from ktx.kernels import cpu
from ktx.transformers_compat import cache_argument, cache_of
from tests.families.test_families import load
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"]
SMALLER = {"qwen3_next": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}}
IDS = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A family's model in transformers and in ktx; made once each."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            original = tiny(family, **SMALLER.get(family, {}))
            original.save_pretrained(folder)
            made[family] = original, load(folder, None)
        return made[family]

    return of


def near(mine, right):
    return float((mine - right).norm() / right.norm()) < 1e-4


def check(compiled, right, dtype=None):
    """A prompt, then tokens with a cache: of one's own, or the one that the model makes."""
    out = compiled(IDS[:, :20])
    assert near(out.logits, right[:, :20])
    cache = cache_of(out) if dtype is None else KVCache(compiled.config, dtype)
    if dtype is not None:
        compiled(IDS[:, :20], **cache_argument(compiled, cache))
    for i in range(20, 22):
        assert near(compiled(IDS[:, i : i + 1], **cache_argument(compiled, cache)).logits, right[:, i : i + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_tokens(pair, family):
    original, mine = pair(family)
    check(torch.compile(mine, backend="eager"), original(IDS).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_graphs_of_aten(pair, family):
    original, mine = pair(family)
    check(torch.compile(mine, backend="aot_eager"), original(IDS).logits)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor(tmp_path):
    original = tiny("qwen3_moe", num_hidden_layers=1)
    original.save_pretrained(tmp_path)
    mine, states = load(tmp_path, None), torch.randn(1, 7, 256)
    block, right = mine.model.layers[0].mlp, original.model.layers[0].mlp
    assert near(torch.compile(block, backend="inductor")(states), right(states))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_prompts_of_many_lengths(pair, family):
    original, mine = pair(family)
    graphs = []
    compiled = torch.compile(mine, backend=lambda graph, given: (graphs.append(graph), graph.forward)[1])
    for length in (20, 33, 25, 38, 12, 17):
        assert near(compiled(IDS[:, :length]).logits, original(IDS[:, :length]).logits)
    assert len(graphs) <= 2  # one of the first length, one of any


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_our_cache(pair, dtype):
    _, mine = pair("llama")
    right, cache = [], KVCache(mine.config, dtype)
    for ids in (IDS[:, :20], IDS[:, 20:21], IDS[:, 21:22]):
        right.append(mine(ids, **cache_argument(mine, cache)).logits)
    compiled, cache = torch.compile(mine, backend="aot_eager"), KVCache(mine.config, dtype)
    for ids, logits in zip((IDS[:, :20], IDS[:, 20:21], IDS[:, 21:22]), right, strict=True):
        assert float((compiled(ids, **cache_argument(mine, cache)).logits - logits).norm() / logits.norm()) < 1e-2


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_there_are_no_breaks(pair, family):
    _, mine = pair(family)
    found = torch._dynamo.explain(mine)(IDS[:, :20])
    assert found.graph_break_count == 0, [str(reason.reason) for reason in found.break_reasons]
    kernels = {str(node.target) for graph in found.graphs for node in graph.graph.nodes}
    assert any(name.startswith("ktx.") and "linear" in name for name in kernels)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_padded_batches(pair, family):
    original, mine = pair(family)
    ids, mask = IDS[:, :24].reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    out = torch.compile(mine, backend="eager")(**given).logits
    assert near(out[0], original(**given).logits[0]) and near(out[1, 5:], original(**given).logits[1, 5:])


def test_generate_with_a_compiled_forward(pair):
    original, mine = pair("qwen3_moe")
    mine = copy.copy(mine)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    right = original.generate(IDS[:, :9], **options)
    mine.forward = torch.compile(mine.forward, backend="eager")
    assert torch.equal(mine.generate(IDS[:, :9], **options), right)


def test_compiled_in_place(pair):
    original, mine = pair("llama")
    mine = copy.deepcopy(mine)
    mine.model.layers[0].compile(backend="eager")  # a layer alone
    assert near(mine(IDS).logits, original(IDS).logits)
    mine.compile(backend="eager")
    assert near(mine(IDS).logits, original(IDS).logits)


def test_hooks_and_edits_are_in_the_graph(pair):
    original, mine = pair("llama")
    mine, original = copy.deepcopy(mine), copy.deepcopy(original)
    for model in (mine, original):
        model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * 2)
    assert near(torch.compile(mine, backend="eager")(IDS).logits, original(IDS).logits)


def test_many_tokens_and_quantised_weights(tmp_path):
    original = tiny("deepseek_v3")
    original.config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "model.gguf", original, "Q8_0")
    mine = load(tmp_path, tmp_path / "model.gguf")
    ids = torch.randint(3, 320, (1, 150), generator=torch.Generator().manual_seed(4))  # MLA's other form
    assert near(torch.compile(mine, backend="aot_eager")(ids).logits, mine(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_export(pair, family):
    original, mine = pair(family)
    lengths = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None}
    given = {"input_ids": IDS[:, :12], "use_cache": False}
    made = torch.export.export(mine, (), given, dynamic_shapes=lengths, strict=False).module()
    for length in (12, 30):
        out = made(input_ids=IDS[:, :length], use_cache=False).logits
        assert near(out, original(IDS[:, :length]).logits)


def test_shortcuts_are_back_outside(pair):
    original, mine = pair("llama")
    torch.compile(mine, backend="eager")(IDS)
    seen, before = [], cpu.ops.run_steps
    cpu.ops.run_steps = lambda *args: (seen.append(len(args[2])), before(*args))
    try:
        cache = KVCache(mine.config, None)
        mine(IDS[:, :20], **cache_argument(mine, cache))
        out = mine(IDS[:, 20:21], **cache_argument(mine, cache)).logits
    finally:
        cpu.ops.run_steps = before
    assert seen and near(out, original(IDS[:, :21]).logits[:, 20:])
