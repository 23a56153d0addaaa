"""ktx doctor: a report on any machine, quickly, also where something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ktx import hardware
from ktx.cli import doctor
from ktx.kernels import microbench
from ktx.quant.types import QTYPES
from ktx.utils import versions
from tests.support import preloaded_process

ROOT = Path(__file__).resolve().parents[2]


def ktx(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return preloaded_process.run("ktx", *words, env=os.environ | environment)


@pytest.mark.wall_clock
def test_json_has_machine_measurements_kernels_versions_and_remedies():
    command = [sys.executable, "-m", "ktx", "doctor", "--json"]  # its imports are among what it takes
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    taken = time.perf_counter() - start
    found = json.loads(done.stdout)
    assert done.returncode == 0 and taken < 30  # five seconds on a quiet machine
    assert found["machine"]["usable cpus"] == len(os.sched_getaffinity(0))
    assert all(float(text.split()[0]) > 0 for text in found["measured"].values())
    assert {"read bandwidth", "int8 peak", "f32 peak"} == set(found["measured"])
    assert found["kernels"]["picked"] in hardware.ISAS
    assert {"Linear", "Experts", "MLA", "Attention"} <= set(found["operators"])
    listed = [name for names in found["weight types"].values() for name in names]
    assert len(listed) == len(set(listed)) == len(QTYPES)
    assert all(entry["remedy"].startswith("pip install") for entry in found["missing"].values())


def test_read_bandwidth_says_what_was_read_beside_the_cache(monkeypatch):
    monkeypatch.setattr(microbench, "last_level_cache", lambda: 160 << 20)
    monkeypatch.setattr(microbench, "memory", lambda: (1 << 36, 1 << 35))
    assert doctor.report(False)["measured"]["read bandwidth"].endswith("GB/s (640 MiB read, last-level cache 160 MiB)")
    monkeypatch.setattr(microbench, "memory", lambda: (1 << 34, 1 << 29))
    assert doctor.report(False)["measured"]["read bandwidth"].startswith("not measured")


def test_versions_that_were_not_tested_are_named(monkeypatch, capsys):
    before = versions.installed_version
    others = {"transformers": "9.1", "numpy": "1.2.3"}
    monkeypatch.setattr(versions, "installed_version", lambda name: others.get(name) or before(name))
    found = doctor.report(quick=True)
    assert found["versions"]["transformers"] == "9.1"
    assert [line for line in found["warnings"] if "than the versions ktx was tested with" in line] == [
        f"transformers 9.1 is newer than the versions ktx was tested with ({versions.tested_range('transformers')}): "
        f"pip install '{versions.requirement('transformers')}'",
        f"numpy 1.2.3 is older than the versions ktx was tested with ({versions.tested_range('numpy')}): "
        f"pip install '{versions.requirement('numpy')}'",
    ]
    doctor.show(found)
    out = capsys.readouterr().out
    assert f"9.1  (tested: {versions.tested_range('transformers')})" in out and "! transformers 9.1 is newer" in out


def test_a_lowered_isa_is_reported_with_its_reason():
    found = json.loads(ktx("doctor", "--json", "--quick", KTX_ISA="scalar").stdout)
    assert found["kernels"]["picked"] == "scalar" and "measured" not in found, found["kernels"]
    if found["kernels"]["best possible"] != "scalar":
        assert any("KTX_ISA lowers" in line for line in found["warnings"])


def test_a_wrong_isa_is_one_line():
    done = ktx("doctor", "--quick", KTX_ISA="sse9")
    assert done.returncode == 2 and "sse9" in done.stderr and "avx2" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_extension_the_rest_is_still_told(monkeypatch, tmp_path):
    """What a user runs when the build failed must not fail with it."""
    code = (
        "import pathlib, runpy, sys; import ktx.errors; real = pathlib.Path.exists; "
        "pathlib.Path.exists = lambda p, **k: False if p.name.startswith('_C.') else real(p, **k); "
        "sys.argv = ['ktx', 'doctor', '--json']; runpy.run_module('ktx', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["versions"]["python"]
    assert "is missing" in found["kernels"]["error"] and any("is missing" in line for line in found["warnings"])


@pytest.mark.parametrize(
    "change,words",
    [
        ({"quota": 1.0, "cpus": (0, 1, 2, 3), "cores": 1}, "cgroup allows 1 of 4"),
        ({"quota": None, "cpus": (0, 1, 2, 3), "cores": 2}, "4 logical cpus on 2 physical cores"),
        ({"huge_pages": "always madvise [never]"}, "transparent huge pages are off"),
    ],
)
def test_warnings(change, words):
    m = replace(hardware.machine(), **change)
    kernels = {"picked": "avx2", "best possible": "avx2", "threads": 1}
    assert any(words in line for line in doctor._list_warnings(m, {"kernels": kernels}))


def test_a_healthy_machine_gets_no_warning():
    m = replace(hardware.machine(), quota=None, cpus=(0, 1), cores=2, huge_pages="always [madvise] never")
    assert doctor._list_warnings(m, {"kernels": {"picked": "avx2", "best possible": "avx2", "threads": 2}}) == []


def test_table_is_aligned(capsys):
    doctor.show(doctor.report(quick=True))
    out = capsys.readouterr().out
    assert "second opinion" in out and "avx2" in out
    machine = [line for line in out.splitlines() if line.startswith("  ")][:4]
    assert len({len(line) - len(line[2:].split("   ", 1)[1].lstrip()) for line in machine if "   " in line[2:]}) == 1
