"""Multi-head latent attention on a GPU: full pages of a prompt are expanded, all other tokens use the absorbed form.

The forms and the names of columns and shapes are those of ktx.ops.mla; `ckv` and `kpe` are the page pools of latents
and of rotated key columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ktx.cache.batch import PageTables
from ktx.cache.kv import stored_row_format
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.errors import UsageError
from ktx.kernels import reference
from ktx.kernels.gpu import linear
from ktx.kernels.gpu.attention_backend import AttentionKernels, kernels_for
from ktx.kernels.gpu.rope_and_cache import rope_and_cache_mla
from ktx.kernels.gpu.split_kv import AttentionShape
from ktx.ops import mla
from ktx.ops.base import Context, is_ktx_operator
from ktx.ops.fusion.fused import kv_float_dtype, rotary_tables, split_mask
from ktx.ops.gpu.attention import flatten_tables
from ktx.ops.gpu.kv_view import PagedView, Row, cached_plan, prepare_float_layer, reserve_kv, view_of_states
from ktx.ops.gpu.norm import RMSNorm
from ktx.weights.base import WeightSource


class MLA(mla.MLA):
    """GPU version of ktx.ops.mla.MLA.

    Keys are expanded with the same matrix that the absorbed form uses, so it is stored once. The FlashInfer backend
    replaces only the absorbed form.
    """

    def check_options(self, ctx: Context) -> None:
        """Raises UsageError for a type of KV cache that no kernel reads."""
        self._kernels(stored_row_format(self.kv_dtype, 1, ctx.dtype, torch.device("cuda"))[1])

    def _kernels(self, stored: torch.dtype) -> AttentionKernels:
        """Returns the kernels of the absorbed form for latents stored in dtype `stored`."""
        return kernels_for(self._latent_shape(), self.backend, self.qk_rope_head_dim, cache_dtype=stored)

    def _latent_shape(self) -> AttentionShape:
        """The shape of absorbed attention: all heads share one latent key."""
        return AttentionShape(self.num_heads, 1, self.kv_lora_rank, self.kv_lora_rank, latent=True)

    def load(self, source: WeightSource) -> None:
        """Reads W_UK and W_UV and packs them on the GPU."""
        exact = self.stores_f32(source)
        halves = [mla.to_f16(source.get(name), exact) for name in self.tensors()]
        self.w_uk_t, self.w_uv = (linear.pack(weight, device=self.placement.torch) for weight in halves)

    def ready(self) -> None:
        """Builds no fused step: those are for the CPU."""
        self.block = None

    def call_replaced(self, arguments: dict[str, Any], cache: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raises UsageError: on a GPU the replaced module's forward is not available."""
        raise self._unsupported_error()

    def _unsupported_error(self) -> UsageError:
        return UsageError(
            f"{self.path}: MLA on a GPU returns no attention weights and runs no attention implementation other than"
            " ktx's; load the model with device='cpu'"
        )

    def compute(
        self,
        kv_cache: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Computes hidden_states [B, S, D] -> [B, S, D] and writes latents and rotated key columns to the cache.

        A kernel writes to pages, or to a layer that grows in place, if it supports the mask; else `_update_cache` does.

        Raises:
            UsageError: attention weights, or another attention implementation than ktx's, are requested.
        """
        if not self.choice.uses_kernel(kv_cache):
            raise self._unsupported_error()
        columns = self.kv_lora_rank, self.qk_rope_head_dim
        view = reserve_kv(self, kv_cache, hidden_states, 1, columns, attention_mask)
        q_nope, q_rope = self._project_queries(hidden_states)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split(columns, -1)
        cos, sin = flatten_tables(rotary_tables(position_embeddings), hidden_states)
        if view is not None:
            q_rope = self._store_in_pages(view, latent, k_rope, q_rope, cos, sin)
        else:
            q_rope = reference.rope(q_rope, cos, sin, self.interleaved)
            states = self._update_cache(
                kv_cache, latent, reference.rope(_flatten(k_rope)[:, None], cos, sin, self.interleaved)
            )
            view = view_of_states(*states, hidden_states.shape[1], attention_mask)
            if view is None:
                return self.o_proj(self._attend_in_torch(q_nope, q_rope, *states, attention_mask)), None
        return self.o_proj(self._attend_on_pages(q_nope, q_rope, view).view(*hidden_states.shape[:2], -1)), None

    def _project_queries(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects queries to [1, H, tokens, nope] and [1, H, tokens, rope], before RoPE."""
        q = (
            self.q_proj(hidden)
            if self.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        )
        heads = q.view(1, -1, self.num_heads, self.qk_nope_head_dim + self.qk_rope_head_dim).transpose(1, 2)
        nope, rope = heads.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        return nope, rope

    def _store_in_pages(
        self,
        view: PagedView,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        q_rope: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Writes normalized latents and rotated key columns [B, S, columns] to the pages of the view.

        The same kernel normalizes the latents, unless their norm has another class or formula, or hooks.

        Returns:
            The rotated columns of the queries.
        """
        norm: Any = self.kv_a_layernorm
        fused_norm = is_ktx_operator(norm, RMSNorm) and not (
            norm.plus_one or norm._forward_hooks or norm._forward_pre_hooks
        )
        ckv, kpe = (pool[:, 0] for pool in view.pools)
        rows = _flatten(latent if fused_norm else norm(latent))
        return rope_and_cache_mla(
            rows,
            _flatten(k_rope),
            q_rope,
            cos,
            sin,
            view.tables.slots,
            ckv,
            kpe,
            norm.in_f32 if fused_norm else None,
            norm.epsilon if fused_norm else 0.0,
            self.interleaved,
        )

    def _update_cache(
        self, cache: Any, latent: torch.Tensor, k_rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalizes latents [B, S, rank] and appends them, with the rotated columns k_rope, to `cache`.

        For caches that the kernels cannot write to themselves (`reserve_kv`); k_rope is [1, 1, tokens, rope].

        Returns:
            All latents and rotated columns of the cache; without a cache, the new ones.
        """
        normalized = self.kv_a_layernorm(latent)[:, None]
        rotated = k_rope.view(len(latent), 1, -1, k_rope.shape[-1])
        if cache is None:
            return normalized, rotated
        prepare_float_layer(cache, self.layer_idx)
        dtype = kv_float_dtype(self.kv_dtype, latent.dtype)
        return cache.update(normalized.to(dtype), rotated.to(dtype), self.layer_idx)

    def _attend_on_pages(self, q_nope: torch.Tensor, q_rope: torch.Tensor, view: PagedView) -> torch.Tensor:
        """Computes paged attention of queries [1, H, T, nope] and [1, H, T, rope]; returns [1, T, H * v].

        Full pages of prompts use the expanded form, all other tokens the absorbed form, as in ktx.ops.mla.
        """
        with_full_pages = (
            []
            if self.absorb_for_prefill
            else [i for i, full_pages in enumerate(view.full_pages) if full_pages.num_tokens]
        )
        if not with_full_pages:
            return self._attend_absorbed(q_nope, q_rope, view, view.tables, [count for _, count, _ in view.rows])
        out = q_nope.new_empty(1, q_nope.shape[2], self.num_heads * self.v_head_dim)
        for i in with_full_pages:
            self._attend_expanded(q_nope, q_rope, view, i, out)
        remainder = view.tables.plans.get("rest")
        if remainder is None:  # the first layer computes it for all others
            remainder = view.tables.plans["rest"] = _select_tokens_outside_full_pages(view)
        if remainder:
            indices, counts, tables = remainder
            queries = q_nope.index_select(2, indices), q_rope.index_select(2, indices)
            out[:, indices] = self._attend_absorbed(*queries, view, tables, counts)
        return out

    def _attend_absorbed(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, view: PagedView, tables: PageTables, counts: list[int]
    ) -> torch.Tensor:
        """Computes the absorbed form, attention on the latents themselves, for some of the queries.

        Args:
            q_nope: queries [1, H, T, nope].
            q_rope: their rotated columns [1, H, T, rope].
            view: the pools of latents and rotated key columns.
            tables: the sequences of these queries and their pages.
            counts: number of queries of each sequence.

        Returns:
            [1, T, H * v].
        """
        query = linear.linear_batched(q_nope[0], self.w_uk_t)[None]
        ckv, kpe = (pool[:, 0] for pool in view.pools)
        kernels = self._kernels(ckv.dtype)
        plan = cached_plan(kernels, tables, counts, self._latent_shape(), query.dtype)
        context = kernels.mla_attention(query, q_rope, ckv, kpe, plan, self.scaling)
        out = linear.linear_batched(context[0].transpose(0, 1), self.w_uv)  # [H, T, v]
        return out.transpose(0, 1).reshape(1, len(context[0]), -1)

    def _attend_expanded(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, view: PagedView, index: int, out: torch.Tensor
    ) -> None:
        """Computes the expanded form for the full pages of a sequence's prompt.

        All other tokens take the absorbed form (`_attend_on_pages`), so a token's form does not depend on how its
        prompt is chunked. Keys and values are expanded from the latents for some heads at a time, to bound memory.

        Args:
            q_nope: queries [1, H, T, nope] of all sequences.
            q_rope: their rotated columns [1, H, T, rope].
            view: keys of all sequences.
            index: of the sequence.
            out: [1, T, H * v], written at the tokens of the full pages.
        """
        (first, count, keys), (lead_tokens, num_full) = view.rows[index], view.full_pages[index]
        tokens = slice(first + lead_tokens, first + lead_tokens + num_full)
        end = keys - count + lead_tokens + num_full  # keys that the last of these tokens sees
        pages = view.tables.pages[index, : -(-end // PAGE_TOKENS)]
        latent, rope = (pool.index_select(0, pages) for pool in view.pools)  # [pages, 1, PAGE, columns]
        latent, rope = latent.to(q_nope.dtype), rope.to(q_nope.dtype)
        by_head = out.view(1, -1, self.num_heads, self.v_head_dim)
        for heads in self._split_into_head_chunks(latent):
            k, v = self._expand_latents(latent.flatten(0, 2), heads)
            shape = AttentionShape(len(heads), len(heads), self.qk_nope_head_dim, self.v_head_dim)
            head_slice = slice(heads.start, heads.stop)
            kernels = kernels_for(shape)
            plan = cached_plan(
                kernels, self._tables_of_sequence(view, index, num_full, end), [num_full], shape, q_nope.dtype
            )
            kernels.attention(
                q_nope[:, head_slice, tokens],
                k,
                v,
                plan,
                self.scaling,
                q_rope=q_rope[:, head_slice, tokens],
                k_rope=rope,
                out=by_head[:, tokens, head_slice],
            )

    def _tables_of_sequence(self, view: PagedView, index: int, num_full: int, end: int) -> PageTables:
        """Returns tables of one sequence with pages numbered from 0, cached because all layers share them.

        `num_full` tokens are queries, `end` is the number of keys up to the last of them.
        """
        plans = view.tables.plans
        if ("alone", index) not in plans:
            pages = torch.arange(-(-end // PAGE_TOKENS), dtype=torch.int32)[None]
            tables = PageTables(torch.tensor([[0, num_full, end]]), pages, torch.empty(0, dtype=torch.int64))
            plans["alone", index] = tables.to(view.tables.pages.device)
        return plans["alone", index]

    def _split_into_head_chunks(self, latent: torch.Tensor) -> Iterator[range]:
        """Yields chunks of heads whose expanded keys and values fit in EXPAND_BYTES."""
        rows = latent.shape[0] * PAGE_TOKENS
        bytes_per_head = rows * (self.qk_nope_head_dim + self.v_head_dim) * latent.element_size()
        step = max(1, mla.EXPAND_BYTES // bytes_per_head)
        for head in range(0, self.num_heads, step):
            yield range(head, min(head + step, self.num_heads))

    def _expand_latents(self, flat: torch.Tensor, heads: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Expands latents [rows, rank] to keys and values of some heads: pools [pages, heads, PAGE_TOKENS, columns]."""
        pools = []
        for matrix, transposed in ((self.w_uk_t, False), (self.w_uv, True)):
            rows = linear.dequantize(matrix, flat.dtype, heads.start * matrix.n, len(heads) * matrix.n)
            w = rows.view(len(heads), matrix.n, matrix.k)
            states = flat @ (w.transpose(1, 2) if transposed else w)  # [heads, rows, columns]
            pools.append(states.unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1))
        return pools[0], pools[1]

    def _attend_in_torch(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes the absorbed form in plain torch, for masks that no kernel supports.

        Args:
            q_nope: queries [1, H, B * S, nope].
            q_rope: their rotated columns [1, H, B * S, rope].
            latent: [B, 1, T, rank].
            k_rope: rotated key columns [B, 1, T, rope].
            mask: transformers' attention mask.

        Returns:
            [B, S, H * v].
        """
        batch = len(latent)
        query = linear.linear_batched(q_nope[0], self.w_uk_t)
        query, rotated = (x.unflatten(1, (batch, -1)).transpose(0, 1) for x in (query, q_rope[0]))  # [B, H, S, columns]
        ranges, dense_mask = split_mask(mask, batch, query.shape[2], latent.shape[2])
        ranges, dense_mask = (None if x is None else x.to(query.device) for x in (ranges, dense_mask))
        states = latent[:, 0].to(query.dtype), k_rope[:, 0].to(query.dtype)
        context = reference.mla_attention(query, rotated, *states, ranges, dense_mask, self.scaling)  # [B, S, H, rank]
        out = linear.linear_batched(context.permute(2, 0, 1, 3).flatten(1, 2), self.w_uv)
        return out.transpose(0, 1).reshape(batch, context.shape[1], -1)


def _flatten(rows: torch.Tensor) -> torch.Tensor:
    """Reshapes [B, S, columns] to [1, B * S, columns]."""
    return rows.reshape(1, -1, rows.shape[-1])


def _select_tokens_outside_full_pages(view: PagedView) -> tuple[torch.Tensor, list[int], PageTables] | tuple[()]:
    """Selects the tokens that are in no full page of a prompt, which use the absorbed form in one kernel call.

    Returns:
        Their indices [n], the lengths of their contiguous runs, and page tables with a sequence per run; empty if all
        tokens are in full pages.
    """
    segments: list[tuple[Row, int]] = []  # a run of such tokens as a sequence, and the index of its sequence in `view`
    for i, ((first, count, keys), (lead_tokens, num_full)) in enumerate(zip(view.rows, view.full_pages, strict=True)):
        for begin, end in ((0, lead_tokens), (lead_tokens + num_full, count)):  # before and after the full pages
            if begin < end:
                segments.append(((first + begin, end - begin, keys - count + end), i))
    if not segments:
        return ()
    device = view.tables.pages.device
    indices = torch.cat([torch.arange(first, first + count) for (first, count, _), _ in segments]).to(device)
    counts = [count for (_, count, _), _ in segments]
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1].tolist()
    rows = torch.tensor([(start, count, keys) for start, ((_, count, keys), _) in zip(starts, segments, strict=True)])
    pages = view.tables.pages.index_select(0, torch.tensor([i for _, i in segments], device=device))
    return indices, counts, PageTables(rows.to(device), pages, indices)
