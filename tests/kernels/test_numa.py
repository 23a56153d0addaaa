"""Memory nodes, pretended: the same results from one copy, each node's share read by its own members first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import json, sys, time, torch
from ktx.kernels import cpu
from ktx.kernels.blocks import unpack_rows
from ktx.kernels.check import random_matrix
from ktx.kernels.microbench import as_one_matrix, random_matrices
from ktx.quant.types import QTYPES

def stack(name, count, n, k):
    return [random_matrix(name, n, k, seed) for seed in range(count)]

def held():
    return int(open("/proc/self/smaps_rollup").read().split("Rss:")[1].split()[0]) * 1024

torch.manual_seed(0)
cpu.ops.set_threads(2)
out, results = {"nodes": cpu.ops.nodes()}, []
for name, n, k in [("Q4_K", 1408, 512), ("F8_E4M3", 1000, 256), ("Q6_K", 7, 256), ("BF16", 130, 96), ("IQ2_XS", 129, 256)]:
    packed = cpu.pack(random_matrix(name, n, k))
    for tokens in (1, 5, 70, 600):
        results.append(cpu.linear(torch.randn(tokens, k), packed))
    results.append(packed.rows(torch.tensor([0, n - 1, n // 2])))
batched = cpu.pack(stack("Q8_0", 5, 48, 64))
for packed in (cpu.pack(random_matrix("F8_E4M3", 1000, 256)), cpu.pack_experts(stack("Q4_K", 3, 200, 512))):
    results += [torch.cat([rows.data for rows in unpack_rows(packed)])]  # taken back
results += [cpu.linear_batched(torch.randn(5, tokens, 64), batched) for tokens in (1, 4, 530)]
for name, experts, hidden, ff in [("Q4_K", 6, 512, 768), ("Q8_0", 3, 1000 // 32 * 32, 1408), ("F8_E4M3", 4, 384, 320)]:
    gate, up, down = (cpu.pack_experts(stack(name, experts, *shape)) for shape in ((ff, hidden), (ff, hidden), (hidden, ff)))
    for tokens in (1, 3, 40, 300):
        ids = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
        results.append(cpu.experts(torch.randn(tokens, hidden), ids, torch.rand(tokens, 2), gate, up, down))
torch.save(results, sys.argv[1])
weight = stack("Q4_0", 16, 4096, 1024)
first = cpu.pack_experts(weight)  # a first one, so that what packing itself needs is there
before = held()
large = [cpu.pack_experts(weight) for _ in range(2)]
out["memory"], out["packed"] = held() - before, sum(p.nbytes for p in large)
out["pages"] = cpu.ops.pages_on(large[0].data)
x = torch.randn(1, 1024)
one = as_one_matrix(cpu.pack(random_matrices(QTYPES["Q4_0"], 4, 1 << 15, 1024)))
for again in range(20):  # on a busy machine one member may have to wait while the other helps it out
    time.sleep(0.1 * again)
    own, stolen = cpu.ops.steal_stats()
    for _ in range(10):
        cpu.linear(x, one)
    now = cpu.ops.steal_stats()
    out["own"], out["stolen"] = now[0] - own, now[1] - stolen
    if out["nodes"] != 2 or out["own"] > 4 * out["stolen"]:
        break
print(json.dumps(out))
"""  # noqa: E501


def run(tmp_path, numa):
    file = tmp_path / f"{numa}.pt"
    got = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(file)],
        env=os.environ | {"KTX_NUMA": numa, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert got.returncode == 0, got.stderr
    return json.loads(got.stdout), torch.load(file, weights_only=True)


def test_nodes_change_neither_results_nor_memory(tmp_path):
    alone, expected = run(tmp_path, "off")
    assert alone["nodes"] == 1 and alone["own"] == alone["stolen"] == 0
    for count in (2, 3):
        facts, results = run(tmp_path, f"fake:{count}")
        assert facts["nodes"] == count
        for got, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
        assert facts["packed"] == alone["packed"]
        assert abs(facts["memory"] - facts["packed"]) < 0.1 * facts["packed"]  # one copy
        assert sum(facts["pages"]) * 4096 >= facts["packed"] // 2
        if count == 2:  # two members, a node each
            assert facts["own"] > 4 * facts["stolen"], facts  # from either queue alike: as many of both


@pytest.mark.parametrize("word", ["fake", "fake:0", "fake:9", "two"])
def test_a_word_that_means_nothing_is_told(word):
    got = subprocess.run(
        [sys.executable, "-m", "ktx", "doctor"], env=os.environ | {"KTX_NUMA": word}, capture_output=True, text=True
    )
    assert got.returncode == 2 and f"KTX_NUMA={word}" in got.stderr and "fake:N" in got.stderr
