"""Which files are GGUF: by their first four bytes, as llama.cpp. No torch here: commands ask before they need it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its first four bytes, whatever its name, or says so by its name."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        with path.open("rb") if path.is_file() else nullcontext() as file:
            return file is not None and file.read(4) == MAGIC
    except OSError:
        return False


def ggufs_in(folder: Path) -> list[Path]:
    """GGUF files of a folder in order of their names: those that are called so, or else those that are some."""
    files = sorted(folder.iterdir())
    named = [file for file in files if file.suffix.lower() == ".gguf"]
    return named or [file for file in files if is_gguf(file)]
