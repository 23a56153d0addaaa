"""The GPU's attention kernels against their twins: on a CUDA device, elsewhere in Triton's interpreter
(tests/conftest.py switches it on).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

import itertools

from ktx.errors import UsageError
from ktx.kernels import reference
from ktx.kernels.check import relative_error
from ktx.kernels.gpu.attention_backend import kernels_for
from ktx.kernels.gpu.mla_decode import as_pages, mla_attention
from ktx.kernels.gpu.paged_attention import attention
from ktx.kernels.gpu.rope_and_cache import rope_and_cache_kv, rope_and_cache_mla
from ktx.kernels.gpu.split_kv import AttentionSchedule, AttentionShape, Tile, num_programs_per_range, tiles_for

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
E4M3 = torch.float8_e4m3fn
KV_SCALE = 0.02  # of e4m3 pools: about what makes normal numbers fill its range
SMALL = (Tile(16, 16, 4, 2, min_blocks=1), Tile(32, 16, 4, 2, min_blocks=1))  # many tiles and parts of few keys
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3, E4M3: 8e-3, torch.float32: 1e-5}
RAGGED = [(1, 45), (5, 5), (12, 40), (1, 1), (1, 90)]  # new tokens and keys of sequences beside each other


class Pools:
    """Keys of several sequences on pages in random order; what no sequence owns is NaN."""

    def __init__(self, lengths, page=64, spare=3):
        need = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(need) + spare)
        self.page, self.lengths, self.count = page, lengths, len(order)
        self.pages = torch.full((len(lengths), max(need) + 1), 10**6, dtype=torch.int32)
        for own, parts in zip(self.pages, order[: sum(need)].split(need), strict=True):
            own[: len(parts)] = parts

    def filled(self, rows, dtype):
        """rows: for each sequence [heads, positions, columns] -> a pool [pages, heads, page, columns] of a type."""
        pool = torch.full((self.count, rows[0].shape[0], self.page, rows[0].shape[2]), torch.nan)
        for own, each in zip(self.pages.tolist(), rows, strict=True):
            for page, part in zip(own, each.split(self.page, 1), strict=False):
                pool[page, :, : part.shape[1]] = part
        return (reference.to_e4m3(pool, KV_SCALE) if dtype == E4M3 else pool.to(dtype)).to(DEVICE)


def made(ragged, kv_heads, columns, page=64):
    """Pools, and numbers [heads, keys, columns] of each sequence for each of `columns`."""
    lengths = [keys for _, keys in ragged]
    rows = [[torch.randn(kv_heads, length, wide) for length in lengths] for wide in columns]
    return Pools(lengths, page), rows


def sequences_of(ragged):
    first = torch.tensor([0, *(count for count, _ in ragged)]).cumsum(0)[:-1]
    return torch.stack([first, *torch.tensor(ragged).T], 1)


def ranges_of(ragged, window):
    ends = torch.cat([torch.arange(keys - count, keys) + 1 for count, keys in ragged])
    begins = (ends - window).clamp(min=0) if window else torch.zeros_like(ends)
    return torch.stack([begins, ends], -1).int()[None]


def planned(ragged, shape, pools, window=0, tiles=SMALL, slots=2):
    work = AttentionSchedule([count for count, _ in ragged], shape, DEVICE, num_sms=slots, tiles=tiles)
    return work.plan(sequences_of(ragged).to(DEVICE), pools.pages.to(DEVICE), window)


def values(pool):
    """What a pool holds, in f64 on the CPU; pages nobody owns as zeros."""
    return (pool.double() * (KV_SCALE if pool.dtype == E4M3 else 1)).nan_to_num(0).cpu()


def true_attention(q, k, v, ragged, pools, scale, window=0, sinks=None, softcap=0.0, q_rope=None, k_rope=None):
    pages = pools.pages.where(pools.pages < pools.count, 0)
    ranges, rope = ranges_of(ragged, window), None if k_rope is None else values(k_rope)
    turned = None if q_rope is None else q_rope.double().cpu()
    few = q.double().cpu(), values(k), values(v), ranges, None, scale, sinks, softcap, turned, rope
    return reference.attention(*few, sequences_of(ragged), pages)


def scales(dtype):
    return {"k_scale": KV_SCALE, "v_scale": KV_SCALE} if dtype == E4M3 else {}


CASES = [  # heads, kv heads, key columns, value columns, page, type of q, of keys and values, window, sinks, softcap
    (8, 2, 64, 64, 64, torch.bfloat16, torch.bfloat16, 0, False, 0.0),
    (3, 3, 40, 24, 64, torch.float16, torch.float16, 0, False, 0.0),
    (9, 1, 64, 80, 16, torch.float16, torch.float16, 0, True, 0.0),
    (12, 2, 96, 64, 48, torch.bfloat16, torch.bfloat16, 20, False, 0.0),
    (6, 2, 32, 32, 7, torch.float16, torch.float16, 20, True, 5.0),
    (40, 1, 32, 16, 64, torch.bfloat16, torch.bfloat16, 0, False, 3.0),
    (8, 2, 64, 64, 64, torch.bfloat16, E4M3, 0, False, 0.0),
    (8, 2, 64, 32, 32, torch.float16, E4M3, 33, True, 0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_and_decodes_beside_each_other(case):
    heads, kv_heads, dk, dv, page, dtype, stored, window, with_sinks, softcap = case
    pools, (keys, vals) = made(RAGGED, kv_heads, (dk, dv), page)
    q = torch.randn(1, heads, sum(count for count, _ in RAGGED), dk).to(DEVICE, dtype)
    k, v = pools.filled(keys, stored), pools.filled(vals, stored)
    sinks = torch.randn(heads) if with_sinks else None
    plan = planned(RAGGED, AttentionShape(heads, kv_heads, dk, dv), pools, window)
    on_device = None if sinks is None else sinks.to(DEVICE)
    got = attention(q, k, v, plan, 0.2, on_device, softcap, **scales(stored))
    exact = true_attention(q, k, v, RAGGED, pools, 0.2, window, sinks, softcap)
    assert relative_error(got.cpu(), exact) < BOUND[dtype]


MLA_CASES = [  # heads, rank, rotated columns, page, type of q, of the latent
    (16, 64, 16, 64, torch.bfloat16, torch.bfloat16),
    (24, 64, 32, 13, torch.float16, torch.float16),
    (48, 32, 16, 64, torch.bfloat16, torch.bfloat16),
    (16, 64, 16, 64, torch.bfloat16, E4M3),
]


def latents(case, ragged=RAGGED):
    heads, rank, turned, page, dtype, stored = case
    pools, (c, p) = made(ragged, 1, (rank, turned), page)
    tokens = sum(count for count, _ in ragged)
    q, qr = (
        torch.randn(1, heads, tokens, rank).to(DEVICE, dtype),
        torch.randn(1, heads, tokens, turned).to(DEVICE, dtype),
    )
    return pools, q, qr, pools.filled(c, stored), pools.filled(p, stored)


@pytest.mark.parametrize("case", MLA_CASES, ids=str)
def test_mla_chunks_and_decodes_beside_each_other(case):
    heads, rank, _, _, dtype, stored = case
    pools, q, qr, ckv, kpe = latents(case)
    plan = planned(RAGGED, AttentionShape(heads, 1, rank, rank, latent=True), pools)
    got = mla_attention(q, qr, ckv[:, 0], kpe[:, 0], plan, 0.1, KV_SCALE if stored == E4M3 else 1.0)
    exact = true_attention(q, ckv, ckv, RAGGED, pools, 0.1, q_rope=qr, k_rope=kpe)
    assert relative_error(got.cpu(), exact) < BOUND[dtype]


def test_queries_in_f32_are_multiplied_in_f32():
    """With the tiles that they need, on keys and values apart and on a latent."""
    ragged = [(3, 40), (1, 70)]
    pools, (keys, vals) = made(ragged, 2, (24, 40))
    q = torch.randn(1, 6, 4, 24).to(DEVICE)
    k, v = pools.filled(keys, torch.float32), pools.filled(vals, torch.float32)
    plan = planned(ragged, AttentionShape(6, 2, 24, 40), pools, 30, tiles_for(24, False, f32=True))
    exact = true_attention(q, k, v, ragged, pools, 0.2, 30)
    assert relative_error(attention(q, k, v, plan, 0.2).cpu(), exact) < BOUND[torch.float32]
    pools, q, qr, ckv, kpe = latents((6, 32, 16, 64, torch.float32, torch.float32), ragged)
    plan = planned(ragged, AttentionShape(6, 1, 32, 32, latent=True), pools, tiles=tiles_for(32, True, f32=True))
    exact = true_attention(q, ckv, ckv, ragged, pools, 0.1, q_rope=qr, k_rope=kpe)
    assert relative_error(mla_attention(q, qr, ckv[:, 0], kpe[:, 0], plan, 0.1).cpu(), exact) < BOUND[torch.float32]


@pytest.mark.parametrize("stored", [torch.bfloat16, E4M3], ids=str)
def test_scrambled_pages_change_no_bit(stored):
    ragged = [(1, 90), (3, 40)]
    pools, q, qr, ckv, kpe = latents((5, 32, 16, 16, torch.bfloat16, stored), ragged)
    shape = AttentionShape(5, 1, 32, 32, latent=True)
    found = mla_attention(q, qr, ckv[:, 0], kpe[:, 0], planned(ragged, shape, pools), 0.1)
    order = torch.randperm(pools.count)
    where = torch.empty_like(order)
    where[order] = torch.arange(pools.count)
    pools.pages = torch.where(
        pools.pages < pools.count, where[pools.pages.clamp(max=pools.count - 1)].int(), pools.pages
    )
    moved = [pool.view(torch.uint8)[order.to(DEVICE)].view(stored)[:, 0] for pool in (ckv, kpe)]
    assert torch.equal(mla_attention(q, qr, *moved, planned(ragged, shape, pools), 0.1), found)


@pytest.fixture
def products_in_order(monkeypatch):
    """A row's product does not depend on its place in a tile, as on a GPU: NumPy's, which the interpreter takes, may
    (OpenBLAS's AVX2 kernel adds up a block's last rows otherwise than its first)."""
    if not GPU:
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a.astype(dtype)[:, :, None] * b[None]).sum(1))


@pytest.mark.parametrize("window", [0, 30])
def test_a_prompt_in_chunks_is_bit_for_bit_the_prompt_at_once(products_in_order, window):
    """One program a tile, so that nothing is merged: the bits then depend on a row's own keys alone."""
    heads, length, tiles = 4, 50, (Tile(16, 16, 4, 2, min_blocks=1000),)
    pools, (keys, vals) = made([(length, length)], 2, (32, 32), 16)
    k, v = (pools.filled(rows, torch.bfloat16) for rows in (keys, vals))
    q = torch.randn(1, heads, length, 32).to(DEVICE, torch.bfloat16)
    shape = AttentionShape(heads, 2, 32, 32)
    whole = attention(q, k, v, planned([(length, length)], shape, pools, window, tiles), 0.2)
    for begin, end in ((0, 1), (1, 21), (21, 50)):
        part = attention(q[:, :, begin:end], k, v, planned([(end - begin, end)], shape, pools, window, tiles), 0.2)
        assert torch.equal(part, whole[:, begin:end])


