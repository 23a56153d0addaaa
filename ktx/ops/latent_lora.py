"""LoRA adapters of an MLA's kv_b_proj, which is never computed as one product.

The absorbed form multiplies queries by W_UK and contexts by W_UV, so an adapter's s B A is split and applied likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ktx.kernels import cpu
from ktx.ops.lora import AdapterMapping, Lora, add_rows, packed, packed_bytes, scaled
from ktx.ops.mla import MLA
from ktx.weights.lora import AdapterUses, LowRank


class HeadFactors:
    """A and B of one adapter of kv_b_proj, split by head.

    They are packed for the absorbed form; B's rows [heads, rows, r] are also stored unpacked, because the expanded form
    computes some heads at a time.
    """

    def __init__(self, adapter: LowRank, owner: MLA):
        """Splits B by head into the rows of W_UK and W_UV, and packs what the absorbed form multiplies with."""
        heads, nope = owner.num_heads, owner.qk_nope_head_dim
        k, v = adapter.b.view(heads, -1, adapter.b.shape[-1]).split([nope, owner.v_head_dim], 1)
        self.a, self.a_t = packed(adapter.a), packed(adapter.a.t())
        self.k_t, self.v = packed(k.transpose(1, 2)), packed(v)
        self.k_rows, self.v_rows = k.contiguous(), v.contiguous()


class LatentLora(Lora):
    """The adapters of one kv_b_proj, by name."""

    def __init__(self, mapping: AdapterMapping, owner: MLA):
        super().__init__(mapping, owner)
        self.owner = owner

    @staticmethod
    def nbytes(owner: MLA, adapters: Sequence[LowRank]) -> int:
        """Returns the bytes that `pack` allocates for an adapter: A twice, and both halves of B packed and unpacked.

        All are f32. They are checked before the adapter is packed, so that one that does not fit is refused.
        """
        (adapter,) = adapters
        rank, heads = adapter.b.shape[-1], owner.num_heads
        shapes = [
            adapter.a.shape,
            adapter.a.shape[::-1],
            (heads, rank, owner.qk_nope_head_dim),
            (heads, owner.v_head_dim, rank),
        ]
        return sum(map(packed_bytes, shapes)) + 4 * adapter.b.numel()

    def pack(self, adapters: Sequence[LowRank]) -> HeadFactors:
        """Returns the factors by head of the one adapter that kv_b_proj has."""
        (adapter,) = adapters
        return HeadFactors(adapter, self.owner)

    def of_sequence(self, row: int) -> LatentAdapters | None:
        """Returns the adapters for tokens of the sequence that has row `row` of the step; None if there are none."""
        return self._of([(slice(None), self.mapping.uses_of_row(row))])

    def of_rows(self, row_indices: torch.Tensor) -> LatentAdapters | None:
        """Returns the adapters for rows of the step, given by ascending indices; None if there are none."""
        return self._of(self.mapping.slices_of_rows(row_indices))

    def _of(self, rows: Sequence[tuple[slice, AdapterUses]]) -> LatentAdapters | None:
        """Returns the adapters of these rows whose factors this layer has; None if there are none."""
        uses_of_rows = [
            (indices, self.factors[use.name], use.factor)
            for indices, uses in rows
            for use in uses
            if use.name in self.factors
        ]
        return LatentAdapters(uses_of_rows) if uses_of_rows else None


@dataclass(frozen=True)
class LatentAdapters:
    """The adapters of one call: for each, its rows, its factors and the scale of its output."""

    rows: Sequence[tuple[slice, HeadFactors, float]]

    def queries(self, q: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Returns `base` [H, rows, rank] plus the adapters' part of the absorbed queries q [H, rows, nope]."""
        for indices, factors, factor in self.rows:
            added = cpu.linear(cpu.linear_batched(q.float(), factors.k_t), factors.a_t)
            base = add_rows(base, scaled(factor, added), indices)
        return base

    def values(self, context: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Returns `base` [H, rows, v] plus the adapters' part of the values from context [H, rows, rank]."""
        for indices, factors, factor in self.rows:
            added = cpu.linear_batched(cpu.linear(context.float(), factors.a), factors.v)
            base = add_rows(base, scaled(factor, added), indices)
        return base

    def expanded(
        self, latent: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns k [keys, heads * nope] and v [keys, heads * v] of some heads plus the adapters' part.

        MLA passes only adapters that apply to all keys here (`of_sequence`), so their rows are not looked at.

        Args:
            latent: [keys, rank].
            k: keys expanded without adapters.
            v: values expanded without adapters.
            heads: the heads in k and v.
        """
        head_slice = slice(heads.start, heads.stop)
        for _, factors, factor in self.rows:
            projected = scaled(factor, cpu.linear(latent.float(), factors.a))
            k = k + (projected @ factors.k_rows[head_slice].flatten(0, 1).t()).to(k.dtype)
            v = v + (projected @ factors.v_rows[head_slice].flatten(0, 1).t()).to(v.dtype)
        return k, v
