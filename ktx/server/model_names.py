"""The names that a request may give as its model: the model's own and those of its LoRA adapters."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection

from ktx.server.errors import APIError

LATEST_TAG = ":latest"  # Ollama's clients append it to model names, on all routes


def match_model_name(name: str, known: Collection[str]) -> str:
    """Returns the known name that equals `name`, with or without Ollama's tag; empty if there is none."""
    return next((candidate for candidate in (name, name.removesuffix(LATEST_TAG)) if candidate in known), "")


class ModelNames:
    """The names of the model and of its LoRA adapters, which change at run time.

    Args:
        models: names of the model; the first one is reported.
        adapters: names of the adapters that are loaded at the start.
    """

    def __init__(self, models: tuple[str, ...], adapters: Collection[str] = ()):
        self.models = models
        self.adapters: dict[str, int] = {}  # name -> id of each LoRA adapter
        self.adapter_ids = itertools.count()
        self.lock = asyncio.Lock()  # held while an adapter is loaded or unloaded
        for name in adapters:
            self.add_adapter(name)

    @property
    def first(self) -> str:
        """The model's name in logs, metrics and statistics."""
        return self.models[0]

    @property
    def all(self) -> tuple[str, ...]:
        """All names that requests may give."""
        return (*self.models, *self.adapters)

    def add_adapter(self, name: str) -> None:
        """Registers a loaded LoRA adapter under a new id."""
        self.adapters = {**self.adapters, name: next(self.adapter_ids)}

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter. Other threads may iterate over `adapters`, so it is replaced."""
        self.adapters = {known: adapter_id for known, adapter_id in self.adapters.items() if known != name}

    def check(self, name: str) -> None:
        """Raises APIError (404) if no model or adapter has the name."""
        if not match_model_name(name, self.all):
            raise APIError(
                404, f"the model {name!r} does not exist; available: {', '.join(self.all)}", "model", "model_not_found"
            )

    def adapter(self, name: str) -> str:
        """Returns the name of the LoRA adapter that a request's model name selects; empty for the model itself."""
        return match_model_name(name, self.adapters)