def test_a_context_in_parts_is_the_context_in_one_and_the_same_bits_each_time():
    ragged = [(1, 300), (1, 3), (2, 181)]
    pools, q, qr, ckv, kpe = latents((4, 32, 16, 64, torch.float16, torch.float16), ragged)
    shape = AttentionShape(4, 1, 32, 32, latent=True)
    one, many = (
        planned(ragged, shape, pools, tiles=(Tile(32, 16, 4, 2, min_blocks=least),), slots=23) for least in (1000, 1)
    )
    assert (many.ranges[0].programs[:, 0] < many.ranges[0].programs[:, 1]).sum() == 16
    assert (
        many.ranges[0].merges[:, 0] >= 0
    ).sum() == 2  # the third sequence's two tokens are one tile, the second's is not shared
    alone, merged = (mla_attention(q, qr, ckv[:, 0], kpe[:, 0], plan, 0.1) for plan in (one, many))
    torch.testing.assert_close(merged, alone, rtol=2e-3, atol=2e-3)
    assert torch.equal(mla_attention(q, qr, ckv[:, 0], kpe[:, 0], many, 0.1), merged)


def test_extreme_scores_are_merged_without_overflow():
    """A maximum of each part: scores of several thousand, in parts that differ by as much."""
    ragged = [(1, 160)]
    pools, (keys, vals) = made(ragged, 1, (32, 32))
    keys[0][:, :80] *= 100
    q = torch.full((1, 4, 1, 32), 10.0).to(DEVICE, torch.bfloat16)
    k, v = pools.filled(keys, torch.bfloat16), pools.filled(vals, torch.bfloat16)
    got = attention(q, k, v, planned(ragged, AttentionShape(4, 1, 32, 32), pools, slots=9), 1.0)
    assert relative_error(got.cpu(), true_attention(q, k, v, ragged, pools, 1.0)) < BOUND[torch.bfloat16]


