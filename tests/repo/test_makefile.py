"""The Makefile: `make chat` answers one question; listed tests exist, and the quick ones are of every folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


ANSWER = "A rule file is YAML that names the modules of a model which get a better operator.\n"


@pytest.mark.parametrize("words, text", [(["ARGS=-p 'What is a rule file?'"], ""), ([], "What is a rule file?\n")])
def test_chat_answers_one_question(words, text):
    set_up = ["VENV=.venv", "-o", ".venv/.ktx", f"PY={sys.executable}"]  # -o: not made anew
    env = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # those of `make test`
    make = ["make", "--no-print-directory", *set_up, "chat", *words]
    done = subprocess.run(make, input=text, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == ANSWER, done.stderr
