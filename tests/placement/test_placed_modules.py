"""What does a placement say of given modules: their devices, the bytes on each, and the cost of a token?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ktx.errors import UsageError
from ktx.placement.memory_model import KVMemory
from ktx.placement.solver import CPU, KV, SCRATCH, SYSTEM, Budget, Placement, Speeds, to_json
from tests.placement.helpers import experts, footprint, part

MIB, GB = 1 << 20, 10**9
CONTEXT = 512 * MIB  # of CUDA, on each GPU
STATE = KVMemory("layer 0", 0, state_bytes=100)


def placed(*modules, layers: list[str], vram=(GB, GB), ram=GB, kv=(), hidden=0, vocab=0, **more) -> Placement:
    """Modules placed by hand; `more` are fields of the budget or the placement."""
    names = ("context", "batch", "kv_dtype", "chunk_size")
    budget = Budget(tuple(vram), ram, **{name: more.pop(name) for name in names if name in more})
    return Placement(footprint(*modules, kv=tuple(kv), hidden=hidden, vocab=vocab), budget, layers, **more)


# ---- budgets


def test_a_budget_is_for_one_sequence_of_8192_tokens_by_default():
    assert Budget((5,), 3) == Budget((5,), 3, 8192, 1, torch.float16, 2048)


@pytest.mark.parametrize("name", ["context", "batch", "chunk_size"])
def test_a_workload_has_at_least_one_token(name):
    assert getattr(Budget((), 0, **{name: 1}), name) == 1
    with pytest.raises(UsageError, match=f"{name} is 0, it must be at least 1"):
        Budget((), 0, **{name: 0})


def test_gpus_are_numbered():
    budget = Budget((5, 7), 3)
    assert budget.gpus == ["cuda:0", "cuda:1"]
    assert [budget.bytes_of(name) for name in (CPU, "cuda:0", "cuda:1")] == [3, 5, 7]
    assert placed(layers=[]).device_names == [CPU, "cuda:0", "cuda:1"]


# ---- devices


def test_modules_are_where_their_layer_is():
    made = placed(layers=["cuda:0", "cuda:1"])
    assert [made.device(part("attention", layer, 1)) for layer in (0, 1)] == ["cuda:0", "cuda:1"]
    assert made.device(KVMemory("x", 0)) == "cuda:0" and made.device(KVMemory("x", 1)) == "cuda:1"


def test_what_follows_the_layers_is_where_the_last_one_is():
    made = placed(layers=["cuda:0", "cuda:1"])
    assert made.device(part("output", None, 1)) == "cuda:1" == made.output_device
    assert made.device(part("attention", 2, 1)) == "cuda:1"  # a layer for multi-token prediction
    assert placed(layers=[]).device(part("output", None, 1)) == CPU


def test_the_embedding_and_experts_are_placed_by_themselves():
    embedding = part("embedding", None, 1)
    made = placed(layers=["cuda:0", "cuda:1"], experts=frozenset({1}))
    assert [made.device(experts(layer, 1)) for layer in (0, 1)] == [CPU, "cuda:1"]
    assert made.device(embedding) == CPU and replace(made, embedding="cuda:0").device(embedding) == "cuda:0"


def test_what_a_rule_places_on_the_cpu_is_there():
    made = placed(layers=["cuda:0"], experts=frozenset({0}))
    assert made.device(experts(0, 1, cpu_only=True)) == CPU == made.device(KVMemory("x", 0, cpu_only=True))


def test_experts_of_a_layer_on_two_devices_are_two_modules():
    first, second = experts(0, 800, path="a"), experts(1, 800, path="b")
    other = part("embedding", None, 5, path="e")
    made = placed(first, second, other, layers=["cuda:0", "cuda:1"], num_gpu_experts={0: 2})
    on_gpu = replace(first.subset(2), path="a.on_gpu")
    assert made.placed_modules == [(first.subset(6), CPU), (on_gpu, "cuda:0"), (second, CPU), (other, CPU)]
    assert made.devices == {"a": CPU, "a.on_gpu": "cuda:0", "b": CPU, "e": CPU}
    made = replace(made, num_gpu_experts={1: 3})
    on_gpu = replace(second.subset(3), path="b.on_gpu")
    assert made.placed_modules == [(first, CPU), (second.subset(5), CPU), (on_gpu, "cuda:1"), (other, CPU)]


def test_experts_that_are_all_on_one_device_are_not_split():
    whole, pinned = experts(0, 800), experts(0, 800, cpu_only=True, path="p")
    made = placed(whole, pinned, layers=["cuda:0"], experts=frozenset({0}), num_gpu_experts={0: 2})
    assert made.placed_modules == [(whole, "cuda:0"), (pinned, CPU)]


def test_experts_to_bring_to_a_gpu_are_those_of_its_layers_on_the_cpu():
    parts = [experts(0, 800), experts(1, 800), experts(2, 800), part("embedding", None, 5)]
    made = placed(*parts, layers=["cuda:0", "cuda:1", "cuda:0"], experts=frozenset({0}))
    assert (made.streamed_experts("cuda:0"), made.streamed_experts("cuda:1")) == ([parts[2]], [parts[1]])
    made = replace(made, num_gpu_experts={1: 2})
    assert made.streamed_experts("cuda:1") == [parts[1].subset(6)]


# ---- bytes


def test_bytes_by_group_and_device():
    parts = [
        part("embedding", None, 1000, 7000),
        part("attention", 0, 3000, 5000),
        experts(0, 40_000, 60_000),
        part("attention", 1, 300, 500),
        experts(1, 4000, 6000),
        part("output", None, 11, 13),
    ]
    made = placed(*parts, layers=["cuda:0", "cuda:1"], kv=[STATE], experts=frozenset({1}), batch=2)
    found = {group: sizes for group, sizes in made.bytes.items() if any(sizes.values())}
    assert found == {
        "embedding": {CPU: 1000},
        "attention": {"cuda:0": 5000, "cuda:1": 500},
        "routed experts": {CPU: 40_000, "cuda:1": 6000},
        "output": {"cuda:1": 13},
        KV: {"cuda:0": (2 + 8) * 100},
        # hidden states of width 0, and of each token an id and a weight: twice for each GPU on the CPU
        SCRATCH: {CPU: 2 * 2 * 2048 * 12, "cuda:0": 2048 * 12, "cuda:1": 2048 * 12},
        SYSTEM: {CPU: 256 * MIB + 2050, "cuda:0": CONTEXT, "cuda:1": CONTEXT},  # 5 % of 41,000
    }
    assert made.total_bytes("cuda:0") == 5000 + 1000 + 2048 * 12 + CONTEXT
    assert made.total_bytes("cuda:1") == 500 + 6000 + 13 + 2048 * 12 + CONTEXT


def test_a_cache_takes_what_its_device_stores():
    layer = KVMemory("x", 0, 1, (32, 32), num_heads=1)
    made = placed(layers=["cuda:0"], kv=[layer], kv_dtype="q8_0", context=65, batch=3)
    assert made.kv_bytes(layer) == 3 * 2 * 64 * (2 * 32 * 2)
    assert replace(made, layers=[CPU]).kv_bytes(layer) == 3 * 2 * 64 * (2 * 34)


def test_a_device_may_be_full_but_not_over():
    made = placed(part("attention", 0, 1000), layers=["cuda:0"], vram=[CONTEXT + 1000], ram=256 * MIB)
    assert made.total_bytes("cuda:0") == CONTEXT + 1000 and made.exceeded() == {}
    less = replace(made, budget=replace(made.budget, vram=(CONTEXT + 999,), ram=256 * MIB - 2))
    assert less.exceeded() == {CPU: 2, "cuda:0": 1}


# ---- workspaces. The hidden size is 10, so that a token takes 4 x 10 values beside its widest block.


def test_the_cpu_alone_takes_f32_activations_latents_and_logits():
    latent = KVMemory("x", 0, 1, (16, 16), num_heads=1, is_mla=True)
    parts = [part("attention", 0, 1, activation_columns=60, max_matrix_weights=500), part("output", None, 1)]
    made = placed(*parts, layers=[CPU], vram=[], kv=[latent], hidden=10, vocab=1000, batch=3, chunk_size=7, context=50)
    latents = 2 * 50 * 32 * 2
    assert made.workspace_bytes(CPU) == 7 * (4 * 10 + 60) * 4 + latents + 2 * 3 * 1000 * 4
    without = replace(made, model=replace(made.model, modules=parts[:1]))
    assert without.workspace_bytes(CPU) == 7 * (4 * 10 + 60) * 4 + latents


def test_a_step_has_a_token_of_each_sequence_at_least():
    made = placed(part("attention", 0, 1), layers=[CPU], vram=[], hidden=10, batch=9, chunk_size=7)
    assert made.workspace_bytes(CPU) == 9 * 4 * 10 * 4


def test_devices_without_modules_have_buffers_for_transfers_only():
    made = placed(layers=["cuda:0"], hidden=10, chunk_size=7)
    assert made.workspace_bytes("cuda:0") == 7 * 2 * 10 * 2 == made.workspace_bytes("cuda:1")
    assert made.workspace_bytes(CPU) == 2 * 2 * (7 * 2 * 10 * 2)  # two sets for each of two GPUs
    assert replace(made, budget=replace(made.budget, vram=())).workspace_bytes(CPU) == 0


def test_one_of_two_gpus_has_activations_dequantized_chunks_and_partial_results():
    layer = KVMemory("x", 0, 2, (64, 64), num_heads=8)
    module = part("attention", 0, 1, activation_columns=60, max_matrix_weights=500)
    made = placed(module, layers=["cuda:0"], kv=[layer], hidden=10, chunk_size=100, vocab=1000)
    partial_results = 2 * (128 * 132) * (64 + 1) * 4  # of 128 rows for each of 132 multiprocessors
    expected = 100 * (40 + 60) * 2 + 100 * 2 * 10 * 2 + partial_results + 500 * 2
    assert made.workspace_bytes("cuda:0") == expected


def test_a_single_gpu_has_graphs_too():
    module = part("attention", 0, 1, activation_columns=60)
    one = placed(module, layers=["cuda:0"], vram=[GB], hidden=10, chunk_size=100, vocab=1000, batch=3)
    two = replace(one, budget=replace(one.budget, vram=(GB, GB)))
    graphs = 3 * (40 + 60) * 2 + 3 * (2 * 10 * 2) + 3 * 1000 * 2  # activations, transfers, logits
    assert one.workspace_bytes("cuda:0") - two.workspace_bytes("cuda:0") == graphs


def test_room_for_experts_is_on_the_gpu_of_their_layer():
    made = placed(experts(0, 800, 600, num_weights=9), layers=["cuda:0", "cuda:1"], streams_experts=True)
    without = replace(made, streams_experts=False)
    difference = [made.workspace_bytes(name) - without.workspace_bytes(name) for name in made.device_names]
    assert difference == [0, 800 + 600, 0]


# ---- a token's cost


def test_a_token_reads_weights_and_the_whole_cache():
    layers = [KVMemory("x", 0, 1, (32, 32), num_heads=1), replace(STATE, layer=1)]
    parts = [part("attention", 0, 300, 500), experts(0, 8000), part("output", None, 70, 90)]
    made = placed(*parts, layers=["cuda:0", "cuda:1"], kv=layers, kv_dtype="q8_0", context=100, batch=3)
    assert made.read_bytes_per_token(CPU) == 3 * 1000  # three tokens, three experts
    assert made.read_bytes_per_token("cuda:0") == 500 + 3 * (100 * 64 * 2)
    assert made.read_bytes_per_token("cuda:1") == 90 + 3 * (2 * 100)  # a state is read and written
    alone = replace(made, layers=[CPU, CPU])
    assert alone.read_bytes_per_token(CPU) == 300 + 3000 + 70 + 3 * (100 * 2 * 34 + 2 * 100)


def test_groups_on_the_cpu_are_known_by_layer():
    parts = [part("embedding", None, 1), experts(0, 1), part("attention", 0, 1), part("router", 1, 1, cpu_only=True)]
    assert placed(*parts, layers=["cuda:0", "cuda:0"]).cpu_groups == {(0, "routed experts"), (1, "router")}


@pytest.mark.parametrize(
    "layers,embedding,crossings",
    [
        ([CPU, CPU], CPU, 0),
        (["cuda:0", "cuda:0"], "cuda:0", 2),  # to the experts of layer 1 and back
        (["cuda:0", "cuda:0"], CPU, 3),
        (["cuda:0", "cuda:1"], CPU, 4),
        ([CPU, "cuda:0"], CPU, 3),
    ],
)
def test_hidden_states_cross_to_each_group_on_another_device(layers, embedding, crossings):
    parts = [part("attention", 0, 1), part("attention", 1, 1), experts(1, 1)]
    assert placed(*parts, layers=layers, embedding=embedding).transfers_per_token() == crossings


def test_a_group_crosses_once_and_two_groups_twice():
    parts = [part("attention", 0, 1, cpu_only=True, path=name) for name in ("q", "k")]
    made = placed(*parts, layers=["cuda:0"], embedding="cuda:0")
    assert made.transfers_per_token() == 2
    assert placed(*parts, experts(0, 1), layers=["cuda:0"], embedding="cuda:0").transfers_per_token() == 4


def test_seconds_are_bytes_by_bandwidth_and_crossings():
    parts = [part("attention", 0, 5 * GB), experts(0, 8 * 3 * GB, top_k=2)]
    made = placed(*parts, layers=["cuda:0"], vram=[GB], hidden=1000, batch=4)
    crossing = 15e-6 + 4 * (2 * 1000 * 2 + 2 * 12) / 2 / 20e9  # half of the bytes at 20 GB/s
    assert made.seconds_per_token(Speeds(100.0, 1000.0)) == {
        CPU: pytest.approx(8 * 3 / 100),
        "cuda:0": pytest.approx(5 / 1000),
        "crossings": pytest.approx(3 * crossing),
    }


SPEEDS = Speeds(100.0, 1000.0, link_gb_s=20.0, cpu_gops=1000.0)


def test_prompts_are_brought_from_where_it_pays_in_every_layer():
    # Copying takes 20 ms and 40 ms. A token takes 2 x 10**8 operations of 10**12 a second: 0.2 ms.
    parts = [experts(layer, size, num_weights=8 * 10**8) for layer, size in enumerate((4 * 10**8, 8 * 10**8))]
    made = placed(*parts, layers=["cuda:0", "cuda:1"], streams_experts=True)
    assert made.min_streamed_tokens(SPEEDS) == 200
    assert replace(made, experts=frozenset({1})).min_streamed_tokens(SPEEDS) == 100
    assert replace(made, model=footprint(parts[0], replace(parts[1], top_k=2))).min_streamed_tokens(SPEEDS) == 100


def test_prompts_are_never_brought_without_room_a_known_rate_or_experts_on_the_cpu():
    made = placed(experts(0, 8 * 10**8, num_weights=8 * 10**8), layers=["cuda:0"], streams_experts=True)
    assert made.min_streamed_tokens(SPEEDS) == 200
    assert made.min_streamed_tokens(replace(SPEEDS, cpu_gops=0.0)) == 0
    assert replace(made, streams_experts=False).min_streamed_tokens(SPEEDS) == 0
    assert replace(made, experts=frozenset({0})).min_streamed_tokens(SPEEDS) == 0
    assert replace(made, model=footprint(experts(0, 8, num_weights=0))).min_streamed_tokens(SPEEDS) == 0


# ---- as a rule file and as data

SOME = [part("embedding", None, 1), part("attention", 0, 1), experts(1, 1), experts(2, 1), part("output", None, 1)]


@pytest.mark.parametrize(
    "layers,more,expected",
    [
        ([CPU] * 3, {}, {"all": CPU}),
        (["cuda:0"] * 3, {}, {"all": "cuda:0", "embedding": CPU, "experts": CPU}),
        (["cuda:0"] * 3, {"embedding": "cuda:0", "experts": {1, 2}}, {"all": "cuda:0"}),
        (["cuda:1"] * 3, {"embedding": "cuda:0", "experts": {1, 2}}, {"all": "cuda:1", "embedding": "cuda:0"}),
        (["cuda:0"] * 3, {"experts": {1}}, {"all": "cuda:0", "embedding": CPU, "experts 2": CPU}),
        (
            ["cuda:0", "cuda:1", "cuda:1"],
            {"experts": {1, 2}},
            {
                "all": "cuda:0",
                "layers 1-2": "cuda:1",
                "output": "cuda:1",
                r"^(?:model\.)?norm$": "cuda:1",
                "embedding": CPU,
            },
        ),
    ],
)
def test_a_device_map_names_what_differs_from_the_first_gpu(layers, more, expected):
    more = {key: frozenset(value) if key == "experts" else value for key, value in more.items()}
    assert placed(*SOME, layers=layers, **more).device_map() == expected


def test_a_model_without_experts_has_none_in_its_map():
    made = placed(part("attention", 0, 1), layers=["cuda:0"], embedding="cuda:0")
    assert made.device_map() == {"all": "cuda:0"}


def test_shares_of_experts_are_listed_by_layer():
    made = placed(layers=["cuda:0"], num_gpu_experts={7: 2, 3: 5})
    assert list(made.gpu_experts_map().items()) == [("layers 3", 5), ("layers 7", 2)]


def test_data_have_all_numbers():
    parts = [part("attention", 0, 1000), experts(0, 8 * 10**8, num_weights=8 * 10**8)]
    made = placed(*parts, layers=["cuda:0"], vram=[2 * GB], ram=3 * GB, context=640, batch=2, num_gpu_experts={0: 1})
    found = to_json(made, None)
    assert found == {
        "devices": {"all": "cuda:0", "embedding": CPU, "experts": CPU},
        "gpu_experts": {"layers 0": 1},
        "context": 640,
        "batch": 2,
        "bytes": {group: made.bytes[group] for group in ("routed experts", "attention", SCRATCH, SYSTEM)},
        "sum": {CPU: made.total_bytes(CPU), "cuda:0": made.total_bytes("cuda:0")},
        "budget": {CPU: 3 * GB, "cuda:0": 2 * GB},
        "a token reads": {CPU: made.read_bytes_per_token(CPU), "cuda:0": made.read_bytes_per_token("cuda:0")},
        "crossings": 3,
    }
    seconds = made.seconds_per_token(SPEEDS)
    assert to_json(made, SPEEDS) == found | {
        "GB/s": {CPU: 100.0, "gpu": 1000.0},
        "seconds": seconds,
        "stream_experts": "off",
        "tokens a second": 2 / sum(seconds.values()),
    }
    assert to_json(replace(made, streams_experts=True, num_gpu_experts={}), SPEEDS)["stream_experts"] == 200
