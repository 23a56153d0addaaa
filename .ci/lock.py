"""Writes requirements.lock with uv's resolver: `python .ci/lock.py TORCH`.

The lock covers every Python and platform that pyproject.toml lists under [tool.uv], with exact versions of all
dependencies of ktx, of its extras for serving and development, and of the build. It excludes torch, which
.ci/install_torch.py chooses, but all versions are compatible with that torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
BUILD = ("pip", "setuptools", "wheel")
# torch, and the dependencies of its CUDA builds
TORCH_PACKAGES = re.compile(r"(torch|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
ALWAYS_TRUE = {  # conditions that hold wherever the lock is used
    "python_full_version < '3.15'",
    "platform_machine == 'x86_64'",
    "sys_platform == 'linux'",
    "platform_python_implementation != 'PyPy'",
    "implementation_name != 'PyPy'",
}
HEAD = """\
# Exact versions of all that ktx, its extras `serve`, `modelscope` and `dev`, and the build need: Python 3.11 to 3.14,
# Linux, x86-64.
# `make chat` and `make test` install them; `make lock` renews them. torch is chosen by .ci/install_torch.py.
"""


def resolved(torch: str) -> str:
    """The requirements that uv resolves, as text."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--extra", "dev"]
    command += ["--no-header", "--no-annotate", "pyproject.toml", "-"]
    requirements = "\n".join([torch, *BUILD])
    return subprocess.run(
        [sys.executable, "-m", *command], input=requirements, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True
    ).stdout


def shortened(lock: str) -> str:
    """The lock without torch's packages, and without the conditions that always hold."""
    lines = []
    for line in lock.splitlines():
        pin, _, marker = line.partition(" ; ")
        if " or " not in marker:
            marker = " and ".join(part for part in marker.split(" and ") if part not in ALWAYS_TRUE)
        if not TORCH_PACKAGES.match(pin):
            lines.append(f"{pin} ; {marker}" if marker else pin)
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Writes the lock and prints the changed lines."""
    torch = next(arg for arg in arguments if arg.startswith("torch"))  # the other arguments are pip options
    before = LOCK.read_text().splitlines() if LOCK.exists() else []
    text = HEAD + shortened(resolved(torch))
    LOCK.write_text(text)
    after = text.splitlines()
    for sign, lines in (("-", [x for x in before if x not in after]), ("+", [x for x in after if x not in before])):
        print("".join(f"{sign} {line}\n" for line in lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
