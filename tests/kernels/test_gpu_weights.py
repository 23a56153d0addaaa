"""Packed weights on a GPU: planes, decoders, linear and experts of every type. Without a CUDA device through Triton's
interpreter, on small shapes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ktx.errors import KtxError
from ktx.kernels import reference
from ktx.kernels.check import random_matrix, relative_error
from ktx.kernels.gpu import dequant, fp8, linear, moe, quant_matmul, soa_layout
from ktx.kernels.gpu.soa_layout import FIELDS, pack, pack_experts
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUMS, HALVES = (
    1e-5,
    5e-3 if DEVICE == "cuda" else 8e-3,
)  # errors of f32 sums, and of bf16, to which the interpreter cuts instead of rounding
NEAR = 3e-8 if DEVICE == "cuda" else 1e-9  # of a weight: a card takes the minimum off before it rounds
TWO = ["Q4_K", "Q5_0", "F8_E4M3"]  # kinds of types where one is like another


def columns(name):
    """A length that is no whole span, and for small blocks no power of two."""
    block = QTYPES[name].block
    return 200 if block == 1 else 768 if block == 256 else 5 * block


def stack(name, count, rows, k):
    parts = [random_matrix(name, rows, k, seed) for seed in range(count)]
    scale = None if parts[0].scale is None else torch.stack([p.scale for p in parts])
    return QuantizedTensor(torch.stack([p.data for p in parts]), parts[0].qtype, (count, rows, k), scale)


def exact_linear(x, weight):
    return reference.linear(x.cpu().double(), weight)


def test_every_type_has_planes_and_a_decoder():
    assert set(FIELDS) == set(dequant.DECODERS) == set(QTYPES)


@pytest.mark.parametrize("name", QTYPES)
def test_planes_hold_every_byte_of_a_block_once(name):
    covered = sorted(byte for f in FIELDS[name] for byte in range(f.start, f.start + f.nbytes))
    assert covered == list(range(QTYPES[name].nbytes))
    sizes = [field.nbytes for field in FIELDS[name]]
    assert sizes == sorted(sizes, reverse=True)
    weight = stack(name, 3, 5, columns(name))
    packed = pack(weight, device=DEVICE)
    assert packed.data.numel() == weight.data.numel()
    assert torch.equal(packed.blocks().cpu(), weight.data)
    assert torch.equal(pack([weight[i] for i in range(3)], device=DEVICE).data, packed.data)


@pytest.mark.parametrize("name", QTYPES)
def test_dequantising_is_exact(name):
    for rows, k in ((33, columns(name)), (1, max(16, QTYPES[name].block))):
        weight = random_matrix(name, rows, k)
        got = dequant.dequantize(pack(weight, device=DEVICE), torch.float32)
        torch.testing.assert_close(got.cpu(), weight.dequantize(), rtol=1e-6, atol=NEAR)


def test_fp8_codes_all_of_them():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    weight = QuantizedTensor(codes, QTYPES["F8_E4M3"], (1, 256), torch.tensor([[0.5, 3.0]]))
    got = dequant.dequantize(pack(weight, device=DEVICE), torch.float32)
    torch.testing.assert_close(got.cpu(), weight.dequantize(), rtol=0, atol=0, equal_nan=True)


def test_mxfp4_scales_that_are_no_normal_number():
    blocks = torch.randint(0, 256, (4, 17), dtype=torch.uint8)
    blocks[:, 0] = torch.tensor([0, 1, 2, 254])
    weight = QuantizedTensor(blocks.view(4, 17), QTYPES["MXFP4"], (4, 32))
    got = dequant.dequantize(pack(weight, device=DEVICE), torch.float32)
    torch.testing.assert_close(got.cpu(), weight.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TWO)
def test_rows_by_number_and_a_range_of_rows(name):
    weight = stack(name, 2, 150, columns(name))
    packed = pack(weight, device=DEVICE)
    values = weight.dequantize().view(300, -1)
    index = torch.tensor([299, 0, 151, 151])
    torch.testing.assert_close(
        dequant.dequantize_rows(packed, index.to(DEVICE)).cpu(), values[index], rtol=1e-6, atol=NEAR
    )
    some = dequant.dequantize(packed, torch.bfloat16, 140, 20)
    torch.testing.assert_close(some.cpu(), values[140:160].bfloat16(), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("name", QTYPES)
def test_linear(name, tokens):
    k = min(columns(name), 512)
    weight, bias = random_matrix(name, 19, k), torch.randn(19)
    x = torch.randn(tokens, k)
    got = linear.linear(x.to(DEVICE), pack(weight, device=DEVICE), bias.to(DEVICE))
    assert relative_error(got.cpu(), exact_linear(x, weight) + bias.double()) < SUMS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*TWO, "BF16", "F32"])
def test_activation_types(name, dtype):
    weight, k = random_matrix(name, 12, columns(name)), columns(name)
    packed = pack(weight, device=DEVICE)
    for tokens in (2, 20, 70):
        x = torch.randn(tokens, k).to(dtype)
        y = linear.linear(x.view(2, -1, k).to(DEVICE), packed)
        assert y.dtype == dtype and y.shape == (2, tokens // 2, 12)
        assert relative_error(y.cpu().view(tokens, 12), exact_linear(x, weight)) < HALVES


@pytest.mark.parametrize("name", TWO)
def test_many_tokens_are_dequantised_in_pieces(name, monkeypatch):
    weight, x = random_matrix(name, 20, columns(name)), torch.randn(70, columns(name))
    monkeypatch.setattr(linear, "DEQUANT_CHUNK_WEIGHTS", 7 * columns(name))
    got = linear.linear(x.to(DEVICE), pack(weight, device=DEVICE))
    assert relative_error(got.cpu(), exact_linear(x, weight)) < SUMS


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_columns_split_among_programs(name, monkeypatch):
    weight, bias = random_matrix(name, 3, 2560), torch.randn(3)
    packed = pack(weight, device=DEVICE)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 2560)
        found = []
        for programs in (1, 256):
            monkeypatch.setattr(quant_matmul, "MIN_PROGRAMS", programs)
            found.append(linear.linear(x.to(DEVICE), packed, bias.to(DEVICE)).cpu())
            assert relative_error(found[-1], exact_linear(x, weight) + bias.double()) < SUMS
        assert not torch.equal(*found)  # sums of another order: they were split


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_S", "F32"])
def test_a_token_is_the_same_bits_whatever_stands_beside_it(name):
    packed, x = pack(random_matrix(name, 9, 512), device=DEVICE), torch.randn(4, 512, device=DEVICE).half()
    whole = linear.linear(x, packed)
    for tokens in (
        (3,) if DEVICE == "cuda" else (1, 2, 3)
    ):  # a card may add up the lanes of another tile in another order
        assert torch.equal(linear.linear(x[:tokens], packed), whole[:tokens])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [2, 20])
def test_what_is_not_finite_stays_in_its_row(value, tokens):
    packed, x = pack(random_matrix("Q4_K", 9, 512), device=DEVICE), torch.randn(tokens, 512, device=DEVICE)
    expected = linear.linear(x, packed)
    x[1, 77] = value
    got = linear.linear(x, packed)
    assert not got[1].isfinite().any()
    keep = torch.arange(tokens) != 1
    assert torch.equal(got[keep], expected[keep])


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q5_K", "F8_E4M3"])
@pytest.mark.parametrize("tokens", [3, 20, 70])
def test_linear_batched(name, tokens):
    weights = stack(name, 3, 24, 256)
    x = torch.randn(3, tokens, 256)
    got = linear.linear_batched(x.to(DEVICE), pack(weights, device=DEVICE))
    assert relative_error(got.cpu(), reference.linear_batched(x.double(), weights)) < SUMS


@pytest.mark.parametrize("name", ["INT8_128", "INT4_64", "INT4_128", "Q8_0"])
def test_weights_are_quantised_on_the_way(name):
    weight = random_matrix("BF16", 20, 256)
    packed = pack(weight, QTYPES[name], DEVICE)
    assert packed.qtype is QTYPES[name]
    got = dequant.dequantize(packed, torch.float32).cpu()
    plain = QTYPES[name].dequantize(QTYPES[name].quantize(weight.dequantize()))
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=NEAR)


@pytest.fixture
def few_pairs(monkeypatch):
    """Fewer go one by one, so that small tests meet both ways."""
    monkeypatch.setattr(moe, "MAX_GEMV_PAIRS", 6)


MIXTURES = [("Q4_K", "Q4_K", "Q5_0"), ("IQ2_XXS", "Q6_K", "IQ4_NL"), ("F8_E4M3",) * 3, ("BF16", "INT4_64", "F16")]


@pytest.mark.parametrize("types", MIXTURES)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_experts(types, tokens, few_pairs):
    count, hidden, inner, top = 3, 256, 64, 2
    gate, up = (stack(name, count, inner, hidden) for name in types[:2])
    down = stack(types[2], count, hidden, inner)
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top)
    ids = torch.stack([torch.randperm(count - 1)[:top] for _ in range(tokens)])  # the last expert stays empty
    ids[0, 0] = -1
    if tokens > 1:
        ids[1, 1] = count  # out of range: skipped too
    packed = [pack_experts(part, device=DEVICE) for part in (gate, up, down)]
    got = moe.experts(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), *packed)
    assert relative_error(got.cpu(), reference.experts(x.double(), ids, weights, gate, up, down)) < SUMS


@pytest.mark.parametrize("tokens", [2, 20])
def test_a_layer_split_between_two_devices_adds_up(tokens, few_pairs):
    gate, up, down = (stack("Q8_0", 6, *shape) for shape in ((64, 96), (64, 96), (96, 64)))
    x, weights = torch.randn(tokens, 96), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])
    ids[0] = torch.tensor([0, 1, 0])  # none of the second share
    shares = []
    for first, last in ((0, 2), (2, 6)):
        parts = [pack_experts([p[i] for i in range(first, last)], device=DEVICE) for p in (gate, up, down)]
        shares.append(moe.experts(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), *parts, first=first).cpu())
    assert not shares[1][0].any()
    assert relative_error(sum(shares), reference.experts(x.double(), ids, weights, gate, up, down)) < SUMS


@pytest.mark.parametrize("act", moe.ACTIVATIONS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_expert_activations_and_biases(act, tokens, few_pairs):
    gate, up, down = (stack("F32", 3, *shape) for shape in ((48, 64), (48, 64), (64, 48)))
    biases = [torch.randn(3, rows) for rows in (48, 48, 64)]
    x, ids, weights = torch.randn(tokens, 64) * 20, torch.randint(0, 3, (tokens, 2)), torch.rand(tokens, 2)
    packed = [pack_experts(part, device=DEVICE) for part in (gate, up, down)]
    there = [t.to(DEVICE) for t in (x, ids, weights)], [b.to(DEVICE) for b in biases]
    got = moe.experts(*there[0], *packed, *there[1], act, 1.702, 7.0)
    assert (
        relative_error(got.cpu(), reference.experts(x.double(), ids, weights, gate, up, down, *biases, act, 1.702, 7.0))
        < SUMS
    )


@pytest.mark.parametrize("tokens", [2, 20])
def test_experts_in_half_precision_and_all_tokens_on_one(tokens, few_pairs):
    gate, up, down = (stack("Q4_0", 3, *shape) for shape in ((96, 64), (96, 64), (64, 96)))
    packed = [pack_experts(part, device=DEVICE) for part in (gate, up, down)]
    x, weights = torch.randn(tokens, 64).bfloat16(), torch.rand(tokens, 2)
    ids = torch.ones(tokens, 2, dtype=torch.int64)
    got = moe.experts(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), *packed)
    assert got.dtype is torch.bfloat16
    assert relative_error(got.cpu(), reference.experts(x.double(), ids, weights, gate, up, down)) < 2 * HALVES


def test_groups_of_pairs_cover_each_pair_once():
    for top, experts, size in ((1, 1, 16), (3, 7, 16), (8, 64, 32)):
        ids = torch.randint(-1, experts + 1, (90, top))
        (pairs, expert, first, end), groups = moe.group_pairs(ids, 0, experts, size)
        seen = []
        for group in range(groups):
            e = int(expert[group])
            here = pairs[int(first[group]) : min(int(first[group]) + size, int(end[e]))] if e < experts else []
            assert all(int(ids.view(-1)[pair]) == e for pair in here)
            seen += [int(pair) for pair in here]
        inside = (ids.view(-1) >= 0) & (ids.view(-1) < experts)
        assert sorted(seen) == inside.nonzero().view(-1).tolist()


def test_nothing_to_multiply():
    packed = pack(random_matrix("Q8_0", 32, 64), device=DEVICE)
    assert linear.linear(torch.zeros(0, 64, device=DEVICE), packed).shape == (0, 32)
    gate, down = (pack_experts(stack("Q8_0", 2, *shape), device=DEVICE) for shape in ((32, 64), (64, 32)))
    none = torch.zeros(0, 1, dtype=torch.int64, device=DEVICE)
    assert moe.experts(torch.zeros(0, 64, device=DEVICE), none, none.float(), gate, gate, down).shape == (0, 64)


def test_activations_in_fp8_are_near_and_scaled_by_128_columns():
    x = torch.randn(5, 300)
    x[2, 128:256] *= 1000
    codes, scale = fp8.quantize(x.to(DEVICE))
    assert codes.dtype is torch.float8_e4m3fn and scale.shape == (5, 3) and scale.stride() == (1, 5)
    back = codes.cpu().float() * scale.cpu().repeat_interleave(128, 1)[:, :300]
    bound = 4e-2 if DEVICE == "cuda" else 8e-2  # the interpreter cuts
    for token in range(5):
        for group in (slice(0, 128), slice(128, 256), slice(256, 300)):
            assert relative_error(back[token, group], x[token, group]) < bound


BAD = {
    "columns": (lambda w: linear.linear(torch.randn(2, 128, device=DEVICE), w), "128 columns"),
    "integers": (lambda w: linear.linear(torch.ones(2, 256, dtype=torch.int32, device=DEVICE), w), "int32"),
    "a bias": (lambda w: linear.linear(torch.randn(2, 256, device=DEVICE), w, torch.randn(5)), "bias"),
    "bytes": (lambda w: soa_layout.SoAWeight(w.data[:-1], w.qtype, 32, 256), "bytes"),
    "matrices": (lambda w: linear.linear_batched(torch.randn(2, 1, 256, device=DEVICE), w), "1 matrices"),
    "types": (lambda w: pack([random_matrix("Q8_0", 4, 64), random_matrix("Q4_0", 4, 64)], device=DEVICE), "differ"),
    "an activation": (lambda w: moe.experts(*[torch.zeros(1, 1)] * 3, w, w, w, act="swish"), "swish"),
    "a down matrix": (lambda w: moe.experts(*[torch.zeros(1, 1)] * 3, w, w, w), "transposed"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_told(what):
    call, word = BAD[what]
    with pytest.raises(KtxError, match=word):
        call(pack(random_matrix("Q8_0", 32, 256), device=DEVICE))


def test_the_rest_of_ktx_needs_no_triton():
    code = "import sys, ktx, ktx.ops.linear, ktx.ops.experts, ktx.kernels.gpu.soa_layout; sys.exit('triton' in sys.modules)"  # noqa: E501
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_it_needs_a_gpu():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_weights.py", "--quick"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no CUDA device" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch,name", [(80, "F8_E4M3"), (90, "Q4_K")])
def test_what_the_interpreter_takes_the_compiler_takes_too(arch, name):
    """For cards that are not here; 99 KiB are the least shared memory of those since 8.0."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "tests/kernels/compile_gpu.py", str(arch), name],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 5 and all(line["shared"] <= 99 << 10 for line in lines)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", QTYPES)
