"""Installs PyTorch for the Python that runs this: `python .ci/install_torch.py [--constraints FILE] ARGUMENTS`.

ARGUMENTS are passed to pip unchanged: a requirement (`torch==2.13.0`), optionally with an index, a file or a URL.
Without one of these, and without an NVIDIA driver, PyTorch's CPU build is installed from its public index (TORCH_INDEX
selects another) if that responds; otherwise the build on pip's default index, which on PyPI is gigabytes of CUDA. FILE
receives the constraints for the rest of the installation: requirements.lock without the packages for which this torch
requires versions of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_S = 5.0  # for the index's response, including the DNS lookup
SOURCE_OPTIONS = ("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--no-index")
PINNED_BY_TORCH = ("triton",)  # CUDA builds of torch require an exact version
OTHER_SIZES = (
    "Other packages: about 60 MB, for the tests 400 MB. Another torch: make chat TORCH='torch==VERSION --index-url URL'"
)


def has_driver() -> bool:
    """Whether an NVIDIA driver is installed, so that a CUDA build could use a GPU."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def has_source(arguments: list[str]) -> bool:
    """Whether pip's arguments select an index, a file or a URL for torch."""
    return any(arg.partition("=")[0] in SOURCE_OPTIONS or "/" in arg or arg.endswith(".whl") for arg in arguments)


def responds(url: str) -> bool:
    """Whether a package index responds within INDEX_TIMEOUT_S. In a thread, because a DNS lookup has no timeout."""
    results: list[bool] = []

    def request() -> None:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/torch/", timeout=INDEX_TIMEOUT_S) as response:
                results.append(response.status == 200)
        except (OSError, ValueError):  # no network, no such page, invalid URL: use the other index
            results.append(False)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(INDEX_TIMEOUT_S)
    return results == [True]


def log(text: str) -> None:
    """Prints a line to stderr at once, between pip's own."""
    print(f"PyTorch: {text}", file=sys.stderr, flush=True)


def pip(*arguments: str) -> int:
    """Runs `pip install` and returns its exit status."""
    quiet = [] if sys.stderr.isatty() else ["--quiet"]  # a download of gigabytes needs its progress bar
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *quiet, *arguments]
    ).returncode


def install(arguments: list[str], constraints: list[str]) -> int:
    """Installs torch from the index that fits this machine; returns pip's exit status."""
    index, name = os.environ.get("TORCH_INDEX", INDEX), " ".join(arg for arg in arguments if not arg.startswith("-"))
    if has_source(arguments):
        log(f"{' '.join(arguments)}, as set in TORCH")
        return pip(*constraints, *arguments)
    if has_driver():
        log(
            f"{name} from pip's default index, for this machine's NVIDIA driver: download about 3 GB, 5 GB on disk. "
            f"{OTHER_SIZES}"
        )
    elif responds(index):
        log(f"{name}, the CPU build from {index} (no NVIDIA driver found): download about 200 MB. {OTHER_SIZES}")
        # --no-deps, because torch's dependencies are installed from pip's index, at the lock's versions.
        if pip("--no-deps", "--index-url", index, *arguments):
            log(f"{index} has no such build; using pip's default index: about 3 GB if that is a CUDA build")
    else:
        log(
            f"{name} from pip's default index, because {index} does not respond: download about 200 MB if that is a "
            f"CPU build; about 3 GB, and 5 GB on disk, if it is a CUDA build. {OTHER_SIZES}"
        )
    return pip(*constraints, *arguments)


def without(lock: str, names: tuple[str, ...]) -> str:
    """A lock file's text without some packages."""
    return "".join(line for line in lock.splitlines(keepends=True) if line.partition("==")[0] not in names)


def installed(name: str) -> bool:
    """Whether a package of this name is installed."""
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def main(arguments: list[str]) -> int:
    """Installs torch, and writes the constraints file if one is requested; returns pip's exit status."""
    if arguments[:1] != ["--constraints"]:
        return install(arguments, [])
    file, arguments = Path(arguments[1]), arguments[2:]
    part = file.with_suffix(".part")
    part.write_text(without(LOCK.read_text(), PINNED_BY_TORCH))
    status = 0 if installed("torch") else install(arguments, ["--constraint", str(part)])
    if status == 0:
        part.write_text(without(LOCK.read_text(), tuple(filter(installed, PINNED_BY_TORCH))))
        part.rename(file)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
