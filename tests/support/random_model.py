"""benchmarks/make_model.py as a module, for tests that need a model on disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--layers", "2", "--experts", "8", "--moe-ff", "64", "--hidden", "256", "--ff", "512", "--vocab", "512"]


def script(name: str) -> ModuleType:
    """A file of benchmarks/ as a module."""
    import sys

    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def write(folder: Path, preset: str = "v2lite", *more: str) -> Path:
    """A tiny model of a preset's architecture in `folder`; its GGUF file."""
    script("make_model").main(["--preset", preset, "-o", str(folder), *TINY, *more])
    return next(folder.glob("*.gguf"))
