"""Installs PyTorch into the environment of the Python that runs this: `python .ci/install_torch.py [--constraints FILE] WORDS`.

WORDS go to pip as they are: a requirement (`torch==2.13.0`), or with an index, a file or an address of its own. Without one of those, and
where no NVIDIA driver is, PyTorch's own CPU build is taken from its public index (TORCH_INDEX names another) if that answers; else whatever
the index that pip has holds, which on PyPI are gigabytes of CUDA. FILE gets what the rest of the installation keeps to: requirements.lock, less
what this torch brings at versions of its own.
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
PATIENCE = 5.0  # seconds for the index's first answer, the look-up of its name included
OWN_PLACE = ("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--no-index")
BROUGHT = ("triton",)  # CUDA builds of torch ask for one version of it
OTHERWISE = "Other packages: about 60 MB, for the tests 400 MB. Another torch: make chat TORCH='torch==VERSION --index-url ADDRESS'"


def has_driver() -> bool:
    """Whether a CUDA build could find a GPU here."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def names_its_place(words: list[str]) -> bool:
    """Whether the words say where torch comes from."""
    return any(word.partition("=")[0] in OWN_PLACE or "/" in word or word.endswith(".whl") for word in words)


def answers(address: str) -> bool:
    """Whether a package index answers soon. In a thread: the look-up of a name knows no limit of time."""
    found: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{address.rstrip('/')}/torch/", timeout=PATIENCE) as answer:
                found.append(answer.status == 200)
        except (OSError, ValueError):  # no network, no such page, no such address: all mean the other index
            found.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return found == [True]


def say(text: str) -> None:
    print(f"PyTorch: {text}", file=sys.stderr, flush=True)


def pip(*words: str) -> int:
    quiet = [] if sys.stderr.isatty() else ["--quiet"]  # gigabytes need their progress bar
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *quiet, *words]
    ).returncode


def install(words: list[str], constraints: list[str]) -> int:
    """pip's exit status."""
    index, wanted = os.environ.get("TORCH_INDEX", INDEX), " ".join(word for word in words if not word.startswith("-"))
    if names_its_place(words):
        say(f"{' '.join(words)}, as TORCH says")
        return pip(*constraints, *words)
    if has_driver():
        say(
            f"{wanted} from the index that pip has, for the NVIDIA driver here: about 3 GB to fetch, 5 GB on disk. {OTHERWISE}"
        )
    elif answers(index):
        say(f"{wanted}, the CPU build from {index} (no NVIDIA driver here): about 200 MB to fetch. {OTHERWISE}")
        if pip("--no-deps", "--index-url", index, *words):  # what torch needs has the lock's versions, from pip's index
            say(f"{index} has no such build; from the index that pip has: about 3 GB if that is built for CUDA")
    else:
        say(
            f"{wanted} from the index that pip has, because {index} does not answer: "
            f"about 200 MB if that is a CPU build, about 3 GB to fetch and 5 GB on disk if it is built for CUDA. {OTHERWISE}"
        )
    return pip(*constraints, *words)


def without(lock: str, names: tuple[str, ...]) -> str:
    """A lock less some packages."""
    return "".join(line for line in lock.splitlines(keepends=True) if line.partition("==")[0] not in names)


def installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def main(words: list[str]) -> int:
    """The exit status of pip."""
    if words[:1] != ["--constraints"]:
        return install(words, [])
    file, words = Path(words[1]), words[2:]
    part = file.with_suffix(".part")
    part.write_text(without(LOCK.read_text(), BROUGHT))
    status = 0 if installed("torch") else install(words, ["--constraint", str(part)])
    if status == 0:
        part.write_text(without(LOCK.read_text(), tuple(filter(installed, BROUGHT))))
        part.rename(file)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
