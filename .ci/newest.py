"""Tests ktx with dependency versions other than the locked ones.

`python .ci/newest.py requirements [--lift]` prints the requirements of pyproject.toml, including the extras `serve`,
`modelscope` and `dev`, one per line; with --lift without upper bounds. For torch it prints the installed version.
`python .ci/newest.py over DIR` creates an environment on top of this Python's, in which pip can install other versions
that take precedence. `python .ci/newest.py test ARGUMENTS` runs pytest with these arguments, then prints the failures
and the versions that differ from the lock.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ktx.utils import versions  # noqa: E402

EXTRAS = ("serve", "modelscope", "dev")
MAX_LISTED_FAILURES = 20  # per file


def declared(lift: bool) -> list[str]:
    """The requirements of pyproject.toml; without upper bounds when `lift` is true.

    torch is pinned to the installed version, because an eager upgrade of what requires it (accelerate, peft) would
    install PyPI's newest build, gigabytes of CUDA.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    # CUDA builds of torch require an exact version of triton.
    torch_pins_triton = "triton" in " ".join(importlib.metadata.requires("torch") or [])
    excluded = (f"{versions.DISTRIBUTION}[", "torch>", *(["triton>"] if torch_pins_triton else []))
    lines = [line for line in lines if not line.startswith(excluded)]
    lines = [re.sub(r",<[^;]*", "", line) for line in lines] if lift else lines
    return [*lines, f"torch=={importlib.metadata.version('torch')}"]


def over(folder: Path) -> None:
    """Creates an environment on top of this one, so that torch is not installed twice."""
    venv.EnvBuilder(clear=True, symlinks=True).create(folder)
    site_packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(site_packages, "under.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")


def pins() -> dict[str, list[str]]:
    """The locked versions of each package, for any Python."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, _, rest = line.partition("==")
        if rest:
            found.setdefault(name, []).append(rest.partition(" ")[0])
    return found


def others() -> Iterator[tuple[str, str, str, str]]:
    """The packages whose installed version is not the lock's.

    Yields:
        (name, installed version, locked versions, "newer than tested", "older than tested" or "").
    """
    locked = pins() | {"torch": []}
    tested = {re.sub(r"[-_.]+", "-", name).lower(): name for name in versions.TESTED}
    for name, pinned in sorted(locked.items()):
        if version := versions.installed_version(name):
            how = versions.compare_to_tested(tested[name], version) if name in tested else None
            if version not in pinned and (pinned or how):
                yield name, version, " or ".join(pinned) or "-", f"{how} than tested" if how else ""


def broken(report: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The failures of a JUnit report by file, each as test name and first line of the error; and the outcome counts."""
    failures: dict[str, list[str]] = {}
    counts = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    for case in ElementTree.parse(report).iter("testcase"):
        failed, skipped = case.find("failure"), case.find("skipped")
        error = case.find("error")
        bad = failed if failed is not None else error
        outcome = (
            "skipped" if skipped is not None else "passed" if bad is None else "failed" if bad is failed else "errors"
        )
        counts[outcome] += 1
        if bad is not None:
            first_line = (bad.get("message") or bad.text or "").strip().partition("\n")[0]
            file = f"{case.get('classname', '').replace('.', '/')}.py"
            failures.setdefault(file, []).append(f"{case.get('name')}: {first_line[:160]}")
    return failures, counts


def summary(report: Path) -> str:
    """The text printed after a test run: differing versions, outcome counts and failures."""
    failures, counts = broken(report)
    rows = [("package", "installed", "locked", ""), *others()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"Python {platform.python_version()}, torch {versions.installed_version('torch')};"
        " versions that differ from the lock:"
    ]
    lines += [
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    if len(rows) == 1:
        lines[-1] = "  none"
    lines.append(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for file, tests in failures.items():
        lines += [f"failures in {file}: {len(tests)}", *(f"  {test}" for test in tests[:MAX_LISTED_FAILURES])]
        lines += [f"  and {len(tests) - MAX_LISTED_FAILURES} more"] if len(tests) > MAX_LISTED_FAILURES else []
    return "\n".join(lines)


def test(arguments: list[str]) -> int:
    """Runs pytest, prints the summary and returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "--tb=short", *arguments]
        status = subprocess.run(command, cwd=ROOT).returncode
        print(summary(report) if report.exists() else f"pytest exited with {status} before any test")
    return status


def main(arguments: list[str]) -> int:
    """Runs the sub-command that the arguments name; returns the exit status."""
    if arguments[:1] == ["requirements"] and arguments[1:] in ([], ["--lift"]):
        print("\n".join(declared(lift=arguments[1:] == ["--lift"])))
        return 0
    if arguments[:1] == ["test"]:
        return test(arguments[1:])
    if arguments[:1] == ["over"] and len(arguments) == 2:
        over(Path(arguments[1]).resolve())
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
