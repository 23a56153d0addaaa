"""Reads JSON files that contain one object, such as configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ktx.errors import BadFile


def read_object(file: Path, what: str) -> dict[str, Any]:
    """Reads the object in a JSON file; errors name the file, which those of transformers do not.

    Args:
        file: the path.
        what: what the object describes, for messages, such as "configuration".

    Raises:
        BadFile: the file cannot be read, is not JSON, or contains something else than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadFile(f"{file}: contains {type(content).__name__}, not the keys of a {what}")
    return content
