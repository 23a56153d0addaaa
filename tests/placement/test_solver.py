"""Which modules does the solver place on which device, for given bytes and budgets?"""

from __future__ import annotations

import random
from itertools import combinations

import pytest

import ktx
from ktx.injection.device_map import parse_entry, parse_gpu_experts
from ktx.injection.rule import Rule
from ktx.placement.memory_model import KVMemory
from ktx.placement.solver import CPU, Budget, Placement, balance_layers, solve, split_evenly
from tests.placement.helpers import experts, footprint, part
from tests.support.tiny_models import tiny

MIB, GIB = 1 << 20, 1 << 30
CONTEXT = 512 * MIB  # of CUDA, on each GPU
GPU = "cuda:0"


def routed(layer: int, size: int, **more):
    """Experts of `size` bytes on a GPU, of a model whose forwards take no memory but to bring experts."""
    return experts(layer, size // 4, size, **({"top_k": 0, "num_weights": 800} | more))


# ---- one GPU: a dense layer, and three with experts of 24,000, 8000 and 16,000 bytes

SIZES = {1: 24_000, 2: 8000, 3: 16_000}
BESIDE = CONTEXT + 4 * 1000  # what is always on the GPU
STREAM = 6000 + 24_000  # both layouts of the largest experts
MODEL = footprint(
    part("embedding", None, 10_000),
    *(part("attention", layer, 1000) for layer in range(4)),
    *(routed(layer, size) for layer, size in SIZES.items()),
)


def on_one(vram: int, model=MODEL) -> Placement:
    made = solve(model, Budget((vram,), GIB))
    assert made.exceeded() == {} and set(made.layers) == {GPU}
    return made


def test_without_a_gpu_everything_is_on_the_cpu():
    made = solve(MODEL, Budget((), GIB))
    assert made == Placement(MODEL, Budget((), GIB), [CPU] * 4)
    assert (made.experts, made.embedding, made.num_gpu_experts, made.streams_experts) == (frozenset(), CPU, {}, False)


def test_everything_is_on_the_gpu_if_it_fits_to_the_byte():
    whole = BESIDE + 48_000 + 10_000
    made = on_one(whole)
    assert (made.experts, made.embedding, made.streams_experts) == ({1, 2, 3}, GPU, False)
    for vram in (whole - 1, whole - 10_000):
        made = on_one(vram)
        assert (made.experts, made.embedding, made.streams_experts) == ({1, 2, 3}, CPU, False)


def test_room_to_bring_experts_comes_before_experts_that_stay():
    made = on_one(BESIDE + STREAM - 1)
    assert (made.streams_experts, made.experts, made.num_gpu_experts) == (False, {2, 3}, {1: 1})
    made = on_one(BESIDE + STREAM)
    assert (made.streams_experts, made.experts, made.num_gpu_experts) == (True, frozenset(), {})
    assert made.embedding == CPU


@pytest.mark.parametrize(
    "free,layers,share",
    [
        (0, set(), {}),
        (999, set(), {}),
        (1000, set(), {2: 1}),  # an eighth of the smallest layer
        (7999, set(), {2: 7}),
        (8000, {2}, {}),
        (9999, {2}, {}),
        (10_000, {2}, {3: 1}),
        (23_999, {2}, {3: 7}),
        (24_000, {2, 3}, {}),
        (27_000, {2, 3}, {1: 1}),
        (29_999, {2, 3}, {1: 1}),
    ],
)
def test_the_smallest_layers_come_first_and_then_a_share_of_the_next(free, layers, share):
    made = on_one(BESIDE + free)
    assert (made.experts, made.num_gpu_experts, made.streams_experts) == (layers, share, False)
    assert made.total_bytes(GPU) == BESIDE + sum(SIZES[i] for i in layers) + sum(
        SIZES[i] * count // 8 for i, count in share.items()
    )


def test_experts_stay_beside_the_room_to_bring_others():
    made = on_one(BESIDE + STREAM + 8000)
    assert (made.streams_experts, made.experts, made.num_gpu_experts) == (True, {2}, {})
    made = on_one(BESIDE + STREAM + 8000 - 1)
    assert (made.streams_experts, made.experts, made.num_gpu_experts) == (True, frozenset(), {2: 7})
    made = on_one(BESIDE + STREAM + 8000 + 8000)
    assert (made.streams_experts, made.experts, made.num_gpu_experts) == (True, {2}, {3: 4})


def test_layers_of_one_size_are_taken_in_order():
    model = footprint(*(routed(layer, 8000) for layer in range(4)))
    made = on_one(CONTEXT + (2000 + 8000) + 8000 + 1000, model)
    assert (made.streams_experts, made.experts, made.num_gpu_experts) == (True, {0}, {1: 1})


def test_a_share_leaves_room_for_what_its_experts_compute():
    # 2048 tokens x 100 columns in bf16, and a token's in a graph
    model, extra = footprint(routed(0, 8_000_000, activation_columns=100)), 2048 * 100 * 2 + 100 * 2
    assert on_one(CONTEXT + 3_000_000 + extra, model).num_gpu_experts == {0: 3}
    assert on_one(CONTEXT + 3_000_000 + extra - 1, model).num_gpu_experts == {0: 2}
    assert on_one(CONTEXT + 1_000_000 + extra, model).num_gpu_experts == {0: 1}
    assert on_one(CONTEXT + 1_000_000 + extra - 1, model).num_gpu_experts == {}


def test_experts_of_a_rule_for_the_cpu_stay_there():
    model = footprint(routed(0, 800, cpu_only=True, path="a"), routed(1, 8000))
    made = on_one(CONTEXT + 4000, model)
    assert made.num_gpu_experts == {1: 4} and made.devices["a"] == CPU


def test_what_does_not_fit_is_returned_too():
    made = solve(MODEL, Budget((BESIDE - 1,), GIB))
    assert made.exceeded() == {GPU: 1} and (made.experts, made.num_gpu_experts) == (frozenset(), {})
    assert not made.streams_experts


# ---- several GPUs


def spread(sizes, vram=(GIB, GIB), extra=(), kv=(), **more) -> list[int]:
    """Numbers of the GPUs of layers of such sizes."""
    parts = [part("attention", layer, size) for layer, size in enumerate(sizes)]
    made = solve(footprint(*parts, *extra, kv=tuple(kv)), Budget(tuple(vram), GIB, **more))
    return [int(name.removeprefix("cuda:")) for name in made.layers]


def test_layers_are_spread_by_their_bytes():
    assert spread([1000] * 4) == [0, 0, 1, 1]
    assert spread([3, 1, 1, 1]) == [0, 1, 1, 1]
    assert spread([1000] * 6, (GIB,) * 3) == [0, 0, 1, 1, 2, 2]


def test_room_is_what_cudas_context_leaves():
    assert spread([1000] * 8, (1024 * MIB, 2048 * MIB)) == [0] * 2 + [1] * 6  # 512 to 1536 MiB
    assert spread([1, 1], (CONTEXT - 5, CONTEXT + 3)) == [1, 1]


def test_what_follows_the_layers_counts_with_the_last_one():
    assert spread([1000] * 8) == [0] * 4 + [1] * 4
    assert spread([1000] * 8, extra=[part("output", None, 2000)]) == [0] * 5 + [1] * 3


def test_the_embedding_and_what_stays_on_the_cpu_do_not_count():
    extra = [part("embedding", None, 9000), part("router", 3, 9000, cpu_only=True)]
    assert spread([1000] * 4, extra=extra) == [0, 0, 1, 1]


def test_caches_count_as_a_gpu_stores_them():
    layer = KVMemory("x", 2, 1, (32, 32), num_heads=1)  # 128 bytes a position; 68 on the CPU
    assert spread([6000, 6000, 1], kv=[layer], context=64, kv_dtype="q8_0") == [0, 0, 1]
    pinned = KVMemory("x", 2, 1, (32, 32), num_heads=1, cpu_only=True)
    assert spread([2, 1, 1], kv=[pinned], context=64) == [0, 1, 1]


def test_experts_that_stay_on_the_cpu_do_not_count():
    parts = [part("attention", layer, 1000) for layer in range(4)]
    model = footprint(*parts, routed(3, 8000))
    assert solve(model, Budget((GIB, GIB), GIB)).layers == [GPU] * 3 + ["cuda:1"]
    made = solve(model, Budget((CONTEXT + 2000, CONTEXT + 4000), GIB))
    assert made.layers == [GPU] + ["cuda:1"] * 3  # in proportion to 2000 and 4000 bytes, 4000 bytes are 1333 and 2667
    assert made.num_gpu_experts == {3: 1} and made.exceeded() == {}


def test_each_gpu_has_shares_of_its_own_layers():
    parts = [*(part("attention", layer, 1000) for layer in range(4)), *(routed(layer, 8000) for layer in range(4))]
    made = solve(footprint(*parts), Budget((CONTEXT + 2000 + 9000, CONTEXT + 2000 + 3000), GIB))
    assert made.layers.count(GPU) == 3 and made.exceeded() == {}
    used = {name: made.total_bytes(name) for name in ("cuda:0", "cuda:1")}
    assert used == {"cuda:0": CONTEXT + 3000 + 8000, "cuda:1": CONTEXT + 1000 + 4000}
    assert (made.experts, made.num_gpu_experts) == ({0}, {3: 4})


# ---- balance


def test_no_layers_and_one_gpu():
    assert balance_layers([], [5, 5]) == []
    assert balance_layers([3, 2, 1], [1]) == [0, 0, 0]


def largest_fill(sizes, capacities, gpus) -> float:
    return max(sum(s for s, g in zip(sizes, gpus, strict=True) if g == i) / c for i, c in enumerate(capacities))


@pytest.mark.parametrize("seed", range(12))
def test_no_other_division_fills_the_fullest_gpu_less(seed):
    chance = random.Random(seed)
    count = 2 + seed % 2
    sizes, capacities = [chance.randint(0, 50) for _ in range(9)], [chance.randint(1, 60) for _ in range(count)]
    found = balance_layers(sizes, capacities)
    assert found == sorted(found) and len(found) == 9
    divisions = [
        [sum(i >= cut for cut in cuts) for i in range(9)]
        for cuts in combinations(sorted([*range(10)] * (count - 1)), count - 1)
    ]
    best = min(largest_fill(sizes, capacities, division) for division in divisions)
    assert largest_fill(sizes, capacities, found) == pytest.approx(best, rel=1e-9)


# ---- an even split, without budgets

FOUR = footprint(
    part("embedding", None, 9000, path="model.embed_tokens"),
    *(part("attention", i, 1000, path=f"model.layers.{i}.self_attn.q_proj") for i in range(4)),
    *(routed(i, 8000, path=f"model.layers.{i}.mlp.experts") for i in (0, 1)),
    part("output", None, 1000, path="lm_head"),
)
SPLIT = parse_entry("all", "cuda:0,cuda:1")


@pytest.mark.parametrize(
    "entries,rules,expected",
    [
        ([SPLIT], [], [0, 1, 1, 1]),  # 9000, 9000, 1000, and 1000 with the output
        ([parse_entry("experts", "cpu"), SPLIT], [], [0, 0, 0, 1]),  # 1000, 1000, 1000, 2000
        ([parse_entry("layers 0-1", "cpu"), SPLIT], [], [0, 0, 0, 1]),  # 0, 0, 1000, 2000
        ([parse_entry("experts 0", "cpu"), SPLIT], [], [0, 0, 1, 1]),  # 1000, 9000, 1000, 2000
        ([parse_gpu_experts("all", 2), SPLIT], [], [0, 1, 1, 1]),  # places no module
        ([SPLIT], [Rule(r"\.experts$", device="cpu")], [0, 0, 0, 1]),
        ([SPLIT], [Rule(r"layers\.[01]$", device="cpu")], [0, 0, 0, 1]),
        ([SPLIT], [Rule(r"\.experts$"), Rule(cls="torch.nn.Linear", device="cpu")], [0, 1, 1, 1]),
        ([SPLIT], [Rule("^lm_head$", device="cpu"), Rule(r"\.experts$", device="cpu")], [0, 0, 1, 1]),
    ],
)
def test_layers_are_split_evenly_by_what_is_not_placed_elsewhere(entries, rules, expected):
    assert split_evenly(FOUR, 2, entries, rules) == expected


def test_small_layers_are_split_evenly_too():
    parts = [part("attention", i, size, path=f"model.layers.{i}") for i, size in enumerate((3, 1, 1, 1))]
    assert split_evenly(footprint(*parts), 2, [SPLIT], []) == [0, 1, 1, 1]
    parts = [part("attention", i, 1, path=f"model.layers.{i}") for i in range(6)]
    assert split_evenly(footprint(*parts), 3, [SPLIT], []) == [0, 0, 1, 1, 2, 2]


def test_layers_that_stay_on_the_cpu_leave_the_others_to_both_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("KTX_GPU", "fake:2")
    tiny("llama", num_hidden_layers=8).save_pretrained(tmp_path)
    plan = ktx.plan(tmp_path, devices={"all": "cuda:0,cuda:1", "layers 0-3": "cpu"})
    there = [step.device for step in plan if step.path.endswith("q_proj")]
    assert there == [CPU] * 4 + ["cuda:0"] * 2 + ["cuda:1"] * 2
