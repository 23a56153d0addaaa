"""What the machine is said to have, on made-up /proc and /sys contents and on the real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ktx import hardware

FLAGS_AVX2 = "sse2 avx2 fma f16c"
FLAGS_VNNI = FLAGS_AVX2 + " avx512f avx512bw avx512dq avx512vl avx512_vnni"


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """A cgroup tree of files; `/proc/self/cgroup` says that this process is in /outer/inner."""
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    real = Path.read_text

    def read(path: Path, *args: object, **kwargs: object) -> str:
        return "0::/outer/inner\n" if str(path) == "/proc/self/cgroup" else real(path)

    monkeypatch.setattr(Path, "read_text", read)

    def put(**files: str) -> None:
        for name, text in files.items():
            file = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return put


def test_this_machine_is_described_as_the_kernel_describes_it():
    m = hardware.machine()
    assert set(m.cpus) == os.sched_getaffinity(0) and 1 <= m.cores <= len(m.cpus)
    assert 0 < m.available <= m.memory and m.flags and m.cpu != "unknown"
    assert {cpu for node in m.nodes for cpu in node.cpus} <= set(m.cpus)
    assert hardware.default_threads() == m.cores


def test_affinity_narrows_the_cores():
    all_cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(all_cpus)})
        m = hardware.machine()
        assert m.cpus == (min(all_cpus),) and m.cores == 1
        assert sum(len(node.cpus) for node in m.nodes) == 1
    finally:
        os.sched_setaffinity(0, all_cpus)


@pytest.mark.parametrize("limit,cpus", [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5)])
def test_cpu_quota_of_cgroup_v2(cgroup, limit, cpus):
    cgroup(outer__inner__cpu_dot_max=limit)
    assert hardware.cpu_quota() == cpus


def test_a_quota_of_the_outer_group_counts_and_half_a_cpu_is_one_core(cgroup):
    cgroup(outer__inner__cpu_dot_max="max 100000", outer__cpu_dot_max="50000 100000")
    assert hardware.machine().cores == 1 and hardware.machine().quota == 0.5


def test_cpu_quota_of_cgroup_v1(cgroup):
    cgroup(cpu__cpu_dot_cfs_quota_us="300000", cpu__cpu_dot_cfs_period_us="100000")
    assert hardware.cpu_quota() == 3
    cgroup(cpu__cpu_dot_cfs_quota_us="-1")
    assert hardware.cpu_quota() is None


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """A tree of caches for pretended cpus: cpu -> [(level, type, size, shared by)]."""
    monkeypatch.setattr(hardware, "CPUS", tmp_path)

    def put(cpus: dict[int, list[tuple[int, str, str, str]]]) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus))
        for cpu, found in cpus.items():
            for number, words in enumerate(found):
                folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{number}"
                folder.mkdir(parents=True)
                for name, text in zip(("level", "type", "size", "shared_cpu_list"), words, strict=True):
                    (folder / name).write_text(f"{text}\n")

    return put


L1 = (1, "Data", "48K", "0"), (1, "Instruction", "32K", "0"), (2, "Unified", "2048K", "0")


@pytest.mark.parametrize(
    "cpus, mebibytes",
    [
        ({0: [*L1, (3, "Unified", "491520K", "0-1")], 1: [*L1, (3, "Unified", "491520K", "0-1")]}, 480),
        ({0: [*L1, (3, "Unified", "32M", "0")], 8: [*L1, (3, "Unified", "32768K", "8")]}, 64),  # two complexes
        ({0: [(1, "Instruction", "64K", "0"), (2, "Unified", "1M", "0")]}, 1),  # the second level is the last
        ({0: [(3, "Instruction", "9M", "0"), (2, "Unified", "1M", "0")]}, 1),
        ({0: [(3, "Unified", "", "0")]}, 0),
        ({0: []}, 0),  # nothing is said
    ],
)
def test_last_level_caches_are_added_up(caches, cpus, mebibytes):
    caches(cpus)
    assert hardware.last_level_cache() == mebibytes << 20


def test_memory_is_the_least_of_machine_and_groups(cgroup):
    free = hardware.memory()
    cgroup(
        outer__memory_dot_max=str(1 << 28),
        outer__memory_dot_current=str(200 << 20),
        outer__memory_dot_stat=f"anon 1\nfile {150 << 20}",
    )
    assert hardware.memory() == (1 << 28, (256 - 200 + 150) << 20)  # page cache is given back when it is needed
    cgroup(outer__memory_dot_max="max")
    assert hardware.memory()[0] == free[0]


def test_isas_follow_the_flags():
    def isa(flags: str) -> str:
        return hardware.Machine("x", frozenset(flags.split()), (0,), 1, None, 1, 1).isa

    assert isa("sse2") == isa("avx2 sse2") == "scalar"
    assert isa(FLAGS_AVX2) == isa(FLAGS_AVX2 + " avx512f avx512_vnni") == "avx2"
    assert isa(FLAGS_VNNI) == "avx512vnni"
    assert isa(FLAGS_VNNI + " avx512vbmi") == "avx512vbmi"
    assert isa(FLAGS_AVX2 + " avx_vnni") == "avxvnni"
    assert isa(FLAGS_VNNI + " avx_vnni avx512_bf16") == "avx512vnni"
    assert isa(FLAGS_VNNI + " avx512vbmi avx512_bf16") == "avx512bf16"


def test_freed_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch):
    for name in hardware.MALLOC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert hardware.tune_malloc()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not hardware.tune_malloc()


def test_our_detection_agrees_with_the_kernels():
    """/proc/cpuinfo and the extension's own cpuid, two ways to the same answer."""
    from ktx.kernels.cpu import ops

    assert hardware.machine().isa == ops.best_isa()


def test_the_second_opinion_agrees():
    pytest.importorskip("cpufeature")
    said, flags = hardware.cpufeature_flags().split(), hardware.machine().flags
    assert ("AVX2" in said) == ("avx2" in flags)
    assert ("AVX512vl" in said) == ("avx512vl" in flags)


def test_amx_needs_the_cpu_flag(monkeypatch):
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: {"flags": FLAGS_VNNI})
    assert not hardware.amx_permitted()


def test_kernel_lists():
    assert list(hardware._parse_list("0-3,8,10-11")) == [0, 1, 2, 3, 8, 10, 11]
    assert list(hardware._parse_list("")) == []
