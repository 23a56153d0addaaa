"""Every code block of README and docs/ is executed.

A page is one sandbox: its blocks run in order in one directory. A block whose first line is a comment with a file name
(`# my_rules.yaml`) is written to that file; other `python` blocks run in one namespace; `sh` blocks run line by line.
MODEL and WEIGHTS name the demo model. A plain `ktx ...` or `python ...` runs in a process that has torch already.
`make` targets are asked for (`make -n`), because the landing runs them for real;
commands that need gigabytes, minutes, a network or another program run as the smaller twin that SMALLER names.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ktx.demo
from ktx.ops.registry import OPERATORS, resolve
from tests.support import preloaded_process

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = {"sh", "bash", "python", "yaml"}
SHOWN = {"", "text", "json", "cpp", "console", "diff"}  # output and fragments, not commands
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
FILE = re.compile(r"^(?:#|//) ([\w./-]+\.(?:py|yaml|yml|json|txt))\s*$")
SMALLER: list[tuple[str, str]] = [
    (r"/tmp/v2lite", '"$OUT/v2lite"'),
    (r"--preset v2lite", "--preset v2lite --layers 2 --experts 4 --moe-ff 64 --hidden 256 --ff 512 --vocab 512"),
    (r"-p [\d,]+ -n [\d,]+ -t 2 -r 3", "-p 16 -n 2 -t 2 -r 1"),
    (
        r"^(ktx verify --perplexity .*)",
        r'\1 --tokens 300 --model "$MODEL" --weights "$WEIGHTS"',
    ),  # every format: tests/cli/test_cli.py
    (r" --peer llama\.cpp", ""),
    (r"^python examples/", f"python {ROOT}/examples/"),
    (r'"\$\(python -c .import ktx\.demo; print\(ktx\.demo\.heldout\(\)\).\)"', '"$HELDOUT"'),
    (r"^git clone .*|^cd ktx$|^pip install .*|^apt-get .*", "true"),
    (r"^((?:KTX_ISA=\w+ )?)make ([a-z-]+).*", r"\1make -n \2"),
    (r"^\.ci/run$", "bash -n .ci/run"),
    (r"^(ktx download .*)", r"python -m tests.hub.fake \1"),
    (  # on tasks that need no network, where it is installed
        r"^(lm_eval .*)--tasks [\w,]+ (.*)",
        rf"! command -v lm_eval || \1--tasks ktx_choices,ktx_heldout --include_path {ROOT}/tests/server/lm_eval --limit 4 \2",  # noqa: E501
    ),
    (  # Ray takes its time: the options alone
        r"^ktx (serve --ray .*)",
        "python -c \"from ktx.__main__ import build_parser as b; b().parse_args('\\1'.split())\"",
    ),
    (  # in the background, ended with the page
        r"^(ktx serve .*)",
        r"setsid \1 > serve.log 2>&1 & echo $! > serve.pid; for i in $(seq 300); do curl -sf http://127.0.0.1:10002/health > /dev/null && exit; sleep 0.2; done; cat serve.log; exit 1",  # noqa: E501
    ),
]


CURL = """import sys, urllib.request
data = sys.argv[sys.argv.index("-d") + 1].encode() if "-d" in sys.argv else None
try:
    print(urllib.request.urlopen(next(word for word in sys.argv if word.startswith("http")), data).read().decode())
except OSError as error:
    sys.exit(f"curl: {error}")
"""


def blocks(page: Path) -> list[tuple[int, str, str]]:
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 1, m[1].strip(), m[2]) for m in BLOCK.finditer(text)]


def commands(body: str) -> list[str]:
    lines = body.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def smaller(command: str) -> str:
    for pattern, twin in SMALLER:
        command = re.sub(pattern, twin, command)
    return command


PLAIN = re.compile(
    r"((?:[A-Z_]+=\S+ )*)(ktx|python -m [\w.]+|python (?!benchmarks/plan_v3)[\w/]+\.py)( [^|&;<>`()*?#\\~]+)?"
)


def run_command(command: str, sandbox: Path, where: str) -> None:
    cwd = ROOT if any(word in command for word in ("make -n", "bash -n", "benchmarks/")) else sandbox
    env = os.environ | {
        "MODEL": str(ktx.demo.path()),
        "WEIGHTS": str(ktx.demo.gguf()),
        "HELDOUT": str(ktx.demo.heldout()),
        "OUT": str(sandbox),
        "NO_COLOR": "1",
        "PATH": f"{sandbox / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{sandbox}:{os.environ.get('PYTHONPATH', '')}",
    }
    if plain := PLAIN.fullmatch(command):
        env |= dict(pair.split("=", 1) for pair in plain[1].split())
        words = [re.sub(r"\$(\w+)", lambda name: env[name[1]], word) for word in shlex.split(plain[3] or "")]
        done = preloaded_process.run(plain[2].split()[-1], *words, env=env, cwd=cwd)
    else:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, f"{where}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def wait_for_the_port() -> None:
    """Until the server that was asked to end has gone."""
    for _ in range(100):
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", 10002)):
                return
        time.sleep(0.1)


@pytest.fixture
def sandbox(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    shim = tmp_path / "bin" / "ktx"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ktx "$@"\n')
    shim.chmod(0o755)
    python = tmp_path / "bin" / "python"  # a script: a link would lose the virtual environment
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    if not shutil.which("curl"):  # as on a bare Debian
        curl = tmp_path / "bin" / "curl"
        curl.write_text(f"#!{sys.executable}\n{CURL}")
        curl.chmod(0o755)
    with open(Path(tempfile.gettempdir()) / "ktx-docs-port.lock", "w") as port:
        if re.search("^ktx serve ", request.node.callspec.params["page"].read_text(), re.M):
            fcntl.flock(port, fcntl.LOCK_EX)  # servers of two pages would have one port
        yield tmp_path
        if (tmp_path / "serve.pid").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((tmp_path / "serve.pid").read_text()), signal.SIGTERM)
            wait_for_the_port()


def test_the_table_of_operators_is_the_registry():
    rows = re.findall(r"^\| `(\w+)` \| `(ktx\.ops\.[\w.]+)` \|", (ROOT / "docs" / "operators.md").read_text(), re.M)
    assert sorted(rows) == sorted((name, f"{module}.{name}") for name, module in OPERATORS.items())
    assert all(resolve(path) is resolve(name) for name, path in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, sandbox: Path, monkeypatch):
    monkeypatch.chdir(sandbox)
    monkeypatch.syspath_prepend(str(sandbox))
    monkeypatch.setenv("MODEL", str(ktx.demo.path()))
    monkeypatch.setenv("WEIGHTS", str(ktx.demo.gguf()))
    namespace: dict = {"__name__": "docs"}
    for line, language, body in blocks(page):
        where = f"{page.name}:{line}"
        assert language in RUN | SHOWN, f"{where}: a block marked {language!r} is neither run nor shown"
        name = FILE.match(body.partition("\n")[0])
        if language in RUN and name:
            (sandbox / name[1]).write_text(body)
        elif language == "python":
            exec(compile(body, where, "exec"), namespace)
        elif language in ("sh", "bash"):
            for command in commands(body):
                run_command(smaller(command), sandbox, where)
        elif language == "yaml":
            pytest.fail(f"{where}: a yaml block needs a first line '# name.yaml', so that the page can use it")
