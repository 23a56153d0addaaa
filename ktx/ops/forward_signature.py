"""The signature of the forward that an operator replaces: its parameters, and which of them takes the cache."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktx.transformers_compat import cache_aliases, cache_name
from ktx.utils.deprecation import deprecated_members


@deprecated_members(joined="join")
@dataclass(frozen=True)
class ForwardSignature:
    """The signature of the forward of a module class.

    Attributes:
        owner: The name of the class.
        names: The names of the positional parameters, without self.
        cache: The parameter that takes the cache; "" if there is none.
        aliases: Older names of that parameter.
    """

    owner: str
    names: tuple[str, ...]
    cache: str
    aliases: tuple[str, ...]

    @staticmethod
    def of(module: nn.Module) -> ForwardSignature:
        """Returns the signature for the class of `module`."""
        kind: Any = type(module)
        return ForwardSignature.of_class(kind)

    @classmethod
    @functools.cache
    def of_class(cls, module_class: Any) -> ForwardSignature:
        """Returns the signature for a module class."""
        parameters = inspect.signature(module_class.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]  # without self
        name = cache_name(module_class)
        return cls(module_class.__name__, names, name, cache_aliases(name))

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Splits the arguments of a call into named arguments and the cache, whose name differs between versions.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments; modified and returned.

        Returns:
            All arguments by name, without the cache, and the cache or None.

        Raises:
            TypeError: There are too many positional arguments, or an argument is given twice.
        """
        if args:
            if len(args) > len(self.names):
                raise TypeError(
                    f"{self.owner}.forward takes {len(self.names)} positional arguments but {len(args)} were given"
                )
            for name, value in zip(self.names, args, strict=False):
                if name in kwargs:
                    raise TypeError(f"{self.owner}.forward got multiple values for argument {name!r}")
                kwargs[name] = value
        cache = kwargs.pop(self.cache, None)
        for alias in self.aliases:
            older = kwargs.pop(alias, None)
            cache = older if cache is None else cache
        return kwargs, cache

    def join(self, given: dict[str, Any], cache: Any) -> dict[str, Any]:
        """Returns the keyword arguments of the forward from what `split` returned."""
        return given | {self.cache: cache} if self.cache else given
