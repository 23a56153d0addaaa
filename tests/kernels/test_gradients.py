"""The kernels' gradients beside autograd's through their plain-torch twins: every type, odd shapes, one token
and many.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ktx.errors import NoGradient
from ktx.kernels import cpu, gradients, reference
from ktx.kernels.check import random_matrix
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor

NEAR = 1e-5
IDS = torch.tensor(
    [[0, 1], [3, 0], [0, 3], [1, 1], [7, -1], [3, 1]]
)  # nobody chooses expert 2; two choices are of none


def differ(mine, exact, *inputs):
    """The largest distance of gradients of inputs, given a random gradient of the result."""
    pairs = [(x.clone().requires_grad_(), x.double().requires_grad_()) for x in inputs]
    out, expected = mine(*(a for a, _ in pairs)), exact(*(b for _, b in pairs))
    grad = torch.randn(out.shape, dtype=torch.float32)
    found = torch.autograd.grad(out, [a for a, _ in pairs], grad.to(out.dtype))
    right = torch.autograd.grad(expected, [b for _, b in pairs], grad.to(expected.dtype))
    assert [g.dtype for g in found] == [x.dtype for x in inputs]
    whole = torch.cat([part.flatten() for part in right]).norm()  # a gradient may be zero, but for rounding
    return max(
        float((a.double() - b).norm() / max(b.norm(), whole / 1000, 1e-6)) for a, b in zip(found, right, strict=True)
    )


def stack(name, count, n, k):
    """Matrices, packed as experts, and their f32 values as one tensor."""
    parts = [random_matrix(name, n, k, seed) for seed in range(count)]
    values = torch.stack([part.dequantize() for part in parts])
    return parts, QuantizedTensor.from_float(values)


@pytest.mark.parametrize("name", QTYPES)
def test_linear_of_every_type(name):
    block = QTYPES[name].block
    for n, k in ((33, 3 * block if block > 1 else 40), (7, block if block > 1 else 1)):
        weight = random_matrix(name, n, k)
        packed = cpu.pack(weight)
        for shape in ((1, k), (2, 3, k), (70, k)):
            assert (
                differ(
                    lambda x, p=packed: cpu.linear(x, p), lambda x, w=weight: reference.linear(x, w), torch.randn(shape)
                )
                < NEAR
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations(dtype):
    weight = random_matrix("Q8_0", 33, 64)
    packed, x = cpu.pack(weight), torch.randn(5, 64).to(dtype)
    assert differ(lambda x: cpu.linear(x, packed), lambda x: reference.linear(x, weight), x) < 1e-2
    norm = torch.rand(64)
    assert differ(lambda x: cpu.rms_norm(x, norm, 1e-6), lambda x: twin_norm(x, norm, 1e-6), x) < 1e-2


def test_a_matrix_is_taken_some_rows_at_a_time(monkeypatch):
    weight, x = random_matrix("Q8_0", 100, 64), torch.randn(9, 64)
    packed, asked = cpu.pack(weight), []
    monkeypatch.setattr(gradients, "DEQUANT_CHUNK_WEIGHTS", 16 * 64)
    spans = gradients._row_chunks
    monkeypatch.setattr(gradients, "_row_chunks", lambda *a: (asked.append(s) or (s, v) for s, v in spans(*a)))
    assert differ(lambda x: cpu.linear(x, packed), lambda x: reference.linear(x, weight), x) < NEAR
    assert [(s.start, s.stop) for s in asked] == [(i, min(i + 16, 100)) for i in range(0, 100, 16)]


def test_a_bias_has_a_gradient():
    weight = random_matrix("F32", 33, 40)
    packed = cpu.pack(weight)
    inputs = torch.randn(2, 5, 40), torch.randn(33)
    assert differ(lambda x, b: cpu.linear(x, packed, b), lambda x, b: reference.linear(x, weight, b), *inputs) < NEAR


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_0"])
def test_batched(name):
    parts, values = stack(name, 3, 33, 64)
    packed = cpu.pack(parts)
    for tokens in (1, 7):
        mine, exact = (lambda x: cpu.linear_batched(x, packed)), (lambda x: reference.linear_batched(x, values))
        assert differ(mine, exact, torch.randn(3, tokens, 64)) < NEAR


GATES = [("silu",), ("gelu",), ("gelu_tanh",), ("relu",), ("relu2",), ("swiglu_oai", 1.702, 0.5)]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate[0])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q6_K"])
def test_experts(name, gate):
    """Of hidden states and of the router's weights; an expert that nobody chose, choices of none, one token."""
    wide = 256 if name == "Q6_K" else 96
    hidden = 256 if name == "Q6_K" else 64
    (gates, exact_gate), (ups, exact_up) = (stack(name, 4, wide, hidden) for _ in range(2))
    downs, exact_down = stack(name, 4, hidden, wide)
    packed, exact = [cpu.pack_experts(part) for part in (gates, ups, downs)], (exact_gate, exact_up, exact_down)
    for biases in ((), (torch.randn(4, wide), torch.randn(4, wide), torch.randn(4, hidden))):
        own = biases or (None, None, None)
        for tokens in (1, len(IDS)):
            ids = IDS[:tokens]
            worst = differ(
                lambda x, w, ids=ids, own=own: cpu.experts(x, ids, w, *packed, *own, *gate),
                lambda x, w, ids=ids, own=own: reference.experts(x, ids, w, *exact, *own, *gate),
                torch.randn(tokens, hidden),
                torch.rand(tokens, 2),
            )
            assert worst < NEAR


