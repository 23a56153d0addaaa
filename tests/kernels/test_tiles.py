"""Tile registers: the model against plain arithmetic, and the AMX kernels' text on it. The real instructions where
there are some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ktx.hardware import ISAS
from ktx.kernels import check, cpu

SHAPES = [(16, 64), (1, 4), (7, 32), (16, 16), (3, 60)]


def tiles(rows, size):
    return (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((rows, size), (size // 4, 64), (rows, 64)))


def of_bytes(kind, a, b, c):
    """c [m, 16] int32 += sum over k of a [m, k] times b [k/4, 16, k%4], wrapping around."""
    left = a.numpy().view(np.int8 if kind == "ssd" else np.uint8).astype(np.int64)
    right = b.numpy().view(np.int8).reshape(-1, 16, 4).transpose(0, 2, 1).reshape(-1, 16).astype(np.int64)
    return (c.numpy().view(np.int32) + left @ right).astype(np.int32)


def of_pairs(a, b, c):
    """Even and odd products summed apart, each step a fused multiply-add of f32; a double holds it exactly."""
    left, right = a.view(torch.bfloat16).double().numpy(), b.view(torch.bfloat16).double().numpy()
    sums = np.zeros((2, len(left), 16), np.float32)
    for k in range(right.shape[0]):
        for odd in range(2):
            step = sums[odd].astype(np.float64) + left[:, 2 * k + odd, None] * right[k, odd::2][None]
            sums[odd] = step.astype(np.float32)
    return c.numpy().view(np.float32) + (sums[0] + sums[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["ssd", "usd"])
def test_the_model_multiplies_bytes(kind, shape):
    a, b, c = tiles(*shape)
    got = cpu.ops.tile_dot(kind, a, b, c, True).numpy().view(np.int32)
    np.testing.assert_array_equal(got, of_bytes(kind, a, b, c))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_multiplies_pairs(shape):
    rows, size = shape
    a, b = (torch.randn(s).bfloat16().view(torch.uint8) for s in ((rows, size // 2), (size // 4, 32)))
    c = torch.randn(rows, 16).view(torch.uint8)
    got = cpu.ops.tile_dot("bf16", a, b, c, True).numpy().view(np.float32)
    np.testing.assert_array_equal(got, of_pairs(a, b, c))


def test_subnormal_numbers_are_zero():
    tiny = torch.full((1, 2), 1e-39).bfloat16().view(torch.uint8)
    b = torch.full((1, 32), 2.0).bfloat16().view(torch.uint8)
    c = torch.full((1, 16), 1e-39).view(torch.uint8)
    assert not cpu.ops.tile_dot("bf16", tiny, b, c, True).view(torch.float32).any()
    one = torch.ones(1, 2).bfloat16().view(torch.uint8)
    nan = torch.full((1, 32), torch.nan).bfloat16().view(torch.uint8)
    assert cpu.ops.tile_dot("bf16", one, nan, c, True).view(torch.float32).isnan().all()


@pytest.mark.skipif(cpu.ops.best_isa() != "amx", reason="no AMX here")
@pytest.mark.parametrize("kind", ["ssd", "usd", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_instructions_are_their_model(kind, shape):
    a, b, c = tiles(*shape)
    if kind == "bf16":
        a, b, c = (torch.randn(t.shape[0], t.shape[1] // 2).bfloat16().view(torch.uint8) for t in (a, b, c))
    assert torch.equal(cpu.ops.tile_dot(kind, a, b, c, False), cpu.ops.tile_dot(kind, a, b, c, True))


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b, c: cpu.ops.tile_dot("ssu", a, b, c, True),
        lambda a, b, c: cpu.ops.tile_dot("ssd", a, b[:-1], c, True),
        lambda a, b, c: cpu.ops.tile_dot("ssd", a.view(torch.int8), b, c, True),
        lambda a, b, c: cpu.ops.tile_dot("ssd", torch.cat([a, a]), b, c, True),
    ],
)
def test_bad_tiles_are_exceptions(call):
    with pytest.raises(RuntimeError):
        call(*tiles(16, 64))


def on(isa, code):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"KTX_ISA": isa}, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_type_on_the_model():
    found = on(
        "amxmodel", "import json; from ktx.kernels.check import measure_errors; print(json.dumps(measure_errors()))"
    )
    for name, errors in found["errors"].items():
        matrix, layer = found["bounds"][name]
        assert max(errors[:2]) <= matrix and errors[2] <= layer, name


ROWS = """
import json, torch
from ktx.kernels import cpu
from ktx.kernels.check import random_matrix
cpu.ops.set_threads(3)
torch.manual_seed(0)
found = []
for name in ("Q4_K", "Q6_K", "Q8_0", "BF16", "IQ2_XXS", "F16"):
    weight, x = cpu.pack(random_matrix(name, 37, 768)), torch.randn(133, 768)
    for wide in (False, True):
        with cpu.bf16_rows(0):
            whole = cpu.linear(x, weight, all_bf16=wide)
            for count in (1, 8, 9, 16, 17, 31, 33, 100):
                part = cpu.linear(x[:count], weight, all_bf16=wide)
                found.append([name, count, float((part - whole[:count]).norm() / whole[:count].norm())])
print(json.dumps(found))
"""


def test_tokens_of_a_tile_are_each_token():
    """9 to 133 tokens fill tiles of tokens in many ways; up to 8 take the path without tiles, where they are
    not wide.
    """
    for name, count, error in on("amxmodel", ROWS):
        assert error < 1e-5, (name, count, error)


def test_instruction_sets_have_one_list():
    assert cpu.ops.isa() in ISAS and cpu.ops.best_isa() in ISAS
    assert set(check.NOT_TIMED_ISAS) < set(ISAS)
