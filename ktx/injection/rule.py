"""One rule: which modules it matches, and the operator that replaces them."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ktx.errors import UsageError

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")  # any other match.class is a regular expression


@dataclass(frozen=True)
class Rule:
    """An entry of a rule file. `replace` None keeps the module; `where` ("file:line") is the prefix of messages."""

    name: re.Pattern[str] | None = None
    cls: str | None = None
    replace: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    recursive: bool = True
    where: str = "rule"

    def __post_init__(self) -> None:
        if isinstance(self.name, str):  # a rule written in Python may pass a string
            object.__setattr__(self, "name", re.compile(self.name))
        if self.name is None and self.cls is None:
            raise UsageError(f"{self.where}: a rule needs a condition: set match.name or match.class")
        if self.cls is not None and not CLASS_PATH.fullmatch(self.cls):
            compile_pattern(self.cls, f"{self.where}: match.class")

    def matches(self, path: str, cls: type) -> bool:
        """Whether the rule applies to a module of class `cls` at `path`."""
        if self.name is not None and not self.name.search(path):
            return False
        return self.cls is None or any(_has_name(base, self.cls) and _has_forward_of(cls, base) for base in cls.__mro__)


def _has_name(cls: type, name: str) -> bool:
    """Whether `name` is a class's short name, its full path, or a package's path to it (torch.nn.Linear).

    A name that is no dotted path is a regular expression: it must match the short name or the full path completely.
    """
    if not CLASS_PATH.fullmatch(name):
        pattern = compile_pattern(name, "match.class")
        return any(map(pattern.fullmatch, (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")))
    package, _, short = name.rpartition(".")
    if cls.__name__ != short:
        return False
    return not package or package == cls.__module__ or getattr(sys.modules.get(package), short, None) is cls


def _has_forward_of(cls: type, base: type) -> bool:
    """Whether a match by base class is valid: a subclass of a torch.nn layer must not override forward().

    Such a subclass computes something else than the layer that the rule names.
    """
    is_layer = base.__module__.startswith("torch.nn.modules.") and base.__name__ != "Module"
    return not is_layer or cls.forward is base.forward  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """Compiles a regular expression; `where` is the prefix of the error message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # warns of syntax that a later Python may change
            return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{where} {pattern!r} is not a regular expression: {error}") from None
