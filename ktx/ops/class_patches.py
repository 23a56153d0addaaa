"""Support for scripts that patch methods of classes: `LlamaMLP.forward = patched`, `torch.nn.SiLU.forward = patched`.

Python has no hook for changes of a class. So each forward of a model first compares the methods of all classes whose
modules fast paths bypass (about a microsecond). A changed method counts as a change of all modules. An operator whose
replaced class is patched calls the forward of that class from then on. A method that was patched before the model was
loaded is recognized by the file that it was defined in.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from ktx.ops.base import Operator
from ktx.ops.change_counter import ChangeCounter

LIBRARIES = tuple(
    f"{Path(spec.origin).parent}{os.sep}"
    for name in ("torch", "transformers")
    if (spec := find_spec(name)) and spec.origin
)
patched: set[type] = set()  # the classes of transformers and torch that are patched now
# Original methods by class and name; None for a method that was patched before its class was watched.
_original_methods: dict[tuple[type, str], Any] = {}
_watched_methods: list[tuple[type, str]] = []  # the keys of _original_methods
_last_methods: list[Any] = []  # the methods at the last check, in the order of _watched_methods
_watched_classes: set[type] = set()
# Operator classes that now call the forward of the replaced class -> the forward that they define, or None.
_own_forwards: dict[type, Any] = {}


def replaced_class(cls: type) -> type | None:
    """Returns the transformers class that the class of an adopted operator inherits from; None for other classes."""
    if not issubclass(cls, Operator):
        return None
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    return next((base for base in bases if not issubclass(base, Operator)), None)


def watch(module: nn.Module) -> None:
    """Watches the methods of a module's class and of the class that it replaces, so that `update` notices patches.

    Called for every module of a Guard; the classes of ktx need only their forward watched.
    """
    cls = type(module)
    replaced = module.__dict__.get("replaced_class")  # of operators that do not inherit from the class they replace
    if cls in _watched_classes and (replaced is None or replaced in _watched_classes):
        return
    _watched_classes.update({cls, *([] if replaced is None else [replaced])})
    _watch_method(cls, "forward")
    for watched in (replaced_class(cls), replaced):
        if watched is not None:
            for name in _method_names(watched):
                _watch_method(watched, name, _is_original(watched, name))


def _watch_method(cls: type, name: str, original: bool = True) -> None:
    """Adds a method to the watched ones; `original` is False if it is already patched."""
    if (cls, name) not in _original_methods:
        method = _original_methods[cls, name] = getattr(cls, name) if original else None
        _watched_methods.append((cls, name))
        _last_methods.append(method)  # None for a patched one, so that the next check finds a difference


def _is_original(cls: Any, name: str) -> bool:
    """Whether a method, with the functions that it wraps, is defined in its class's file, in transformers or in torch.

    A method patched before its class was watched is recognized this way.
    """
    owner = next(base for base in cls.__mro__ if name in vars(base))
    files = (getattr(sys.modules.get(owner.__module__), "__file__", None) or "", *LIBRARIES)
    method: Any = getattr(cls, name)
    while method is not None:
        code = getattr(method, "__code__", None)
        if code is None or not code.co_filename.startswith(files):
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def _method_names(cls: type) -> set[str]:
    """Returns the names of the functions that a class and its bases define, excluding those of nn.Module."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    names = {name for base in bases for name, value in vars(base).items() if isinstance(value, FunctionType)}
    return {name for name in names if not name.startswith("__")} | {"forward"}


def is_patched(module: nn.Module) -> bool:
    """Whether the class of a module, or the class that it replaces, is patched."""
    cls, replaced = type(module), (replaced_class(type(module)), module.__dict__.get("replaced_class"))
    return cls.forward is not _original_methods[cls, "forward"] or any(
        other in patched for other in replaced if other is not None
    )


def update() -> None:
    """Compares all watched methods with the last check; a change counts as a change of all modules.

    Called before each forward of a model, because Python has no hook for changes of a class.
    Operators whose replaced class is patched now call its forward; those whose patch was undone call their own again.
    """
    current = [getattr(cls, name, None) for cls, name in _watched_methods]
    if current == _last_methods:
        return
    ChangeCounter.count += 1
    for key in [key for key, original in _original_methods.items() if original is None]:
        if _is_original(*key):  # an earlier patch was undone
            _original_methods[key] = getattr(*key)
    patched.clear()
    patched.update(
        cls
        for (cls, name), method in zip(_watched_methods, current, strict=True)
        if method is not _original_methods[cls, name]
    )
    for cls in _watched_classes:
        if (replaced := replaced_class(cls)) is not None:
            _set_forward(cls, replaced in patched)
    _last_methods[:] = [getattr(cls, name, None) for cls, name in _watched_methods]


def _set_forward(cls: Any, call_patched: bool) -> None:
    """Makes an operator class call the forward of the transformers class that it replaces, or its own again.

    So a script's patch of a transformers class also has an effect on the operators that replace its modules. Does
    nothing where other code has patched the operator class itself.

    Args:
        cls: An operator class that inherits from the class it replaces.
        call_patched: True for the forward of the patched class (`call_patched_class`), False for the operator's own.
    """
    if call_patched and cls not in _own_forwards and cls.forward is _original_methods[cls, "forward"]:
        _own_forwards[cls] = cls.__dict__.get("forward")
        cls.forward = cls.call_patched_class
    elif not call_patched and cls in _own_forwards:
        own = _own_forwards.pop(cls)
        if cls.__dict__.get("forward") is not cls.call_patched_class:
            return  # other code has patched the operator's class
        if own is None:
            del cls.forward
        else:
            cls.forward = own
