"""What pip gets of us: the distribution's name, its bounds, the lock, and what was tested."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

from ktx import versions

ROOT = Path(__file__).resolve().parent.parent

# `ktx` on the package index is somebody else's: no text of ours may have it installed, nor ask for its metadata.
WRONG_NAME = re.compile(
    r"""\bktx\[\s*[a-z]                                                 # ktx[serve]
    | \b(?:pip3?|pipx|uv)\s[^|;&`()\n]*?\b(?:install|add|download)\s(?:[^|;&`()\n]*?[\s'"])?ktx(?=[\s'"`=<>~!;,).]|$)
    | \b(?:version|distribution|requires|files|metadata)\(\s*['"]ktx['"]""",
    re.X | re.M,
)


def texts() -> dict[str, str]:
    """Every text of the repository by its path."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {}
    for name in filter(None, names.split("\0")):
        try:
            found[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # a picture, a model; or a file deleted and not committed
    return found


@pytest.mark.parametrize(
    "text",
    [
        "pip install ktx",
        "pip install -U 'ktx'",
        "pip3 install ktx==0.5.0",
        "`pip install ktx`",
        "pip install 'ktx[serve]'",
        "python -m pip install --upgrade ktx transformers",
        "uv pip install ktx",
        "uv add ktx",
        "pipx install ktx",
        'dev = ["ktx[serve]"]',
        'importlib.metadata.version("ktx")',
        "distribution('ktx')",
    ],
)
def test_the_wrong_name_is_found(text):
    assert WRONG_NAME.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "pip install -e '.[serve]'",
        "pip install ktx-moe",
        "pip install 'dist/ktx_moe-0.1.0-cp311-abi3-linux_x86_64.whl[serve]'",
        "pip install httpx; ktx serve",
        "git clone https://example.org/ktx && pip install -e .",
    ],
)
def test_the_right_name_is_not_found(text):
    assert not WRONG_NAME.search(text)


def test_no_text_sends_anybody_to_a_strangers_package():
    wrong = [
        f"{name}:{text[: found.start()].count(chr(10)) + 1}: {found[0]}"
        for name, text in texts().items()
        if name != "tests/test_packaging.py"
        for found in WRONG_NAME.finditer(text)
    ]
    assert not wrong, "ktx on the package index is somebody else's:\n" + "\n".join(wrong)


def test_an_extra_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert versions.install("serve") == "pip install -e '.[serve]'"
    monkeypatch.chdir(tmp_path)
    assert versions.install("ray") == f"pip install -e '.[ray]' in {ROOT}"


@pytest.mark.parametrize(
    "direct_url,wheel",
    [
        ('{"url": "file:///home/m%20e/dist/ktx_moe-1-cp311-abi3-linux_x86_64.whl"}', "/home/m e/dist/ktx_moe-1-cp311-abi3-linux_x86_64.whl"),
        ('{"url": "https://example.org/ktx_moe-1-cp311-abi3-linux_x86_64.whl"}', "https://example.org/ktx_moe-1-cp311-abi3-linux_x86_64.whl"),
        (None, "dist/ktx_moe-0.1.0-cp311-abi3-linux_x86_64.whl"),
    ],
)  # fmt: skip
def test_an_extra_of_a_wheel(monkeypatch, tmp_path, direct_url, wheel):
    class Installed:
        def read_text(self, name):
            return direct_url

    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert versions.install("serve") == f"pip install '{wheel}[serve]'"


def test_an_extra_of_files_that_nobody_installed(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert versions.install("serve").startswith("pip install 'dist/ktx_moe-")