def test_experts_whose_tokens_all_go_elsewhere():
    packed = [cpu.pack_experts(stack("F32", 2, 32, 32)[0]) for _ in range(3)]
    x, weights = torch.randn(3, 32, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    cpu.experts(x, torch.full((3, 2), 9), weights, *packed).sum().backward()
    assert not x.grad.any() and not weights.grad.any()


def test_experts_are_counted_as_often_as_they_compute():
    packed, counts = [cpu.pack_experts(stack("F32", 2, 32, 32)[0]) for _ in range(3)], cpu.new_stats(2)
    ids = torch.tensor([[0, 1], [1, 0]])
    out = cpu.experts(torch.randn(2, 32, requires_grad=True), ids, torch.rand(2, 2), *packed, counts=counts)
    out.sum().backward()
    assert cpu.ExpertStats.read(counts).activations == (2, 2)


SHAPES = [(1, 4, 2, 5, 9), (2, 4, 4, 1, 1), (2, 6, 1, 7, 7), (1, 3, 3, 1, 8)]  # batch, heads, key heads, queries, keys


def intervals(batch, queries, keys):
    """The last three keys, and nothing at all for a query."""
    ends = torch.arange(queries) + keys - queries + 1
    ranges = torch.stack([(ends - 3).clamp(min=0), ends], -1).repeat(batch, 1, 1).to(torch.int32)
    if queries > 2:
        ranges[0, 1] = 0
    return ranges


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("few", [False, True], ids=["at once", "a query at a time"])
@pytest.mark.parametrize("batch,heads,groups,queries,keys", SHAPES)
def test_attention(monkeypatch, batch, heads, groups, queries, keys, few, softcap):
    if few:
        monkeypatch.setattr(gradients, "MAX_SCORES", 1)
    q, k, v = (
        torch.randn(batch, heads, queries, 24),
        torch.randn(batch, groups, keys, 24),
        torch.randn(batch, groups, keys, 40),
    )
    turned = torch.randn(batch, heads, queries, 8), torch.randn(batch, 1, keys, 8)
    bools = torch.rand(batch, 1, queries, keys) > 0.4
    floats = torch.randn(batch, heads, queries, keys).masked_fill(~bools, torch.finfo(torch.float32).min)
    for ranges, mask in ((None, None), (intervals(batch, queries, keys), None), (None, bools), (None, floats)):
        about = ranges, mask, 0.3

        def attend(which, *inputs, about=about):
            return which.attention(*inputs[:3], *about, inputs[3], softcap, *inputs[4:])

        inputs = q, k, v, torch.randn(heads), *turned
        assert differ(lambda *i, f=attend: f(cpu, *i), lambda *i, f=attend: f(reference, *i), *inputs) < NEAR
        mine, exact = (lambda *i, o=of, a=about: o.attention(*i, *a, softcap=softcap) for of in (cpu, reference))
        assert differ(mine, exact, q, k, v) < NEAR


def test_attention_on_keys_in_half_precision():
    q, k, v = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 9, 32).half(), torch.randn(1, 2, 9, 32).half()
    mine, exact = (lambda *i, o=of: o.attention(*i, None, None, 0.2) for of in (cpu, reference))
    assert differ(mine, exact, q, k, v) < 2e-3


@pytest.mark.parametrize("batch,heads,queries,keys", [(1, 4, 5, 9), (2, 3, 1, 1), (2, 1, 6, 6)])
def test_attention_on_the_latent(batch, heads, queries, keys):
    inputs = (
        torch.randn(batch, heads, queries, 32),
        torch.randn(batch, heads, queries, 8),
        torch.randn(batch, keys, 32),
        torch.randn(batch, keys, 8),
    )
    for ranges in (None, intervals(batch, queries, keys)):
        mine, exact = (lambda *i, o=of, r=ranges: o.mla_attention(*i, r, None, 0.2) for of in (cpu, reference))
        assert differ(mine, exact, *inputs) < NEAR


def twin_norm(x, weight, eps, plus_one=False):
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return plain * (1 + weight if plus_one else weight)


