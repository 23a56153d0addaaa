"""What `make test-newest` and `make test-allowed` install, and what they say at the end."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from ktx.utils import versions

ROOT = Path(__file__).resolve().parents[2]
REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.models.test_a" name="test_good"/>
<testcase classname="tests.models.test_a" name="test_bad[1]"><failure message="AssertionError: 1 is not 2&#10;more">...</failure></testcase>
<testcase classname="tests.models.test_a" name="test_worse"><error message="failed on setup: no such name">...</error></testcase>
<testcase classname="tests.hub.test_b" name="test_left_out"><skipped message="no client"/></testcase>
<testcase classname="tests.hub.test_b" name="test_bad"><failure message="ImportError: gone">...</failure></testcase>
</testsuite></testsuites>"""  # noqa: E501


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("newest", ROOT / ".ci" / "newest.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_bounds_are_lifted_and_nothing_else(tool):
    bounded, lifted = ([Requirement(line) for line in tool.declared(lift)] for lift in (False, True))
    assert [one.name for one in bounded] == [one.name for one in lifted]
    assert {"transformers", "uvicorn", "modelscope-hub", "pytest"} <= {one.name for one in bounded}
    assert versions.DISTRIBUTION not in {one.name for one in bounded}
    for pinned in (bounded.pop(), lifted.pop()):
        assert str(pinned) == f"torch=={versions.installed_version('torch')}", "no other torch is installed over it"
    for had, has in zip(bounded, lifted, strict=True):
        assert {one.operator for one in has.specifier} == {">="} and set(has.specifier) < set(had.specifier)
        assert str(has.marker) == str(had.marker)


@pytest.mark.parametrize("torch_needs,there", [(["filelock"], True), (["triton==1.0; sys_platform == 'linux'"], False)])
def test_triton_is_left_to_a_torch_that_brings_it(tool, monkeypatch, torch_needs, there):
    monkeypatch.setattr(tool.importlib.metadata, "requires", lambda name: torch_needs)
    assert any(line.startswith("triton") for line in tool.declared(lift=True)) is there


def test_the_summary_names_what_broke_and_against_what(tool, tmp_path, monkeypatch):
    (tmp_path / "report.xml").write_text(REPORT)
    here = {
        "transformers": "99.1",
        "gguf": tool.pins()["gguf"][0],
        "huggingface-hub": "0.0.1",
        "anyio": "99",
        "torch": "99.0",
    }
    monkeypatch.setattr(tool.versions, "installed_version", here.get)
    lines = tool.summary(tmp_path / "report.xml").splitlines()
    table = {line.split()[0]: line.split() for line in lines[2:6]}
    assert set(table) == {"transformers", "huggingface-hub", "anyio", "torch"}  # gguf is the locked one
    assert table["transformers"] == ["transformers", "99.1", tool.pins()["transformers"][0], "newer", "than", "tested"]
    assert table["huggingface-hub"][3:] == ["older", "than", "tested"] and table["torch"][2:] == [
        "-",
        "newer",
        "than",
        "tested",
    ]
    assert table["anyio"] == ["anyio", "99", tool.pins()["anyio"][0]]
    assert lines[6:] == [
        "1 passed, 2 failed, 1 errors, 1 skipped",
        "failures in tests/models/test_a.py: 2",
        "  test_bad[1]: AssertionError: 1 is not 2",
        "  test_worse: failed on setup: no such name",
        "failures in tests/hub/test_b.py: 1",
        "  test_bad: ImportError: gone",
    ]


def test_with_the_locked_versions_there_is_nothing_to_name(tool, tmp_path, monkeypatch):
    (tmp_path / "report.xml").write_text("<testsuites/>")
    monkeypatch.setattr(tool.versions, "installed_version", lambda name: tool.pins().get(name, [None])[0])
    assert tool.summary(tmp_path / "report.xml").splitlines()[1:] == [
        "  none",
        "0 passed, 0 failed, 0 errors, 0 skipped",
    ]


def test_an_environment_over_this_one_has_its_packages_behind_its_own(tool, tmp_path):
    tool.over(tmp_path / "over")
    (own,) = (tmp_path / "over" / "lib").glob("python*/site-packages")
    (own / "gguf.py").write_text("")
    code = "import gguf, yaml, sys; print(gguf.__file__, yaml.__file__, sys.prefix, sep='\\n')"
    done = subprocess.run([tmp_path / "over" / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, prefix = done.stdout.splitlines()
    assert first == str(own / "gguf.py") and second == yaml.__file__ and prefix == str(tmp_path / "over")
