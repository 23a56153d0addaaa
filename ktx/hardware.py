"""What this machine has. No torch here: a plan or a help text must not wait for it."""

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
ISAS = {  # the instruction sets of our kernels, the better ones last, and the flags of /proc/cpuinfo they need
    "amxmodel": frozenset[str](),  # the kernels of amx with its tiles in software, for tests
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
    """A NUMA node: its usable cpus and its memory in bytes."""

    number: int
    cpus: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class Machine:
    """The hardware as this process may use it; memory in bytes."""

    cpu: str
    flags: frozenset[str]
    cpus: tuple[int, ...]  # usable logical cpus: affinity
    cores: int  # usable physical cores, not more than the cgroup's quota
    quota: float | None  # cpus a cgroup allows, None when unlimited
    memory: int
    available: int
    nodes: tuple[Node, ...] = field(default=())
    huge_pages: str = "?"

    @property
    def isa(self) -> str:
        """The best instruction set our kernels could use, by the kernel's own account of the CPU."""
        return [name for name, needed in ISAS.items() if needed <= self.flags][-1]


def machine() -> Machine:
    """Reads /proc and /sys; costs a millisecond."""
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
        huge_pages=_first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled"), "?"),
    )


def default_threads() -> int:
    """One worker for each usable physical core."""
    return machine().cores


def share_of_cpus(number: int, of: int) -> set[int]:
    """The cpus of one of several processes that divide this machine: whole cores side by side, on one memory node where they can be.

    All of them when there are more processes than cores, or no share is left for this number.
    """
    usable = sorted(os.sched_getaffinity(0))
    node = {cpu: place.number for place in _nodes(set(usable)) for cpu in place.cpus}
    cores: dict[tuple[int, str], list[int]] = {}
    for cpu in usable:
        cores.setdefault((node.get(cpu, 0), _core_of(cpu)), []).append(cpu)
    each = len(cores) // of
    mine = [cores[core] for core in sorted(cores, key=lambda core: (core[0], cores[core]))][number * each :][:each]
    return {cpu for core in mine for cpu in core} or set(usable)


def memory() -> tuple[int, int]:
    """(total, available) bytes for this process: the machine's, or its cgroup's if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    info = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    total, available = info["MemTotal"], info.get("MemAvailable", info["MemFree"])
    for limit, used, cache in _cgroup_memory():
        total, available = min(total, limit), min(available, max(0, limit - used + cache))
    return total, available


def last_level_cache() -> int:
    """Bytes of the last-level caches of the usable cpus, each counted once; 0 where the system does not say."""
    found: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        caches = [
            (int(_first_line(folder / "level", "0")), folder)
            for folder in (CPUS / f"cpu{cpu}" / "cache").glob("index[0-9]*")
            if _first_line(folder / "type", "") in ("Unified", "Data")
        ]
        for level, folder in sorted(caches)[-1:]:
            found[level, _first_line(folder / "shared_cpu_list", str(cpu))] = _size(_first_line(folder / "size", "0"))
    return sum(found.values())


def cpu_quota() -> float | None:
    """CPUs the cgroup (v2 or v1) gives this process; None when it sets no limit."""
    for folder in _own_cgroups(""):
        text = _first_line(folder / "cpu.max", "")
        if text and not text.startswith("max"):
            limit, period = text.split()
            return int(limit) / int(period)
    limit, period = (_first_line(CGROUP / "cpu" / name, "-1") for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None


def amx_permitted() -> bool:
    """Whether the kernel lets this process use AMX tiles (arch_prctl ARCH_REQ_XCOMP_PERM)."""
    if "amx_tile" not in _cpuinfo().get("flags", "").split():
        return False
    import ctypes

    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def cpufeature_flags() -> str:
    """What the cpufeature package says of the CPU, or how to get it."""
    import importlib.util

    if importlib.util.find_spec("cpufeature") is None:
        return "not installed: pip install cpufeature"
    from cpufeature import CPUFeature

    names = ("AVX2", "AVX512f", "AVX512bw", "AVX512vl", "OS_AVX", "OS_AVX512")
    return " ".join(name for name in names if CPUFeature.get(name))


def _cgroup_memory() -> Iterator[tuple[int, int, int]]:
    """(limit, used, reclaimable page cache) of each limited cgroup above this process."""
    for folder in _own_cgroups(""):
        limit = _first_line(folder / "memory.max", "max")
        if limit != "max":
            yield int(limit), int(_first_line(folder / "memory.current", "0")), _stat(folder / "memory.stat", "file")
    limit = _first_line(CGROUP / "memory" / "memory.limit_in_bytes", "")
    if limit and int(limit) < 1 << 60:
        folder = CGROUP / "memory"
        used = int(_first_line(folder / "memory.usage_in_bytes", "0"))
        yield int(limit), used, _stat(folder / "memory.stat", "cache")


def _own_cgroups(controller: str) -> Iterator[Path]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == controller:
            folder = CGROUP / path.lstrip("/")
            while folder.is_relative_to(CGROUP):
                yield folder
                if folder == CGROUP:
                    break
                folder = folder.parent


def _stat(file: Path, key: str) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


def _cpuinfo() -> dict[str, str]:
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        info[key.strip()] = value.strip()
    return info


def _core_of(cpu: int) -> str:
    return _first_line(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list", str(cpu))


def _nodes(usable: set[int]) -> Iterator[Node]:
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        cpus = tuple(cpu for cpu in _list(_first_line(folder / "cpulist", "")) if cpu in usable)
        lines = (folder / "meminfo").read_text().splitlines()
        total = next((int(line.split()[3]) * 1024 for line in lines if "MemTotal" in line), 0)
        yield Node(int(folder.name.removeprefix("node")), cpus, total)


def _list(text: str) -> Iterator[int]:
    """Numbers of a kernel list: "0-3,8"."""
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        yield from range(int(low), int(high or low) + 1)


def _size(text: str) -> int:
    """Bytes of a kernel size: "32768K"."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    number = text.rstrip("KMG")
    return int(number) * unit if number.isdecimal() else 0


def _first_line(path: Path, default: str) -> str:
    try:
        return path.read_text().strip() or default
    except OSError:
        return default


def format_bytes(nbytes: float) -> str:
    """Bytes for people: 1.5 GB, by powers of 1000 as disks and downloads count."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def tune_malloc() -> bool:
    """Tells glibc's malloc to keep what is freed, up to a gigabyte, for the next request. False when the environment has settled that.

    Activations of a few megabytes come and go thousands of times in a prompt. By default each is mapped anew, and the system clears every page
    of it: a seventh of a prompt's time on a virtual machine, whose host takes freed pages away.
    """
    import ctypes

    if any(name in os.environ for name in MALLOC):
        return False
    set_option = getattr(
        ctypes.CDLL(None), "mallopt", None
    )  # mallopt(3): M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1, M_TOP_PAD -2
    return set_option is not None and all(set_option(*pair) for pair in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20)))