@pytest.mark.parametrize("plus_one", [False, True])
def test_norm(plus_one):
    for shape in ((1, 33), (2, 3, 64)):
        inputs = torch.randn(shape), torch.randn(shape[-1])
        mine, exact = (lambda *i, f=of: f(*i, 1e-5, plus_one) for of in (cpu.rms_norm, twin_norm))
        assert differ(mine, exact, *inputs) < NEAR


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved):
    for tables, width in ((1, 24), (2, 16)):
        cos, sin = torch.randn(tables, 5, width), torch.randn(tables, 5, width)
        mine, exact = (lambda x, o=of, c=cos, s=sin: o.rope(x, c, s, interleaved) for of in (cpu, reference))
        assert differ(mine, exact, torch.randn(2, 3, 5, 24)) < NEAR


@pytest.mark.parametrize("gate", GATES[:-1], ids=lambda gate: gate[0])
def test_gated(gate):
    mine, exact = (lambda g, u, f=of: f(g, u, *gate) for of in (cpu.gated, reference.activate))
    assert differ(mine, exact, torch.randn(3, 5, 33), torch.randn(3, 5, 33)) < NEAR


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("groups", ["none", "max", "top2"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_topk"])
def test_route(scoring, groups, renorm):
    """Of the logits, through the weights of the chosen; a bias that counts for the choice alone changes nothing
    else.
    """
    for bias in (None, torch.randn(16)):
        about = 3, scoring, bias, 4, 2, groups, renorm, 1.5
        mine, exact = (lambda x, o=of, a=about: o.route(x, *a)[1] for of in (cpu, reference))
        assert differ(mine, exact, torch.randn(7, 16)) < NEAR


def test_what_has_no_gradient_says_so():
    q, pool = torch.randn(1, 4, 2, 32, requires_grad=True), torch.randn(3, 2, 64, 32)
    on_pages = {"sequences": torch.tensor([[0, 2, 5]]), "pages": torch.tensor([[1]], dtype=torch.int32)}
    with pytest.raises(NoGradient, match="pages.*use_cache=False"):
        cpu.attention(q, pool, pool, None, None, 0.2, **on_pages)
    blocks = reference.to_q8_0(torch.randn(1, 2, 5, 32))
    with pytest.raises(NoGradient, match="eight bits.*use_cache=False"):
        cpu.attention(q, blocks, blocks, None, None, 0.2)
    tables = torch.randn(1, 2, 32, requires_grad=True)
    with pytest.raises(NoGradient, match="argument 1, of shape .*detach"):
        cpu.rope(torch.randn(1, 4, 2, 32), tables, tables.detach())
    with torch.no_grad():
        assert cpu.attention(q, blocks, blocks, None, None, 0.2).isfinite().all()


def test_a_second_derivative_is_right_and_derivatives_that_the_kernels_do_not_have_are_errors():
    matrix = random_matrix("F32", 32, 32)
    packed, plain = cpu.pack(matrix), matrix.dequantize()
    x = torch.randn(3, 32, requires_grad=True)
    second = []
    for product in (lambda: cpu.linear(x, packed), lambda: torch.nn.functional.linear(x, plain)):
        (first,) = torch.autograd.grad(product().square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-5, atol=1e-4)
    for forward_mode in (torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(NoGradient, match="be differentiated backwards only"):
            forward_mode(lambda x: cpu.linear(x, packed))(x.detach())


def test_weights_that_change_before_backward_are_an_error():
    packed = cpu.pack(random_matrix("F32", 32, 32))
    out = cpu.linear(torch.randn(3, 32, requires_grad=True), packed)
    packed.data.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autograd_saves_no_dequantised_weights():
    """Of experts the input, the choices and their weights; packed matrices as they are."""
    packed = [
        cpu.pack_experts(stack("Q8_0", 4, 128, 64)[0] if i < 2 else stack("Q8_0", 4, 64, 128)[0]) for i in range(3)
    ]
    x, saved = torch.randn(6, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cpu.experts(x, IDS, torch.rand(6, 2), *packed)
    own = {p.data.data_ptr() for p in packed}
    assert own < {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == x.nbytes + IDS.nbytes + 6 * 2 * 4


def test_of_every_node_its_share_of_the_rows():
    program = """
import torch
from tests.kernels.test_gradients import IDS, cpu, differ, reference, stack
assert cpu.ops.nodes() == 2
torch.manual_seed(0)
(gate, exact_gate), (up, exact_up) = stack("Q8_0", 4, 96, 64), stack("Q8_0", 4, 96, 64)
down, exact_down = stack("Q8_0", 4, 64, 96)
packed = [cpu.pack_experts(part) for part in (gate, up, down)]
mine = lambda x, w: cpu.experts(x, IDS, w, *packed)
exact = lambda x, w: reference.experts(x, IDS, w, exact_gate, exact_up, exact_down)
print(differ(mine, exact, torch.randn(6, 64), torch.rand(6, 2)))
"""
    environment = os.environ | {"KTX_NUMA": "fake:2", "KTX_THREADS": "2", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < NEAR
