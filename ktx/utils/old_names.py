"""Modules of ktx 0.1 that moved, which still work for one release.

An import of an old module gives a module whose attributes are those of the new one, under old and new names, with one
DeprecationWarning per module and name. Other names that changed: `ktx.utils.deprecation`, and on the command line
`ktx.cli.arguments.OLD_OPTIONS`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ktx.utils.deprecation import warn_of_name

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
    "ktx.ops.calls": "ktx.ops.forward_signature",
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
    "ktx.engine.sampler": {"Sampling": "SamplingParams", "Choice": "SampledToken", "Chooser": "Sampler"},
    "ktx.engine.stats": {"Activity": "EngineStats", "Done": "StatsSnapshot"},
    "ktx.injection.rules": {"shipped": "shipped_rules"},
    "ktx.engine.client": {"Chorus": "RequestGroup"},
    "ktx.engine.detokenizer": {"Detokeniser": "Detokenizer"},
    "ktx.loader.load": {"Handle": "LoadInfo"},
    "ktx.ops.float_views": {
        "matrix": "view_matrix",
        "experts": "view_experts",
        "plain": "view_tensor",
        "out_of_reach": "unreadable",
    },
    "ktx.ops.forward_signature": {"Call": "ForwardSignature"},
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
        warn_of_name(old, self.new)
        if hasattr(new, "__path__"):  # a package: _Finder finds its modules too
            module.__path__ = []

        def attribute(name: str) -> Any:
            if (old, name) in ELSEWHERE:
                return getattr(importlib.import_module(ELSEWHERE[old, name]), name)
            renamed = NAMES.get(self.new, {}).get(name)
            if renamed is not None:
                warn_of_name(f"{old}.{name}", f"{self.new}.{renamed}")
            return getattr(new, renamed or name)

        module.__getattr__ = attribute  # type: ignore[method-assign]


def install() -> None:
    """Makes the old modules importable; without effect when they are already.

    The finder is the first one, because that of another, editable installation would find a checkout of ktx 0.1.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
