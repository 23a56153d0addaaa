"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the cache stores the compressed latent.

Small batches use the absorbed form: W_UK is multiplied into the query and W_UV into the result, so attention is
multi-query attention on the latent, and cached tokens are never expanded. Large batches use the expanded form: the
latent is expanded to keys and values, for some heads at a time, and attention has 192 columns instead of 576. Each call
chooses the form by its number of tokens; both forms read the same cache, so they can be mixed.

Names: a query head has `nope` columns without RoPE and `rope` columns with it; `rank` is the number of columns of a
latent, `v` that of a head's value; W_UK and W_UV, the halves of kv_b_proj, expand latents to keys and values. Shapes: B
sequences, H heads, S new tokens, T keys, D columns of hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ktx.cache.batch import BatchMetadata
from ktx.cache.kv import restore_stock_layer, to_floats
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import gather_pages, get_batch, get_paged_layer
from ktx.errors import UsageError
from ktx.families import MLA_PAIRING
from ktx.kernels import cpu
from ktx.kernels.gpu.attention_backend import known_backend
from ktx.kernels.gradients import is_recorded
from ktx.kernels.packed_cache import cached_pack
from ktx.ops import contract
from ktx.ops import packed_state as stored
from ktx.ops.attention import CastingCache, dropout_error, is_causal, masks_future, non_causal_error
from ktx.ops.attention_weights import AttentionChoice, attention_weights
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.class_patches import patched
from ktx.ops.edit import checked_values
from ktx.ops.float_views import Dequantized, Floats, unreadable
from ktx.ops.fusion.fused import (
    NO_NORM,
    FusedStep,
    PreNorm,
    WeightDescriptor,
    is_plain_linear,
    kv_float_dtype,
    rotary_tables,
    run_attention,
    split_mask,
)
from ktx.ops.guard import Guard, descendants, valid_fast_path
from ktx.ops.masks import non_causal_ranges
from ktx.ops.norm import RMSNorm
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import VisibleParameters
from ktx.ops.protocols import MLAAdapters, MLALora
from ktx.quant.types import QTYPES
from ktx.weights.base import EXPANDED, QuantizedTensor, WeightSource

# A call of at least so many tokens S is faster in the expanded form: 2 * 768 * S > 2 * 512 * 256 operations per key and
# head.
MIN_EXPANDED_TOKENS = 128
EXPAND_BYTES = 1 << 28  # memory for the expanded keys and values of the heads that are computed at a time


