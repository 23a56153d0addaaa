"""Methods that scripts put on classes: `LlamaMLP.forward = patched`, `type(layer.mlp).forward = patched`, `torch.nn.SiLU.forward = patched`.

Python calls no one when a class changes. So each forward of a model begins with a look at all classes of modules that shortcuts stand for (about a microsecond): when a method is
another one, that counts as a change of all modules. An operator whose replaced class has been patched calls that class's forward from then on. What was put there before a model
was loaded is known by the file that it was written in.
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
from ktx.ops.change_counter import Changes

LIBRARIES = tuple(
    f"{Path(spec.origin).parent}{os.sep}"
    for name in ("torch", "transformers")
    if (spec := find_spec(name)) and spec.origin
)
patched: set[type] = set()  # classes of transformers' and torch's, by whose methods operators go
_watched: dict[tuple[type, str], Any] = {}  # methods as they were when their class was first seen
_places: list[tuple[type, str]] = []
_seen: list[Any] = []
_kinds: set[type] = set()
_own: dict[type, Any] = {}  # of operators that call another forward: what was in its place


def replaced_by(kind: type) -> type | None:
    """The class that an operator's class replaces, as far as it inherits from it; None for others."""
    if not issubclass(kind, Operator):
        return None
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return next((base for base in bases if not issubclass(base, Operator)), None)


def watch(module: nn.Module) -> None:
    """From now on its class is looked at, and the one that it replaces."""
    kind = type(module)
    other = module.__dict__.get("replaces")
    if kind in _kinds and (other is None or other in _kinds):
        return
    _kinds.update({kind, *([] if other is None else [other])})
    _put(kind, "forward")
    for old in (replaced_by(kind), other):
        if old is not None:
            for name in _methods(old):
                _put(old, name, _is_its_own(old, name))


def _put(kind: type, name: str, usual: bool = True) -> None:
    if (kind, name) not in _watched:
        method = _watched[kind, name] = getattr(kind, name) if usual else None
        _places.append((kind, name))
        _seen.append(method)  # of one that is not usual None, so that the next look finds it


def _is_its_own(kind: Any, name: str) -> bool:
    """Whether a method was written where its class was, with decorators of transformers' or torch's: not put there before the model was loaded."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    homes = (getattr(sys.modules.get(owner.__module__), "__file__", None) or "", *LIBRARIES)
    method: Any = getattr(kind, name)
    while method is not None:
        code = getattr(method, "__code__", None)
        if code is None or not code.co_filename.startswith(homes):
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def _methods(kind: type) -> set[str]:
    """Names of what a class and its bases define beside torch's module."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    names = {name for base in bases for name, value in vars(base).items() if isinstance(value, FunctionType)}
    return {name for name in names if not name.startswith("__")} | {"forward"}


def is_patched(module: nn.Module) -> bool:
    """Whether somebody has put other methods on a module's class, or on the one that it replaces."""
    kind, replaced = type(module), (replaced_by(type(module)), module.__dict__.get("replaces"))
    return kind.forward is not _watched[kind, "forward"] or any(old in patched for old in replaced if old is not None)


def follow() -> None:
    """Has operators go by what classes are now."""
    now = [getattr(kind, name, None) for kind, name in _places]
    if now == _seen:
        return
    Changes.count += 1
    for place in [place for place, usual in _watched.items() if usual is None]:
        if _is_its_own(*place):  # what was there before has been taken back
            _watched[place] = getattr(*place)
    patched.clear()
    patched.update(
        kind for (kind, name), method in zip(_places, now, strict=True) if method is not _watched[kind, name]
    )
    for kind in _kinds:
        if (old := replaced_by(kind)) is not None:
            _choose(kind, old in patched)
    _seen[:] = [getattr(kind, name, None) for kind, name in _places]


def _choose(kind: Any, by_class: bool) -> None:
    """Which forward an operator's class has, unless somebody has put one on the class itself."""
    if by_class and kind not in _own and kind.forward is _watched[kind, "forward"]:
        _own[kind] = kind.__dict__.get("forward")
        kind.forward = kind.by_class
    elif not by_class and kind in _own:
        before = _own.pop(kind)
        if kind.__dict__.get("forward") is not kind.by_class:
            return  # somebody else has put one there
        if before is None:
            del kind.forward
        else:
            kind.forward = before
