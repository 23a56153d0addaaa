"""ktx doctor: report the machine, the kernels that ktx selects on it, and missing packages."""

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
from ktx.utils.versions import install_command

SUMMARY = "report the machine, the selected kernels, and missing packages and how to install them"
# package -> what needs it, and how to install it
OPTIONAL = {
    "ik_llama_cpp": ("ktx bench --peer ik_llama.cpp", "pip install ik-llama-cpp-python"),
    "llama_cpp": ("ktx bench --peer llama.cpp", "pip install llama-cpp-python"),
    "ray": ("several replicas: ktx serve --ray", install_command("ray")),
    "modelscope_hub": ("ktx download --hub modelscope", install_command("modelscope")),
    "triton": ("GPU kernels", "pip install triton (Linux with a CUDA GPU)"),
    "flashinfer": ("paged MLA on the GPU", "pip install flashinfer-python (CUDA GPU)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx doctor`."""
    flag(parser, "--json", help="print one JSON object instead of tables")
    flag(parser, "--quick", help="skip the measurements of bandwidth and peak speed")


def run(args: argparse.Namespace) -> int:
    """Prints the report. The exit status is 0 even if something is missing, because the report lists it."""
    report_data = report(args.quick)
    if args.json:
        print(json.dumps(report_data, indent=1))
    else:
        show(report_data)
    return 0


def report(quick: bool) -> dict[str, Any]:
    """Collects what `ktx doctor` reports: machine, versions, kernels, missing packages, warnings; as JSON data.

    Args:
        quick: skip the measurements.
    """
    from ktx.hardware import amx_permitted, cpufeature_flags, machine

    info = machine()
    report_data: dict[str, Any] = {
        "machine": {
            "cpu": info.cpu,
            "usable cpus": len(info.cpus),
            "physical cores": info.cores,
            "cgroup cpu limit": info.quota or "none",
            "instruction sets": _format_isas(info.flags),
            "AMX permitted": amx_permitted(),
            "second opinion (cpufeature)": cpufeature_flags(),
            "memory": f"{info.available / 1e9:.1f} GB free of {info.memory / 1e9:.1f} GB",
            "NUMA": [f"node {node.number}: {len(node.cpus)} cpus, {node.memory / 1e9:.1f} GB" for node in info.nodes],
            "transparent huge pages": info.huge_pages,
        },
        "versions": {
            "python": platform.python_version(),
            "ktx": _own_version(),
            **{name: versions.installed_version(name) or "missing" for name in versions.TESTED},
        },
        "tested versions": {name: versions.tested_range(name) for name in versions.TESTED},
        "missing": {
            name: {"for": purpose, "remedy": remedy}
            for name, (purpose, remedy) in OPTIONAL.items()
            if importlib.util.find_spec(name) is None
        },
    }
    report_data |= _kernels_or_error(quick)
    report_data["warnings"] = [*versions.untested_warnings(), *_list_warnings(info, report_data)]
    return report_data


def _kernels_or_error(quick: bool) -> dict[str, Any]:
    """Returns the section about the kernels, or the error that keeps them from loading, which the report shows."""
    try:
        return _kernel_sections(quick)
    except UsageError:
        raise
    except KtxError as error:
        return {"kernels": {"error": str(error)}, "gpu": "not checked"}


def _kernel_sections(quick: bool) -> dict[str, Any]:
    """Returns the report's sections that need the compiled kernels: kernels, GPU, operators, weight types.

    Unless `quick`, also the measured bandwidth and peaks (0.3 s per peak).
    """
    import torch

    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import free_read_bandwidth
    from ktx.ops.registry import OPERATORS
    from ktx.quant.types import QTYPES

    isa, threads = ops.isa(), ops.threads()
    kernels = {
        "picked": isa,
        "best possible": ops.best_isa(),
        "threads": threads,
        "memory nodes": ops.nodes(),
        "KTX_ISA": os.environ.get("KTX_ISA", "not set"),
    }
    section: dict[str, Any] = {
        "kernels": kernels,
        "gpu": _gpu(torch),
        "operators": dict.fromkeys(OPERATORS, f"cpu, {isa}"),
    }
    int_types = [q.name for q in QTYPES.values() if not q.is_float]
    section["weight types"] = {
        f"int8 dot products ({isa})": int_types,
        f"f32 multiply-add ({isa})": [q.name for q in QTYPES.values() if q.is_float],
    }
    if not quick:
        section["measured"] = {
            "read bandwidth": str(free_read_bandwidth(threads) or "not measured: less than 1 GiB of memory is free"),
            "int8 peak": f"{ops.probe_int8(threads, 0.3):.0f} GOPS",
            "f32 peak": f"{ops.probe_fma(threads, 0.3):.0f} GFLOPS",
        }
    return section


def _gpu(torch: Any) -> str:
    if not torch.cuda.is_available():
        return "none" + (" (this torch is built for CUDA)" if torch.version.cuda else " (this torch is a CPU build)")
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _format_isas(flags: frozenset[str]) -> str:
    """The names of the instruction sets of `flags` that ktx's kernels use, separated by spaces."""
    known = (
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
    return " ".join(name for name in known if name in flags) or "none that ktx uses"


def _own_version() -> str:
    import ktx

    installed = versions.installed_version(versions.DISTRIBUTION)
    return installed or f"{ktx.__version__} (not installed, run from a checkout)"


def _list_warnings(machine: Any, report_data: dict[str, Any]) -> list[str]:
    """Returns what slows this machine down or contradicts its limits, with a remedy where there is one."""
    kernels, warnings = report_data["kernels"], []
    if "error" in kernels:
        warnings.append(kernels["error"])
    elif kernels["picked"] != kernels["best possible"]:
        warnings.append(f"KTX_ISA lowers the kernels from {kernels['best possible']} to {kernels['picked']}")
    if machine.quota and machine.quota < len(machine.cpus):
        warnings.append(
            f"a cgroup allows {machine.quota:g} of {len(machine.cpus)} cpus: further threads would only wait"
        )
    if len(machine.cpus) > machine.cores:
        warnings.append(
            f"{len(machine.cpus)} logical cpus on {machine.cores} physical cores:"
            f" --cpu-infer {machine.cores} is usually fastest"
        )
    if kernels.get("threads", 0) > len(machine.cpus):
        warnings.append(f"{kernels['threads']} threads on {len(machine.cpus)} cpus")
    if "[never]" in machine.huge_pages:
        file = "/sys/kernel/mm/transparent_hugepage/enabled"
        warnings.append(f"transparent huge pages are off: `echo madvise > {file}` makes large models faster")
    return warnings


def show(report_data: dict[str, Any]) -> None:
    """Prints the report of `ktx doctor` as aligned tables, then the GPU, missing packages and warnings."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 160, highlight=False, markup=False)
    for title in ("machine", "measured", "kernels", "weight types", "operators", "versions"):
        if title not in report_data:
            continue
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for key, value in report_data[title].items():
            tested = report_data["tested versions"].get(key) if title == "versions" else None
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
    console.print(f"gpu: {report_data['gpu']}")
    for name, entry in report_data["missing"].items():
        console.print(f"missing: {name} (for {entry['for']}): {entry['remedy']}")
    for warning in report_data["warnings"]:
        console.print(f"! {warning}")