class MLA(Operator):
    """Multi-head latent attention, for modules that cache a latent as DeepSeek's do.

    Options:
        absorb_for_prefill: Use the absorbed form for any number of tokens, which saves memory and costs prefill speed.
        rope (interleaved, halves, config): The rotary pairs of a class that is not in MLA_PAIRING; the user asserts
            that the class computes as DeepSeek's does.
        backend (triton, flashinfer, auto): The attention kernels on a GPU.

    Attributes:
        w_uk_t: W_UK transposed, [heads, rank, nope], for absorbed queries.
        w_uv: W_UV [heads, v, rank].
        w_uk: W_UK [heads * nope, rank], for expanded keys; None with `absorb_for_prefill`.
        block: The fused absorbed form, if this module supports it.
        choice: The attention implementation that the model's configuration names.
        expansion: The guard of `kv_b_proj`.
        lora: The LoRA adapters of kv_b_proj that apply to the current forward.
    """

    consumes = ("kv_b_proj",)
    remade = ("block", "expansion")
    reads = frozenset({"scaling", "w_uk_t", "w_uv", "w_uk"})
    uses_ktx_kernel = True  # see ktx.ops.attention.Attention
    w_uk_t: Any
    w_uv: Any
    w_uk: Any
    block: MLABlock | None
    choice: AttentionChoice
    expansion: Guard | None
    lora: MLALora | None = None

    @classmethod
    def from_hf(
        cls,
        old: Any,
        ctx: Context,
        absorb_for_prefill: bool = False,
        rope: str = "",
        backend: str = "triton",
        **kwargs: Any,
    ) -> MLA:
        """Creates the operator that replaces a transformers MLA attention.

        It loses kv_b_proj, whose weight the operator packs as W_UK and W_UV; `ready` adds a KVExpansion in its place.

        Args:
            old: The module, on the meta device.
            ctx: The operator's path, configuration, device and dtypes.
            absorb_for_prefill: See the options of the class.
            rope: See the options of the class.
            backend: See the options of the class.
            **kwargs: Not used.

        Raises:
            UsageError: `old` has no compressed latent, its class is unknown, or it differs from DeepSeek's attention.
        """
        if not hasattr(old, "kv_lora_rank") or not hasattr(old, "kv_a_proj_with_mqa"):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}: MLA needs an attention with a compressed latent (kv_lora_rank)"
            )
        pairs = _choose_rotary_pairs(rope or MLA_PAIRING.get(type(old).__name__, ""), old, ctx)
        new: MLA = adopt(cls, old, ctx)
        del new._modules["kv_b_proj"]
        new.dtype = ctx.dtype
        new.absorb_for_prefill, new.kv_dtype = absorb_for_prefill, ctx.kv_dtype
        new.interleaved, new.backend = pairs == "interleaved", known_backend(backend)
        new.choice, new.expansion = AttentionChoice(old.config), None
        new.w_uk_t, new.w_uv, new.w_uk, new.block = None, None, None, None
        new.check_options(ctx)
        contract.check_latent_attention(old, ctx.path, new.interleaved)
        return new

    def check_options(self, ctx: Context) -> None:
        """Raises UsageError for options that the device does not support, before loading; the CPU supports all."""

    def tensors(self) -> list[str]:
        """Returns the paths of W_UK and W_UV."""
        return [f"{self.path}.k_b_proj.weight", f"{self.path}.v_b_proj.weight"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of W_UK [heads, rank, nope] and W_UV [heads, v, rank] by their paths."""
        heads, rank = self.num_heads, self.kv_lora_rank
        return dict(
            zip(self.tensors(), [(heads, rank, self.qk_nope_head_dim), (heads, self.v_head_dim, rank)], strict=True)
        )

    def load(self, source: WeightSource) -> None:
        """Reads and packs W_UK and W_UV."""
        packed = cached_pack(lambda: self._pack(source))
        self.w_uk_t, self.w_uv, self.w_uk = (*packed, None) if len(packed) == 2 else packed

    def _pack(self, source: WeightSource) -> list[cpu.Packed]:
        """Reads and packs W_UK transposed, W_UV, and W_UK for the expanded form unless `absorb_for_prefill` is set."""
        k_b, v_b = (source.get(name) for name in self.tensors())
        spec, expanded = source.spec(self.tensors()[0]), f"{self.tensors()[0]}{EXPANDED}"
        if not self.absorb_for_prefill and source.spec(expanded) is not None:  # written by save_pretrained(packed=True)
            return [cpu.pack(weight) for weight in (k_b, v_b, source.get(expanded))]
        return self._pack_matrices(k_b, v_b, self.stores_f32(source), spec is not None and not spec.qtype.is_float)

    def _pack_matrices(
        self, k_b: QuantizedTensor, v_b: QuantizedTensor, exact: bool, quantized: bool
    ) -> list[cpu.Packed]:
        """Packs W_UK transposed and W_UV, and W_UK for the expanded form unless `absorb_for_prefill` is set.

        Args:
            k_b: W_UK transposed, [heads, rank, nope].
            v_b: W_UV [heads, v, rank].
            exact: Whether to pack f32 weights as F32 instead of F16.
            quantized: Whether to pack W_UK for the expanded form as Q8_0, because the file stores it quantized.
        """
        packed = [cpu.pack(to_f16(k_b, exact)), cpu.pack(to_f16(v_b, exact))]
        if not self.absorb_for_prefill:
            w_uk = QuantizedTensor.from_float(k_b.dequantize().transpose(1, 2).reshape(-1, self.kv_lora_rank))
            use_q8 = quantized and self.kv_lora_rank % QTYPES["Q8_0"].block == 0
            packed.append(cpu.pack(w_uk, QTYPES["Q8_0"]) if use_q8 else cpu.pack(to_f16(w_uk, exact)))
        return packed

    def dequantized_matrix(self, name: str, expert: int | None) -> torch.Tensor:
        """Returns the weight of kv_b_proj, f32 [heads * (nope + v), rank] as in transformers, for ktx.edit."""
        if name != "kv_b_proj" or expert is not None:
            raise UsageError(f"{self.path}: MLA has one weight that can be edited: ktx.edit(module, 'kv_b_proj')")
        return self.floats()["kv_b_proj.weight"].values(torch.float32)

    def repack(self, values: torch.Tensor, name: str, expert: int | None, dtype: str | None) -> None:
        """Packs an edited kv_b_proj, for ktx.edit: as F32 if `dtype` says so or it was F32 before, else as F16."""
        if dtype not in (None, "F16", "F32"):
            raise UsageError(f"{self.path}: kv_b_proj can be packed as F16 or F32, not as {dtype}")
        heads, rank = self.num_heads, self.kv_lora_rank
        values = checked_values(
            f"{self.path}.kv_b_proj", values, (heads * (self.qk_nope_head_dim + self.v_head_dim), rank)
        )
        k, v = values.view(heads, -1, rank).split([self.qk_nope_head_dim, self.v_head_dim], 1)
        exact = dtype == "F32" or (dtype is None and self.w_uk_t.qtype is QTYPES["F32"])
        halves = [QuantizedTensor.from_float(half.contiguous()) for half in (k.transpose(1, 2), v)]
        packed = self._pack_matrices(halves[0], halves[1], exact=exact, quantized=False)
        self.w_uk_t, self.w_uv, self.w_uk = (*packed, None) if len(packed) == 2 else packed

    def stores_f32(self, source: WeightSource) -> bool:
        """Whether the file stores W_UK as F32."""
        spec = source.spec(self.tensors()[0])
        return spec is not None and spec.qtype is QTYPES["F32"]

    def ready(self) -> None:
        """Builds kv_b_proj as a module, its guard, and the fused step if this attention can be one."""
        expansion = self._modules.get("kv_b_proj") or KVExpansion(self)
        self._modules["kv_b_proj"] = expansion
        self.expansion = Guard((), [expansion])
        self.block = MLABlock.of(self)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the attention; by the replaced module's forward if the kernels cannot do what the call requires.

        That is dropout, gradients of attention weights, another attention function, or hooks on `kv_b_proj`.
        """
        arguments, cache = self.call.split(args, kwargs)
        drops = self.training and self.dropout > 0
        if drops and self.placement.gpu:
            raise dropout_error(self.dropout, f"{self.path} on a GPU")
        # Attention weights need a gradient too if autograd records the input.
        needs_weight_gradients = is_recorded(arguments["hidden_states"]) and self.choice.returns_weights(
            arguments, cache
        )
        if drops or needs_weight_gradients or self.choice.is_custom or self._needs_kv_b_proj():
            return self.call_replaced(arguments, cache)
        return self.compute(cache, **arguments)

    @property
    def dropout(self) -> float:
        """The dropout probability of attention weights in training."""
        return float(getattr(self, "attention_dropout", 0.0))

    def call_patched_class(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the replaced forward, which calls the patched method; on a GPU raises UsageError."""
        if self.placement.gpu:
            return super().call_patched_class(*args, **kwargs)
        return self.call_replaced(*self.call.split(args, kwargs))

    def _needs_kv_b_proj(self) -> bool:
        """Whether kv_b_proj has hooks, or was patched or replaced."""
        if self.expansion is None or torch.compiler.is_compiling():
            return False
        return self._modules.get("kv_b_proj") is not self.expansion.states[0].module or not self.expansion.holds()

    def call_replaced(self, arguments: dict[str, Any], cache: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Calls the forward of the replaced module, which expands all keys and values with its `kv_b_proj`.

        This is for a kv_b_proj with hooks or that was replaced, for other attention functions than the kernel, and for
        dropout of attention weights.

        Args:
            arguments: The arguments by name, without the cache.
            cache: The cache, or None.

        Raises:
            UsageError: The cache is the paged KV cache of an engine.
        """
        if get_paged_layer(cache, self.layer_idx) is not None and self.training and self.dropout > 0:
            raise dropout_error(self.dropout, "an engine's forward")
        if get_paged_layer(cache, self.layer_idx) is not None:
            raise UsageError(
                f"{self.path}: an engine caches compressed keys, so a hook on kv_b_proj and attn_implementation"
                f" {self.choice.config._attn_implementation!r} have no effect there; remove the hook, or choose"
                " attn_implementation 'ktx'"
            )
        if cache is not None:
            cache = DtypeRestoringCache(cache, kv_float_dtype(self.kv_dtype, arguments["hidden_states"].dtype))
        result: tuple[torch.Tensor, torch.Tensor | None] = super().forward(**self.call.join(arguments, cache))
        return result

    def compute(
        self,
        kv_cache: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the forward.

        Args:
            kv_cache: The cache, or None.
            hidden_states: [B, S, D].
            position_embeddings: The rotary tables.
            attention_mask: Intervals, a dense mask, or None.
            **kwargs: Further arguments of the forward.

        Returns:
            The output [B, S, D], and the attention weights [B, H, S, T] if they are requested, else None.

        Raises:
            UsageError: The module is not causal and the cache is the paged KV cache of an engine.
        """
        if (block := valid_fast_path(self)) is not None:
            fused = block(hidden_states, position_embeddings, attention_mask, kv_cache)
            if fused is not None:
                return fused, None
        if is_recorded(hidden_states):
            restore_stock_layer(kv_cache, self.layer_idx)
        batch, length, _ = hidden_states.shape
        q = (
            self.q_proj(hidden_states)
            if self.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        )
        q_nope, q_rope = (
            q.view(batch, length, -1, self.qk_nope_head_dim + self.qk_rope_head_dim)
            .transpose(1, 2)
            .split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        )
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        cos, sin = rotary_tables(position_embeddings)
        q_rope = cpu.rope(q_rope, cos, sin, self.interleaved)
        k_rope = cpu.rope(k_rope[:, None], cos, sin, self.interleaved)
        latent = self.kv_a_layernorm(latent)[:, None]
        pages = get_paged_layer(kv_cache, self.layer_idx)
        if pages is not None:
            if not is_causal(self, kwargs):
                raise non_causal_error(self)
            pools = pages.update(latent, k_rope)
            assert pages.owner.batch is not None
            return self.o_proj(self.attend_pages(q_nope, q_rope, *pools, pages.owner.batch)), None
        num_expanded = self._num_expanded_tokens(kv_cache, batch, length)  # before the cache grows
        if kv_cache is not None:
            cache_dtype = kv_float_dtype(self.kv_dtype, latent.dtype)
            latent, k_rope = kv_cache.update(latent.to(cache_dtype), k_rope.to(cache_dtype), self.layer_idx)
        keys, outputs = latent.shape[2], []
        ranges, mask = split_mask(attention_mask, batch, length, keys)
        if not masks_future(self, self.choice, attention_mask, kwargs):
            ranges = non_causal_ranges(ranges, mask, (batch, length, keys))
        adapters = None if (lora := self.lora) is None else lora.of_sequence(0)
        # Without ranges or a mask attention is causal, so no row sees the keys after that of the last row.
        for attend, first, last in ((self.expanded, 0, num_expanded), (self.absorbed, num_expanded, length)):
            if first < last:
                end_key = keys - length + last if ranges is None and mask is None else keys
                rows = slice(first, last)
                row_ranges = None if ranges is None else ranges[:, rows].contiguous()
                row_mask = None if mask is None else mask[:, :, rows]
                row_queries = q_nope[:, :, rows], q_rope[:, :, rows]
                outputs.append(
                    attend(*row_queries, latent[:, 0, :end_key], k_rope[:, 0, :end_key], row_ranges, row_mask, adapters)
                )
        out = self.o_proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1))
        if not self.choice.returns_weights(kwargs):
            return out, None
        states = torch.cat([to_floats(latent).float(), to_floats(k_rope).float()], -1)
        queries = torch.cat([self._absorb_queries(q_nope, adapters), q_rope], -1)
        return out, attention_weights(queries, states, ranges, mask, self.scaling)

    def attend_pages(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latents: torch.Tensor,
        ropes: torch.Tensor,
        batch: BatchMetadata,
    ) -> torch.Tensor:
        """Computes attention for a batch of sequences on the paged KV cache.

        Full pages of a prompt use the expanded form, sequence by sequence. All other tokens (`batch.remainder`) use the
        absorbed form: those before the first full page (`lead_tokens`, which fill a page that an earlier chunk began),
        those after the last one, and decoded tokens.

        Args:
            q_nope: [1, H, T, nope].
            q_rope: [1, H, T, rope].
            latents: The page pool of latents.
            ropes: The page pool of rotated keys.
            batch: The sequences of the batch.

        Returns:
            [1, T, H * v].
        """
        out = q_nope.new_empty(1, batch.tokens, q_nope.shape[1] * self.v_head_dim)
        for span, (first, _, _), pages in zip(batch.spans, batch.rows, batch.pages, strict=True):
            if span.full_page_tokens:
                rows = slice(first + span.lead_tokens, first + span.lead_tokens + span.full_page_tokens)
                end = span.past + span.lead_tokens + span.full_page_tokens
                latent, rope = (gather_pages(pool, pages, end) for pool in (latents, ropes))
                adapters = None if (lora := self.lora) is None else lora.of_sequence(rows.start)
                out[:, rows] = self.expanded(q_nope[:, :, rows], q_rope[:, :, rows], latent, rope, None, None, adapters)
        if batch.remainder is not None:
            row_indices, sequences, pages = batch.remainder
            remainder_queries = q_nope.index_select(2, row_indices), q_rope.index_select(2, row_indices)
            paging = {"sequences": sequences, "pages": pages}
            remainder_adapters = None if (lora := self.lora) is None else lora.of_rows(row_indices)
            out[:, row_indices] = self.absorbed(
                *remainder_queries, latents[:, 0], ropes[:, 0], None, None, remainder_adapters, **paging
            )
        return out

    def _num_expanded_tokens(self, cache: Any, sequences: int, length: int) -> int:
        """Returns how many tokens at the start of a call use the expanded form.

        For a single sequence these are full pages, so the form of a token does not depend on how its prompt is chunked.
        For a batch of the engine only 0 or not 0 is meaningful, because `attend_pages` divides its tokens itself.
        """
        # w_uk is None: absorb_for_prefill
        if self.w_uk is None or torch.compiler.is_exporting():  # an exported graph has one form for any length
            return 0
        batch = get_batch(cache)
        if batch is not None:
            return max(span.full_page_tokens for span in batch.spans)
        past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
        if sequences > 1 or past % PAGE_TOKENS:  # the call does not start at a page of one sequence: one form for all
            return length if length >= MIN_EXPANDED_TOKENS else 0
        return length // PAGE_TOKENS * PAGE_TOKENS

    def absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        ranges: Any,
        mask: Any,
        adapters: MLAAdapters | None = None,
        **pages: torch.Tensor,
    ) -> torch.Tensor:
        """Computes attention in the absorbed form: on latents, with W_UK applied to queries and W_UV to the results.

        Args:
            q_nope: [B, H, S, nope].
            q_rope: [B, H, S, rope].
            latent: [B, T, rank].
            k_rope: [B, T, rope].
            ranges: Intervals of visible keys, or None.
            mask: The dense mask, or None.
            adapters: The adapters of kv_b_proj, by row.
            **pages: The paging arguments of cpu.mla_attention.

        Returns:
            [B, S, H * v].
        """
        batch, heads, length, _ = q_nope.shape
        context = cpu.mla_attention(
            self._absorb_queries(q_nope, adapters), q_rope, latent, k_rope, ranges, mask, self.scaling, **pages
        )  # [B, S, H, rank]
        by_head = context.permute(2, 0, 1, 3).reshape(heads, batch * length, -1)
        out = cpu.linear_batched(by_head, self.w_uv)
        if adapters is not None:
            out = adapters.values(by_head, out)
        return out.view(heads, batch, length, -1).permute(1, 2, 0, 3).reshape(batch, length, -1)

    def _absorb_queries(self, q_nope: torch.Tensor, adapters: MLAAdapters | None = None) -> torch.Tensor:
        """Multiplies queries [B, H, S, nope] by W_UK -> [B, H, S, rank]."""
        batch, heads, length, _ = q_nope.shape
        flat = q_nope.transpose(0, 1).reshape(heads, batch * length, -1)
        by_head = cpu.linear_batched(flat, self.w_uk_t)
        if adapters is not None:
            by_head = adapters.queries(flat, by_head)
        return by_head.view(heads, batch, length, -1).transpose(0, 1)

    def expanded(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        ranges: Any,
        mask: Any,
        adapters: MLAAdapters | None = None,
    ) -> torch.Tensor:
        """Computes attention in the expanded form: k = [W_UK c | k_rope], v = W_UV c, in the dtype of the latent c.

        Args:
            q_nope: [B, H, S, nope].
            q_rope: [B, H, S, rope].
            latent: [B, T, rank].
            k_rope: [B, T, rope].
            ranges: Intervals of visible keys, or None.
            mask: The dense mask, or None.
            adapters: The adapters of kv_b_proj, the same for all rows.

        Returns:
            [B, S, H * v].
        """
        batch, heads, length, nope = q_nope.shape
        keys, width = latent.shape[1], self.v_head_dim
        flat = to_floats(latent[:, None])[:, 0].reshape(batch * keys, -1)
        bytes_per_head = batch * keys * (nope + width) * flat.element_size()
        heads_per_step = max(1, EXPAND_BYTES // bytes_per_head)
        # A head that does not fill whole row groups cannot be sliced out of the packed matrix.
        if (nope | width) % cpu.GROUP_ROWS:
            heads_per_step = heads
        out = q_nope.new_empty(batch, length, heads, width)
        for head in range(0, heads, heads_per_step):
            head_range = range(head, min(head + heads_per_step, heads))
            expanded = (
                cpu.linear(flat, _slice_head_rows(self.w_uk, head_range, nope), all_bf16=True),
                self._expand_values(flat, head_range),
            )
            if adapters is not None:
                expanded = adapters.expanded(flat, *expanded, head_range)
            k_nope, values = (part.view(batch, keys, len(head_range), -1).transpose(1, 2) for part in expanded)
            head_slice = slice(head_range.start, head_range.stop)
            out[:, :, head_slice] = cpu.attention(
                q_nope[:, head_slice],
                k_nope,
                values,
                ranges,
                mask if mask is None or mask.shape[1] == 1 else mask[:, head_slice],
                self.scaling,
                q_rope=q_rope[:, head_slice],
                k_rope=k_rope[:, None],
            )
        return out.view(batch, length, -1)

    def _expand_values(self, flat: torch.Tensor, heads: range) -> torch.Tensor:
        """Computes the values of some heads from latents `flat` [rows, rank] -> [rows, heads * v].

        Heads that fill whole row groups are contiguous in memory and multiplied as one matrix.
        """
        w_uv = self.w_uv
        assert w_uv is not None
        if w_uv.n % cpu.GROUP_ROWS == 0:
            return cpu.linear(
                flat,
                _slice_head_rows(cpu.Packed(w_uv.data, w_uv.qtype, w_uv.matrices * w_uv.n, w_uv.k), heads, w_uv.n),
                all_bf16=True,
            )
        return cpu.linear_batched(flat.expand(w_uv.matrices, -1, -1), w_uv).transpose(0, 1).reshape(flat.shape[0], -1)

    def floats(self) -> dict[str, Floats]:
        """Returns the view of kv_b_proj.weight [heads * (nope + v), rank]: per head the rows of W_UK, then of W_UV."""
        self.check_loaded()
        k, v = self.w_uk_t, self.w_uv
        rows_per_head = k.k + v.n
        if self.placement.gpu:
            message = (
                f"{self.path}.kv_b_proj is on {self.placement}, and it cannot be read back from there; load the model"
                " on the CPU to read it (device='cpu')"
            )
            return {"kv_b_proj.weight": unreadable((k.matrices * rows_per_head, k.n), message, id(k))}

        def read(first: int, last: int) -> torch.Tensor:
            heads = range(first // rows_per_head, -(-last // rows_per_head))
            rows = [torch.cat([_dequantize_head(k, head).T, _dequantize_head(v, head)]) for head in heads]
            return torch.cat(rows)[first - heads.start * rows_per_head : last - heads.start * rows_per_head]

        return {"kv_b_proj.weight": Floats((k.matrices * rows_per_head, k.n), read, k.data.data_ptr())}

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        """Returns W_UK transposed and W_UV, and W_UK for the expanded form under a name of its own (EXPANDED)."""
        self.check_loaded()
        k_b, v_b = (name.removeprefix(f"{self.path}.") for name in self.tensors())
        state: dict[str, list[PackedState] | torch.Tensor] = {
            k_b: [stored.stack_state(_split_heads(self.w_uk_t))],
            v_b: [stored.stack_state(_split_heads(self.w_uv))],
        }
        return state if self.w_uk is None else state | {f"{k_b}{EXPANDED}": [stored.matrix_state(self.w_uk)]}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Packs another kv_b_proj.weight [heads * (nope + v), rank], f32 values as F32. UsageError on a GPU."""
        if self.placement.gpu:
            raise UsageError(
                f"{self.path}: kv_b_proj cannot be replaced on a GPU; load the model on the CPU to replace it"
            )
        heads = values["kv_b_proj.weight"].float().reshape(self.num_heads, -1, self.kv_lora_rank)
        k_b, v_b = heads.split([self.qk_nope_head_dim, self.v_head_dim], 1)
        packed = self._pack_matrices(
            QuantizedTensor.from_float(k_b.transpose(1, 2)),
            QuantizedTensor.from_float(v_b),
            exact=True,
            quantized=False,
        )
        self.w_uk_t, self.w_uv, self.w_uk = (*packed, None) if len(packed) == 2 else packed

    def weight_bytes(self) -> tuple[int, int]:
        """Returns the bytes of both forms of kv_b_proj, and those of the absorbed form, which a token reads."""
        absorbed_bytes = sum(w.nbytes for w in (self.w_uk_t, self.w_uv) if w is not None)
        expanded_bytes = 0 if self.w_uk is None else self.w_uk.nbytes
        return absorbed_bytes + expanded_bytes, absorbed_bytes  # a single token uses the absorbed form


class KVExpansion(nn.Module):
    """The child kv_b_proj, as in transformers: latents [..., rank] -> keys and values [..., heads * (nope + v)].

    The operator does not call it, because it computes with W_UK and W_UV. It exists for programs that read the weight,
    hook the module or add an adapter to it. The keys lack their rotary columns; the weights belong to the owner.
    """

    bias = None

    def __init__(self, owner: MLA):
        """Creates the child of `owner` with the attributes of the nn.Linear that programs expect, but no parameter."""
        super().__init__()
        self.__dict__["owner"] = owner  # not registered as a child
        self.path, self.placement = f"{owner.path}.kv_b_proj", owner.placement
        parameters = VisibleParameters()  # so that `weight` is found as a parameter, and packed when it is assigned
        parameters.names, parameters.owner = frozenset({"weight"}), self
        self.__dict__["_buffers"] = parameters
        self.replaced_class = nn.Linear  # whose methods guards watch too, because scripts may patch them
        self.in_features = owner.kv_lora_rank
        self.out_features = owner.num_heads * (owner.qk_nope_head_dim + owner.v_head_dim)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out_features, in_features], read-only (ktx.ops.float_views)."""
        owner: MLA = self.__dict__["owner"]
        floats, label = owner.floats()["kv_b_proj.weight"], f"{owner.path}.kv_b_proj.weight"
        return Dequantized(floats, owner.dtype, label, on_write=self._replaced)

    def _replaced(self, values: torch.Tensor) -> Floats:
        """Packs other values and returns the new view of the weight."""
        owner: MLA = self.__dict__["owner"]
        owner.take({"kv_b_proj.weight": checked_values(f"{owner.path}.kv_b_proj", values, self.weight.shape)})
        return owner.floats()["kv_b_proj.weight"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._replaced(value)
        else:
            super().__setattr__(name, value)

    def repacked(self, name: str, values: torch.Tensor) -> None:
        """Lets the owner pack other values."""
        self.__dict__["owner"].take({f"kv_b_proj.{name}": values})

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Expands latents [..., rank] with the owner's packed halves, and adds the LoRA adapters of the forward."""
        owner: MLA = self.__dict__["owner"]
        if nn.Linear in patched:  # a method of nn.Linear itself was patched
            linear: Any = nn.Linear
            return linear.forward(self, latent)  # type: ignore[no-any-return]
        if owner.w_uk is None:
            raise UsageError(
                f"{owner.path}.kv_b_proj: absorb_for_prefill never expands keys; load the model without that option"
            )
        flat, heads = latent.reshape(-1, self.in_features), owner.num_heads
        parts = cpu.linear(flat, owner.w_uk, all_bf16=True), owner._expand_values(flat, range(heads))
        if (lora := owner.lora) is not None and (adapters := lora.of_sequence(0)) is not None:
            parts = adapters.expanded(flat, *parts, range(heads))
        return torch.cat([part.view(flat.shape[0], heads, -1) for part in parts], -1).view(*latent.shape[:-1], -1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not prefix:  # its own state_dict(); otherwise the owner writes the weight
            destination["weight"] = self.weight

    def _load_from_state_dict(self, *args: Any) -> None:
        """Packs a weight from a state dict of this module alone; as part of a model, the owner loads it."""
        super()._load_from_state_dict(*args)
        state, prefix, unexpected = args[0], args[1], args[5]
        if not prefix and "weight" in state:
            self._replaced(state["weight"])
        if f"{prefix}weight" in unexpected:  # because the owner loads it
            unexpected.remove(f"{prefix}weight")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As in torch; raises UsageError for True, because the packed weight cannot be trained."""
        if requires_grad:
            self.__dict__["owner"].trained("kv_b_proj.weight")
        return super().requires_grad_(requires_grad)

    def extra_repr(self) -> str:
        """Describes the sizes in the module's repr."""
        return f"{self.in_features} -> {self.out_features}"


class DtypeRestoringCache(CastingCache):
    """Wraps a cache that stores another dtype; returns keys and values in the dtype of the update."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores keys and values, and returns all of them in the dtype of the given ones."""
        return tuple(to_floats(states).to(keys.dtype) for states in super().update(keys, values, *args, **kwargs))


class MLABlock:
    """Fuses the absorbed form into one kernel call, on a cache that grows in place."""

    def __init__(self, owner: MLA, matrices: WeightDescriptor):
        """Builds the kernel step from `owner` and its packed `matrices`, in the order that `of` adds them."""
        self.owner = owner
        q_norm: Any = None if owner.q_lora_rank is None else owner.q_a_layernorm
        norm, rank, rope_dim = owner.kv_a_layernorm, owner.kv_lora_rank, owner.qk_rope_head_dim
        # The cache has one head, whose two buffers are the latent and the rotated key columns.
        self.heads, self.head_dims, self.half_rotary, self.has_dropout = 1, (rank, rope_dim), False, owner.dropout > 0
        self.guard = Guard(
            [owner], descendants(owner), [norm.copied_weight(), None if q_norm is None else q_norm.copied_weight()]
        )
        self.fused_step = FusedStep(
            "mla_step",
            matrices.packed,
            matrices.descriptor,
            [matrices.hidden, owner.num_heads, owner.qk_nope_head_dim, owner.v_head_dim, rank, rope_dim],
            None if q_norm is None else q_norm.in_f32,
            norm.in_f32,
            owner.interleaved,
            [1.0 if q_norm is None else q_norm.epsilon, norm.epsilon, owner.scaling],
        )

    def supports(self, hidden: torch.Tensor, cache: Any) -> bool:
        """Whether all tokens of hidden [B, S, D] use the absorbed form and need no attention weights or dropout."""
        if self.has_dropout and self.owner.training:
            return False
        return not self.owner._num_expanded_tokens(cache, *hidden.shape[:2]) and self.owner.choice.uses_kernel(cache)

    @classmethod
    def of(cls, owner: MLA) -> MLABlock | None:
        """Builds the block of `owner`; None if a projection or norm is not an operator of ktx.

        None too if a projection has a bias or a norm adds 1 to its weight, which the kernel does not support.
        """
        has_q_rank = owner.q_lora_rank is not None
        projections = ["q_a_proj"] * has_q_rank + [
            "q_b_proj" if has_q_rank else "q_proj",
            "kv_a_proj_with_mqa",
            "o_proj",
        ]
        norms = ["q_a_layernorm"] * has_q_rank + ["kv_a_layernorm"]
        children: dict[str, Any] = owner._modules
        if any(not is_plain_linear(children[name]) or children[name].bias is not None for name in projections):
            return None
        if any(not RMSNorm.is_cpu_norm(children[name]) or children[name].plus_one for name in norms):
            return None
        matrices = WeightDescriptor()
        # The kernel parses q_a_proj first; without a q rank an empty projection takes its place.
        for name in ([] if has_q_rank else [""]) + projections:
            matrices.projection(children[name].parts if name else [])
        for weights in (owner.w_uk_t, owner.w_uv):
            matrices.experts(weights)
        return cls(owner, matrices)

    def __call__(
        self,
        hidden: torch.Tensor,
        embeddings: Any,
        mask: torch.Tensor | None,
        cache: Any,
        before: PreNorm = NO_NORM,
    ) -> torch.Tensor | None:
        """Computes the attention with its projections in one kernel call, because for few tokens call overhead counts.

        Args:
            hidden: f32 [B, S, D].
            embeddings: The rotary tables.
            mask: The attention mask.
            cache: The cache.
            before: The norm of the input; if it has one, `hidden` is added to the output (residual).

        Returns:
            f32 [B, S, D], or None if this call needs the unfused forward.
        """
        return run_attention(self, hidden, embeddings, mask, cache, before) if self.supports(hidden, cache) else None


def _choose_rotary_pairs(rope: str, old: Any, ctx: Context) -> str:
    """Returns which columns RoPE rotates as a pair: "interleaved" or "halves". UsageError for an unknown class."""
    if rope == "config":
        return "interleaved" if old.config.rope_interleave else "halves"
    if rope not in ("interleaved", "halves"):
        supported = " ".join(MLA_PAIRING)
        raise UsageError(
            f"{ctx.path}: {type(old).__name__} may differ from DeepSeek's attention; MLA supports {supported}. If it"
            " does not differ, set the option rope: interleaved, halves or config"
        )
    return rope


def _dequantize_head(w: cpu.Packed, head: int) -> torch.Tensor:
    """Returns the dequantized matrix of a head, f32 [n, k]."""
    return _slice_head(w, head).rows(torch.arange(w.n, device="cpu"))


def _slice_head(w: cpu.Packed, head: int) -> cpu.Packed:
    """Returns the packed matrix of a head."""
    head_bytes = w.nbytes // w.matrices
    return cpu.Packed(w.data[head * head_bytes : (head + 1) * head_bytes], w.qtype, w.n, w.k)


def _split_heads(w: Any) -> list[Any]:
    """Returns the packed matrices of all heads; a GPU matrix is returned whole."""
    return [_slice_head(w, head) for head in range(w.matrices)] if isinstance(w, cpu.Packed) else [w]


def _slice_head_rows(w: cpu.Packed, heads: range, rows_per_head: int) -> cpu.Packed:
    """Returns the packed rows of `heads`; a head must fill whole row groups, unless all heads are requested."""
    if len(heads) * rows_per_head == w.n:
        return w
    head_bytes = w.nbytes // (w.n // cpu.GROUP_ROWS) * rows_per_head // cpu.GROUP_ROWS
    return cpu.Packed(
        w.data[heads.start * head_bytes : heads.stop * head_bytes], w.qtype, len(heads) * rows_per_head, w.k
    )


def to_f16(weight: QuantizedTensor, exact: bool) -> QuantizedTensor:
    """Converts F32 weights to F16, which halves their memory, where that is possible.

    `exact` means that F32 is the type of the file, which is preserved; otherwise the weights were computed from another
    type, which has rounded them more than F16 does. Returns `weight` itself if it is not F32, if `exact` is set, or if
    F16 would overflow.
    """
    if weight.qtype is not QTYPES["F32"] or exact:
        return weight
    half = weight.dequantize().half()
    if not half.isfinite().all():
        return weight
    return QuantizedTensor(
        half.contiguous().view(torch.uint8).reshape(*half.shape[:-1], -1), QTYPES["F16"], weight.shape
    )
