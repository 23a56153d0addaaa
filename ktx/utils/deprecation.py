"""Names of ktx 0.1 that changed, which still work for one release: of arguments, members, and classes of a module.

Each use gives a DeprecationWarning with the current name. Modules that moved: `ktx.utils.old_names`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

SINCE = "since ktx 0.2; the old name ends with 0.3"
T = TypeVar("T")


def warn_of_name(old: str, new: str, stacklevel: int = 4) -> None:
    """Issues the warning that `old` is called `new`."""
    warnings.warn(f"{old} is called {new} {SINCE}", DeprecationWarning, stacklevel=stacklevel)


def deprecated_names(module: str, **names: str) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a module, by which its renamed classes and functions have their old names too.

    Args:
        module: the module's `__name__`.
        names: the current name by the old one.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_name(f"{module}.{name}", f"{module}.{names[name]}", stacklevel=3)
        return getattr(sys.modules[module], names[name])

    return attribute


def deprecated_arguments(**names: str) -> Callable[[T], T]:
    """Returns a decorator of a function or class, whose keyword arguments may then have their old names too.

    Args:
        names: the current name of each argument by its old one.
    """

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            target.__init__ = _accept_old_names(target.__init__, target.__name__, names)  # type: ignore[misc]
            return target
        return _accept_old_names(target, target.__name__, names)

    return decorate


def _accept_old_names(function: Callable[..., Any], label: str, names: Mapping[str, str]) -> Callable[..., Any]:
    """Returns the function with `names`, from old to current, as further names of its arguments; each use warns.

    Raises:
        TypeError: at a call that has an argument under both names.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for old in [name for name in kwargs if name in names]:
            if names[old] in kwargs:
                raise TypeError(f"{label}() got both {old!r} and {names[old]!r}, its name {SINCE}")
            warn_of_name(f"{label}: the argument {old}", names[old], stacklevel=3)
            kwargs[names[old]] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call


def deprecated_members(**names: str) -> Callable[[T], T]:
    """Returns a decorator of a class, whose members may then be read, called and set under their old names too.

    Args:
        names: the current name of each member by its old one.
    """

    def decorate(cls: Any) -> Any:
        for old, new in names.items():
            setattr(cls, old, _OldMember(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}"))
        return cls

    return decorate


class _OldMember:
    """Descriptor that stands for another member of its class."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def __get__(self, instance: Any, owner: type) -> Any:
        warn_of_name(self.old, self.new, stacklevel=3)
        return getattr(owner if instance is None else instance, self.new.rpartition(".")[2])

    def __set__(self, instance: Any, value: Any) -> None:
        warn_of_name(self.old, self.new, stacklevel=3)
        setattr(instance, self.new.rpartition(".")[2], value)
