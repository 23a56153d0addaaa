"""ktx doctor: what this machine has, what ktx makes of it, and what is missing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from typing import Any

from ktx.cli.arguments import flag
from ktx.errors import KtxError, UsageError
from ktx.utils import versions
from ktx.utils.versions import install

SUMMARY = "show the machine, the picked kernels, and missing packages with their remedy"
OPTIONAL = {
    "ik_llama_cpp": ("ktx bench --peer ik_llama.cpp", "pip install ik-llama-cpp-python"),
    "llama_cpp": ("ktx bench --peer llama.cpp", "pip install llama-cpp-python"),
    "ray": ("several replicas: ktx serve --ray", install("ray")),
    "modelscope_hub": ("ktx download --hub modelscope", install("modelscope")),
    "triton": ("GPU kernels", "pip install triton (Linux with a CUDA GPU)"),
    "flashinfer": ("paged MLA on the GPU", "pip install flashinfer-python (CUDA GPU)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--json", help="one JSON object instead of tables")
    flag(parser, "--quick", help="leave the measurements out")


def run(args: argparse.Namespace) -> int:
    """Prints the report; exit status 0 also when something is missing: it is said."""
    found = report(args.quick)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


def report(quick: bool) -> dict[str, Any]:
    """Everything doctor knows, as plain data."""
    from ktx.hardware import amx_permitted, cpufeature_flags, machine

    m = machine()
    found: dict[str, Any] = {
        "machine": {
            "cpu": m.cpu,
            "usable cpus": len(m.cpus),
            "physical cores": m.cores,
            "cgroup cpu limit": m.quota or "none",
            "instruction sets": _isas(m.flags),
            "AMX permitted": amx_permitted(),
            "second opinion (cpufeature)": cpufeature_flags(),
            "memory": f"{m.available / 1e9:.1f} GB free of {m.memory / 1e9:.1f} GB",
            "NUMA": [f"node {n.number}: {len(n.cpus)} cpus, {n.memory / 1e9:.1f} GB" for n in m.nodes],
            "transparent huge pages": m.huge_pages,
        },
        "versions": {
            "python": platform.python_version(),
            "ktx": _own_version(),
            **{name: versions.installed(name) or "missing" for name in versions.TESTED},
        },
        "tested versions": {name: versions.tested(name) for name in versions.TESTED},
        "missing": {
            name: {"for": what, "remedy": remedy}
            for name, (what, remedy) in OPTIONAL.items()
            if importlib.util.find_spec(name) is None
        },
    }
    found |= _kernels_or_why(quick)
    found["warnings"] = [*versions.untested(), *_warnings(m, found)]
    return found


def _kernels_or_why(quick: bool) -> dict[str, Any]:
    """The kernels, or why there are none: a doctor does not fall ill with the patient."""
    try:
        return _kernels(quick)
    except UsageError:
        raise
    except KtxError as error:
        return {"kernels": {"error": str(error)}, "gpu": "not asked"}


def _kernels(quick: bool) -> dict[str, Any]:
    import torch

    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import free_read_bandwidth
    from ktx.ops.base import SHIPPED
    from ktx.quant.types import QTYPES

    isa, threads = ops.isa(), ops.threads()
    kernels = {
        "picked": isa,
        "best possible": ops.best_isa(),
        "threads": threads,
        "memory nodes": ops.nodes(),
        "GEMM": "fast" if ops.fast_gemm() else "exact",
        "KTX_ISA": os.environ.get("KTX_ISA", "not set"),
    }
    found: dict[str, Any] = {"kernels": kernels, "gpu": _gpu(torch), "operators": dict.fromkeys(SHIPPED, f"cpu, {isa}")}
    ints = [q.name for q in QTYPES.values() if not q.is_float]
    found["weight types"] = {
        f"int8 dot products ({isa})": ints,
        f"f32 multiply-add ({isa})": [q.name for q in QTYPES.values() if q.is_float],
    }
    if not quick:
        found["measured"] = {
            "read bandwidth": str(free_read_bandwidth(threads) or "not measured: less than 1 GiB of memory is free"),
            "int8 peak": f"{ops.probe_int8(threads, 0.3):.0f} GOPS",
            "f32 peak": f"{ops.probe_fma(threads, 0.3):.0f} GFLOPS",
        }
    return found


def _gpu(torch: Any) -> str:
    if not torch.cuda.is_available():
        return "none" + (" (this torch is built for CUDA)" if torch.version.cuda else " (this torch is a CPU build)")
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _isas(flags: frozenset[str]) -> str:
    wanted = (
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
    )
    return " ".join(name for name in wanted if name in flags) or "none of ours"


def _own_version() -> str:
    import ktx

    found = versions.installed(versions.DISTRIBUTION)
    return found or f"{ktx.__version__} (not installed, run from a checkout)"


def _warnings(m: Any, found: dict[str, Any]) -> list[str]:
    kernels, said = found["kernels"], []
    if "error" in kernels:
        said.append(kernels["error"])
    elif kernels["picked"] != kernels["best possible"]:
        said.append(f"KTX_ISA lowers the kernels from {kernels['best possible']} to {kernels['picked']}")
    if m.quota and m.quota < len(m.cpus):
        said.append(f"a cgroup allows {m.quota:g} of {len(m.cpus)} cpus: more threads than that only wait")
    if len(m.cpus) > m.cores:
        said.append(f"{len(m.cpus)} logical cpus on {m.cores} physical cores: --cpu-infer {m.cores} is usually fastest")
    if kernels.get("threads", 0) > len(m.cpus):
        said.append(f"{kernels['threads']} threads on {len(m.cpus)} cpus")
    if "[never]" in m.huge_pages:
        file = "/sys/kernel/mm/transparent_hugepage/enabled"
        said.append(f"transparent huge pages are off: `echo madvise > {file}` helps large models")
    return said


def show(found: dict[str, Any]) -> None:
    """The report as aligned tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 160, highlight=False, markup=False)
    for title in ("machine", "measured", "kernels", "weight types", "operators", "versions"):
        if title not in found:
            continue
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for key, value in found[title].items():
            tested = found["tested versions"].get(key) if title == "versions" else None
            table.add_row(
                key,
                " ".join(value)
                if title == "weight types"
                else ", ".join(map(str, value))
                if isinstance(value, list)
                else f"{value}  (tested: {tested})"
                if tested
                else str(value),
            )
        console.print(table)
    console.print(f"gpu: {found['gpu']}")
    for name, entry in found["missing"].items():
        console.print(f"missing: {name} (for {entry['for']}): {entry['remedy']}")
    for warning in found["warnings"]:
        console.print(f"! {warning}")
