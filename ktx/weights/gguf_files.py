"""Detects GGUF files by their first four bytes, as llama.cpp does.

Must not import torch: commands call this before they need it.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file: by its extension, or by its first four bytes whatever its name."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        with path.open("rb") if path.is_file() else nullcontext() as file:
            return file is not None and file.read(4) == MAGIC
    except OSError:
        return False


def ggufs_in(folder: Path) -> list[Path]:
    """GGUF files in a folder, sorted by name: those with the extension, or if there are none, those with the magic."""
    files = sorted(folder.iterdir())
    named = [file for file in files if file.suffix.lower() == ".gguf"]
    return named or [file for file in files if is_gguf(file)]
