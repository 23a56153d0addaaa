"""Which build of torch `make` takes, against package indexes of our own with a torch of a few bytes."""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib.util
import os
import socket
import subprocess
import threading
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / ".ci" / "install_torch.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("install_torch", TOOL)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def add_wheel(index: Path, name: str, version: str, needs: str = "") -> None:
    """A package without code, in a simple index."""
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {needs}\n" if needs else ""
    )
    files = {
        "METADATA": about,
        "WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    info, file = f"{name}-{version}.dist-info", folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        record = ""
        for entry, text in files.items():
            wheel.writestr(f"{info}/{entry}", text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{info}/{entry},sha256={digest},{len(text)}\n"
        wheel.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    links = [f'<a href="{one.name}">{one.name}</a>' for one in sorted(folder.glob("*.whl"))]
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Nothing: pytest shows what matters."""


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[dict[str, str]]:
    """PyTorch's index with CPU builds, the one that pip has, and one that accepts connections and says nothing."""
    add_wheel(tmp_path / "cpu", "torch", "99.0+cpu")
    for version in ("99.0", "99.1"):
        add_wheel(tmp_path / "pypi", "torch", version, "triton==1.0")
    add_wheel(tmp_path / "pypi", "triton", "1.0")
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server,
        socket.socket() as mute,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        base = f"http://127.0.0.1:{server.server_port}"
        yield {
            "cpu": f"{base}/cpu",
            "pypi": f"{base}/pypi",
            "mute": f"http://127.0.0.1:{mute.getsockname()[1]}",
            "no page": f"{base}/nothing",
            "no address": "nonsense",
        }
        server.shutdown()


CPU = ("--no-deps", "--index-url", "{cpu}", "torch==99.0")


@pytest.mark.parametrize(
    "words,index,driver,calls,said",
    [
        ("torch==99.0", "cpu", False, [CPU, ("torch==99.0",)], "the CPU build from {cpu} (no NVIDIA driver found): download about 200 MB"),  # noqa: E501
        ("torch==99.0", "cpu", True, [("torch==99.0",)], "for this machine's NVIDIA driver: download about 3 GB"),
        ("torch==99.0", "mute", False, [("torch==99.0",)], "{mute} does not respond"),
        ("torch==99.0", "no page", False, [("torch==99.0",)], "does not respond"),
        ("torch==99.0", "no address", False, [("torch==99.0",)], "nonsense does not respond"),
        ("torch --index-url=http://x", "cpu", False, [("torch", "--index-url=http://x")], "as set in TORCH"),
        ("torch -f /somewhere", "cpu", False, [("torch", "-f", "/somewhere")], "as set in TORCH"),
        ("/somewhere/torch.whl", "cpu", False, [("/somewhere/torch.whl",)], "as set in TORCH"),
        ("torch.whl", "cpu", True, [("torch.whl",)], "as set in TORCH"),
    ],
)  # fmt: skip
def test_which_build(tool, indexes, monkeypatch, capsys, words, index, driver, calls, said):
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(tool, "pip", lambda *given: asked.append(given) or 0)
    monkeypatch.setattr(tool, "has_driver", lambda: driver)
    monkeypatch.setattr(tool, "INDEX_TIMEOUT_S", 1.0 if index == "mute" else 5.0)
    monkeypatch.setenv("TORCH_INDEX", indexes[index])
    assert tool.install(words.split(), []) == 0
    assert asked == [tuple(word.format(**indexes) for word in call) for call in calls]
    assert said.format(**indexes) in capsys.readouterr().err


@pytest.mark.parametrize("place,driver", [("nvidia-smi", True), ("nvidia-smi.txt", False), (None, False)])
def test_a_driver(tool, tmp_path, monkeypatch, place, driver):
    if place:
        (tmp_path / place).touch(mode=0o755)
    real = tool.Path.exists
    monkeypatch.setattr(tool.Path, "exists", lambda path: "nvidia" not in str(path) and real(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tool.has_driver() is driver


class Environment:
    """An environment with pip and nothing else."""

    def __init__(self, folder: Path, indexes: dict[str, str]):
        import pip

        venv.EnvBuilder(symlinks=True).create(folder / "env")
        (folder / "lib").mkdir()
        (folder / "lib" / "pip").symlink_to(Path(pip.__file__).parent)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        self.python, self.constraints = folder / "env" / "bin" / "python", folder / "constraints.txt"
        self.variables = kept | {
            "PYTHONPATH": str(folder / "lib"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": indexes["pypi"],
            "PIP_NO_CACHE_DIR": "1",
        }

    def install(self, words: str, index: str) -> subprocess.CompletedProcess[str]:
        """By the script as make runs it, on a machine without a driver."""
        code = f"import runpy, shutil, pathlib, sys; shutil.which = lambda *_: None; real = pathlib.Path.exists; pathlib.Path.exists = lambda p, **k: 'nvidia' not in str(p) and real(p, **k); sys.argv[1:] = ['--constraints', {str(self.constraints)!r}, *{words.split()!r}]; runpy.run_path({str(TOOL)!r}, run_name='__main__')"  # noqa: E501
        return subprocess.run(
            [self.python, "-c", code], env=self.variables | {"TORCH_INDEX": index}, capture_output=True, text=True
        )

    def version(self, name: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True).stdout.strip()


def names(file: Path) -> set[str]:
    return {line.partition("==")[0] for line in file.read_text().splitlines() if "==" in line}


LOCKED = names(ROOT / "requirements.lock")


def test_the_cpu_build_is_installed_and_the_whole_lock_holds(tmp_path, indexes):
    there = Environment(tmp_path, indexes)
    done = there.install("torch==99.0", indexes["cpu"])
    assert done.returncode == 0, done.stderr
    assert there.version("torch") == "99.0+cpu" and there.version("triton") == ""
    assert names(there.constraints) == LOCKED and "triton" in LOCKED
    again = there.install("torch==99.0", indexes["cpu"])
    assert again.returncode == 0 and not again.stderr  # it is there: nothing is fetched, nothing is said


def test_a_version_that_the_cpu_index_lacks_comes_from_pips_with_its_own_triton(tmp_path, indexes):
    there = Environment(tmp_path, indexes)
    done = there.install("torch==99.1", indexes["cpu"])
    assert done.returncode == 0 and "has no such build; using pip's default index" in done.stderr, done.stderr
    assert there.version("torch") == "99.1" and there.version("triton") == "1.0"
    assert names(there.constraints) == LOCKED - {"triton"}


def test_a_version_that_nobody_has_is_an_error_and_make_tries_again(tmp_path, indexes):
    there = Environment(tmp_path, indexes)
    done = there.install("torch==99.9", indexes["no page"])
    assert done.returncode != 0 and "99.9" in done.stderr and not there.constraints.exists()
