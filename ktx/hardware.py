"""Detects the machine's CPUs, memory, caches and limits.

Must not import torch: a plan or a help text must not wait for it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
ISAS = {  # the instruction sets of the kernels, best last, and the flags of /proc/cpuinfo that they need
    "amxmodel": frozenset[str](),  # the amx kernels with tiles emulated in software, for tests
    "scalar": frozenset[str](),
    "avx2": _AVX2,
    "avxvnni": _AVX2 | {"avx_vnni"},
    "avx512vnni": _AVX512,
    "avx512vbmi": _AVX512 | {"avx512vbmi"},
    "avx512bf16": _AVX512 | {"avx512vbmi", "avx512_bf16"},
    "amx": _AVX512 | {"avx512vbmi", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
}


@dataclass(frozen=True)
class Node:
    """A NUMA node: its number, usable CPUs, and memory in bytes."""

    number: int
    cpus: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class Machine:
    """The hardware that this process may use; memory in bytes."""

    cpu: str
    flags: frozenset[str]
    cpus: tuple[int, ...]  # usable logical CPUs, by affinity
    cores: int  # usable physical cores, at most the cgroup's quota
    quota: float | None  # CPUs that the cgroup allows, None when unlimited
    memory: int
    available: int
    nodes: tuple[Node, ...] = field(default=())
    huge_pages: str = "?"

    @property
    def isa(self) -> str:
        """The best instruction set that the CPU supports according to the operating system."""
        return [name for name, needed in ISAS.items() if needed <= self.flags][-1]


def machine() -> Machine:
    """Detects the hardware from /proc and /sys, as far as this process may use it; takes about a millisecond."""
    info = _cpuinfo()
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    quota = cpu_quota()
    physical = len({_core_of(cpu) for cpu in cpus})
    cores = max(1, min(physical, int(quota))) if quota else physical
    total, available = memory()
    return Machine(
        cpu=info.get("model name", platform.processor() or "unknown"),
        flags=frozenset(info.get("flags", "").split()),
        cpus=cpus,
        cores=cores,
        quota=quota,
        memory=total,
        available=available,
        nodes=tuple(_nodes(set(cpus))),
        huge_pages=_read_stripped(Path("/sys/kernel/mm/transparent_hugepage/enabled"), "?"),
    )


def default_threads() -> int:
    """The default number of worker threads: one per usable physical core."""
    return machine().cores


def cpu_share(number: int, num_processes: int) -> set[int]:
    """The CPUs of process `number` out of `num_processes` that share this machine, such as replicas of a model.

    Each gets complete, adjacent cores, on one NUMA node where possible. Returns all usable CPUs when there are more
    processes than cores, or no share remains for this number.
    """
    usable = sorted(os.sched_getaffinity(0))
    node_of = {cpu: node.number for node in _nodes(set(usable)) for cpu in node.cpus}
    cores: dict[tuple[int, str], list[int]] = {}
    for cpu in usable:
        cores.setdefault((node_of.get(cpu, 0), _core_of(cpu)), []).append(cpu)
    size = len(cores) // num_processes
    share = [cores[core] for core in sorted(cores, key=lambda core: (core[0], cores[core]))][number * size :][:size]
    return {cpu for core in share for cpu in core} or set(usable)


def memory() -> tuple[int, int]:
    """(total, available) memory for this process in bytes: the machine's, or its cgroup's if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    info = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    total, available = info["MemTotal"], info.get("MemAvailable", info["MemFree"])
    for limit, used, cache in _cgroup_memory():
        total, available = min(total, limit), min(available, max(0, limit - used + cache))
    return total, available


def last_level_cache() -> int:
    """Total size in bytes of the usable CPUs' last-level caches; 0 when the system has no data.

    A measurement of the memory's bandwidth must read more than this. A cache that several CPUs share counts once: its
    key is its level and the list of these CPUs.
    """
    found: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        caches = [
            (int(_read_stripped(folder / "level", "0")), folder)
            for folder in (CPUS / f"cpu{cpu}" / "cache").glob("index[0-9]*")
            if _read_stripped(folder / "type", "") in ("Unified", "Data")
        ]
        for level, folder in sorted(caches)[-1:]:
            found[level, _read_stripped(folder / "shared_cpu_list", str(cpu))] = _parse_size(
                _read_stripped(folder / "size", "0")
            )
    return sum(found.values())


