"""Names that requests have as their model."""

from __future__ import annotations

from collections.abc import Collection

TAG = ":latest"  # that Ollama's clients add, on all routes


def meant(name: str, known: Collection[str]) -> str:
    """The one of the known names that a request means; empty where it means none of them."""
    return next((one for one in (name, name.removesuffix(TAG)) if one in known), "")
