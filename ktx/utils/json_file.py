"""JSON files that hold one object, as configurations do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ktx.errors import BadFile


def read_object(file: Path, of: str) -> dict[str, Any]:
    """The keys of a `of`, such as a configuration. BadFile for a file that cannot be read, is no JSON, or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{file}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadFile(f"{file}: holds {type(found).__name__}, not the keys of a {of}")
    return found
