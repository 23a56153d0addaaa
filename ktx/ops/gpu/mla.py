"""Multi-head latent attention on a GPU, see ktx.ops.mla: whole pages of a prompt expanded, everything else absorbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ktx.cache.kv import stored_row
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import PageTables
from ktx.errors import UsageError
from ktx.kernels import reference
from ktx.kernels.gpu import linear
from ktx.kernels.gpu.attention_backend import Kernels, kernels_for
from ktx.kernels.gpu.rope_and_cache import rope_and_cache_mla
from ktx.kernels.gpu.split_kv import Shape
from ktx.ops import mla
from ktx.ops.base import Context
from ktx.ops.fusion.fused import float_type, rotary_tables, split_mask
from ktx.ops.gpu.attention import turns
from ktx.ops.gpu.kv_view import PagedView, Row, of_states, planned, room_for, settled
from ktx.ops.gpu.norm import RMSNorm
from ktx.weights.base import WeightSource


class MLA(mla.MLA):
    """As on the CPU. Keys are expanded by the matrix that absorbs, so it is held once. FlashInfer can take the absorbed form's place, not the other's."""

    def check(self, ctx: Context) -> None:
        self._kernels(stored_row(self.kv_dtype, 1, ctx.dtype, torch.device("cuda"))[1])

    def _kernels(self, stored: torch.dtype) -> Kernels:
        """Those of the absorbed form, for latents that are stored in a type."""
        return kernels_for(self._latent(), self.backend, self.qk_rope_head_dim, stored=stored)

    def _latent(self) -> Shape:
        return Shape(self.num_heads, 1, self.kv_lora_rank, self.kv_lora_rank, latent=True)

    def load(self, source: WeightSource) -> None:
        exact = self.is_exact(source)
        halves = [mla.as_half(source.get(name), exact) for name in self.tensors()]
        self.w_uk_t, self.w_uv = (linear.pack(half, device=self.placement.torch) for half in halves)

    def ready(self) -> None:
        self.block = None

    def by_transformers(self, given: dict[str, Any], cache: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise self._refused()

    def _refused(self) -> UsageError:
        return UsageError(
            f"{self.path}: attention weights, and other implementations than ktx's, are not computed where MLA is on a GPU; load the model with device='cpu'"
        )

    def computed(
        self,
        kv_cache: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if not self.choice.plain(kv_cache):
            raise self._refused()
        columns = self.kv_lora_rank, self.qk_rope_head_dim
        room = room_for(self, kv_cache, hidden_states, 1, columns, attention_mask)
        q_nope, q_rope = self._queries(hidden_states)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split(columns, -1)
        cos, sin = turns(rotary_tables(position_embeddings), hidden_states)
        if room is not None:
            q_rope = self._store(room, latent, k_rope, q_rope, cos, sin)
        else:
            q_rope = reference.rope(q_rope, cos, sin, self.interleaved)
            states = self._update(kv_cache, latent, reference.rope(_one(k_rope)[:, None], cos, sin, self.interleaved))
            room = of_states(*states, hidden_states.shape[1], attention_mask)
            if room is None:
                return self.o_proj(self._by_torch(q_nope, q_rope, *states, attention_mask)), None
        return self.o_proj(self._on_pages(q_nope, q_rope, room).view(*hidden_states.shape[:2], -1)), None

    def _queries(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, H, tokens, nope] and [1, H, tokens, rope], not rotated yet."""
        q = (
            self.q_proj(hidden)
            if self.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        )
        heads = q.view(1, -1, self.num_heads, self.qk_nope_head_dim + self.qk_rope_head_dim).transpose(1, 2)
        nope, rope = heads.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        return nope, rope

    def _store(
        self,
        room: PagedView,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        q_rope: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Puts latents, normalised, and rotated columns [B, S, columns] where they belong; the queries' rotated columns come back."""
        norm: Any = self.kv_a_layernorm
        inside = isinstance(norm, RMSNorm) and not (norm.plus_one or norm._forward_hooks or norm._forward_pre_hooks)
        ckv, kpe = (pool[:, 0] for pool in room.pools)
        rows = _one(latent if inside else norm(latent))
        return rope_and_cache_mla(
            rows,
            _one(k_rope),
            q_rope,
            cos,
            sin,
            room.tables.slots,
            ckv,
            kpe,
            norm.in_f32 if inside else None,
            norm.epsilon if inside else 0.0,
            self.interleaved,
        )

    def _update(self, cache: Any, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What any cache makes of latents [B, S, rank], not normalised yet, and rotated columns [1, 1, tokens, rope]."""
        normal = self.kv_a_layernorm(latent)[:, None]
        turned = k_rope.view(len(latent), 1, -1, k_rope.shape[-1])
        if cache is None:
            return normal, turned
        settled(cache, self.layer_idx)
        stored = float_type(self.kv_dtype, latent.dtype)
        return cache.update(normal.to(stored), turned.to(stored), self.layer_idx)

    def _on_pages(self, q_nope: torch.Tensor, q_rope: torch.Tensor, room: PagedView) -> torch.Tensor:
        """[1, H, T, nope] and [1, H, T, rope] -> [1, T, H * v]."""
        wholes = [] if self.absorb_for_prefill else [i for i, (_, count) in enumerate(room.wholes) if count]
        if not wholes:
            return self.absorbed_on(q_nope, q_rope, room, room.tables, [count for _, count, _ in room.rows])
        out = q_nope.new_empty(1, q_nope.shape[2], self.num_heads * self.v_head_dim)
        for i in wholes:
            self._expand(q_nope, q_rope, room, i, out)
        rest = room.tables.plans.get("rest")
        if rest is None:  # the same for all layers
            rest = room.tables.plans["rest"] = _rest(room)
        if rest:
            places, counts, tables = rest
            few = q_nope.index_select(2, places), q_rope.index_select(2, places)
            out[:, places] = self.absorbed_on(*few, room, tables, counts)
        return out

    def absorbed_on(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, room: PagedView, tables: PageTables, counts: list[int]
    ) -> torch.Tensor:
        """The queries of some tables' sequences -> [1, T, H * v]."""
        query = linear.linear_batched(q_nope[0], self.w_uk_t)[None]
        ckv, kpe = (pool[:, 0] for pool in room.pools)
        kernels = self._kernels(ckv.dtype)
        plan = planned(kernels, tables, counts, self._latent(), query.dtype)
        context = kernels.mla_attention(query, q_rope, ckv, kpe, plan, self.scaling)
        out = linear.linear_batched(context[0].transpose(0, 1), self.w_uv)  # [H, T, v]
        return out.transpose(0, 1).reshape(1, len(context[0]), -1)

    def _expand(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, room: PagedView, index: int, out: torch.Tensor
    ) -> None:
        """Writes to out [1, T, H * v] what the whole pages of a sequence's prompt see, some heads at a time."""
        (first, count, keys), (lead, whole) = room.rows[index], room.wholes[index]
        own, end = slice(first + lead, first + lead + whole), keys - count + lead + whole
        pages = room.tables.pages[index, : -(-end // PAGE_TOKENS)]
        latent, rope = (pool.index_select(0, pages) for pool in room.pools)  # [pages, 1, PAGE, columns]
        latent, rope = latent.to(q_nope.dtype), rope.to(q_nope.dtype)
        by_head = out.view(1, -1, self.num_heads, self.v_head_dim)
        for heads in self._heads_at_once(latent):
            k, v = self._expanded(latent.flatten(0, 2), heads)
            shape = Shape(len(heads), len(heads), self.qk_nope_head_dim, self.v_head_dim)
            chosen = slice(heads.start, heads.stop)
            kernels = kernels_for(shape)
            plan = planned(kernels, self._alone(room, index, whole, end), [whole], shape, q_nope.dtype)
            kernels.attention(
                q_nope[:, chosen, own],
                k,
                v,
                plan,
                self.scaling,
                q_rope=q_rope[:, chosen, own],
                k_rope=rope,
                out=by_head[:, own, chosen],
            )

    def _alone(self, room: PagedView, index: int, whole: int, end: int) -> PageTables:
        """The tables of one sequence on pages of its own, in order; the same for all layers."""
        made = room.tables.plans
        if ("alone", index) not in made:
            pages = torch.arange(-(-end // PAGE_TOKENS), dtype=torch.int32)[None]
            tables = PageTables(torch.tensor([[0, whole, end]]), pages, torch.empty(0, dtype=torch.int64))
            made["alone", index] = tables.to(room.tables.pages.device)
        return made["alone", index]

    def _heads_at_once(self, latent: torch.Tensor) -> Iterator[range]:
        """As many heads as EXPAND_BYTES hold keys and values of."""
        rows = latent.shape[0] * PAGE_TOKENS
        each = rows * (self.qk_nope_head_dim + self.v_head_dim) * latent.element_size()
        step = max(1, mla.EXPAND_BYTES // each)
        for head in range(0, self.num_heads, step):
            yield range(head, min(head + step, self.num_heads))

    def _expanded(self, flat: torch.Tensor, heads: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [rows, rank] -> keys and values of some heads as pools [pages, heads, PAGE, columns]."""
        found = []
        for matrix, turned in ((self.w_uk_t, False), (self.w_uv, True)):
            rows = linear.dequantize(matrix, flat.dtype, heads.start * matrix.n, len(heads) * matrix.n)
            w = rows.view(len(heads), matrix.n, matrix.k)
            states = flat @ (w.transpose(1, 2) if turned else w)  # [heads, rows, columns]
            found.append(states.unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1))
        return found[0], found[1]

    def _by_torch(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """For masks that no kernel knows, absorbed: states [B, 1, T, columns] -> [B, S, H * v]."""
        batch = len(latent)
        query = linear.linear_batched(q_nope[0], self.w_uk_t)
        query, turned = (x.unflatten(1, (batch, -1)).transpose(0, 1) for x in (query, q_rope[0]))  # [B, H, S, columns]
        ranges, matrix = split_mask(mask, batch, query.shape[2], latent.shape[2])
        ranges, matrix = (None if x is None else x.to(query.device) for x in (ranges, matrix))
        states = latent[:, 0].to(query.dtype), k_rope[:, 0].to(query.dtype)
        context = reference.mla_attention(query, turned, *states, ranges, matrix, self.scaling)  # [B, S, H, rank]
        out = linear.linear_batched(context.permute(2, 0, 1, 3).flatten(1, 2), self.w_uv)
        return out.transpose(0, 1).reshape(batch, context.shape[1], -1)


def _one(rows: torch.Tensor) -> torch.Tensor:
    """[B, S, columns] -> [1, B * S, columns]."""
    return rows.reshape(1, -1, rows.shape[-1])


def _rest(room: PagedView) -> tuple[torch.Tensor, list[int], PageTables] | tuple[()]:
    """The tokens that are in no whole page: their places [n], how many of them are together, and the tables of these; nothing if there are none."""
    segments: list[tuple[Row, int]] = []
    for i, ((first, count, keys), (lead, whole)) in enumerate(zip(room.rows, room.wholes, strict=True)):
        for begin, end in ((0, lead), (lead + whole, count)):
            if begin < end:
                segments.append(((first + begin, end - begin, keys - count + end), i))
    if not segments:
        return ()
    device = room.tables.pages.device
    places = torch.cat([torch.arange(first, first + count) for (first, count, _), _ in segments]).to(device)
    counts = [count for (_, count, _), _ in segments]
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1].tolist()
    rows = torch.tensor([(start, count, keys) for start, ((_, count, keys), _) in zip(starts, segments, strict=True)])
    pages = room.tables.pages.index_select(0, torch.tensor([i for _, i in segments], device=device))
    return places, counts, PageTables(rows.to(device), pages, places)
