"""LoRA adapters of stacked experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ktx.kernels import cpu
from ktx.ops.experts import Experts
from ktx.ops.lora import AdapterMapping, Lora, packed, packed_bytes, scaled
from ktx.ops.protocols import AdapterRows
from ktx.weights.lora import AdapterUse, AdapterUses, LowRank


class ExpertFactors:
    """Packed A and B of one projection of all experts."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        self.a, self.b = packed(a), packed(b)

    def __call__(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """Computes B A of an expert: rows [tokens, k] -> f32 [tokens, n]."""
        return cpu.linear(cpu.linear(rows.float(), self.a.matrix(expert)), self.b.matrix(expert))


class ExpertsLora(Lora):
    """The adapters of a layer's experts; `factors` maps an adapter's name to a dict from projection to factors."""

    def __init__(self, mapping: AdapterMapping, owner: Experts):
        super().__init__(mapping, owner)
        self.owner = owner

    @staticmethod
    def nbytes(owner: Experts, adapters: Sequence[LowRank]) -> int:
        """Returns the bytes that `pack` allocates, so that an adapter that does not fit in memory is refused.

        An adapter of gate_up_proj is packed as two projections, each with its own copy of A.
        """
        total, shapes = 0, owner.lora_shapes()
        for adapter in adapters:
            count = 1 if adapter.projection else len(shapes[adapter.shape])  # projections; each stores its own A
            experts, rows, rank = adapter.b.shape
            total += count * (packed_bytes(adapter.a.shape) + packed_bytes((experts, rows // count, rank)))
        return total

    def pack(self, adapters: Sequence[LowRank]) -> dict[str, ExpertFactors]:
        """Packs the adapters of stacked parameters by projection, because the experts compute each projection alone."""
        factors: dict[str, ExpertFactors] = {}
        shapes = self.owner.lora_shapes()
        for adapter in adapters:
            projections = shapes[(adapter.projection, adapter.shape) if adapter.projection else adapter.shape]
            split_b = self.owner.split_projections(adapter.b, len(projections))
            for projection, b in zip(projections, split_b, strict=True):
                factors[projection] = ExpertFactors(adapter.a, b)
        return factors

    def adapters_by_expert(
        self, tokens: torch.Tensor, num_tokens: int, per_expert: Sequence[int]
    ) -> list[list[AdapterRows]]:
        """Returns for each expert the adapters of its rows, which may belong to requests with different adapters.

        Args:
            tokens: token index of each row, sorted by expert.
            num_tokens: number of tokens of the forward.
            per_expert: number of rows of each expert.
        """
        uses_of_token: list[AdapterUses] = [()] * num_tokens
        for indices, uses in self.mapping.slices(num_tokens):
            uses_of_token[indices] = [uses] * len(range(*indices.indices(num_tokens)))
        per_expert_adapters: list[list[AdapterRows]] = []
        for expert_tokens in tokens.split(list(per_expert)):
            rows = [uses_of_token[token] for token in expert_tokens.tolist()]
            used = dict.fromkeys(use for row_uses in rows for use in row_uses if use.name in self.factors)
            per_expert_adapters.append([(use, _rows_of(use, rows)) for use in used])
        return per_expert_adapters

    def add_output(
        self, projection: str, rows: torch.Tensor, expert: int, chosen: Sequence[AdapterRows], y: torch.Tensor
    ) -> torch.Tensor:
        """Adds the adapters' outputs to the output of one expert's projection.

        Args:
            projection: the projection.
            rows: its input [tokens, k].
            expert: the index of the expert.
            chosen: the adapters of these rows, each with the indices of those that use it; None: all.
            y: its output [tokens, n].

        Returns:
            [tokens, n].
        """
        for use, indices in chosen:
            factors = self.factors[use.name].get(projection)
            if factors is None:
                continue
            if indices is None:
                y = y + scaled(use.factor, factors(rows, expert)).to(y.dtype)
            else:
                y = y.index_add(0, indices, scaled(use.factor, factors(rows[indices], expert)).to(y.dtype))
        return y


def _rows_of(use: AdapterUse, rows: Sequence[AdapterUses]) -> torch.Tensor | None:
    """Returns the indices of the rows that use an adapter; None if all do."""
    indices = [i for i, uses in enumerate(rows) if use in uses]
    return None if len(indices) == len(rows) else torch.tensor(indices)
