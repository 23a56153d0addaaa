"""ktx: very large mixture-of-experts models in plain PyTorch, on one GPU plus CPU memory or without a GPU."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from ktx.integrations import experts_interface

if TYPE_CHECKING:
    from ktx.injection.inject import Plan as Plan
    from ktx.injection.rules import Rule as Rule
    from ktx.integrations.from_pretrained import KtxConfig as KtxConfig
    from ktx.loader.build import plan as plan
    from ktx.loader.load import load as load
    from ktx.ops.base import Context as Context
    from ktx.ops.base import Operator as Operator
    from ktx.ops.base import register as register
    from ktx.ops.edit import dequantize as dequantize
    from ktx.ops.edit import edit as edit
    from ktx.ops.experts_interface import experts as experts

__version__ = "0.1.0"
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

# torch's OpenMP threads spin for milliseconds after their work, on the cores that ktx's worker threads need, which made
# prefill 15 % slower. The OpenMP runtime reads OMP_WAIT_POLICY when torch is imported, so this only helps when ktx is
# imported first; ktx.model.notes reports when it was not.
_torch_came_first = "torch" in sys.modules and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
experts_interface.install()

_MODULES = {  # public name -> the module that defines it
    "KtxConfig": "ktx.integrations.from_pretrained",
    "Plan": "ktx.injection.inject",
    "Context": "ktx.ops.base",
    "Operator": "ktx.ops.base",
    "register": "ktx.ops.base",
    "Rule": "ktx.injection.rules",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'ktx' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
