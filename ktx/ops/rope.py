"""Rotary position embeddings (RoPE) that cache their cos/sin tables."""

from __future__ import annotations

from typing import Any

import torch

from ktx.cache import forward_context
from ktx.errors import UsageError
from ktx.ops.base import Context, Operator, adopt

MIN_TABLE_POSITIONS = 256  # the minimum length of a table


class RotaryEmbedding(Operator):
    """The RoPE module of transformers with a cached table of cos and sin, looked up by position.

    The forward of transformers computes the rest: frequencies that depend on the sequence length (dynamic NTK,
    longrope), and positions outside of any table (fractional, negative, or beyond the maximum length of the model).

    Attributes:
        table: (number of positions, tables, frequencies, scaling): the tables were computed from the last two.
        fixed: Whether the frequencies do not depend on the sequence length.
    """

    remade = ("table",)
    table: tuple[int, Any, torch.Tensor, float] | None

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> RotaryEmbedding:
        """Creates the operator that replaces a RoPE module; UsageError if it has no frequencies (inv_freq)."""
        if not hasattr(old, "inv_freq"):
            raise UsageError(f"{ctx.path} is a {type(old).__name__}: RotaryEmbedding needs inv_freq")
        new: RotaryEmbedding = adopt(cls, old, ctx)
        new.table, new.fixed = None, getattr(old, "rope_type", "") in ("default", "linear", "yarn", "llama3")
        return new

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns cos and sin for position_ids [B, S], in the dtype of x, as the replaced module does.

        The table is computed again, for a power of two of positions, if a position exceeds it or a script has changed
        frequencies or scaling. Frequencies that depend on the length are computed for each sequence of a batch.
        """
        if torch.compiler.is_compiling():  # position values are unknown in a graph
            return super().forward(x, position_ids, *args, **kwargs)
        if not self.fixed or args or kwargs or position_ids.dim() != 2:
            context = forward_context.current()
            counts = None if context is None else context.row_counts(position_ids)
            if counts is None or self.fixed:
                return super().forward(x, position_ids, *args, **kwargs)
            parts = position_ids.split(counts, 1)
            tables = [super(RotaryEmbedding, self).forward(x, part, *args, **kwargs) for part in parts]
            return tuple(torch.cat(values, 1) for values in zip(*tables, strict=True))
        if (length := self._table_length(position_ids)) is None:
            return super().forward(x, position_ids)
        scaling = float(getattr(self, "attention_scaling", 1.0))
        # the fields of `table`: 0 number of positions, 1 tables, 2 frequencies, 3 scaling
        if (
            self.table is None
            or length > self.table[0]
            or scaling != self.table[3]
            or not torch.equal(self.inv_freq, self.table[2])
        ):
            size = max(MIN_TABLE_POSITIONS, 1 << (length - 1).bit_length())
            positions = torch.arange(size, device=position_ids.device)[None]
            self.table = size, super().forward(x.float(), positions), self.inv_freq.clone(), scaling
        values = self.table[1]
        if isinstance(values, torch.Tensor):  # deepseek_v2: one complex table
            return values[0][position_ids]
        return tuple(v[0][position_ids].to(x.dtype) for v in values)

    def _table_length(self, position_ids: torch.Tensor) -> int | None:
        """Returns the table length that covers all positions; None if no table has them or it would be too long."""
        if position_ids.dtype not in (torch.int64, torch.int32) or not position_ids.numel():
            return None
        low, high = (int(end) for end in position_ids.aminmax())
        fits = low >= 0 and high < max(MIN_TABLE_POSITIONS, int(getattr(self, "max_seq_len_cached", 0) or 0))
        return high + 1 if fits else None
