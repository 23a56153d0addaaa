"""`experts_implementation="ktx"` for transformers: known to it from `import ktx` on, whichever of the two is imported first.

`import ktx` may cost neither torch nor transformers, so the name is registered when transformers' table of experts is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOME = "transformers.integrations.moe"
NAME = "ktx"


def computed(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers calls in the place of an experts module's forward; see ktx.ops.interface."""
    above = importlib.import_module("ktx.ops.interface")  # it stands above this module
    return above.forward(None, module, *args, **kwargs)


class _Finder:
    """Finds the table as others do, once, and has it filled after it is imported."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != HOME:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _then_fill(spec)
        return spec


def _then_fill(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    usual = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        usual(module)
        _fill(module)

    loader.exec_module = exec_module


def _fill(module: Any) -> None:
    module.ALL_EXPERTS_FUNCTIONS.register(NAME, computed)


def install() -> None:
    """Fills the table, or sees to it that it will be."""
    table = sys.modules.get(HOME)
    if hasattr(table, "ALL_EXPERTS_FUNCTIONS"):
        _fill(table)
    else:
        sys.meta_path.insert(0, _Finder)