def test_linear_of_a_real_shape(name):
    n, k = 1537, 7168
    rows = random_matrix(name, 64, k)
    scale = torch.rand(-(-n // 128), k // 128) + 0.5 if name == "F8_E4M3" else None
    weight = QuantizedTensor(rows.data.repeat(25, 1)[:n].contiguous(), rows.qtype, (n, k), scale)
    packed, values = pack(weight, device="cuda"), weight.dequantize().cuda().double()
    for tokens in (1, 2, 7, 8, 9, 33, 64, 200):
        x = torch.randn(tokens, k, device="cuda")
        assert relative_error(linear.linear(x, packed), x.double() @ values.T) < SUMS
        low = x.bfloat16()
        assert relative_error(linear.linear(low, packed), low.double() @ values.T) < HALVES


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 300])
def test_a_cuda_graph_holds_a_layer(tokens):
    gate, up, down = (stack("Q4_K", 16, *shape) for shape in ((768, 2048), (768, 2048), (2048, 768)))
    packed = [pack_experts(part, device="cuda") for part in (gate, up, down)]
    x, weights = torch.randn(tokens, 2048, device="cuda").bfloat16(), torch.rand(tokens, 4, device="cuda")
    ids = torch.stack([torch.randperm(16)[:4] for _ in range(tokens)]).cuda()
    router = pack(random_matrix("Q8_0", 64, 2048), device="cuda")

    def layer():
        return moe.experts(x, ids, weights, *packed, first=2), linear.linear(x, router)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = layer()
    ids.copy_(ids.flip(0).roll(1, 1))
    x.normal_()
    graph.replay()
    for got, expected in zip(kept, layer(), strict=True):
        assert torch.equal(got, expected)
    inner = ids.cpu() - 2
    exact = reference.experts(x.cpu().double(), inner, weights.cpu(), gate, up, down)
    assert relative_error(kept[0].cpu(), exact) < 2 * HALVES


@gpu
@pytest.mark.gpu
def test_fp8_by_blocks_in_cublas():
    weight = random_matrix("F8_E4M3", 1536, 7168 - 128)
    packed, x = pack(weight, device="cuda"), torch.randn(200, 7168 - 128, device="cuda").bfloat16()
    if not fp8.supports(x, packed):
        pytest.skip(f"{torch.cuda.get_device_name()} and CUDA {torch.version.cuda} multiply no blocks of FP8")
    exact = x.double() @ weight.dequantize().cuda().double().T
    assert relative_error(fp8.linear(x, packed), exact) < 4e-2
    assert relative_error(linear.linear(x, packed), exact) < 4e-2
