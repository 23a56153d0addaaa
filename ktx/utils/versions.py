"""The distribution's name, how to install its extras, and the dependency versions that ktx was tested with.

Must not import torch: `ktx doctor` uses this module when torch is broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ktx.utils.version import VERSION

DISTRIBUTION = "ktx-moe"  # `ktx` on PyPI is another project: no message may tell a user to install it
CHECKOUT = Path(__file__).resolve().parents[2]

# Package -> (oldest accepted version, newest version that the tests ran on). Only the given components are compared:
# 5.23 includes 5.23.1. pyproject.toml has the same bounds; tests/repo/test_packaging.py compares them and the lock.
TESTED = {
    "torch": ("2.11", "2.15"),
    "transformers": ("5.17", "5.24"),
    "tokenizers": ("0.22", "0.23"),
    "gguf": ("0.17", "0.19"),
    "safetensors": ("0.5", "0.8"),
    "huggingface_hub": ("1.31", "2.4"),
    "numpy": ("1.26", "2.5"),
    "jinja2": ("3.1", "3.1"),
    "pyyaml": ("6", "6"),
    "rich": ("13", "15"),
    "prompt_toolkit": ("3.0.40", "3.0.53"),
    "shtab": ("1.7", "1.13"),
    "cpufeature": ("0.2.1", "0.2.1"),
    "llguidance": ("1.3", "1.9"),
    "fastapi": ("0.120", "0.165"),
    "pydantic": ("2.9", "2.14"),
    "starlette": ("0.49.1", "1.10"),
    "uvicorn": ("0.40", "0.54"),
    "sse-starlette": ("3.3", "3.7"),
    "prometheus-client": ("0.20", "0.26"),
    "httpx": ("0.27", "0.28"),
    "ray": ("2.60", "2.60"),
    "modelscope-hub": ("0.5", "0.5"),
}


def install_command(extra: str) -> str:
    """The pip command that adds an extra (`serve`, `ray`, ...) to this installation, a checkout or a wheel."""
    if (CHECKOUT / "pyproject.toml").is_file():
        command = f"pip install -e '.[{extra}]'"
        return command if Path.cwd() == CHECKOUT else f"{command} in {CHECKOUT}"
    return f"pip install '{_wheel()}[{extra}]'"


def _wheel() -> str:
    """Returns the wheel to name in the pip command that adds an extra: the one that ktx was installed from.

    If pip recorded none, it is the file that `make wheel` creates.
    """
    try:
        url = json.loads(importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}").get(
            "url", ""
        )
    except importlib.metadata.PackageNotFoundError:
        url = ""
    if url.endswith(".whl"):
        return unquote(urlsplit(url).path) if url.startswith("file:") else url
    return f"dist/{DISTRIBUTION.replace('-', '_')}-{VERSION}-cp311-abi3-linux_x86_64.whl"


def release_components(version: str) -> tuple[int, ...]:
    """The release components of a version: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def installed_version(name: str) -> str | None:
    """The installed version of a package; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tested_range(name: str) -> str:
    """The tested versions as text for messages: `5.17 to 5.23`."""
    oldest, newest = TESTED[name]
    return oldest if oldest == newest else f"{oldest} to {newest}"


def requirement(name: str) -> str:
    """The tested versions as a pip requirement: `transformers>=5.17,<5.24`."""
    oldest, newest = TESTED[name]
    *front, last = release_components(newest)
    return f"{name}>={oldest},<{'.'.join(map(str, [*front, last + 1]))}"


def compare_to_tested(name: str, version: str) -> str | None:
    """`older` or `newer` when a version is outside the tested range; None when it is inside."""
    release, (oldest, newest) = release_components(version), map(release_components, TESTED[name])
    if release < oldest:
        return "older"
    return "newer" if release[: len(newest)] > newest else None


def untested_warnings() -> list[str]:
    """One line with a remedy for each installed package whose version is outside the tested range."""
    return [
        f"{name} {version} is {how} than the versions ktx was tested with ({tested_range(name)}): "
        f"pip install '{requirement(name)}'"
        for name in TESTED
        if (version := installed_version(name)) and (how := compare_to_tested(name, version))
    ]
