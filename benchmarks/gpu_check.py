"""`make gpu-check`: tests and benchmarks for a machine with a CUDA GPU, in under ten minutes.

Runs on the installed wheel or the checkout: the CPU kernels on this host (its CPU may have instructions that the
developers' machines lack), the model families, operators and models on the GPU, the GPU kernels against the GPU's
limits, and a model of DeepSeek-V2-Lite's shapes on the CPU, on the GPU, and on both, with decode steps as CUDA graphs
and a trace of one step. Appends a line to benchmarks/results/, where the stages also write their measurements.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECORD, HYBRID, GRAPHS = (str(RESULTS / f"gpu_{name}.jsonl") for name in ("attention", "hybrid", "graphs"))
TRACE = str(RESULTS / "gpu_trace.png")
STAGES = (  # name, command, exit codes that pass (pytest exits with 5 when no test is marked gpu)
    ("cpu kernels", ["-m", "ktx.kernels.check"], (0,)),
    (
        "families and demo model",
        [
            "-m",
            "pytest",
            "-q",
            "tests/ops",
            "tests/families",
            "tests/model",
            "tests/demo/test_demo.py",
            "tests/kernels",
        ],
        (0,),
    ),
    ("gpu tests", ["-m", "pytest", "-q", "-m", "gpu", "tests"], (0, 5)),
    (
        "models on the gpu",
        ["-m", "pytest", "-q", "tests/gpu", "tests/placement/test_memory_model.py", "tests/top/test_devices.py"],
        (0,),
    ),
    ("gpu attention", ["benchmarks/gpu_attention.py", "--quick", "--record", RECORD], (0,)),
    ("packed weights", ["benchmarks/gpu_weights.py", "--quick"], (0,)),
    (
        "a model to measure",
        ["benchmarks/make_model.py", "--preset", "v2lite", "--layers", "8", "--out", "{scratch}"],
        (0,),
    ),
    ("steps as graphs", ["benchmarks/gpu_graphs.py", "--model", "{scratch}", "--record", GRAPHS], (0,)),
    ("cpu, hybrid, gpu", ["benchmarks/gpu_hybrid.py", "--model", "{scratch}", "--record", HYBRID], (0,)),
    ("a step", ["benchmarks/gpu_trace.py", "--model", "{scratch}", "--output", TRACE], (0,)),
)


def machine() -> dict[str, str]:
    """Returns the versions and the devices of this machine."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        "host": platform.processor() or platform.machine(),
    }


def main() -> int:
    """Runs all stages. Exit status 1 if one fails or there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default=str(RESULTS / "gpu_check.jsonl"), help="file to append the record to (default: %(default)s)"
    )
    args = parser.parse_args()
    record = machine()
    if not record["gpu"]:
        print(
            "gpu-check: torch sees no CUDA device on this machine; run `make test` and `make cpu-check` here instead",
            file=sys.stderr,
        )
        return 1
    print(" · ".join(f"{key} {value}" for key, value in record.items()), flush=True)
    stages = {}
    with tempfile.TemporaryDirectory() as model_dir:
        for name, command, passing_codes in STAGES:
            print(f"\n== {name}", flush=True)
            start = time.perf_counter()
            arguments = [argument.replace("{scratch}", model_dir) for argument in command]
            code = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
            stages[name] = {"ok": code in passing_codes, "exit": code, "seconds": round(time.perf_counter() - start, 1)}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    line = record | {"date": datetime.date.today().isoformat(), "commit": commit, "stages": stages}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(stages, indent=1))
    return 0 if all(stage["ok"] for stage in stages.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
