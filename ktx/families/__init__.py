"""One declaration per model family, and tables of all families by model type or class name.

Each module of this package defines `FAMILIES`, a tuple of `Family`, from which the tables are built. A new family needs
a module here (about twenty lines), a rule file only if no shipped one fits, and a row in the tests' table of tiny
models. Names of GGUF tensors come from gguf-py and `ktx/weights/gguf_names.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TypeVar

from ktx.families.family import GGUF, Family, Pairing, RoutingSpec

T = TypeVar("T")


def _load_families() -> tuple[Family, ...]:
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "family")
    return tuple(family for name in modules for family in importlib.import_module(f"{__name__}.{name}").FAMILIES)


def _merged(*tables: Mapping[str, T]) -> dict[str, T]:
    """One table of several; a key that is declared twice is an error."""
    merged: dict[str, T] = {}
    for table in tables:
        twice = sorted(merged.keys() & table.keys())
        if twice:
            raise ValueError(f"ktx/families: declared twice: {', '.join(twice)}")
        merged |= table
    return merged


FAMILIES = _load_families()
BY_MODEL_TYPE: dict[str, Family] = _merged(*(dict.fromkeys(family.model_types, family) for family in FAMILIES))
RULE_FILES = {name: family.rules for name, family in BY_MODEL_TYPE.items() if family.rules != "generic"}
RULE_ALIASES = {family.rules_alias: family.rules for family in FAMILIES if family.rules_alias}
PRE_NORM_LAYERS = frozenset(name for family in FAMILIES for name in family.layers)
FUSABLE_ATTENTION = frozenset(name for family in FAMILIES for name in family.attention)
HALF_TABLES = frozenset(name for family in FAMILIES if family.half_tables for name in family.attention)
MLA_PAIRING: dict[str, Pairing] = _merged(*(family.mla for family in FAMILIES))
ROUTERS: dict[str, RoutingSpec] = _merged(*(family.routers for family in FAMILIES))
CHAT_FORMAT_NAMES = _merged(
    *(dict.fromkeys((*family.model_types, *family.chat_model_types), family.chat) for family in FAMILIES if family.chat)
)
GGUF_MODEL_TYPES: dict[str, tuple[str, ...]] = {}
for _family in FAMILIES:
    if _family.gguf:
        GGUF_MODEL_TYPES[_family.gguf.arch] = GGUF_MODEL_TYPES.get(_family.gguf.arch, ()) + _family.model_types


def gguf_of(model_type: str) -> GGUF | None:
    """How llama.cpp writes models of this type; None if it does not."""
    family = BY_MODEL_TYPE.get(model_type)
    return family.gguf if family else None
