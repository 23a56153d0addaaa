"""What the kernels count of experts: exact, by whoever calls, on every memory node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from ktx.kernels import cpu
from ktx.kernels.check import random_matrix

COUNT, HIDDEN, INNER, TOP = 7, 256, 320, 3


def stack(name, n, k):
    return cpu.pack_experts([random_matrix(name, n, k, seed) for seed in range(COUNT)])


@pytest.fixture(scope="module")
def packed():
    return stack("Q4_K", INNER, HIDDEN), stack("Q5_0", INNER, HIDDEN), stack("Q8_0", HIDDEN, INNER)


def choices(tokens):
    """Ids with duplicates, some outside, and expert 4 chosen by nobody."""
    ids = torch.randint(-1, COUNT + 1, (tokens, TOP))
    ids[ids == 4] = 2
    ids[0] = torch.tensor([2, 2, COUNT])
    return ids


def plain(ids):
    return tuple(int((ids == e).sum()) for e in range(COUNT))


def chosen(ids):
    return sum(count > 0 for count in plain(ids))


@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 500])
def test_activations_are_the_choices_and_bytes_the_chosen_experts(packed, tokens):
    one = sum(weights.nbytes for weights in packed) // COUNT
    ids, weights, counts = choices(tokens), torch.rand(tokens, TOP), cpu.new_stats(COUNT)
    x = torch.randn(tokens, HIDDEN)
    with cpu.bf16_rows(tokens):
        expected = cpu.experts(x, ids, weights, *packed)
        got = cpu.experts(x, ids, weights, *packed, counts=counts)
        assert torch.equal(got, expected)
        found = cpu.ExpertStats.read(counts)
        assert found.activations == plain(ids) and found.nbytes == chosen(ids) * one
        assert found.seconds > 0 and len(found.node_seconds) == cpu.ops.nodes()
        before = counts.clone()
        cpu.experts(x, ids, weights, *packed, counts=counts)
    more = cpu.ExpertStats.read(counts - before)
    assert more.activations == found.activations and more.nbytes == found.nbytes and more.seconds > 0
    assert found.seconds >= max(found.node_seconds) > 0


def test_each_pass_over_the_weights_reads_them(packed):
    one = sum(weights.nbytes for weights in packed) // COUNT
    tokens = 2500  # at 7 experts of 3 a pass takes 1024
    ids, counts = choices(tokens), cpu.new_stats(COUNT)
    ids[1030:2040] = 6
    with cpu.bf16_rows(tokens):
        cpu.experts(torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, TOP), *packed, counts=counts)
    found = cpu.ExpertStats.read(counts)
    assert found.activations == plain(ids)
    assert found.nbytes == sum(chosen(part) for part in ids.split(1024)) * one
    counts.zero_()
    with cpu.bf16_rows(70, (3, 64)):
        cpu.experts(torch.randn(70, HIDDEN), ids[:70], torch.rand(70, TOP), *packed, counts=counts)
    apart = (ids[:3], ids[3:67], ids[67:70]) if cpu.ops.has_bf16_tiles() else (ids[:70],)
    assert cpu.ExpertStats.read(counts).nbytes == sum(map(chosen, apart)) * one


def test_nobody_chosen_is_nothing_read(packed):
    counts = cpu.new_stats(COUNT)
    cpu.experts(torch.randn(2, HIDDEN), torch.full((2, TOP), -1), torch.rand(2, TOP), *packed, counts=counts)
    found = cpu.ExpertStats.read(counts)
    assert found.nbytes == 0 and not any(found.activations)


@pytest.mark.parametrize("counts", [torch.zeros(COUNT, dtype=torch.int64), torch.zeros(COUNT + 2 + cpu.ops.nodes())])
def test_counts_of_another_form_are_refused(packed, counts):
    with pytest.raises(RuntimeError, match=f"counts must be {COUNT + 2 + cpu.ops.nodes()} contiguous int64"):
        cpu.experts(torch.randn(1, HIDDEN), choices(1), torch.rand(1, TOP), *packed, counts=counts)


def test_several_threads_add_to_one_and_a_reader_sees_it_grow(packed):
    ids, counts = choices(4), cpu.new_stats(COUNT)
    x, weights, seen = torch.randn(4, HIDDEN), torch.rand(4, TOP), [counts.clone()]

    def work():
        for _ in range(50):
            cpu.experts(x, ids, weights, *packed, counts=counts)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        seen.append(counts.clone())
    for worker in workers:
        worker.join()
    last = cpu.ExpertStats.read(counts)
    assert last.activations == tuple(150 * count for count in plain(ids))
    assert all((after >= before).all() for before, after in zip(seen, [*seen[1:], counts], strict=True))


PROGRAM = """
import json, torch
from ktx.kernels import cpu
from tests.kernels.test_expert_stats import COUNT, HIDDEN, INNER, TOP, stack
cpu.ops.set_threads(2)
packed = stack("Q4_K", INNER, HIDDEN), stack("Q4_K", INNER, HIDDEN), stack("Q8_0", HIDDEN, INNER)
counts, told = cpu.new_stats(COUNT), []
for tokens in (1, 40):
    ids = torch.arange(tokens * TOP).view(tokens, TOP) % COUNT
    for _ in range(200):  # beside a busy neighbour a member misses some, never all
        with cpu.bf16_rows(tokens):
            cpu.experts(torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, TOP), *packed, counts=counts)
    found = cpu.ExpertStats.read(counts)
    told.append([found.activations, found.nbytes, found.seconds, found.node_seconds])
print(json.dumps(told))
"""


@pytest.mark.slow
def test_seconds_are_by_memory_node():
    def told(numa):
        env = os.environ | {"KTX_NUMA": numa, "PYTHONPATH": os.getcwd()}
        got = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
        assert got.returncode == 0, got.stderr
        return json.loads(got.stdout)

    alone, split = told("off"), told("fake:2")
    assert [one[:2] for one in split] == [one[:2] for one in alone]  # what was chosen and read does not depend on nodes
    assert [len(one[3]) for one in alone] == [1, 1]
    (_, _, first, before), (_, _, last, after) = split
    assert len(before) == len(after) == 2 and all(0 < a < b for a, b in zip(before, after, strict=True))
    assert max(before) <= first and max(after) <= last
