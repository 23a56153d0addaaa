"""Time and memory of `ktx plan` on a DeepSeek-V3 (671B) GGUF without weights, only header and configuration.

    python benchmarks/plan_v3.py [--folder DIR]

The file is sparse: 405 GB long, a few MB on disk. Exit status 1 if the plan takes 10 s of CPU time or 1 GiB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_model

# VmHWM instead of ru_maxrss, which includes the memory of the parent process before exec.
PLAN = """
import sys
from ktx.__main__ import main
status = main(sys.argv[1:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0], file=sys.stderr)
sys.exit(status)
"""
# 10 s are twice the time that it takes here, nearly all of which are imports of torch and transformers, because another
# process may slow it down.
MAX_CPU_S, MAX_BYTES, MAX_TRIES = 10.0, 1 << 30, 3


def write(folder: Path) -> Path:
    """Writes DeepSeek-V3's folder with a Q4_K_M file without data, and returns the file's path."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        make_model.main(["--preset", "v3", "--header-only", "-o", str(folder)])
    return Path(out.getvalue().splitlines()[-1])


def measure(folder: Path) -> tuple[float, float, int, str]:
    """Runs `ktx plan` in a child process; returns elapsed seconds, CPU seconds, peak bytes and output."""
    path = write(folder)
    command = [sys.executable, "-c", PLAN, "plan", "--model", str(folder), "--weights", str(path)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=Path(__file__).resolve().parent.parent)
        _, status, usage = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - start
        stdout.seek(0)
        stderr.seek(0)
        output, errors = stdout.read(), stderr.read()
    if status:
        raise SystemExit(f"ktx plan failed, status {os.waitstatus_to_exitcode(status)}: {errors}")
    return elapsed_s, usage.ru_utime + usage.ru_stime, int(errors.split()[-1]) * 1024, output


def main() -> int:
    """Prints the plan, its time and its memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="folder for the sparse file, which stays there (default: a temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp_dir:
        for _ in range(MAX_TRIES):  # the first may read libraries from disk, and other processes may be busy
            elapsed_s, cpu_s, peak_bytes, output = measure(args.folder or Path(temp_dir))
            if cpu_s < MAX_CPU_S:
                break
    print(output)
    print(f"ktx plan: {elapsed_s:.1f} s, {cpu_s:.1f} s of CPU time, {peak_bytes / 2**20:.0f} MiB peak")
    return int(cpu_s >= MAX_CPU_S or peak_bytes >= MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
