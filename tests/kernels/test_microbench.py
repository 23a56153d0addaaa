"""What a read probe reads: more than the last-level caches of the machine, pretended here, hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ktx.kernels import microbench

GIB = 1 << 30


@pytest.mark.parametrize(
    "cache, free, least, read, told",
    [
        (480, 64 * GIB, microbench.MIN_PASS_BYTES, 1920, "1920 MiB read, last-level cache 480 MiB"),
        (32, 64 * GIB, microbench.MIN_PASS_BYTES, 256, "256 MiB read, last-level cache 32 MiB"),
        (32, 64 * GIB, 1 << 29, 512, "512 MiB read, last-level cache 32 MiB"),
        (0, 64 * GIB, microbench.MIN_PASS_BYTES, 256, "256 MiB read, cache size unknown"),
        (480, 4 * GIB, microbench.MIN_PASS_BYTES, 1024, "less than 4 times that because memory is short"),
        (480, GIB // 2, microbench.MIN_PASS_BYTES, 256, "less than 4 times that because memory is short"),
    ],
)
def test_the_probe_reads_more_than_the_cache(monkeypatch, cache, free, least, read, told):
    asked = []
    ops = SimpleNamespace(probe_read=lambda threads, mebibytes: asked.append((threads, mebibytes)) or 10.0)
    monkeypatch.setattr(microbench, "cpu", SimpleNamespace(ops=ops))
    monkeypatch.setattr(microbench, "last_level_cache", lambda: cache << 20)
    monkeypatch.setattr(microbench, "memory", lambda: (1 << 40, free))
    found = microbench.read_bandwidth(3, least)
    assert asked == [(3, read)] and found.gb_s == 10.0 and found.nbytes == read << 20
    assert str(found).startswith("10.0 GB/s (") and told in str(found)


def test_what_is_multiplied_comes_from_memory_too(monkeypatch):
    monkeypatch.setattr(microbench, "last_level_cache", lambda: 480 << 20)
    monkeypatch.setattr(microbench, "memory", lambda: (1 << 40, 1 << 36))
    assert microbench.pass_bytes() == 1920 << 20


def test_without_a_free_gigabyte_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(microbench, "memory", lambda: (1 << 34, (1 << 30) - 1))
    assert microbench.free_read_bandwidth(2) is None