def test_expanded_mla_with_shared_rotated_columns():
    """MLA's other form: keys and values of each head in a dense matrix, rotated columns once for all heads."""
    heads, nope, turned, wide, length = 3, 32, 16, 32, 100
    both, padded = torch.randn(length, heads * (nope + wide)), 128
    matrix = F.pad(both, (0, 0, 0, padded - length), value=torch.nan).to(DEVICE, torch.bfloat16)
    pool = as_pages(matrix, heads, 64)
    k, v = pool[..., :nope], pool[..., nope:]
    pools = Pools([length])
    pools.pages, pools.count = torch.arange(2, dtype=torch.int32)[None], 2
    kpe = as_pages(F.pad(torch.randn(length, turned), (0, 0, 0, padded - length)).to(DEVICE, torch.bfloat16), 1, 64)
    ragged = [(21, length)]
    q, qr = (torch.randn(1, heads, 21, d).to(DEVICE, torch.bfloat16) for d in (nope, turned))
    plan = planned(ragged, AttentionShape(heads, heads, nope, wide), pools)
    got = attention(q, k, v, plan, 0.2, q_rope=qr, k_rope=kpe)
    exact = true_attention(q, k, v, ragged, pools, 0.2, q_rope=qr, k_rope=kpe.expand(-1, heads, -1, -1))
    assert relative_error(got.cpu(), exact) < BOUND[torch.bfloat16]
    with pytest.raises(ValueError, match="pad the rows"):
        as_pages(matrix[:100], heads, 64)


