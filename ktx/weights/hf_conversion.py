"""Builds parameters that a checkpoint stores differently from the current modeling code, by transformers' operations.

Experts are excluded: their matrices keep their stored layout, see ktx.weights.safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktx.transformers_compat import apply_converter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ConvertedTensor:
    """A parameter and the checkpoint tensors that it is converted from.

    `groups`: tensor names by source pattern, in the converter's order.
    """

    name: str
    converter: Any
    groups: dict[str, list[str]]

    @property
    def sources(self) -> list[str]:
        """The names of the checkpoint tensors."""
        return [name for names in self.groups.values() for name in names]

    def values(self, read: Callable[[str], torch.Tensor], config: PreTrainedConfig) -> torch.Tensor:
        """Converts the tensors that `read` returns to the parameter's values."""
        tensors = {pattern: [read(name) for name in names] for pattern, names in self.groups.items()}
        values: torch.Tensor = apply_converter(self.converter, self.name, tensors, config)
        return values


def find_converted(names: Iterable[str], converters: list[Any]) -> dict[str, ConvertedTensor]:
    """Returns the parameters that transformers' `converters` can build from checkpoint tensors of these names.

    Tensors are grouped by the parameter and converter (`i`) they belong to. Only converters with one target are
    used; a parameter needs tensors for all source patterns of its converter.
    """
    converters = [converter for converter in converters if len(converter.target_patterns) == 1]
    found: dict[tuple[str, int], dict[str, list[str]]] = {}
    for name in sorted(names, key=_by_number):
        for i, converter in enumerate(converters):
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                found.setdefault((target, i), {p: [] for p in converter.source_patterns})[pattern].append(name)
                break
    complete = {key: groups for key, groups in found.items() if all(groups.values())}
    return {target: ConvertedTensor(target, converters[i], groups) for (target, i), groups in complete.items()}


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that orders numbers in names by value: expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
