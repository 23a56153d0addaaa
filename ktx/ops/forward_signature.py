"""How the forward that an operator stands in for is called: its parameters, and which of them is the cache."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktx.transformers_compat import cache_aliases, cache_name


@dataclass(frozen=True)
class Call:
    """The parameters of a module class's forward. `cache` is the one that takes the cache ("" where there is none), `aliases` older names of it."""

    owner: str
    names: tuple[str, ...]
    cache: str
    aliases: tuple[str, ...]

    @staticmethod
    def of(module: nn.Module) -> Call:
        """Of the forward of a module's class."""
        kind: Any = type(module)
        return Call.of_class(kind)

    @classmethod
    @functools.cache
    def of_class(cls, module: Any) -> Call:
        parameters = inspect.signature(module.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]  # without self
        name = cache_name(module)
        return cls(module.__name__, names, name, cache_aliases(name))

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A call's arguments by name without its cache, and the cache; `kwargs` is changed. TypeError as Python's own for a call that fits no forward."""
        if args:
            if len(args) > len(self.names):
                raise TypeError(
                    f"{self.owner}.forward takes {len(self.names)} positional arguments, {len(args)} were given"
                )
            for name, value in zip(self.names, args, strict=False):
                if name in kwargs:
                    raise TypeError(f"{self.owner}.forward got several values for the argument {name!r}")
                kwargs[name] = value
        cache = kwargs.pop(self.cache, None)
        for alias in self.aliases:
            older = kwargs.pop(alias, None)
            cache = older if cache is None else cache
        return kwargs, cache

    def joined(self, given: dict[str, Any], cache: Any) -> dict[str, Any]:
        """What `split` took apart, as the forward itself wants it."""
        return given | {self.cache: cache} if self.cache else given