def test_error_is_no_worse_than_twice_torchs():
    ragged, heads = [(40, 40)], 4
    pools, (keys, vals) = made(ragged, 2, (64, 64))
    q = torch.randn(1, heads, 40, 64).to(DEVICE, torch.float16)
    k, v = pools.filled(keys, torch.float16), pools.filled(vals, torch.float16)
    exact = true_attention(q, k, v, ragged, pools, 0.125)
    got = attention(q, k, v, planned(ragged, AttentionShape(heads, 2, 64, 64), pools), 0.125)
    dense = (x[0].to(DEVICE, torch.float16).repeat_interleave(2, 0)[None] for x in (keys, vals))
    torchs = F.scaled_dot_product_attention(q, *dense, is_causal=True, scale=0.125).transpose(1, 2)
    assert relative_error(got.cpu(), exact) <= 2 * relative_error(torchs.cpu(), exact)


def test_a_place_that_is_kept_free_gives_zeros_and_a_plan_fits_other_lengths():
    """As a CUDA graph is replayed: the same work, plans for other lengths, and sequences that are not there."""
    pools, (keys, vals) = made([(1, 150), (1, 150)], 1, (32, 32))
    k, v = pools.filled(keys, torch.float16), pools.filled(vals, torch.float16)
    q = torch.randn(1, 4, 2, 32).to(DEVICE, torch.float16)
    work = AttentionSchedule([1, 1], AttentionShape(4, 1, 32, 32), DEVICE, num_sms=5, tiles=SMALL)
    for lengths in ((150, 0), (9, 150)):
        rows = [(1, length) for length in lengths]
        got = attention(q, k, v, work.plan(sequences_of(rows).to(DEVICE), pools.pages.to(DEVICE)), 0.2)
        for i, length in enumerate(lengths):
            if not length:
                assert not got[0, i].any()
                continue
            exact = (q[0, :, i].double().cpu() @ keys[i][0, :length].half().double().T * 0.2).softmax(-1)
            assert relative_error(got[0, i].cpu(), exact @ vals[i][0, :length].half().double()) < 2e-3


