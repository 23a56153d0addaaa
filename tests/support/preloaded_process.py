"""`python -m MODULE ...` or `python SCRIPT.py ...` in a process of its own that need not import torch and transformers
first, which takes five seconds.

multiprocessing's forkserver has imported both, and nothing of ktx but the package, which sets what must be set before
torch. What a command costs to start, and what it
leaves unimported, is for tests that start Python itself.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

PRELOADED = ["ktx", "torch", "transformers.modeling_utils", "transformers.generation", "transformers.models.auto"]
ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run(
    *words: object, text: str | bytes = "", env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([sys.executable, "-m", *words], input=text, text=True, capture_output=True, ...), without "-m"
    for a script.
    """
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("in", "out", "err")]
        files[0].write_bytes(text if isinstance(text, bytes) else text.encode())
        given = dict(os.environ if env is None else env)
        process = _context.Process(target=_child, args=(command, [str(file) for file in files], given, str(cwd)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (file.read_text(encoding=_encoding(given)) for file in files[1:])
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _encoding(env: Mapping[str, str]) -> str:
    """Of the standard streams of a process with this environment."""
    return env.get("PYTHONIOENCODING", "utf-8")


def _child(words: list[str], files: list[str], env: dict[str, str], cwd: str) -> None:
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, (file, mode) in enumerate(zip(files, modes, strict=True)):
        opened = os.open(file, mode, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    encoding = _encoding(env)
    sys.stdin, sys.stdout = open(0, encoding=encoding), open(1, "w", encoding=encoding)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the forkserver ignores it
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if (
        "ktx.kernels.cpu" in sys.modules
    ):  # loaded by the parent's main module, which multiprocessing imports here: kernels read KTX_ISA once
        os.execve(sys.executable, [sys.executable, *([] if words[0].endswith(".py") else ["-m"]), *words], env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if threads := env.get("OMP_NUM_THREADS"):  # read when torch was imported
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = words
    code: object = 0
    try:
        if words[0].endswith(".py"):
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
