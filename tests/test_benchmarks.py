"""The scripts of benchmarks/ whose figures the issue tracker and README quote: they run on the demo model and say what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "words,positive",
    [
        (("scaling.py", "-p", "64", "-r", "1", "-t", "2"), ("one", "all", "ratio", "int8_probe")),
        (("depth.py", "-d", "500", "-n", "2", "-r", "1"), ("near_ms", "far_ms", "share", "bytes")),
        (
            ("depth.py", "-d", "500", "-n", "2", "-r", "1", "--kv-dtype", "q8_0"),
            ("near_ms", "far_ms", "share", "bytes"),
        ),
    ],
)
def test_a_script_says_what_it_measured(words, positive):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{words[0]}", *words[1:], "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(found[name] > 0 for name in positive)
