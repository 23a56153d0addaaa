"""LoRA adapters of an MLA's kv_b_proj, which is never computed as one product: in the absorbed form W_UK stands in the queries and W_UV behind the contexts, and so do s B A of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ktx.kernels import cpu
from ktx.ops.lora import Lora, Mapping, Uses, packed, packed_bytes, plus, times
from ktx.ops.mla import MLA
from ktx.weights.lora import LowRank


class HeadFactors:
    """s B A of kv_b_proj: packed as queries and contexts take it in the absorbed form, and B's rows [heads, rows, r] as they are, of which expanding takes some heads."""

    def __init__(self, one: LowRank, owner: MLA):
        heads, nope = owner.num_heads, owner.qk_nope_head_dim
        k, v = one.b.view(heads, -1, one.b.shape[-1]).split([nope, owner.v_head_dim], 1)
        self.a, self.a_t = packed(one.a), packed(one.a.t())
        self.k_t, self.v = packed(k.transpose(1, 2)), packed(v)
        self.k_rows, self.v_rows = k.contiguous(), v.contiguous()


class LatentLora(Lora):
    """The adapters of one kv_b_proj, by name: what they add to queries and contexts, or to keys and values."""

    def __init__(self, mapping: Mapping, owner: MLA):
        super().__init__(mapping, owner)
        self.owner = owner

    @staticmethod
    def nbytes(owner: MLA, several: Sequence[LowRank]) -> int:
        (one,) = several
        rank, heads = one.b.shape[-1], owner.num_heads
        halves = [
            one.a.shape,
            one.a.shape[::-1],
            (heads, rank, owner.qk_nope_head_dim),
            (heads, owner.v_head_dim, rank),
        ]
        return sum(map(packed_bytes, halves)) + 4 * one.b.numel()

    def made(self, several: Sequence[LowRank]) -> HeadFactors:
        (one,) = several
        return HeadFactors(one, self.owner)

    def whole(self, row: int) -> Latents | None:
        """For tokens of one sequence, of which the step's row `row` is one."""
        return self._of([(slice(None), self.mapping.at(row))])

    def among(self, places: torch.Tensor) -> Latents | None:
        """For those of the step's rows."""
        return self._of(self.mapping.among(places))

    def _of(self, rows: Sequence[tuple[slice, Uses]]) -> Latents | None:
        found = [
            (own, self.factors[use.name], use.factor) for own, uses in rows for use in uses if use.name in self.factors
        ]
        return Latents(found) if found else None


@dataclass(frozen=True)
class Latents:
    """Adapters of a call's rows, each with a factor."""

    rows: Sequence[tuple[slice, HeadFactors, float]]

    def queries(self, q: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """q [H, rows, nope] -> what is added to `known` [H, rows, rank], with it."""
        for own, factors, factor in self.rows:
            added = cpu.linear(cpu.linear_batched(q.float(), factors.k_t), factors.a_t)
            known = plus(known, times(factor, added), own)
        return known

    def values(self, context: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """context [H, rows, rank] -> the same with `known` [H, rows, v]."""
        for own, factors, factor in self.rows:
            added = cpu.linear_batched(cpu.linear(context.float(), factors.a), factors.v)
            known = plus(known, times(factor, added), own)
        return known

    def expanded(
        self, latent: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latent [keys, rank] -> k [keys, heads * nope] and v [keys, heads * v] of some heads, with what is added."""
        some = slice(heads.start, heads.stop)
        for _, factors, factor in self.rows:
            low = times(factor, cpu.linear(latent.float(), factors.a))
            k = k + (low @ factors.k_rows[some].flatten(0, 1).t()).to(k.dtype)
            v = v + (low @ factors.v_rows[some].flatten(0, 1).t()).to(v.dtype)
        return k, v
