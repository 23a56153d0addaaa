"""The Makefile's lists of tests: every path exists, and the quick tests are of every folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def listed(name: str) -> list[str]:
    """The paths of a list in the Makefile, without names of tests."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    words = re.search(rf"^{name} \?= (.*)$", text, re.M)
    assert words is not None, name
    return [word.partition("::")[0] for word in words[1].split() if word.startswith("tests/")]


@pytest.mark.parametrize("name", ["FAST", "OLDEST", "OTHERS", "SMOKE"])
def test_listed_paths_exist(name):
    missing = [path for path in listed(name) if not (ROOT / path).exists()]
    assert listed(name) and not missing


def test_quick_tests_are_of_every_folder():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert {Path(path).parts[1] for path in listed("FAST")} == folders
