"""Packing, linear and experts: every type, odd shapes, one token and many. Runs on the instruction set KTX_ISA
picks.
"""

from __future__ import annotations

import threading

import pytest
import torch

from ktx.errors import KtxError, UsageError
from ktx.kernels import cpu, reference
from ktx.kernels.check import MAX_REL_ERROR_FLOAT, error_bounds, random_matrix, relative_error
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor

INTS = [q.name for q in QTYPES.values() if not q.is_float]
FLOATS = [q.name for q in QTYPES.values() if q.is_float]


def columns(name):
    block = QTYPES[name].block
    return (1, 40, 200) if block == 1 else (256, 768) if block == 256 else (block, 3 * block, 1408)


def bound(name):
    return 1e-6 if error_bounds(name)[0] == MAX_REL_ERROR_FLOAT else error_bounds(name)[0]


@pytest.mark.parametrize("name", QTYPES)
def test_unpacking_is_exact(name):
    for n in (1, 16, 33):
        for k in columns(name):
            weight = random_matrix(name, n, k)
            got = cpu.pack(weight).rows(torch.arange(n))
            torch.testing.assert_close(got, weight.dequantize(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 17, 130])
@pytest.mark.parametrize("name", QTYPES)
def test_linear(name, tokens):
    n, k = 50, columns(name)[-1]
    weight, bias = random_matrix(name, n, k), torch.randn(50)
    x = torch.randn(tokens, k)
    packed = cpu.pack(weight)
    exact = reference.linear(x.double(), weight)
    # A row of few tokens is a small sample: the bound is on the root mean square over many, so few tokens get room for
    # chance.
    room = 1 if QTYPES[name].is_float or tokens * n > 800 else 2
    assert relative_error(cpu.linear(x, packed), exact) < bound(name) * room
    torch.testing.assert_close(cpu.linear(x, packed, bias), cpu.linear(x, packed) + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", QTYPES)
def test_a_token_is_the_same_bits_whatever_stands_beside_it(name):
    k = columns(name)[-1]
    packed = cpu.pack(random_matrix(name, 50, k))
    x = torch.randn(70, k)
    for wide in (False, True):
        with cpu.bf16_rows(0):
            alone = torch.cat([cpu.linear(row[None], packed, all_bf16=wide) for row in x])
            for tokens in (2, 3, 5, 6, 7, 8, 9, 12, 17, 33, 70):
                assert torch.equal(cpu.linear(x[:tokens], packed, all_bf16=wide), alone[:tokens])
    with cpu.bf16_rows(70, [3, 20, 30, 1]):
        mixed = cpu.linear(x, packed)
    for rows, wide in (
        (range(3), False),
        (range(3, 23), True),
        (range(23, 30), False),
        ([30], True),
        (range(31, 70), False),
    ):
        with cpu.bf16_rows(0):
            assert torch.equal(mixed[list(rows)], cpu.linear(x[list(rows)], packed, all_bf16=wide))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "F32"])
