"""LoRA adapters of stacked experts: what they add to the products of an expert with the rows that chose it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ktx.kernels import cpu
from ktx.ops.lora import Lora, Mapping, Use, Uses, packed, packed_bytes, times
from ktx.weights.lora import LowRank

if TYPE_CHECKING:
    from ktx.ops.experts import Experts

Some = tuple[Use, torch.Tensor | None]  # an adapter, and which of an expert's rows it is for; None: all


class ExpertFactors:
    """s B A of one projection of all experts."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        self.a, self.b = packed(a), packed(b)

    def __call__(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """rows [tokens, k] -> f32 [tokens, n]."""
        return cpu.linear(cpu.linear(rows.float(), self.a.matrix(expert)), self.b.matrix(expert))


class ExpertsLora(Lora):
    """The adapters of a layer's experts: by name, and there by projection, the factors that are added to its products."""

    def __init__(self, mapping: Mapping, owner: Experts):
        super().__init__(mapping, owner)
        self.owner = owner

    @staticmethod
    def nbytes(owner: Experts, several: Sequence[LowRank]) -> int:
        found, shapes = 0, owner.adapted_shapes()
        for one in several:
            count = 1 if one.projection else len(shapes[one.shape])  # of projections, each with an A
            experts, rows, rank = one.b.shape
            found += count * (packed_bytes(one.a.shape) + packed_bytes((experts, rows // count, rank)))
        return found

    def made(self, several: Sequence[LowRank]) -> dict[str, ExpertFactors]:
        found: dict[str, ExpertFactors] = {}
        shapes = self.owner.adapted_shapes()
        for one in several:
            halves = shapes[(one.projection, one.shape) if one.projection else one.shape]
            for half, b in zip(halves, self.owner.halved(one.b, len(halves)), strict=True):
                found[half] = ExpertFactors(one.a, b)
        return found

    def chosen(self, tokens: torch.Tensor, count: int, per_expert: Sequence[int]) -> list[list[Some]]:
        """Of each expert the adapters of the rows that chose it: `tokens` says, in the order of experts, whose of the `count` tokens a row is."""
        whose: list[Uses] = [()] * count
        for own, uses in self.mapping.of(count):
            whose[own] = [uses] * len(range(*own.indices(count)))
        found: list[list[Some]] = []
        for mine in tokens.split(list(per_expert)):
            rows = [whose[token] for token in mine.tolist()]
            known = dict.fromkeys(use for several in rows for use in several if use.name in self.factors)
            found.append([(use, _where(use, rows)) for use in known])
        return found

    def added(
        self, half: str, rows: torch.Tensor, expert: int, chosen: Sequence[Some], y: torch.Tensor
    ) -> torch.Tensor:
        """y [tokens, n], a projection of an expert's rows [tokens, k], with what adapters add to it."""
        for use, own in chosen:
            factors = self.factors[use.name].get(half)
            if factors is None:
                continue
            if own is None:
                y = y + times(use.factor, factors(rows, expert)).to(y.dtype)
            else:
                y = y.index_add(0, own, times(use.factor, factors(rows[own], expert)).to(y.dtype))
        return y


def _where(use: Use, rows: Sequence[Uses]) -> torch.Tensor | None:
    own = [i for i, uses in enumerate(rows) if use in uses]
    return None if len(own) == len(rows) else torch.tensor(own)
