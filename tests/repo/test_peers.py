"""benchmarks/peers measures kt-kernel and ftllm beside ktx.

Both are made up: one computes a layer with torch, slowly, the other only waits.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from ktx import demo
from ktx.cli.bench_moe_layer import MoELayer, reference_output
from ktx.kernels.check import relative_error
from tests.support import preloaded_process
from tests.support.random_model import script

FAKE = '''
"""kt_kernel as its engine's process uses it.

Pointers to row-major bf16 are read, the layer is computed in float32 and written in bf16.
"""
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
            places = (c.gate_proj, wide), (c.up_proj, wide), (c.down_proj, narrow)
            weights = [view(p, s, torch.bfloat16) for p, s in places]
            routing = view(ids, (n, top), torch.int64), view(shares, (n, top), torch.float32)
            args = view(x, (n, c.hidden), torch.bfloat16), *routing
            view(out, (n, c.hidden), torch.bfloat16).copy_(reference_output(weights, *args))
        return work

kt_kernel_ext = ModuleType("kt_kernel_ext")
kt_kernel_ext.WorkerPoolConfig, kt_kernel_ext.CPUInfer = SimpleNamespace, CPUInfer
kt_kernel_ext.moe = SimpleNamespace(MOEConfig=MOEConfig, AMXBF16_MOE=MOE)
sys.modules["kt_kernel.kt_kernel_ext"] = kt_kernel_ext
'''
FAKE_FTLLM = '''
"""ftllm.llm as its engine's process uses it: each token of an answer takes 20 ms."""
import sys, time
from types import SimpleNamespace

sys.modules["__main__"].SETTLE_S = 0  # these threads do not spin
print("this goes to standard output")  # as the wheel does

def model(path, dtype, **options):
    print(f"loads {path} {options}", file=sys.stderr)
    return SimpleNamespace(model=0, set_atype=lambda name: None, stop_token_ctypes=lambda tokens: ())

left = {}
def launch(model, count, ids, max_tokens, *rest):
    left[len(left)] = max_tokens.value
    return len(left) - 1
def fetch(model, handle):
    time.sleep(0.02)
    left[handle] -= 1
    return 7 if left[handle] >= 0 else -1
fastllm_lib = SimpleNamespace(
    launch_response_llm_model=launch,
    can_fetch_response_llm_model=lambda model, handle: True,
    fetch_response_llm_model=fetch,
)
set_device_map = set_cpu_threads = lambda *words: None
'''
LAYER = "4,2,256,256"


def run(*words, **environment):
    return preloaded_process.run("benchmarks/peers/compare.py", *words, env=os.environ | environment)


@pytest.mark.wall_clock
def test_beside_a_peer_both_are_measured_in_turns(tmp_path):
    (tmp_path / "kt_kernel.py").write_text(FAKE)
    words = ["--peer", "kt-kernel", "--layer", LAYER, "--formats", "BF16", "-p", "5", "-r", "5", "-t", "2"]
    done = run(*words, "--record", tmp_path / "r.jsonl", KTX_PEER_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    mine, peer = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (mine["engine"], peer["engine"], peer["format"]) == ("ktx", "kt-kernel", "BF16")
    assert mine["ratio"] == pytest.approx(peer["ms"] / mine["ms"])
    assert max(mine["relative_error"], peer["relative_error"]) < 0.01
    assert 100 < peer["ms"] < 195  # the better number of workers counts: one sleeps 100 ms, two 200
    assert "kt-kernel 0.0 made up" in done.stdout and "this goes to" not in done.stdout


@pytest.mark.wall_clock
def test_a_model_beside_a_peer_is_measured_in_turns(tmp_path):
    (tmp_path / "ftllm").mkdir()
    (tmp_path / "ftllm" / "__init__.py").touch()
    (tmp_path / "ftllm" / "llm.py").write_text(FAKE_FTLLM)
    words = ["--peer", "ftllm", "--model", demo.path(), "--weights", demo.gguf(), "-p", "10", "-n", "3", "-r", "1"]
    done = run(*words, "--json", KTX_PEER_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["test"], line["engine"]) for line in lines] == [
        ("pp10", "ktx"), ("pp10", "ftllm"), ("tg3", "ktx"), ("tg3", "ftllm")
    ]  # fmt: skip
    for mine, peer, best in ((*lines[:2], 10 / 0.02), (*lines[2:], 1 / 0.02)):
        assert 0.5 * best < peer["tok_s"] <= best and peer["best_alone"] <= best
        assert mine["ratio"] == pytest.approx(mine["tok_s"] / peer["tok_s"])
    assert done.stderr.count(f"loads {demo.gguf()} {{'ori_model_path': '{demo.path()}'}}") == 2  # alone, and in turns


@pytest.mark.parametrize(
    "words,status,told",
    [
        (("--peer", "kt-kernel", "--layer", LAYER, "-p", "1"), 1, "pip install --no-deps kt-kernel"),
        (("--peer", "ftllm", "--layer", LAYER, "-p", "1"), 1, "pip install --no-deps ftllm"),
        (("--peer", "ftllm", "--model", demo.path(), "-p", "1"), 1, "pip install --no-deps ftllm"),
        (("--peer", "ftllm", "--model", demo.gguf(), "-p", "1"), 2, "ftllm needs the model's folder"),
        (("--peer", "ftllm", "--layer", LAYER, "--json"), 2, "--json has no effect with --layer"),
        (("--peer", "llama.cpp"), 2, "invalid choice"),
        (("--layer", LAYER), 2, "--peer"),
    ],
)
def test_what_cannot_be_is_told(words, status, told, tmp_path):
    for name in ("kt_kernel", "ftllm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    done = run(*words, KTX_PEER_PATH=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == status and told in done.stderr and "Traceback" not in done.stderr


def test_a_whole_model_is_not_for_kt_kernel():
    done = run("--peer", "kt-kernel")
    assert done.returncode == 2 and "--layer" in done.stderr


def test_codes_of_four_bits_are_the_weights():
    w = torch.randn(2, 3, 64).bfloat16()
    packed, scale = script("peers/kt_kernel_engine").int4(w)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float() - 8
    assert packed.shape == (2, 3, 32) and scale.shape == (2, 3, 2)
    values = codes * scale.float().repeat_interleave(32, -1)
    assert relative_error(values, w.float()) < 0.12


def test_the_layer_as_a_model_is_the_layer(tmp_path):
    """transformers' own Qwen3-MoE of the folder that ftllm is given has the logits of the layer.

    ftllm's results are compared with these logits.
    """
    engine, layer = script("peers/ftllm_engine"), MoELayer(4, 2, 256, 256)
    tensors = engine.write_model(tmp_path, layer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = [7, 300, 4000]
    with torch.inference_mode():
        logits = model(torch.tensor(ids)[:, None]).logits[:, -1, : engine.DIRECTIONS]
    assert relative_error(logits, engine.reference_logits(layer, tensors, ids)) < 1e-4
    x, chosen, shares = layer.call(3)
    assert reference_output(tensors["weights"], x, chosen, shares).shape == (3, 256)
