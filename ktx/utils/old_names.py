"""Names of ktx 0.1, which still work for one release: modules that moved, and names in them that changed.

An import of an old module gives a module whose attributes are those of the new one, under old and new names, with one
DeprecationWarning per module and name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {  # old -> new
    "ktx.compat": "ktx.transformers_compat",
    "ktx.config": "ktx.environment",
    "ktx.device_map": "ktx.injection.device_map",
    "ktx.inject": "ktx.injection.inject",
    "ktx.ktransformers": "ktx.injection.ktransformers",
    "ktx.rules": "ktx.injection.rules",
    "ktx.loading": "ktx.loader.load",
    "ktx.preparing": "ktx.loader.build",
    "ktx.filling": "ktx.loader.load_weights",
    "ktx.skeleton": "ktx.loader.meta_model",
    "ktx.footprint": "ktx.placement.memory_model",
    "ktx.scratch": "ktx.placement.workspace",
    "ktx.fitting": "ktx.placement.suggest",
    "ktx.notes": "ktx.model.notes",
    "ktx.selftest": "ktx.model.self_test",
    "ktx.saving": "ktx.model.saving",
    "ktx.saving_packed": "ktx.model.saving_packed",
    "ktx.pretrained": "ktx.integrations.from_pretrained",
    "ktx.plugin": "ktx.integrations.experts_interface",
    "ktx.qtypes": "ktx.quant.types",
    "ktx.versions": "ktx.utils.versions",
    "ktx.cache.pages": "ktx.cache.page_pool",
    "ktx.commands": "ktx.cli",
    "ktx.dialects": "ktx.chat_formats",
    "ktx.engine.activity": "ktx.engine.stats",
    "ktx.engine.asking": "ktx.engine.client",
    "ktx.engine.sampling": "ktx.engine.sampler",
    "ktx.engine.stream": "ktx.engine.detokenizer",
    "ktx.engine.text": "ktx.engine.chat_session",
    "ktx.ops.fused": "ktx.ops.fusion.fused",
    "ktx.ops.layer": "ktx.ops.fusion.layer",
    "ktx.ops.floats": "ktx.ops.float_views",
    "ktx.ops.interface": "ktx.ops.experts_interface",
    "ktx.ops.stored": "ktx.ops.packed_state",
    "ktx.ops.weights": "ktx.ops.edit",
    "ktx.weights.source": "ktx.weights.base",
    "ktx.weights.names": "ktx.weights.gguf_names",
    "ktx.weights.metadata": "ktx.weights.gguf_config",
}
NAMES = {  # new module -> its names before
    "ktx.cache.page_pool": {"Pages": "PagePool"},
    "ktx.engine.request": {"Piece": "TokenEvent", "Prompt": "PromptLogprobs"},
    "ktx.engine.sampler": {"Sampling": "SamplingParams"},
    "ktx.engine.client": {"Chorus": "RequestGroup"},
    "ktx.engine.detokenizer": {"Detokeniser": "Detokenizer"},
    "ktx.loader.load": {"Handle": "LoadInfo"},
    "ktx.ops.lora": {"Use": "AdapterUse"},
    "ktx.ops.packed_state": {"Stored": "PackedState"},
}
ELSEWHERE = {  # (old module, name) -> the module that has it now
    ("ktx.weights.source", "open_weights"): "ktx.weights.open",
    ("ktx.rules", "Rule"): "ktx.injection.rule",
}


class _Finder(MetaPathFinder):
    """Finds the old modules."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        new = _new_name(name)
        return None if new is None else importlib.util.spec_from_loader(name, _Loader(new))


def _new_name(name: str) -> str | None:
    """The current name of a module that was renamed or moved; None for any other."""
    if name in MODULES:
        return MODULES[name]
    package = name.rpartition(".")[0]
    return f"{MODULES[package]}.{name.rpartition('.')[2]}" if package in ("ktx.commands", "ktx.dialects") else None


class _Loader(Loader):
    """Fills an old module from the new one."""

    def __init__(self, new: str):
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Warns, and makes the module's attributes those of the new one, under their old names where these changed."""
        old, new = module.__name__, importlib.import_module(self.new)
        _warn(old, self.new)
        if hasattr(new, "__path__"):
            module.__path__ = []

        def attribute(name: str) -> Any:
            if (old, name) in ELSEWHERE:
                return getattr(importlib.import_module(ELSEWHERE[old, name]), name)
            renamed = NAMES.get(self.new, {}).get(name)
            if renamed is not None:
                _warn(f"{old}.{name}", f"{self.new}.{renamed}")
            return getattr(new, renamed or name)

        module.__getattr__ = attribute  # type: ignore[method-assign]


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is called {new} since ktx 0.2; the old name ends with 0.3", DeprecationWarning, stacklevel=4)


def install() -> None:
    """Makes the old modules importable; without effect when they are already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def old_name(module: str, name: str) -> Any:
    """For `__getattr__` of a module whose names changed: the object that `name` meant.

    Raises:
        AttributeError: the module never had such a name.
    """
    renamed = NAMES.get(module, {}).get(name)
    if renamed is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", f"{module}.{renamed}")
    return getattr(sys.modules[module], renamed)