def cpu_quota() -> float | None:
    """The number of CPUs that the cgroup (v2 or v1) allows this process; None when it sets no limit."""
    for folder in _own_cgroups(""):
        text = _read_stripped(folder / "cpu.max", "")
        if text and not text.startswith("max"):
            limit, period = text.split()
            return int(limit) / int(period)
    limit, period = (_read_stripped(CGROUP / "cpu" / name, "-1") for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None


def amx_permitted() -> bool:
    """Whether the Linux kernel permits this process to use AMX tiles (arch_prctl ARCH_REQ_XCOMP_PERM)."""
    if "amx_tile" not in _cpuinfo().get("flags", "").split():
        return False
    import ctypes

    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0  # 158: arch_prctl, 0x1023: the request, 18: tile data


def cpufeature_flags() -> str:
    """The CPU features that the cpufeature package reports, or how to install it: a second opinion for `ktx doctor`."""
    import importlib.util

    if importlib.util.find_spec("cpufeature") is None:
        return "not installed: pip install cpufeature"
    from cpufeature import CPUFeature

    names = ("AVX2", "AVX512f", "AVX512bw", "AVX512vl", "OS_AVX", "OS_AVX512")
    return " ".join(name for name in names if CPUFeature.get(name))


def _cgroup_memory() -> Iterator[tuple[int, int, int]]:
    """Yields (limit, used, reclaimable page cache) in bytes for each limited cgroup of this process, as of a container.

    `memory` needs them because /proc/meminfo shows the memory of the machine.
    """
    for folder in _own_cgroups(""):
        limit = _read_stripped(folder / "memory.max", "max")
        if limit != "max":
            yield (
                int(limit),
                int(_read_stripped(folder / "memory.current", "0")),
                _read_stat(folder / "memory.stat", "file"),
            )
    limit = _read_stripped(CGROUP / "memory" / "memory.limit_in_bytes", "")
    if limit and int(limit) < 1 << 60:  # cgroup v1, where a huge number means no limit
        folder = CGROUP / "memory"
        used = int(_read_stripped(folder / "memory.usage_in_bytes", "0"))
        yield int(limit), used, _read_stat(folder / "memory.stat", "cache")


def _own_cgroups(controller: str) -> Iterator[Path]:
    """Yields the folders of this process's cgroup and its parents, each of which may limit its memory or CPU time.

    `controller` is the name in /proc/self/cgroup: "" for cgroup v2.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == controller:
            folder = CGROUP / path.lstrip("/")
            while folder.is_relative_to(CGROUP):
                yield folder
                if folder == CGROUP:
                    break
                folder = folder.parent


def _read_stat(file: Path, key: str) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


def _cpuinfo() -> dict[str, str]:
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        info[key.strip()] = value.strip()
    return info


def _core_of(cpu: int) -> str:
    return _read_stripped(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list", str(cpu))


def _nodes(usable: set[int]) -> Iterator[Node]:
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        cpus = tuple(cpu for cpu in _parse_list(_read_stripped(folder / "cpulist", "")) if cpu in usable)
        lines = (folder / "meminfo").read_text().splitlines()
        total = next((int(line.split()[3]) * 1024 for line in lines if "MemTotal" in line), 0)
        yield Node(int(folder.name.removeprefix("node")), cpus, total)


def _parse_list(text: str) -> Iterator[int]:
    """The numbers in a kernel list such as "0-3,8"."""
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        yield from range(int(low), int(high or low) + 1)


def _parse_size(text: str) -> int:
    """The bytes of a kernel size such as "32768K"."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    number = text.rstrip("KMG")
    return int(number) * unit if number.isdecimal() else 0


def _read_stripped(path: Path, default: str) -> str:
    """The content of a file of /proc or /sys without surrounding space; `default` if empty or unreadable."""
    try:
        return path.read_text().strip() or default
    except OSError:
        return default


def format_bytes(nbytes: float) -> str:
    """Formats a size for display, by powers of 1000 as disks and downloads do: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def tune_malloc() -> bool:
    """Makes glibc's malloc retain up to a gigabyte of freed memory for later allocations.

    Returns False when the environment already configures malloc. During a prompt, activations of a few megabytes are
    allocated and freed thousands of times. By default malloc maps each allocation again and the system clears all of
    its pages, which takes a seventh of a prompt's time on a virtual machine whose host reclaims freed pages.
    """
    import ctypes

    if any(name in os.environ for name in MALLOC_VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # mallopt(3): M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1, M_TOP_PAD -2
    return mallopt is not None and all(mallopt(*pair) for pair in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20)))
