"""ktx: very large mixture-of-experts models in plain PyTorch, on one GPU plus CPU memory or without a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ktx.integrations import experts_interface
from ktx.utils import old_names
from ktx.utils import openmp as openmp  # before torch
from ktx.utils.version import VERSION

if TYPE_CHECKING:
    from ktx.injection.inject import Plan as Plan
    from ktx.injection.rule import Rule as Rule
    from ktx.integrations.from_pretrained import KtxConfig as KtxConfig
    from ktx.loader.build import plan as plan
    from ktx.loader.load import load as load
    from ktx.ops.base import Context as Context
    from ktx.ops.base import Operator as Operator
    from ktx.ops.edit import dequantize as dequantize
    from ktx.ops.edit import edit as edit
    from ktx.ops.experts_interface import experts as experts
    from ktx.ops.registry import register as register

__version__ = VERSION
__all__ = [
    "Context",
    "KtxConfig",
    "Operator",
    "Plan",
    "Rule",
    "dequantize",
    "edit",
    "experts",
    "load",
    "plan",
    "register",
]

experts_interface.install()
old_names.install()

_MODULES = {  # public name -> the module that defines it
    "KtxConfig": "ktx.integrations.from_pretrained",
    "Plan": "ktx.injection.inject",
    "Context": "ktx.ops.base",
    "Operator": "ktx.ops.base",
    "register": "ktx.ops.registry",
    "Rule": "ktx.injection.rule",
    "dequantize": "ktx.ops.edit",
    "edit": "ktx.ops.edit",
    "experts": "ktx.ops.experts_interface",
    "load": "ktx.loader.load",
    "plan": "ktx.loader.build",
}


def __dir__() -> list[str]:
    """The public names, including those that are not imported yet, for tab completion."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports a public name on first access, so that `import ktx` does not import torch."""
    if f"ktx.{name}" in old_names.MODULES:
        return importlib.import_module(f"ktx.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'ktx' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
