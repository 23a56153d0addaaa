"""Environment variables: one table, the page that shows it, and the sources that read them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from ktx.environment import VARIABLES, check_environment, environment
from ktx.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"(?<![A-Za-z_])KTX_[A-Z]+(?:_[A-Z]+)*\b")
READ = re.compile(r'getenv\("(KTX_\w+)"')  # in C++, where macros begin like this too
MISSPELT = {"KTX_THREDS", "KTX_API_KEYS"}  # in tests of what is said about such


def sources(folder, *kinds):
    return [path for kind in kinds for path in sorted((ROOT / folder).rglob(kind))]


def named(paths, pattern=NAME):
    return {found for path in paths for found in pattern.findall(path.read_text(encoding="utf-8"))}


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(KTX_\w+)` \| (.*) \|$", page, re.M)
    assert rows == [(variable.name, variable.help) for variable in VARIABLES.values()]


def test_nothing_else_is_read_or_named():
    python = sources("ktx", "*.py") + sources("benchmarks", "*.py")
    others = [ROOT / name for name in ("Makefile", "setup.py", "README.md", "pyproject.toml")] + sources("docs", "*.md")
    others += [path for path in sources(".ci", "*") if path.is_file() and path.parent.name != "__pycache__"]
    others += sources("examples", "*.py")
    assert named(python + others) - MISSPELT <= set(VARIABLES)
    assert named(sources("tests", "*.py")) - MISSPELT <= set(VARIABLES)
    assert named(sources("csrc", "*.cpp", "*.h", "*.inl"), READ) <= set(VARIABLES)


def test_each_is_read_somewhere():
    table = ROOT / "ktx" / "environment.py"
    read = named([path for path in sources("ktx", "*.py") if path != table])
    assert set(VARIABLES) == (read | named(sources("csrc", "*.cpp"), READ)) & set(VARIABLES)


def test_a_known_one_is_no_cause_for_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_environment({**dict.fromkeys(VARIABLES, ""), "PATH": "", "OTHER": ""})
    for name, near in (("KTX_API_KEYS", "KTX_API_KEY"), ("KTX_THREDS", "KTX_THREADS")):
        with pytest.warns(UserWarning, match=rf"{name} is not known \(did you mean '{near}'"):
            check_environment({name: "1"})


def test_values():
    assert environment("KTX_THREADS", {"KTX_THREADS": "3"}) == 3 and environment("KTX_THREADS", {}) == 0
    with pytest.raises(UsageError, match="KTX_THREADS=x is not known: use a number"):
        environment("KTX_THREADS", {"KTX_THREADS": "x"})