def test_views_and_a_given_result_are_used_as_they_are():
    ragged = [(3, 20)]
    pools, (keys, vals) = made(ragged, 2, (32, 32))
    k, v = (pools.filled(rows, torch.float16) for rows in (keys, vals))
    shape, room = AttentionShape(4, 2, 32, 32), torch.randn(3, 4, 80).to(DEVICE, torch.float16)
    q, out = room[..., 8:40].transpose(0, 1)[None], torch.zeros(1, 3, 4, 64).to(DEVICE, torch.float16)
    want = attention(q.contiguous(), k, v, planned(ragged, shape, pools), 0.2)
    got = attention(q, k, v, planned(ragged, shape, pools), 0.2, out=out[..., :32])
    assert torch.equal(got, want) and torch.equal(out[..., :32], want) and not out[..., 32:].any()


def test_units_are_shared_out_without_gaps():
    for counts, lengths, window in (
        ((1,) * 5, (900, 1, 64, 65, 300), 0),
        ((50, 1, 3), (77, 400, 3), 0),
        ((9, 1), (100, 90), 40),
    ):
        work = AttentionSchedule(counts, AttentionShape(8, 2, 32, 32), "cpu", num_sms=11, tiles=SMALL)
        rows = list(zip(counts, lengths, strict=True))
        for line in work.plan(sequences_of(rows), torch.zeros(len(rows), 20, dtype=torch.int32), window).ranges:
            starts, programs = line.starts.tolist(), line.programs.tolist()
            assert programs[0][0] == 0 and max(end for _, end, _, _ in programs) == starts[-1]
            assert all(a[1] == b[0] for a, b in itertools.pairwise(programs))
            shared = [set() for _ in starts[1:]]
            for number, (begin, end, first, last) in enumerate(programs):
                inside = [i for i in range(len(shared)) if begin < starts[i + 1] and end > starts[i]]
                assert list(range(first, last + 1)) == inside
                for i in inside:
                    shared[i].add(number)
            wanted = [[i, min(own), max(own)] for i, own in enumerate(shared) if len(own) > 1]
            assert [row for row in line.merges.tolist() if row[0] >= 0] == wanted
            tile, part = line.group.tile, line.group
            for (sequence, row), units in zip(part.tile_starts.tolist(), line.starts.diff().tolist(), strict=True):
                count, keys = rows[sequence]
                first, last = row // part.heads_per_chunk, min((row + tile.rows - 1) // part.heads_per_chunk, count - 1)
                begin = max(keys - count + first + 1 - window, 0) if window else 0
                seen = {key // tile.keys for key in range(begin, keys - count + last + 1)}
                assert units == len(seen)


def test_every_row_has_one_tile():
    for heads, kv_heads in ((16, 1), (24, 1), (128, 1), (96, 1), (40, 8), (71, 71)):
        shape = AttentionShape(heads, kv_heads, 64, 64, latent=kv_heads == 1)
        counts = (1, 5, 1, 0, 70)
        work, seen = AttentionSchedule(counts, shape, "cpu", num_sms=132), set()
        for part in work.groups:
            assert (
                part.head_chunks * part.heads_per_chunk >= shape.heads_per_kv_head
                and part.heads_per_chunk <= part.tile.rows
            )
            for sequence, first in part.tile_starts.tolist():
                for row in range(first, first + part.tile.rows):
                    token = row // part.heads_per_chunk
                    if token < counts[sequence]:
                        own = [
                            (sequence, token, b * part.heads_per_chunk + row % part.heads_per_chunk)
                            for b in range(part.head_chunks)
                        ]
                        assert not seen & set(own)
                        seen |= set(own)
        assert {row for row in seen if row[2] < shape.heads_per_kv_head} == {
            (s, t, h) for s, count in enumerate(counts) for t in range(count) for h in range(shape.heads_per_kv_head)
        }


def test_programs_fill_the_multiprocessors():
    assert [num_programs_per_range(beside, 132) for beside in (1, 2, 8, 128)] == [132, 66, 16, 1]
    for beside in range(1, 140):
        programs = num_programs_per_range(beside, 132)
        assert programs * beside / (-(-programs * beside // 132) * 132) >= 0.75


def test_what_does_not_fit_a_plan_is_refused():
    pools, (keys, vals) = made([(2, 20)], 2, (32, 32))
    k, v = (pools.filled(rows, torch.float16) for rows in (keys, vals))
    q, shape = torch.randn(1, 4, 2, 32).to(DEVICE, torch.float16), AttentionShape(4, 2, 32, 32)
    plan = planned([(2, 20)], shape, pools)
    for name, call in {
        "q is": lambda: attention(q[:, :, :1], k, v, plan, 1.0),
        "k is": lambda: attention(q, k[..., :16], v, plan, 1.0),
        "k is .*dense columns": lambda: attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, plan, 1.0),
        "v is .*bfloat16": lambda: attention(q, k, v.bfloat16(), plan, 1.0),
        "come together": lambda: attention(q, k, v, plan, 1.0, q_rope=q),
        "latent=True": lambda: mla_attention(q, q, k[:, 0], k[:, 0], plan, 1.0),
        "5 query heads": lambda: AttentionShape(5, 2, 32, 32),
        "keys are its values": lambda: AttentionShape(4, 1, 32, 16, latent=True),
        "none negative": lambda: AttentionSchedule([], shape, DEVICE),
        "made for 1 sequences": lambda: plan.schedule.plan(plan.sequences.repeat(2, 1), plan.pages),
        "too small": lambda: AttentionSchedule([2], shape, DEVICE, num_sms=3, scratch=torch.zeros(4)),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


def test_kernels_are_chosen_by_what_is_installed_and_fits():
    shape = AttentionShape(16, 1, 512, 512, latent=True)
    assert kernels_for(shape).mla_attention is mla_attention and kernels_for(shape).attention is attention
    with pytest.raises(UsageError, match="not an attention backend; available: triton flashinfer auto"):
        kernels_for(shape, "flash")
    small = AttentionShape(16, 1, 96, 96, latent=True)
    assert kernels_for(small, "auto", rope_columns=32).name == "triton"
    with pytest.raises(
        UsageError, match="FlashInfer: (the package flashinfer-python is not|its MLA kernels take latents)"
    ):
        kernels_for(small, "flashinfer", rope_columns=32)


def tables(tokens, turned):
    angles = torch.rand(1, tokens, turned // 2) * 6
    return tuple(torch.cat([x, x], -1).to(DEVICE) for x in (angles.cos(), angles.sin()))


def same_stored(found, wanted):
    """e4m3 numbers may be neighbours where a product fell between two; Triton's interpreter also loses the carry of
    some.
    """
    if found.dtype == E4M3:
        codes = [x.cpu().view(torch.uint8).int() for x in (found, wanted)]
        off = (codes[0] - codes[1]).abs()
        assert (off > 1).float().mean() <= (0.0 if GPU else 0.05) and (off == 1).float().mean() < 0.01
    else:
        torch.testing.assert_close(found.cpu(), wanted.cpu(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("stored", [torch.float16, E4M3], ids=str)
def test_heads_are_rotated_and_stored(interleaved, stored):
    tokens, slots = 5, torch.tensor([70, 3, -1, 31, 32]).to(DEVICE)
    q, k = (torch.randn(1, tokens, h, 48).transpose(1, 2).to(DEVICE, torch.float16) for h in (20, 3))
    v = torch.randn(1, 3, tokens, 24).to(DEVICE, torch.float16) * 30
    cos, sin = tables(tokens, 32)
    pools = [torch.zeros(5, 3, 16, d).to(DEVICE, stored) for d in (48, 24)]
    twins = [pool.clone() for pool in pools]
    turned = rope_and_cache_kv(q, k, v, cos, sin, slots, *pools, interleaved, KV_SCALE, 0.1)
    wanted = reference.store_heads(q, k, v, cos, sin, slots, *twins, interleaved, KV_SCALE, 0.1)
    torch.testing.assert_close(turned, wanted, rtol=1e-3, atol=1e-4)
    for found, twin in zip(pools, twins, strict=True):
        same_stored(found, twin)
    if not interleaved:
        assert rope_and_cache_kv(q, k, v, cos, sin, slots, *pools, out=q).data_ptr() == q.data_ptr()
        assert torch.equal(q, turned)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("stored", [torch.float16, E4M3], ids=str)
def test_a_latent_is_normalised_rotated_and_stored(interleaved, stored):
    tokens, slots = 4, torch.tensor([12, 7, 60, -1]).to(DEVICE)
    latent, k_rope = (torch.randn(1, tokens, d).to(DEVICE, torch.float16) for d in (96, 16))
    q_rope, norm = torch.randn(1, 18, tokens, 16).to(DEVICE, torch.float16), torch.rand(96).to(DEVICE, torch.float16)
    cos, sin = tables(tokens, 16)
    pools = [torch.zeros(4, 16, d).to(DEVICE, stored) for d in (96, 16)]
    twins = [pool.clone() for pool in pools]
    rest = (norm, 1e-6, interleaved, KV_SCALE)
    turned = rope_and_cache_mla(latent, k_rope, q_rope, cos, sin, slots, *pools, *rest)
    wanted = reference.store_latent(latent, k_rope, q_rope, cos, sin, slots, *twins, *rest)
    torch.testing.assert_close(turned, wanted, rtol=1e-3, atol=1e-4)
    for found, twin in zip(pools, twins, strict=True):
        same_stored(found, twin)
    with pytest.raises(ValueError, match="no row of"):
        rope_and_cache_mla(latent, k_rope, q_rope, cos[:, :3], sin[:, :3], slots, *pools)


def compiled(*words):
    """What compile_sm90.py found."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = str(Path(__file__).with_name("compile_sm90.py"))
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(GPU, reason="the kernels are compiled for the device itself")
@pytest.mark.parametrize("heads,rows,layout", [(16, 16, "1, 8"), (128, 64, "4, 2")])
def test_mla_compiles_for_an_h100_and_no_warp_repeats_anothers_work(heads, rows, layout):
    """What a program holds fits a multiprocessor, and both products are laid out over all eight warps."""
    found = compiled(str(heads))[0]
    assert found["rows"] == rows and found["shared"] <= 227 << 10
    assert set(found["layouts"]) == {layout}
    assert found["copies"] >= 4  # latent and rotated columns are fetched ahead, before the loop and in it


@pytest.mark.skipif(GPU, reason="the kernels are compiled for the device itself")
def test_the_other_kernels_compile_for_an_h100():
    found = compiled()
    names = ["_attend", "_merge"] * 6 + ["_rms_norm", "_store_heads", "_store_latent"]
    assert [kernel["name"] for kernel in found] == names and all(kernel["shared"] <= 227 << 10 for kernel in found)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("stored", [torch.bfloat16, E4M3], ids=str)
def test_mla_at_deepseeks_size_errs_at_most_twice_what_torch_does(heads, stored):
    ragged = [(1, 4096), (1, 100), (1, 9001), (33, 2000)]
    pools, q, qr, ckv, kpe = latents((heads, 512, 64, 64, torch.bfloat16, stored), ragged)
    plan = planned(ragged, AttentionShape(heads, 1, 512, 512, latent=True), pools, tiles=(), slots=0)
    got = mla_attention(q, qr, ckv[:, 0], kpe[:, 0], plan, 0.07, KV_SCALE if stored == E4M3 else 1.0)
    exact = true_attention(q, ckv, ckv, ragged, pools, 0.07, q_rope=qr, k_rope=kpe)
    keys, rope = (
        values(pool)[pools.pages[2, :141].long()][:, 0].flatten(0, 1)[:9001].cuda().bfloat16() for pool in (ckv, kpe)
    )
    few = torch.cat([q, qr], -1)[:, :, 2][:, None]
    torchs = F.scaled_dot_product_attention(few, torch.cat([keys, rope], -1)[None, None], keys[None, None], scale=0.07)
    assert relative_error(got[:, 2].cpu(), exact[:, 2]) <= 2 * relative_error(torchs[:, 0].cpu(), exact[:, 2])
    assert relative_error(got.cpu(), exact) < BOUND[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_cuda_graph_is_replayed_for_other_lengths_and_pages():
    ragged = [(1, 3000), (1, 64), (1, 500)]
    pools, q, qr, ckv, kpe = latents((16, 512, 64, 64, torch.bfloat16, torch.bfloat16), ragged)
    work = AttentionSchedule([1, 1, 1], AttentionShape(16, 1, 512, 512, latent=True), DEVICE)
    sequences, pages = sequences_of(ragged).cuda(), pools.pages.cuda()
    run = lambda: mla_attention(q, qr, ckv[:, 0], kpe[:, 0], work.plan(sequences, pages), 0.07)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for lengths in ((3000, 64, 500), (17, 1, 499), (2999, 60, 64)):
        sequences[:, 2] = torch.tensor(lengths).cuda()
        graph.replay()
        assert torch.equal(found, run())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("window,with_sinks,columns", [(0, False, 128), (128, True, 64), (0, False, 256)])
def test_gqa_at_real_sizes(window, with_sinks, columns):
    ragged = [(1, 5000), (700, 1500), (1, 33), (300, 300)]
    pools, (keys, vals) = made(ragged, 8, (columns, columns))
    q = torch.randn(1, 64, sum(count for count, _ in ragged), columns).to(DEVICE, torch.bfloat16)
    k, v = pools.filled(keys, torch.bfloat16), pools.filled(vals, torch.bfloat16)
    sinks = torch.randn(64) if with_sinks else None
    plan = planned(ragged, AttentionShape(64, 8, columns, columns), pools, window, tiles=(), slots=0)
    got = attention(q, k, v, plan, columns**-0.5, None if sinks is None else sinks.cuda())
    assert (
        relative_error(got.cpu(), true_attention(q, k, v, ragged, pools, columns**-0.5, window, sinks))
        < BOUND[torch.bfloat16]
    )