def test_a_mixture_is_the_same_bits_whatever_stands_beside_it(name):
    gate, up, down = (cpu.pack_experts(stack(name, 7, 256, 256)) for _ in range(3))
    x, weights = torch.randn(90, 256), torch.rand(90, 3)
    ids = torch.stack([torch.randperm(7)[:3] for _ in x])
    ids[20:, 0] = 5  # one is asked for more often than the others
    ids[20:, 1:] = torch.where(ids[20:, 1:] == 5, 6, ids[20:, 1:])
    for begin, count in ((0, 0), (0, 90), (4, 60)):  # those rows are whole pages of a prompt, the others are not
        with cpu.bf16_rows(90, [begin, count]):
            whole = cpu.experts(x, ids, weights, gate, up, down)
        for few in ([0], [1, 3], list(range(8)), list(range(10, 50)), list(range(64, 90))):
            inside = [begin <= row < begin + count for row in few]
            if all(inside) or not any(inside):
                with cpu.bf16_rows(len(few), [0, len(few)] if all(inside) else []):
                    assert torch.equal(cpu.experts(x[few], ids[few], weights[few], gate, up, down), whole[few])


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_largest_codes_and_activations_fit_where_they_are_summed(name, tokens):
    """Activations of one size are quantised without error, so a sum that overflowed would stand out."""
    values = torch.ones(32, 512)
    values[:, ::32] = -1  # so that types with a minimum have their largest code nearly everywhere
    try:
        weight = QuantizedTensor(QTYPES[name].quantize(values), QTYPES[name], (32, 512))
    except UsageError:
        weight = random_matrix(name, 32, 512)
    packed = cpu.pack(weight)
    for x in (torch.ones(512), weight.dequantize()[0].sign()):
        x = torch.where(x == 0, 1.0, x).expand(tokens, -1).contiguous() * 3
        assert relative_error(cpu.linear(x, packed), reference.linear(x.double(), weight)) < 1e-5


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_K", "Q5_0", "Q6_K", "Q8_0", "IQ2_XXS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activation_types(name, dtype):
    weight = random_matrix(name, 40, 512)
    x = torch.randn(3, 2, 512).to(dtype)
    y = cpu.linear(x, cpu.pack(weight))
    assert y.dtype == dtype and y.shape == (3, 2, 40)
    assert relative_error(y, reference.linear(x.double(), weight)) < bound(name) * 1.5 + (
        0 if dtype == torch.float32 else 4e-3
    )


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "BF16"])
def test_many_tokens_are_each_token(name):
    weight = cpu.pack(random_matrix(name, 35, 256))
    x = torch.randn(1100, 256)
    with cpu.bf16_rows(0):
        whole = cpu.linear(x, weight)
        singly = torch.cat([cpu.linear(row[None], weight) for row in x])
    torch.testing.assert_close(whole, singly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q5_0"])
def test_linear_batched(name):
    weights = [random_matrix(name, 24, 64, seed) for seed in range(3)]
    x = torch.randn(3, 7, 64)
    got = cpu.linear_batched(x, cpu.pack(weights))
    for i, weight in enumerate(weights):
        assert relative_error(got[i], reference.linear(x[i].double(), weight)) < bound(name) * 1.5


def stack(name, count, rows, k):
    parts = [random_matrix(name, rows, k, seed) for seed in range(count)]
    return QuantizedTensor(torch.stack([p.data for p in parts]), parts[0].qtype, (count, rows, k))


@pytest.mark.parametrize(
    "types",
    [
        ("Q4_K", "Q4_K", "Q5_0"),
        ("Q8_0",) * 3,
        ("IQ2_XXS", "Q6_K", "IQ4_NL"),
        ("F32",) * 3,
        ("BF16", "Q4_0", "F16"),
        ("MXFP4",) * 3,
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
def test_experts(types, tokens):
    count, hidden, inner, top = 5, 256, 96, 2
    gate, up, down = (
        stack(types[0], count, inner, hidden),
        stack(types[1], count, inner, hidden),
        stack(types[2], count, hidden, inner),
    )
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top)
    ids = torch.stack([torch.randperm(count - 1)[:top] for _ in range(tokens)])  # the last expert stays empty
    ids[0, 0] = -1
    if tokens > 1:
        ids[1, 1] = count  # out of range: skipped too
    got = cpu.experts(x, ids, weights, cpu.pack_experts(gate), cpu.pack_experts(up), cpu.pack_experts(down))
    exact = reference.experts(x.double(), ids, weights, gate, up, down)
    assert relative_error(got, exact) < (1e-5 if types == ("F32",) * 3 else error_bounds("Q8_0")[1])


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"])
def test_expert_activations_and_biases(act):
    gate, up, down = (stack("F32", 3, *shape) for shape in ((48, 64), (48, 64), (64, 48)))
    biases = [torch.randn(3, rows) for rows in (48, 48, 64)]
    x, ids, weights = torch.randn(6, 64) * 20, torch.randint(0, 3, (6, 2)), torch.rand(6, 2)
    ids[:, 1] = (ids[:, 0] + 1) % 3
    got = cpu.experts(
        x, ids, weights, cpu.pack_experts(gate), cpu.pack_experts(up), cpu.pack_experts(down), *biases, act, 1.702, 7.0
    )
    assert (
        relative_error(got, reference.experts(x.double(), ids, weights, gate, up, down, *biases, act, 1.702, 7.0))
        < 1e-5
    )


def test_no_tokens():
    packed = cpu.pack_experts(stack("Q8_0", 2, 32, 64))
    out = cpu.experts(
        torch.zeros(0, 64),
        torch.zeros(0, 1, dtype=torch.int64),
        torch.zeros(0, 1),
        packed,
        packed,
        cpu.pack_experts(stack("Q8_0", 2, 64, 32)),
    )
    assert out.shape == (0, 64)


def test_two_models_in_two_threads_and_too_many_workers():
    weights = [random_matrix("Q4_K", 64, 512, seed) for seed in range(2)]
    packed = [cpu.pack(weight) for weight in weights]
    x = torch.randn(5, 512)
    expected = [cpu.linear(x, p) for p in packed]
    before, wrong = cpu.ops.threads(), []

    def work(i):
        for _ in range(200):
            if not torch.equal(cpu.linear(x, packed[i]), expected[i]):
                wrong.append(i)

    cpu.ops.set_threads(7)
    try:
        team = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        [t.start() for t in team]
        [t.join() for t in team]
    finally:
        cpu.ops.set_threads(before)
    assert not wrong


BAD = {
    "a row that is no whole block": lambda w: cpu.ops.packed_nbytes(12, 16, 100),
    "an unknown type": lambda w: cpu.ops.packed_nbytes(99, 16, 256),
    "wrong columns": lambda w: cpu.linear(torch.randn(2, 128), w),
    "packed bytes that do not fit": lambda w: cpu.ops.linear(torch.randn(2, 256), w.data[:-1], 8, 32, 256, None),
    "integer activations": lambda w: cpu.linear(torch.ones(2, 256, dtype=torch.int32), w),
    "a bias of another size": lambda w: cpu.linear(torch.randn(2, 256), w, torch.randn(5)),
    "a row past the end": lambda w: w.rows(torch.tensor([32])),
    "no threads": lambda w: cpu.ops.set_threads(0),
    "ids of another length": lambda w: cpu.experts(
        torch.randn(2, 256), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1), w, w, w
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_exceptions(what):
    packed = cpu.pack(random_matrix("Q8_0", 32, 256))
    with pytest.raises((RuntimeError, KtxError)):
        BAD[what](packed)


def test_compiles_without_a_graph_break():
    packed = cpu.pack(random_matrix("Q8_0", 32, 256))
    traced = torch.compile(lambda x: cpu.linear(x, packed) * 2, fullgraph=True, backend="eager")
    x = torch.randn(2, 256)
    torch.testing.assert_close(traced(x), cpu.linear(x, packed) * 2)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "Q6_K", "Q8_0", "IQ2_S", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_odd_shapes_and_many_tokens(name, rows):
    k = columns(name)[-1]
    weight = random_matrix(name, rows, k)
    packed = cpu.pack(weight)
    for tokens in (1, 6, 7, 8, 9, 13, 600, 4096 if rows == 7 else 64):
        x = torch.randn(tokens, k)
        room = 1 if tokens * rows > 2000 else 2
        assert relative_error(cpu.linear(x, packed), reference.linear(x.double(), weight)) < bound(name) * room, tokens


@pytest.mark.parametrize("name", [q for q in INTS if q not in ("TQ1_0", "TQ2_0")])
def test_channels_that_stand_out(name):
    """Real models have channels ten times larger than the others; one scale for a whole row would drown the rest."""
    k = 1536 if QTYPES[name].block == 256 else 1408
    weight, x = random_matrix(name, 64, k), torch.randn(64, k)
    x[:, torch.randperm(k)[: k // 100]] *= 10
    assert relative_error(cpu.linear(x, cpu.pack(weight)), reference.linear(x.double(), weight)) < 1.3e-2


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "F16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(name, value):
    packed = cpu.pack(random_matrix(name, 40, 512))
    for tokens in (2, 9, 40):
        x = torch.randn(tokens, 512)
        expected = cpu.linear(x, packed)
        x[1, 77] = value
        got = cpu.linear(x, packed)
        assert not got[1].isfinite().any()
        keep = torch.arange(tokens) != 1
        assert torch.equal(got[keep], expected[keep])


def test_what_is_not_finite_stays_in_its_token_of_a_mixture():
    gate, up, down = (cpu.pack_experts(stack("Q4_K", 4, *shape)) for shape in ((256, 256), (256, 256), (256, 256)))
    x, ids, weights = torch.randn(30, 256), torch.randint(0, 4, (30, 2)), torch.rand(30, 2)
    expected = cpu.experts(x, ids, weights, gate, up, down)
    x[5, 100] = float("nan")
    got = cpu.experts(x, ids, weights, gate, up, down)
    assert not got[5].isfinite().any()
    keep = torch.arange(30) != 5
    assert torch.equal(got[keep], expected[keep])


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_the_number_of_threads_changes_nothing(tokens):
    gate, up, down = (cpu.pack_experts(stack("Q4_K", 6, *shape)) for shape in ((512, 256), (512, 256), (256, 512)))
    x, weights = torch.randn(tokens, 256), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])
    before, found = cpu.ops.threads(), []
    try:
        for team in (1, 2, 3, 5):
            cpu.ops.set_threads(team)
            found.append(
                (
                    cpu.experts(x, ids, weights, gate, up, down),
                    cpu.linear(x, cpu.Packed(gate.data, gate.qtype, 6 * 512, 256)),
                )
            )
    finally:
        cpu.ops.set_threads(before)
    for mixture, product in found[1:]:
        assert relative_error(mixture, found[0][0]) < 1e-6 and relative_error(product, found[0][1]) < 1e-6


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_the_same_expert_twice_and_all_tokens_on_one(tokens):
    gate, up, down = (stack("Q8_0", 3, *shape) for shape in ((96, 256), (96, 256), (256, 96)))
    packed = [cpu.pack_experts(part) for part in (gate, up, down)]
    x, weights = torch.randn(tokens, 256), torch.rand(tokens, 2)
    ids = torch.ones(tokens, 2, dtype=torch.int64)
    exact = reference.experts(x.double(), ids, weights, gate, up, down)
    assert relative_error(cpu.experts(x, ids, weights, *packed), exact) < 1.8e-2


@pytest.mark.parametrize("name", ["INT8_128", "Q8_0", "INT4_64", "INT4_128", "Q4_0"])
@pytest.mark.parametrize("origin", ["F32", "F16", "BF16", "F8_E4M3"])
def test_weights_are_quantised_on_the_way(name, origin):
    """As near to the floats as the plain maker of the type comes, for each row on its own and in pieces of many
    rows.
    """
    weight, k = random_matrix(origin, 1100, 256), 256
    values = weight.dequantize()
    packed = cpu.pack(weight, QTYPES[name])
    got = packed.rows(torch.arange(1100))
    plain = QTYPES[name].dequantize(QTYPES[name].quantize(values)).reshape(1100, k)
    assert packed.qtype is QTYPES[name]
    assert relative_error(got, values) < 1.02 * relative_error(plain, values) + 1e-7
    assert relative_error(got, values) < (8e-3 if "8" in name[:4] else 0.13)


def test_a_row_of_zeros_and_one_large_weight():
    values = torch.zeros(16, 128)
    values[1, 5] = -1000.0
    for name in ("INT8_128", "INT4_128", "INT4_64"):
        got = cpu.pack(QuantizedTensor.from_float(values), QTYPES[name]).rows(torch.arange(16))
        torch.testing.assert_close(got, values, rtol=2e-3, atol=0)
