"""What `ktx plan` costs on a DeepSeek-V3 (671B) file: its header and configuration, the weights a hole.

    python benchmarks/plan_v3.py [--folder DIR]

The file is sparse: 405 GB long, a few MB on disk. Exit status 1 when the plan takes ten seconds of a processor or 1 GiB.
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

import make_model  # noqa: E402

# VmHWM and not ru_maxrss: that one remembers the memory of the process that forked this one.
PLAN = """
import sys
from ktx.__main__ import main
status = main(sys.argv[1:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0], file=sys.stderr)
sys.exit(status)
"""
# Ten seconds are twice what it takes here, and nearly all of that are imports of torch and transformers: a neighbour may be busy.
SECONDS, BYTES, TRIES = 10.0, 1 << 30, 3


def write(folder: Path) -> Path:
    """DeepSeek-V3's folder and its Q4_K_M file without data; the file's path."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        make_model.main(["--preset", "v3", "--header-only", "-o", str(folder)])
    return Path(out.getvalue().splitlines()[-1])


def measure(folder: Path) -> tuple[float, float, int, str]:
    """`ktx plan` in a process of its own: seconds on the clock, seconds of processors, peak bytes, output."""
    path = write(folder)
    command = [sys.executable, "-c", PLAN, "plan", "--model", str(folder), "--weights", str(path)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as peak:
        process = subprocess.Popen(command, stdout=out, stderr=peak, cwd=Path(__file__).resolve().parent.parent)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        peak.seek(0)
        text, said = out.read(), peak.read()
    if status:
        raise SystemExit(f"ktx plan failed, status {os.waitstatus_to_exitcode(status)}: {said}")
    return seconds, usage.ru_utime + usage.ru_stime, int(said.split()[-1]) * 1024, text


def main() -> int:
    """Prints the plan and what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the sparse file here (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(TRIES):  # the first may read its libraries from disk, and a neighbour may be busy
            seconds, used, peak, text = measure(args.folder or Path(scratch))
            if used < SECONDS:
                break
    print(text)
    print(f"ktx plan: {seconds:.1f} s, {used:.1f} s of a processor, {peak / 2**20:.0f} MiB peak")
    return int(used >= SECONDS or peak >= BYTES)


if __name__ == "__main__":
    sys.exit(main())
