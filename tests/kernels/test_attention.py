"""Attention and the small operators against their twins in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ktx.cache.kv import store_kv
from ktx.kernels import cpu, reference
from ktx.kernels.check import relative_error


def bound(dtype):
    """Keys and values in half precision are multiplied in bf16 where the CPU can."""
    return 5e-3 if dtype != torch.float32 and cpu.ops.isa() in ("avx512bf16", "amx") else 4e-6


def kept(x, dtype):
    """x as a cache keeps it."""
    return reference.to_q8_0(x) if dtype == torch.uint8 else x.to(dtype)


CASES = [  # batch, heads, kv heads, queries, keys, key columns, value columns, type of keys and values
    (1, 4, 2, 1, 1, 64, 64, torch.float32),
    (2, 8, 2, 5, 5, 40, 72, torch.float32),
    (1, 16, 16, 63, 100, 192, 128, torch.float16),
    (1, 32, 4, 1, 4097, 128, 128, torch.float16),
    (1, 12, 4, 17, 130, 80, 80, torch.bfloat16),
    (1, 128, 1, 2, 70, 64, 64, torch.float32),
    (1, 128, 1, 2, 71, 64, 64, torch.float16),
    (2, 24, 2, 3, 333, 64, 96, torch.bfloat16),
    (1, 9, 1, 1, 65, 34, 32, torch.float16),
    (2, 12, 3, 4, 131, 96, 64, torch.uint8),
    (1, 32, 2, 1, 700, 128, 128, torch.uint8),
]


def made(case):
    b, h, g, s, t, dk, dv, dtype = case
    return torch.randn(b, h, s, dk), kept(torch.randn(b, g, t, dk), dtype), kept(torch.randn(b, g, t, dv), dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_causal(case):
    q, k, v = made(case)
    exact = reference.attention(q.double(), k, v, None, None, 0.1)
    assert relative_error(cpu.attention(q, k, v, None, None, 0.1), exact) < bound(k.dtype)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_ranges_and_masks(case):
    q, k, v = made(case)
    (b, h, s), t = q.shape[:3], k.shape[2]
    start = torch.randint(0, t, (b, s))
    ranges = torch.stack([start, (start + torch.randint(1, t + 1, (b, s))).clamp(max=t)], -1).int()
    exact = reference.attention(q.double(), k, v, ranges, None, 0.1)
    assert relative_error(cpu.attention(q, k, v, ranges, None, 0.1), exact) < bound(k.dtype)
    seen = torch.rand(b, 1, s, t) > 0.3
    seen[..., 0] = True
    sinks = torch.randn(h)
    got = cpu.attention(q, k, v, None, seen, 0.1, sinks, 30.0)
    assert relative_error(got, reference.attention(q.double(), k, v, None, seen, 0.1, sinks, 30.0)) < bound(k.dtype)
    added = torch.where(seen, torch.randn(b, 1, s, t), torch.finfo(torch.float32).min)
    exact = reference.attention(q.double(), k, v, None, added, 0.1)
    assert relative_error(cpu.attention(q, k, v, None, added, 0.1), exact) < bound(k.dtype)


def test_error_is_no_worse_than_twice_torchs():
    q, k, v = (torch.randn(1, 8, 200, 64) for _ in range(3))
    exact = reference.attention(q.double(), k, v, None, None, 0.125)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125).transpose(1, 2)
    assert relative_error(cpu.attention(q, k, v, None, None, 0.125), exact) <= 2 * relative_error(torchs, exact)


def test_nothing_visible_gives_zeros():
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    ranges = torch.tensor([[[0, 0], [4, 2], [0, 5]]], dtype=torch.int32)
    out = cpu.attention(q, k, v, ranges, None, 1.0)
    assert not out[0, :2].any() and out[0, 2].isfinite().all() and out[0, 2].any()


def test_chunks_are_whole_and_batch_is_single():
    q, k, v = torch.randn(3, 4, 90, 32), torch.randn(3, 2, 90, 32), torch.randn(3, 2, 90, 32)
    whole = cpu.attention(q, k, v, None, None, 0.2)
    for end in (1, 37, 90):
        part = cpu.attention(q[:, :, max(0, end - 9) : end], k[:, :, :end], v[:, :, :end], None, None, 0.2)
        torch.testing.assert_close(part, whole[:, max(0, end - 9) : end], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cpu.attention(q[1:2], k[1:2], v[1:2], None, None, 0.2), whole[1:2], rtol=1e-5, atol=1e-6)


def test_views_of_a_larger_cache():
    keys, values = torch.randn(2, 3, 256, 40).half(), torch.randn(2, 3, 256, 24).half()
    q = torch.randn(2, 6, 1, 40)
    got = cpu.attention(q, keys[:, :, :77], values[:, :, :77], None, None, 0.3)
    torch.testing.assert_close(
        got, cpu.attention(q, keys[:, :, :77].clone(), values[:, :, :77].clone(), None, None, 0.3)
    )


@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 1, 3000, 512, 64),
        (2, 5, 7, 40, 96, 32),
        (1, 128, 1, 65, 64, 16),
        (2, 20, 1, 203, 64, 32),
        (1, 8, 1, 5, 32, 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_mla(shape, dtype):
    b, h, s, t, rank, rope = shape
    q, qr = torch.randn(b, h, s, rank), torch.randn(b, h, s, rope)
    if dtype == torch.uint8 and (rank | rope) % 32:
        pytest.skip("columns are no whole blocks")
    c, p = kept(torch.randn(b, t, rank), dtype), kept(torch.randn(b, t, rope), dtype)
    exact = reference.mla_attention(q.double(), qr.double(), c, p, None, None, 0.05)
    assert relative_error(cpu.mla_attention(q, qr, c, p, None, None, 0.05), exact) < bound(dtype)
    ranges = torch.tensor([[3 % t, t], [0, t - 2]], dtype=torch.int32)[:b, None].expand(b, s, 2).contiguous()
    exact = reference.mla_attention(q.double(), qr.double(), c, p, ranges, None, 0.05)
    assert relative_error(cpu.mla_attention(q, qr, c, p, ranges, None, 0.05), exact) < bound(dtype)


def test_q8_0_is_stored_as_ggml_stores_it():
    x = torch.randn(2, 3, 50, 96)
    x[0, 0, 0, :32], x[0, 0, 1, 40], x[0, 0, 2, 70] = 0, torch.nan, torch.inf
    buffer = torch.zeros(2, 3, 60, 102, dtype=torch.uint8)
    cpu.ops.store_q8_0(x.transpose(1, 2).contiguous().transpose(1, 2), buffer[:, :, 5:55])
    assert not buffer[:, :, :5].any() and not buffer[:, :, 55:].any()
    sound = x.clone()
    sound[0, 0, 1, 32:64] = sound[0, 0, 2, 64:] = 0
    got, twin = buffer[:, :, 5:55].clone(), reference.to_q8_0(sound)
    values = cpu.ops.load_q8_0(got)
    assert (
        values[0, 0, 1, 32:64].isnan().all() and values[0, 0, 2, 64:].isnan().all()
    )  # not finite: the block, and nothing else
    got[0, 0, 1, 34:68] = got[0, 0, 2, 68:] = 0
    assert (got.view(torch.int8).int() - twin.view(torch.int8).int()).abs().max() <= 1  # ties of rounding
    assert relative_error(cpu.ops.load_q8_0(got).float(), sound) < 6e-3
    torch.testing.assert_close(cpu.ops.load_q8_0(twin).float(), reference.from_q8_0(twin), rtol=1e-3, atol=1e-6)
    with pytest.raises(RuntimeError, match="no whole blocks"):
        cpu.ops.load_q8_0(torch.zeros(1, 1, 1, 33, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="does not fit"):
        cpu.ops.store_q8_0(x, buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_columns_from_two_sources_are_one_row(dtype):
    q, k, v = torch.randn(2, 12, 5, 48), torch.randn(2, 3, 90, 48).to(dtype), torch.randn(2, 3, 90, 32).to(dtype)
    shared = torch.randn(2, 1, 90, 16).to(dtype)
    apart = cpu.attention(q[..., :32], k[..., :32], v, None, None, 0.2, q_rope=q[..., 32:], k_rope=k[..., 32:])
    torch.testing.assert_close(apart, cpu.attention(q, k, v, None, None, 0.2))
    args = (q[..., :32], k[..., :32], v, None, None, 0.2)
    got = cpu.attention(*args, q_rope=q[..., 32:], k_rope=shared)
    whole = torch.cat([k[..., :32], shared.expand(-1, 3, -1, -1)], -1)
    torch.testing.assert_close(got, cpu.attention(q, whole, v, None, None, 0.2))
    with pytest.raises(RuntimeError, match="come together"):
        cpu.attention(*args, q_rope=q[..., 32:])
    with pytest.raises(RuntimeError, match="does not fit"):
        cpu.attention(*args, q_rope=q[..., 32:], k_rope=shared[:, :, :80])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_begin_where_keys_do(dtype):
    """Only values with the keys' own strides are their first columns."""
    room, q = torch.randn(1, 1, 40, 64).to(dtype), torch.randn(1, 16, 1, 64)
    for v in (room[:, :, :20, :32], room.as_strided((1, 1, 20, 32), (2560, 2560, 32, 1))):
        got = cpu.attention(q, room[:, :, :20], v, None, None, 0.125)
        torch.testing.assert_close(got, cpu.attention(q, room[:, :, :20].clone(), v.clone(), None, None, 0.125))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_no_query_sees_does_not_matter(dtype):
    """The end of a static cache may hold anything."""
    q, k, v = torch.randn(1, 16, 2, 64), torch.randn(1, 1, 100, 64).to(dtype), torch.randn(1, 1, 100, 64).to(dtype)
    ranges = torch.tensor([[[0, 37], [0, 38]]], dtype=torch.int32)
    clean = cpu.attention(q, k[:, :, :38], v[:, :, :38], None, None, 0.125)
    k[:, :, 38:], v[:, :, 38:] = torch.nan, torch.inf
    got = cpu.attention(q, k, v, ranges, None, 0.125)
    torch.testing.assert_close(got, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(dtype, plus_one):
    x, w = torch.randn(3, 5, 200).to(dtype), torch.randn(200)
    torch.testing.assert_close(
        cpu.rms_norm(x, w, 1e-6, plus_one),
        reference.rms_norm(x, w, 1e-6, plus_one),
        rtol=1e-2 if dtype != torch.float32 else 1e-5,
        atol=1e-3,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [64, 32])
def test_rope(interleaved, turned):
    x = torch.randn(2, 7, 4, 64).transpose(1, 2)
    cos, sin = torch.randn(2, 7, turned // 2), torch.randn(2, 7, turned // 2)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    torch.testing.assert_close(cpu.rope(x, cos, sin, interleaved), reference.rope(x, cos, sin, interleaved))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize("groups", [("none", 1, 1), ("max", 8, 3), ("top2", 8, 4)])
@pytest.mark.parametrize("renorm", [False, True])
def test_route(scoring, groups, renorm):
    logits, bias = torch.randn(50, 64), torch.randn(64) * 0.1
    ids, weights = cpu.route(logits, 6, scoring, bias, groups[1], groups[2], groups[0], renorm, 2.5)
    ids_, weights_ = reference.route(logits, 6, scoring, bias, groups[1], groups[2], groups[0], renorm, 2.5)
    assert torch.equal(ids, ids_)
    torch.testing.assert_close(weights, weights_, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_gated(act):
    gate, up = torch.randn(3, 37), torch.randn(3, 37)
    torch.testing.assert_close(cpu.gated(gate, up, act), reference.activate(gate, up, act), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cpu.attention(
            torch.randn(1, 3, 1, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), None, None, 1.0
        ),
        lambda: cpu.attention(
            torch.randn(1, 2, 5, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), None, None, 1.0
        ),
        lambda: cpu.attention(
            torch.randn(1, 2, 1, 8), torch.randn(1, 2, 4, 9), torch.randn(1, 2, 4, 8), None, None, 1.0
        ),
        lambda: cpu.rms_norm(torch.randn(2, 8), torch.randn(9), 1e-6),
        lambda: cpu.route(torch.randn(2, 8), 9, "softmax"),
        lambda: cpu.route(torch.randn(2, 8), 2, "wishful"),
        lambda: cpu.gated(torch.randn(2, 8), torch.randn(2, 9), "silu"),
    ],
)
def test_bad_arguments_are_exceptions(call):
    with pytest.raises(RuntimeError):
        call()


RAGGED = [(1, 130), (5, 5), (70, 200), (1, 1), (1, 2500), (33, 64)]  # queries and keys of sequences beside each other
PAGE = 64


def on_pages(keys, values):
    """Keys and values [1, heads, positions, columns] of several sequences, scattered over two pools -> (pool, pool,
    pages).
    """
    need = [-(-rows.shape[2] // PAGE) for rows in keys]
    order = torch.randperm(sum(need) + 3).int()
    pages = torch.zeros(len(keys), max(need), dtype=torch.int32)
    pools = [torch.empty(len(order), *t[0].shape[1:2], PAGE, t[0].shape[3], dtype=t[0].dtype) for t in (keys, values)]
    for own, count, parts in zip(pages, need, order[: sum(need)].split(need), strict=True):
        own[:count] = parts
    for pool, stored in zip(pools, (keys, values), strict=True):
        for own, rows in zip(pages.tolist(), stored, strict=True):
            for page, part in zip(own, rows[0].split(PAGE, 1), strict=False):
                pool[page, :, : part.shape[1]] = part
    return *pools, pages


def sequences_of(ragged):
    first = torch.tensor([0, *(queries for queries, _ in ragged)]).cumsum(0)[:-1]
    return torch.stack([first, *torch.tensor(ragged).T], 1)


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("case", [(8, 2, 64, 64), (16, 1, 128, 96), (6, 6, 40, 72), (3, 1, 64, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_a_sequence_on_pages_beside_others_is_exactly_as_it_is_alone(case, dtype, window):
    heads, kv_heads, dk, dv = case
    if dtype == torch.uint8 and dk % 32 + dv % 32:
        dk, dv = 64, 32
    q = torch.randn(1, heads, sum(queries for queries, _ in RAGGED), dk)
    keys, values = ([kept(torch.randn(1, kv_heads, count, d), dtype) for _, count in RAGGED] for d in (dk, dv))
    k, v, pages = on_pages(keys, values)
    ends = torch.cat([torch.arange(count - queries, count) + 1 for queries, count in RAGGED])
    ranges = torch.stack([(ends - window).clamp(min=0) if window else torch.zeros_like(ends), ends], -1).int()[None]
    sequences = sequences_of(RAGGED)
    found = cpu.attention(q, k, v, ranges, None, 0.1, sequences=sequences, pages=pages)
    exact = reference.attention(q.double(), k, v, ranges, None, 0.1, sequences=sequences, pages=pages)
    assert relative_error(found, exact) < bound(dtype)
    for (first, queries, _), own_k, own_v in zip(sequences.tolist(), keys, values, strict=True):
        these = slice(first, first + queries)
        alone = cpu.attention(q[:, :, these], own_k, own_v, ranges[:, these].contiguous(), None, 0.1)
        assert torch.equal(found[:, these], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_latents_on_pages(dtype):
    heads, rank, turned = 16, 128, 64
    total = sum(queries for queries, _ in RAGGED)
    q, qr = torch.randn(1, heads, total, rank), torch.randn(1, heads, total, turned)
    latents, ropes = ([kept(torch.randn(1, 1, count, d), dtype) for _, count in RAGGED] for d in (rank, turned))
    pool, kpe, pages = on_pages(latents, ropes)
    sequences = sequences_of(RAGGED)
    found = cpu.mla_attention(q, qr, pool[:, 0], kpe[:, 0], None, None, 0.05, sequences=sequences, pages=pages)
    exact = reference.mla_attention(q.double(), qr.double(), pool[:, 0], kpe[:, 0], None, None, 0.05, sequences, pages)
    assert relative_error(found, exact) < bound(dtype)
    for (first, queries, _), own, rope in zip(sequences.tolist(), latents, ropes, strict=True):
        these = slice(first, first + queries)
        alone = cpu.mla_attention(q[:, :, these], qr[:, :, these], own[:, 0], rope[:, 0], None, None, 0.05)
        assert torch.equal(found[:, these], alone)


def test_what_does_not_fit_pages_is_refused():
    q, pool = torch.randn(1, 2, 3, 64), torch.randn(4, 2, PAGE, 64)
    good, pages = torch.tensor([[0, 3, 70]]), torch.tensor([[0, 3]], dtype=torch.int32)
    cpu.attention(q, pool, pool, None, None, 1.0, sequences=good, pages=pages)
    for bad in ([[0, 4, 70]], [[0, 3, 129]], [[1, 3, 70]], [[0, 3, 2]], [[0, 0, 2]], [[-1, 3, 70]]):
        with pytest.raises(RuntimeError, match="sequence 0"):
            cpu.attention(q, pool, pool, None, None, 1.0, sequences=torch.tensor(bad), pages=pages)
    with pytest.raises(RuntimeError, match="page 4"):
        cpu.attention(q, pool, pool, None, None, 1.0, sequences=good, pages=torch.tensor([[0, 4]], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="64 positions"):
        cpu.attention(q, pool[:, :, :32], pool[:, :, :32], None, None, 1.0, sequences=good, pages=pages)
    for slots in ([0, 1], [0, 1, 256], [-1, 0, 1]):
        with pytest.raises(RuntimeError, match="slot"):
            cpu.ops.store_slots(q, pool, torch.tensor(slots))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_rows_go_to_their_slots(dtype):
    rows, pool = torch.randn(1, 2, 150, 64), kept(torch.zeros(5, 2, PAGE, 64), dtype)
    slots = torch.cat([torch.arange(70, 170), torch.arange(10, 40), torch.arange(300, 320)])
    want, stored = pool.clone(), torch.empty(1, 2, 150, pool.shape[3], dtype=dtype)
    store_kv(rows, stored)
    for i, slot in enumerate(slots.tolist()):
        want[slot // PAGE, :, slot % PAGE] = stored[0, :, i]
    cpu.ops.store_slots(rows, pool, slots)
    assert torch.equal(pool, want)
