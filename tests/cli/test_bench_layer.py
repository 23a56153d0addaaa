"""ktx bench --layer: one layer beside a peer. The peer is a made-up kt_kernel that computes the layer with torch, slowly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ktx.cli import bench_ftllm, bench_kt_kernel, bench_layer
from ktx.cli.bench_moe_layer import MoELayer, reference_output
from ktx.kernels.check import relative_error
from tests.support import preloaded_process

ROOT = Path(__file__).resolve().parents[2]
FAKE = '''
"""kt_kernel as bench_kt_kernel uses it: pointers to row-major bf16 are read, the layer is computed in float32 and written in bf16."""
import ctypes, sys, time
from types import ModuleType, SimpleNamespace
import torch

__version__, __cpu_variant__ = "0.0", "made up"
print("this goes to standard output")  # as the wheel does

def view(pointer, shape, dtype):
    count = 1
    for n in shape:
        count *= n
    kind = {torch.bfloat16: 2, torch.int64: 8, torch.float32: 4, torch.int32: 4}[dtype]
    return torch.frombuffer((ctypes.c_uint8 * (count * kind)).from_address(pointer), dtype=dtype).view(shape)

class MOEConfig(SimpleNamespace):
    def __init__(self, experts, top, hidden, width, gpu):
        super().__init__(experts=experts, top=top, hidden=hidden, width=width, quant_config=SimpleNamespace())

class CPUInfer:
    def __init__(self, pool): self.backend_ = pool
    def submit(self, task): task()
    def sync(self): time.sleep(0.1 * self.backend_.subpool_thread_count[0])

class MOE:
    def __init__(self, config): self.c = config
    def load_weights_task(self, order): return lambda: None
    def forward_task(self, count, top, ids, shares, x, out, more):
        def work():
            from ktx.cli.bench_moe_layer import reference_output
            c, n = self.c, int(view(count, (1,), torch.int32))
            wide, narrow = (c.experts, c.width, c.hidden), (c.experts, c.hidden, c.width)
            weights = [view(p, s, torch.bfloat16) for p, s in ((c.gate_proj, wide), (c.up_proj, wide), (c.down_proj, narrow))]
            args = view(x, (n, c.hidden), torch.bfloat16), view(ids, (n, top), torch.int64), view(shares, (n, top), torch.float32)
            view(out, (n, c.hidden), torch.bfloat16).copy_(reference_output(weights, *args))
        return work

kt_kernel_ext = ModuleType("kt_kernel_ext")
kt_kernel_ext.WorkerPoolConfig, kt_kernel_ext.CPUInfer = SimpleNamespace, CPUInfer
kt_kernel_ext.moe = SimpleNamespace(MOEConfig=MOEConfig, AMXBF16_MOE=MOE)
sys.modules["kt_kernel.kt_kernel_ext"] = kt_kernel_ext
'''
LAYER = "4,2,256,256"


def run(*words, **environment):
    return preloaded_process.run("ktx", "bench", "--layer", *words, env=os.environ | environment)


def test_alone_every_format_has_a_speed_and_an_error(tmp_path):
    record = tmp_path / "layer.jsonl"
    done = run(LAYER, "-p", "1,9", "-r", "1", "-t", "2", "--record", str(record))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["format"], line["tokens"]) for line in lines] == [(f, t) for f in bench_layer.FORMATS for t in (1, 9)]
    worst = {"int8": 0.03, "Q8_0": 0.03, "BF16": 0.01, "int4": 0.25, "int4g32": 0.2, "Q4_K": 0.2}
    for line in lines:
        assert line["ms"] > 0 and line["gops"] > 0 and 0 < line["relative_error"] < worst[line["format"]]
        assert line["engine"] == "ktx" and line["commit"] and "ratio" not in line
    assert len(done.stdout.splitlines()) == 2 + len(lines)


@pytest.mark.wall_clock
def test_beside_a_peer_both_are_measured_in_turns(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_layer.PEER_FORMATS, "kt-kernel", {"BF16": "BF16"})
    (tmp_path / "kt_kernel.py").write_text(FAKE)
    program = (
        "import sys\nfrom ktx.cli import bench_layer\nbench_layer.PEER_FORMATS['kt-kernel'] = {'BF16': 'BF16'}\n"
        "from ktx.__main__ import main\nraise SystemExit(main(sys.argv[1:]))"
    )
    words = ["bench", "--layer", LAYER, "-p", "5", "-r", "5", "-t", "2", "--peer", "kt-kernel", "--record", "r.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path,
        env=os.environ | {"KTX_PEER_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    mine, peer = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (mine["engine"], peer["engine"], peer["format"]) == ("ktx", "kt-kernel", "BF16")
    assert mine["ratio"] == pytest.approx(peer["ms"] / mine["ms"])
    assert max(mine["relative_error"], peer["relative_error"]) < 0.01
    assert 100 < peer["ms"] < 195  # the better number of workers counts: one sleeps 100 ms, two 200
    assert "kt-kernel 0.0 made up" in done.stdout and "this goes to" not in done.stdout


@pytest.mark.parametrize(
    "words,status,told",
    [
        (("4,2,256",), 2, "four numbers"),
        (("4,5,256,256",), 2, "1 to all experts"),
        ((LAYER, "--peer", "llama.cpp"), 2, "kt-kernel or ftllm"),
        ((LAYER, "--formats", "int3"), 2, "int4"),
        ((LAYER, "--peer", "kt-kernel", "-p", "1"), 1, "pip install --no-deps kt-kernel"),
        ((LAYER, "--peer", "ftllm", "-p", "1"), 1, "pip install --no-deps ftllm"),
    ],
)
def test_what_cannot_be_is_told(words, status, told, tmp_path):
    for name in ("kt_kernel", "ftllm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    done = run(*words, KTX_PEER_PATH=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == status and told in done.stderr and "Traceback" not in done.stderr


def test_a_whole_model_is_not_for_kt_kernel():
    done = preloaded_process.run("ktx", "bench", "--peer", "kt-kernel")
    assert done.returncode == 2 and "--layer" in done.stderr


def test_codes_of_four_bits_are_the_weights():
    w = torch.randn(2, 3, 64).bfloat16()
    packed, scale = bench_kt_kernel.int4(w)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float() - 8
    assert packed.shape == (2, 3, 32) and scale.shape == (2, 3, 2)
    values = codes * scale.float().repeat_interleave(32, -1)
    assert relative_error(values, w.float()) < 0.12


def test_the_layer_as_a_model_is_the_layer(tmp_path):
    """What ftllm is given: transformers' own Qwen3-MoE of that folder gives the logits that its results are compared with."""
    from transformers import AutoModelForCausalLM

    layer = MoELayer(4, 2, 256, 256)
    tensors = bench_ftllm.write_model(tmp_path, layer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = [7, 300, 4000]
    with torch.inference_mode():
        logits = model(torch.tensor(ids)[:, None]).logits[:, -1, : bench_ftllm.DIRECTIONS]
    assert relative_error(logits, bench_ftllm.reference_logits(layer, tensors, ids)) < 1e-4
    x, chosen, shares = layer.call(3)
    assert reference_output(tensors["weights"], x, chosen, shares).shape == (3, 256)


def test_roofline_draws_a_picture(tmp_path):
    words = ["--types", "Q4_K", "BF16", "--tokens", "1", "48", "-r", "1"]
    done = preloaded_process.run(
        "benchmarks/roofline.py", "-o", tmp_path / "r.png", "--json", tmp_path / "r.jsonl", *words
    )
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(p["type"], p["tokens"]) for p in points] == [("Q4_K", 1), ("Q4_K", 48), ("BF16", 1), ("BF16", 48)]
    assert points[1]["intensity"] == pytest.approx(48 * points[0]["intensity"])
    assert all(0 < p["gops"] < 2 * p["peak"] for p in points)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
