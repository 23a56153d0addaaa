"""What does a placement that does not fit say, and which options would make it fit?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ktx.errors import DoesNotFit
from ktx.placement.memory_model import Footprint, KVMemory
from ktx.placement.solver import Budget, solve
from ktx.placement.suggest import fit, suggestions
from tests.placement.helpers import experts, footprint, part

MB, GB = 10**6, 10**9
CONTEXT, RESERVE = 512 << 20, 256 << 20  # 0.537 and 0.268 GB: of CUDA on each GPU, and on the CPU
KEYS = KVMemory("x", 0, 1, (32, 32), num_heads=1, cpu_only=True)  # 128 bytes a position, 68 as q8_0


def unfit(model: Footprint, budget: Budget) -> list[str]:
    made = solve(model, budget)
    assert made.exceeded()
    return list(suggestions(made))


def layers(*sizes: int, kv: tuple[KVMemory, ...] = (), **more) -> Footprint:
    values = {"num_weights": 10**9} | more
    return footprint(*(part("attention", layer, size, **values) for layer, size in enumerate(sizes)), kv=kv)


# ---- the message


def test_what_fits_is_returned():
    model, budget = layers(GB), Budget((2 * GB,), GB)
    assert fit(model, budget) == solve(model, budget)


def test_the_message_has_the_four_largest_groups_and_all_suggestions():
    parts = [
        part("attention", 0, 5 * GB),
        part("router", 0, 1 * GB),
        part("shared experts", 0, 3 * GB),
        part("dense layers", 0, 4 * GB),
        part("output", None, 2 * GB),
    ]
    model, budget = footprint(*parts), Budget((10 * GB,), GB)
    with pytest.raises(DoesNotFit) as error:
        fit(model, budget)
    assert str(error.value) == (
        "cuda:0 needs 15.5 GB (attention 5.0 GB, dense layers 4.0 GB, shared experts 3.0 GB, output 2.0 GB),"
        f" 10.0 GB are given, 5.5 GB are missing. It would fit with {', or '.join(unfit(model, budget))}"
    )


def test_the_message_names_each_device_and_no_empty_groups():
    model, budget = footprint(part("attention", 0, 2 * GB), part("router", 0, GB, cpu_only=True)), Budget((GB,), GB)
    with pytest.raises(DoesNotFit) as error:
        fit(model, budget)
    assert str(error.value).partition(". It")[0] == (
        "cpu needs 1.3 GB (router 1.0 GB, CUDA, reserve 318 MB), 1.0 GB are given, 318 MB are missing;"
        " cuda:0 needs 2.5 GB (attention 2.0 GB, CUDA, reserve 537 MB), 1.0 GB are given, 1.5 GB are missing"
    )


# ---- a budget that suffices


@pytest.mark.parametrize(
    "size,ram", [(2 * GB - RESERVE, "2.0G"), (2 * GB - RESERVE + 1, "2.1G"), (2 * GB - RESERVE + 100 * MB, "2.1G")]
)
def test_memory_of_the_cpu_is_rounded_up_to_100_megabytes(size, ram):
    cache = KVMemory("x", 0, state_bytes=size // 9)  # of one sequence, and eight snapshots
    model = footprint(part("attention", 0, size % 9), kv=(cache,))
    assert unfit(model, Budget((), GB))[0] == f"--ram {ram}"


def test_memory_of_the_gpu_is_rounded_up_to_100_megabytes():
    assert unfit(layers(2 * GB - CONTEXT), Budget((GB,), GB))[0] == "--vram 2.0G"
    assert unfit(layers(2 * GB - CONTEXT + 1), Budget((GB,), GB))[0] == "--vram 2.1G"


def test_each_budget_that_is_exceeded_grows_and_no_other():
    model = layers(2 * GB, 2 * GB, 4 * GB)
    found = unfit(model, Budget((5 * GB, 3 * GB), GB))  # two layers on the first GPU
    assert found[0] == "--vram 5.0G,4.6G"
    found = unfit(model, Budget((3 * GB, 3 * GB), GB))
    assert found[0] == "--vram 4.6G,4.6G"


def test_both_budgets_grow_if_both_are_exceeded():
    model = footprint(part("attention", 0, 2 * GB), part("router", 0, GB, cpu_only=True))
    assert unfit(model, Budget((GB,), GB))[0] == "--vram 2.6G --ram 1.4G"


def test_memory_of_the_cpu_grows_only_if_a_larger_gpu_leaves_it_exceeded():
    # 1.537 GB are rounded up to 1.6 GB, where the experts fit too
    model = footprint(part("attention", 0, GB), experts(0, 40 * MB))
    assert unfit(model, Budget((GB,), RESERVE + 10 * MB))[0] == "--vram 1.6G"
    model = footprint(part("attention", 0, GB), experts(0, 400 * MB, count=1))
    assert unfit(model, Budget((GB,), RESERVE + 10 * MB))[0] == "--vram 1.6G --ram 0.7G"


# ---- more memory on GPUs in place of memory of the CPU

ROUTED = footprint(part("attention", 0, GB, num_weights=10**9), experts(0, 10 * GB, num_weights=20 * 10**9), hidden=0)


def test_a_larger_gpu_takes_experts_off_the_cpu():
    found = unfit(ROUTED, Budget((4 * GB,), 2 * GB))
    assert found[0].startswith("--ram ")
    vram = float(found[1].removeprefix("--vram ").removesuffix("G"))
    budget = Budget((round(vram * 1000) * MB,), 2 * GB)
    assert not solve(ROUTED, budget).exceeded()
    assert solve(ROUTED, replace(budget, vram=(budget.vram[0] - 200 * MB,))).exceeded()


def test_a_larger_gpu_is_found_for_small_models_too():
    model = footprint(experts(0, 400 * MB, num_weights=10**9))  # smaller than CUDA's context
    found = unfit(model, Budget((CONTEXT + 10 * MB,), RESERVE + 10 * MB))
    assert found[0].startswith("--ram ") and found[1] in ("--vram 1.0G", "--vram 1.1G")


def test_larger_gpus_are_equal_but_for_those_that_are_larger_already():
    model = footprint(*(experts(layer, 10 * GB, num_weights=20 * 10**9) for layer in range(2)))
    found = unfit(model, Budget((15 * GB, 2 * GB), GB))
    first, second = found[1].removeprefix("--vram ").split(",")
    assert first == "15.0G" and 2.0 < float(second[:-1]) < 15.0


def test_no_gpu_helps_with_what_has_to_be_on_the_cpu():
    model = footprint(part("attention", 0, GB), part("router", 0, 10 * GB, cpu_only=True, num_weights=10**9))
    assert [word.partition(" ")[0] for word in unfit(model, Budget((4 * GB,), 2 * GB))] == ["--ram"]


def test_without_a_gpu_none_is_suggested():
    model = layers(10 * GB)
    assert [word.partition(" ")[0] for word in unfit(model, Budget((), 8 * GB))] == ["--ram", "a"]


# ---- shorter, fewer, smaller


def test_the_longest_context_that_fits_is_in_full_pages():
    room = 1000 * 64 * 128  # of 1000 pages
    budget = Budget((), RESERVE + room, context=1 << 20)
    assert "--ctx 64000" in unfit(footprint(kv=(KEYS,)), budget)
    assert "--ctx 63936" in unfit(footprint(kv=(KEYS,)), replace(budget, ram=RESERVE + room - 1))
    assert "--ctx 64" in unfit(footprint(kv=(KEYS,)), replace(budget, ram=RESERVE + 64 * 128))


def test_a_context_of_one_page_less_is_suggested_too():
    budget = Budget((), RESERVE + 99 * 64 * 128, context=100 * 64)
    assert "--ctx 6336" in unfit(footprint(kv=(KEYS,)), budget)


def test_no_context_is_suggested_where_the_weights_do_not_fit():
    model = footprint(part("attention", 0, 4 * GB), kv=(KEYS,))
    assert not [word for word in unfit(model, Budget((), 2 * GB, context=1 << 20)) if word.startswith("--ctx")]


def test_one_sequence_and_q8_0_are_suggested_where_they_suffice():
    def words(batch: int, room: int, dtype=torch.float16) -> set[str]:
        budget = Budget((), RESERVE + room, context=64_000, batch=batch, kv_dtype=dtype)
        return {word for word in unfit(footprint(kv=(KEYS,)), budget) if word.startswith(("--batch", "--kv"))}

    f16, q8_0 = 64_000 * 128, 64_000 * 68
    assert words(2, 2 * f16 - 1) == {"--batch 1", "--kv-dtype q8_0"}
    assert words(2, 2 * q8_0) == {"--batch 1", "--kv-dtype q8_0"}
    assert words(2, 2 * q8_0 - 1) == {"--batch 1"}
    assert words(2, f16 - 1) == set()
    assert words(1, f16 - 1) == {"--kv-dtype q8_0"}
    assert words(2, 2 * q8_0 - 1, "q8_0") == {"--batch 1"}
    assert words(1, q8_0 - 1, "q8_0") == set()


# ---- a smaller quant


def quants(model: Footprint, budget: Budget) -> list[str]:
    return [word for word in unfit(model, budget) if word.startswith("a quant")]


def test_a_quant_makes_up_for_what_is_missing_on_a_gpu():
    # 8 bits a weight of 4 GB; a quarter is missing
    model = layers(4 * GB, num_weights=4 * 10**9)
    assert quants(model, Budget((CONTEXT + 3 * GB,), GB)) == [
        "a quant of 6.0 bits per weight on cuda:0 (these have 8.0)"
    ]


def test_a_quant_makes_the_reserve_on_the_cpu_smaller_too():
    # 4 bits a weight of 40 GB, and 5 % of that as reserve: 42 GB, of which 30 GB are missing
    model = layers(40 * GB, num_weights=80 * 10**9)
    ratio = 1 - 30 / 1.05 / 40
    assert quants(model, Budget((), RESERVE + 12 * GB)) == [
        f"a quant of {4 * ratio:.1f} bits per weight on cpu (these have 4.0)"
    ]


def test_only_what_is_on_the_device_counts():
    model = footprint(
        part("attention", 0, 4 * GB, num_weights=4 * 10**9),
        part("router", 0, GB, num_weights=10**9, cpu_only=True),
    )
    assert quants(model, Budget((CONTEXT + 2 * GB,), 9 * GB)) == [
        "a quant of 4.0 bits per weight on cuda:0 (these have 8.0)"
    ]


def test_no_quant_below_a_fifth_is_suggested():
    model = layers(10 * GB, num_weights=10 * 10**9)
    assert quants(model, Budget((CONTEXT + 21 * GB // 10,), GB)) == [
        "a quant of 1.7 bits per weight on cuda:0 (these have 8.0)"
    ]
    assert quants(model, Budget((CONTEXT + 19 * GB // 10,), GB)) == []


def test_no_quant_is_suggested_for_two_devices_or_without_weights():
    model = footprint(
        part("attention", 0, 4 * GB, num_weights=4 * 10**9),
        part("router", 0, GB, num_weights=10**9, cpu_only=True),
    )
    assert quants(model, Budget((CONTEXT + 2 * GB,), GB)) == []
    assert quants(footprint(kv=(KEYS,)), Budget((), RESERVE - 1)) == []


def test_suggestions_come_in_order():
    model = layers(4 * GB, num_weights=4 * 10**9, kv=(replace(KEYS, cpu_only=False),))
    # caches of 8.2 MB a sequence, and 4.5 MB of attention's partial results
    found = unfit(model, Budget((CONTEXT + 4 * GB + 15 * MB,), GB, context=64_000, batch=2))
    assert [word.split()[0] for word in found] == ["--vram", "--ctx", "--batch", "a"]
