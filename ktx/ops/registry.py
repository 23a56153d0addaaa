"""Operators by name: those of ktx, and those that users register for rule files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ktx.errors import UsageError, did_you_mean
from ktx.ops.base import Operator

OPERATORS = {
    "Linear": "ktx.ops.linear",
    "Experts": "ktx.ops.experts",
    "Layer": "ktx.ops.fusion.layer",
    "MoE": "ktx.ops.moe",
    "Recurrent": "ktx.ops.recurrent",
    "Router": "ktx.ops.router",
    "MLA": "ktx.ops.mla",
    "Attention": "ktx.ops.attention",
    "RMSNorm": "ktx.ops.norm",
    "RotaryEmbedding": "ktx.ops.rope",
    "Embedding": "ktx.ops.embed",
    "MLP": "ktx.ops.mlp",
}
GPU_OPERATORS = {  # operator -> dotted path of its GPU class; users' operators set `gpu_form` instead
    name: f"ktx.ops.gpu.{module.rpartition('.')[2]}.{name}" for name, module in OPERATORS.items() if name != "Recurrent"
}
_REGISTERED: dict[str, type[Operator]] = {}


def register(name: str) -> Callable[[type[Operator]], type[Operator]]:
    """Class decorator that registers an operator under a short name for rule files.

    Raises:
        UsageError: The name is taken by an operator of ktx.
    """

    def decorate(cls: type[Operator]) -> type[Operator]:
        if name in OPERATORS or name == "default":
            raise UsageError(f"the operator name {name!r} is reserved by ktx; choose another")
        _REGISTERED[name] = cls
        return cls

    return decorate


def resolve(name: str, where: str = "") -> type[Operator]:
    """Returns the operator class that a rule names.

    Args:
        name: The short name of a shipped or registered operator, or a dotted path.
        where: The file and line of the rule, which starts error messages.

    Raises:
        UsageError: There is no such class, its module cannot be imported, or it is not an Operator.
    """
    prefix = f"{where}: " if where else ""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, attribute = (f"{OPERATORS[name]}.{name}" if name in OPERATORS else name).rpartition(".")
    if not module:
        raise UsageError(
            f"{prefix}no operator is called {name!r}{did_you_mean(name, [*OPERATORS, *_REGISTERED])}; give one of"
            f" {' '.join(OPERATORS)} or a dotted path"
        )
    try:
        imported = _import_module(module, where)
    except Exception as error:  # importing a user's module may raise anything
        error_type = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        remedy = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            remedy = "; it must be installed, next to the rule file, or in a folder of PYTHONPATH"
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"{prefix}cannot import {name}: {error_type}{first_line}{remedy}") from error
    cls = getattr(imported, attribute, None)
    if cls is None:
        raise UsageError(f"{prefix}module {module} has no class {attribute}{did_you_mean(attribute, dir(imported))}")
    if not (isinstance(cls, type) and issubclass(cls, Operator)):
        raise UsageError(f"{prefix}{name} is not a subclass of ktx.Operator")
    return cls


def _import_module(module: str, where: str) -> ModuleType:
    """Imports a user's module; one that is not on sys.path from the folder of the rule file that names it.

    Args:
        module: The dotted path.
        where: The file and line of the rule.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        rule_file = Path(where.rpartition(":")[0])
        folder = rule_file.absolute().parent
        if (
            error.name != top
            or not rule_file.is_file()
            or not ((folder / f"{top}.py").exists() or (folder / top).is_dir())
        ):
            raise
        sys.path.append(str(folder))  # for good: the module may import others later, and pickles refer to it by name
    return importlib.import_module(module)


def on_gpu(cls: type[Operator], where: str = "") -> type[Operator]:
    """Returns the class that implements an operator on a GPU.

    Args:
        cls: The operator class that a rule names.
        where: The file and line of the rule, which starts error messages.

    Raises:
        UsageError: The operator has no GPU implementation.
    """
    name = cls.gpu_form or GPU_OPERATORS.get(cls.__name__, "")
    if not name:
        prefix = f"{where}: " if where else ""
        raise UsageError(f"{prefix}{cls.__name__} has no GPU implementation; place the module on the CPU (device: cpu)")
    # a class for both kinds of device names itself
    return cls if name == f"{cls.__module__}.{cls.__name__}" else resolve(name, where)
