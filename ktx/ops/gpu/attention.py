"""Attention of every family on a GPU: transformers' own module around the kernels on pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ktx.kernels import reference
from ktx.kernels.gpu.attention_backend import kernels_for
from ktx.kernels.gpu.rope_and_cache import rope_and_cache_kv
from ktx.kernels.gpu.split_kv import Shape
from ktx.kernels.gradients import none_on_gpu
from ktx.ops import attention
from ktx.ops.base import Context
from ktx.ops.fusion.fused import rotary_tables, split_mask, window_of
from ktx.ops.gpu.kv_view import PagedView, of_batch, of_states, room_for, settled

NAME = "ktx_gpu"
SCORES = 1 << 26  # of queries that are computed at once where no kernel knows the mask


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ktx.ops.attention.attend, on a GPU."""
    batch = getattr(key, "ktx_batch", None)
    choice = attention.choice_of(module)
    if choice.foreign or dropout > 0 or (batch is None and not choice.plain()):
        given = (query, key, value, attention_mask, scaling, dropout, softcap, s_aux)
        return attention.attend(module, *given, **kwargs)
    new = query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    sinks = None if s_aux is None else s_aux.float().contiguous()
    if batch is not None:
        room: PagedView | None = of_batch(batch, (key, value), window_of(module))
    else:
        if attention_mask is None and new > key.shape[2]:
            raise ValueError(f"{new} queries on {key.shape[2]} keys need a mask")
        room = of_states(key, value, new, attention_mask)
    cap = float(softcap or 0.0)
    if room is None:
        return by_torch(query, key, value, attention_mask, scale, sinks, cap), None
    flat = query.transpose(1, 2).reshape(1, -1, query.shape[1], query.shape[3]).transpose(1, 2)
    backend = getattr(module, "backend", "triton")
    return on_pages(flat, room, scale, sinks, cap, backend).view(len(query), new, query.shape[1], -1), None


def on_pages(
    q: torch.Tensor, room: PagedView, scale: float, sinks: torch.Tensor | None, softcap: float, backend: str
) -> torch.Tensor:
    """q [1, H, T, Dk], the sequences one after another -> [1, T, H, Dv]."""
    keys, values = room.pools
    shape = Shape(q.shape[1], keys.shape[1], keys.shape[3], values.shape[3])
    kernels = kernels_for(shape, backend, 0, sinks is not None, keys.dtype)
    return kernels.attention(q, keys, values, room.plan(kernels, shape, q.dtype), scale, sinks, softcap)


def by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    softcap: float,
) -> torch.Tensor:
    """[B, S, H, Dv] by the definition, some queries at a time, for masks that no kernel knows."""
    batch, heads, new, _ = query.shape
    ranges, matrix = split_mask(mask, batch, new, key.shape[2])
    ranges, matrix = (None if x is None else x.to(query.device) for x in (ranges, matrix))
    step = max(1, SCORES // (batch * heads * key.shape[2]))
    parts = []
    for own in (slice(first, first + step) for first in range(0, new, step)):
        some = None if ranges is None else ranges[:, own], None if matrix is None else matrix[:, :, own]
        parts.append(reference.attention(query[:, :, own], key, value, *some, scale, sinks, softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


AttentionInterface.register(NAME, attend)


class Attention(attention.Attention):
    """As on the CPU. The usual attention rotates and stores in one launch; any other is transformers' own around `attend`."""

    sinks_f32: torch.Tensor | None
    implementation = NAME

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, backend: str = "triton", **kwargs: Any) -> attention.Attention:
        new = super().from_hf(old, ctx, backend, **kwargs)
        new.sinks_f32 = None
        if new.usual:  # what cannot be had is said before anything is loaded
            heads = old.config.num_attention_heads
            shape = Shape(heads, heads // old.num_key_value_groups, old.head_dim, old.head_dim)
            kernels_for(shape, backend, sinks=hasattr(old, "sinks"))
        return new

    def ready(self) -> None:
        sinks = getattr(self, "sinks", None)
        self.sinks_f32 = None if sinks is None else sinks.detach().float().contiguous()

    def computed(self, given: dict[str, Any], cache: Any) -> Any:
        drops = self.training and getattr(self, "attention_dropout", 0.0) > 0
        if self.usual and not drops and self.choice.plain(cache):
            done = self.stored(cache=cache, **given)
            if done is not None:
                return done, None
        settled(cache, self.layer_idx)
        return super().computed(given, cache)

    def stored(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        *,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """hidden_states [B, S, D] -> [B, S, D], with keys and values stored; None when this call has to go the long way."""
        if position_embeddings is None or cache is None:
            return None
        heads = self.k_proj.out_features // self.head_dim
        room = room_for(self, cache, hidden_states, heads, (self.head_dim, self.head_dim), attention_mask)
        if room is None:
            return None
        none_on_gpu("Attention", getattr(self, "sinks", None))
        q, k, v = (self._heads(name, hidden_states) for name in "qkv")
        cos, sin = turns(rotary_tables(position_embeddings, self.half_tables), hidden_states)
        q = rope_and_cache_kv(q, k, v, cos, sin, room.tables.slots, *room.pools)
        found = on_pages(q, room, float(self.scaling), self.sinks_f32, 0.0, self.backend)
        return self.o_proj(found.view(*hidden_states.shape[:2], -1))

    def _heads(self, which: str, hidden: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values [1, heads, tokens, columns], by their norm if it has one: of a head, or of all of them."""
        rows = getattr(self, f"{which}_proj")(hidden)
        norm = self._modules.get(f"{which}_norm")
        if norm is not None and norm.weight.numel() != self.head_dim:  # type: ignore[union-attr, operator]
            rows, norm = norm(rows), None
        rows = rows.view(1, -1, rows.shape[-1] // self.head_dim, self.head_dim)
        return (rows if norm is None else norm(rows)).transpose(1, 2)


def turns(tables: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, tokens, columns] for the tokens of hidden [B, S, D]; one row of positions may stand for all sequences."""
    cos, sin = (table.expand(len(hidden), -1, -1).reshape(1, -1, table.shape[-1]) for table in tables)
    return cos, sin
