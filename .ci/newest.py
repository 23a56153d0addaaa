"""How ktx does on other versions than the locked ones.

`python .ci/newest.py requirements [--lift]` prints what pyproject.toml asks for, extras `serve`, `modelscope` and `dev` included, one a line and without torch:
with its bounds, or, lifted, without their ends. `python .ci/newest.py over DIR` makes an environment that has what this Python's has, and where pip can put other versions
in front of it. `python .ci/newest.py test WORDS` runs pytest with those words, then says what broke and against which versions.
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
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ktx.utils import versions  # noqa: E402

EXTRAS = ("serve", "modelscope", "dev")
MOST = 20  # failures that are shown of a file


def declared(lift: bool) -> list[str]:
    """Requirements for pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    brought = "triton" in " ".join(importlib.metadata.requires("torch") or [])  # CUDA builds ask for one version of it
    left_out = (f"{versions.DISTRIBUTION}[", "torch>", *(["triton>"] if brought else []))
    lines = [line for line in lines if not line.startswith(left_out)]
    return [re.sub(r",<[^;]*", "", line) for line in lines] if lift else lines


def over(folder: Path) -> None:
    """An environment over this one: torch is installed once."""
    venv.EnvBuilder(clear=True, symlinks=True).create(folder)
    own = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(own, "under.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")


def pins() -> dict[str, list[str]]:
    """The locked versions of each package, of any Python."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, _, rest = line.partition("==")
        if rest:
            found.setdefault(name, []).append(rest.partition(" ")[0])
    return found


def others() -> Iterator[tuple[str, str, str, str]]:
    """Packages whose version here is not the lock's: name, version, the lock's, and `newer` or `older` than what was tested."""
    locked = pins() | {"torch": []}
    tested = {re.sub(r"[-_.]+", "-", name).lower(): name for name in versions.TESTED}
    for name, pinned in sorted(locked.items()):
        if here := versions.installed(name):
            how = versions.outside(tested[name], here) if name in tested else None
            if here not in pinned and (pinned or how):
                yield name, here, " or ".join(pinned) or "-", f"{how} than tested" if how else ""


def broken(report: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Failures by file, each a test and the first line of what went wrong; and how many tests there were of each end."""
    failures: dict[str, list[str]] = {}
    counts = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    for case in xml.parse(report).iter("testcase"):
        failed, skipped = case.find("failure"), case.find("skipped")
        error = case.find("error")
        what = failed if failed is not None else error
        end = (
            "skipped" if skipped is not None else "passed" if what is None else "failed" if what is failed else "errors"
        )
        counts[end] += 1
        if what is not None:
            first = (what.get("message") or what.text or "").strip().partition("\n")[0]
            file = f"{case.get('classname', '').replace('.', '/')}.py"
            failures.setdefault(file, []).append(f"{case.get('name')}: {first[:160]}")
    return failures, counts


def summary(report: Path) -> str:
    """What a person reads at the end."""
    failures, counts = broken(report)
    rows = [("package", "here", "locked", ""), *others()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"Python {platform.python_version()}, torch {versions.installed('torch')}; versions that are not the locked ones:"
    ]
    lines += [
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    if len(rows) == 1:
        lines[-1] = "  none"
    lines.append(", ".join(f"{number} {end}" for end, number in counts.items()))
    for file, tests in failures.items():
        lines += [f"broke in {file}: {len(tests)}", *(f"  {test}" for test in tests[:MOST])]
        lines += [f"  and {len(tests) - MOST} more"] if len(tests) > MOST else []
    return "\n".join(lines)


def test(words: list[str]) -> int:
    """pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "--tb=short", *words]
        status = subprocess.run(command, cwd=ROOT).returncode
        print(summary(report) if report.exists() else f"pytest ended with {status} before any test")
    return status


def main(words: list[str]) -> int:
    if words[:1] == ["requirements"] and words[1:] in ([], ["--lift"]):
        print("\n".join(declared(lift=words[1:] == ["--lift"])))
        return 0
    if words[:1] == ["test"]:
        return test(words[1:])
    if words[:1] == ["over"] and len(words) == 2:
        over(Path(words[1]).resolve())
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
