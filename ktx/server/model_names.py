"""Matches the model name of a request with the names that the server has."""

from __future__ import annotations

from collections.abc import Collection

LATEST_TAG = ":latest"  # Ollama's clients append it to model names, on all routes


def match_model_name(name: str, known: Collection[str]) -> str:
    """Returns the known name that equals `name`, with or without Ollama's tag; empty if there is none."""
    return next((candidate for candidate in (name, name.removesuffix(LATEST_TAG)) if candidate in known), "")
