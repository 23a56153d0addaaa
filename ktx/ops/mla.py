"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the cache holds the compressed latent.

Few tokens: absorbed. W_UK is multiplied into the query and W_UV into the result, so attention is multi-query on the latent and the
past is never expanded. Many tokens: the latent is expanded to keys and values, for some heads at a time, and attention has 192 columns
instead of 576. A call decides by what it sees, so mixed use is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.cache.kv import as_stock, values_of
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import BatchMetadata, batch_of, gather_pages, paged
from ktx.errors import UsageError
from ktx.kernels import cpu
from ktx.kernels.gpu.attention_backend import known_backend
from ktx.kernels.gradients import recorded
from ktx.kernels.packed_cache import cached_pack
from ktx.ops import contract
from ktx.ops import packed_state as stored
from ktx.ops.attention import CastingCache, causal_pages, hides, is_causal, not_dropped
from ktx.ops.attention_weights import Choice, attention_weights
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.class_patches import patched
from ktx.ops.edit import fitting
from ktx.ops.float_views import Dequantized, Floats, out_of_reach
from ktx.ops.fusion.fused import (
    NO_NORM,
    FusedStep,
    PreNorm,
    WeightDescriptor,
    float_type,
    plain_linear,
    rotary_tables,
    run_attention,
    split_mask,
)
from ktx.ops.guard import Guard, below, current
from ktx.ops.masks import uncausal
from ktx.ops.norm import RMSNorm
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import OfferedParameters
from ktx.quant.types import QTYPES
from ktx.weights.base import EXPANDED, QuantizedTensor, WeightSource

if TYPE_CHECKING:
    from ktx.ops.latent_lora import LatentLora, Latents

EXPAND_FROM = 128  # tokens of a call from which expanding pays: 2 * 768 * S > 2 * 512 * 256 operations a key and head
EXPAND_BYTES = 1 << 28  # memory for the keys and values of the heads that are expanded at once
ROPE = {  # attention classes that do what DeepSeek's does, and where they pair the rotated columns
    "DeepseekV2Attention": "interleaved",
    "DeepseekV3Attention": "config",
    "AXK1Attention": "config",
    "Glm4MoeLiteAttention": "config",
    "MiniCPM3Attention": "halves",
    "YoutuAttention": "config",
}


class MLA(Operator):
    """Replaces an attention that caches a latent as DeepSeek's does.

    Options: `absorb_for_prefill` keeps one form for any length, which saves memory and costs prefill speed; `rope`
    (interleaved, halves, config) vouches for a class that is not in ROPE; `backend` (triton, flashinfer, auto) says whose kernels read the latent on a GPU.
    """

    consumes = ("kv_b_proj",)
    remade = ("block", "expansion")
    reads = frozenset({"scaling", "w_uk_t", "w_uv", "w_uk"})
    ours = True  # as ktx.ops.attention.Attention has it
    w_uk_t: Any
    w_uv: Any
    w_uk: Any
    block: MLABlock | None
    choice: Choice
    expansion: Guard | None
    lora: LatentLora | None = None  # of kv_b_proj, while adapters of the forward are meant for it

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
        if not hasattr(old, "kv_lora_rank") or not hasattr(old, "kv_a_proj_with_mqa"):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, MLA needs an attention with a compressed latent (kv_lora_rank)"
            )
        pairs = _pairs(rope or ROPE.get(type(old).__name__, ""), old, ctx)
        new: MLA = adopt(cls, old, ctx)
        del new._modules["kv_b_proj"]
        new.dtype = ctx.dtype
        new.absorb_for_prefill, new.kv_dtype = absorb_for_prefill, ctx.kv_dtype
        new.interleaved, new.backend = pairs == "interleaved", known_backend(backend)
        new.choice, new.expansion = Choice(old.config), None
        new.w_uk_t, new.w_uv, new.w_uk, new.block = None, None, None, None
        new.check(ctx)
        contract.latent_attention(old, ctx.path, new.interleaved)
        return new

    def check(self, ctx: Context) -> None:
        """UsageError for options that cannot be had where it lies, before anything is loaded; the CPU has all."""

    def tensors(self) -> list[str]:
        return [f"{self.path}.k_b_proj.weight", f"{self.path}.v_b_proj.weight"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        heads, rank = self.num_heads, self.kv_lora_rank
        return dict(
            zip(self.tensors(), [(heads, rank, self.qk_nope_head_dim), (heads, self.v_head_dim, rank)], strict=True)
        )

    def load(self, source: WeightSource) -> None:
        packed = cached_pack(lambda: self._pack(source))
        self.w_uk_t, self.w_uv, self.w_uk = (*packed, None) if len(packed) == 2 else packed

    def _pack(self, source: WeightSource) -> list[cpu.Packed]:
        """W_UK transposed, W_UV, and unless one form serves any length W_UK once more, rows along the latent, for expanding."""
        k_b, v_b = (source.get(name) for name in self.tensors())
        spec, expanded = source.spec(self.tensors()[0]), f"{self.tensors()[0]}{EXPANDED}"
        if (
            not self.absorb_for_prefill and source.spec(expanded) is not None
        ):  # as it was in the memory of another model
            return [cpu.pack(weight) for weight in (k_b, v_b, source.get(expanded))]
        return self._packed(k_b, v_b, self.is_exact(source), spec is not None and not spec.qtype.is_float)

    def _packed(self, k_b: QuantizedTensor, v_b: QuantizedTensor, exact: bool, quantised: bool) -> list[cpu.Packed]:
        packed = [cpu.pack(as_half(k_b, exact)), cpu.pack(as_half(v_b, exact))]
        if not self.absorb_for_prefill:
            w_uk = QuantizedTensor.of(k_b.dequantize().transpose(1, 2).reshape(-1, self.kv_lora_rank))
            coarse = quantised and self.kv_lora_rank % QTYPES["Q8_0"].block == 0
            packed.append(cpu.pack(w_uk, QTYPES["Q8_0"]) if coarse else cpu.pack(as_half(w_uk, exact)))
        return packed

    def matrix_of(self, name: str, expert: int | None) -> torch.Tensor:
        """For ktx.edit: kv_b_proj's weight f32 [heads * (nope + v), rank], as transformers has it."""
        if name != "kv_b_proj" or expert is not None:
            raise UsageError(f"{self.path}: an MLA has one matrix of its own: ktx.edit(module, 'kv_b_proj')")
        return self.floats()["kv_b_proj.weight"].values(torch.float32)

    def pack_again(self, values: torch.Tensor, name: str, expert: int | None, dtype: str | None) -> None:
        """For ktx.edit: both halves become F32 where they were that or `dtype` says so, else F16."""
        if dtype not in (None, "F16", "F32"):
            raise UsageError(f"{self.path}: kv_b_proj is packed as F16 or F32, not as {dtype}")
        heads, rank = self.num_heads, self.kv_lora_rank
        values = fitting(f"{self.path}.kv_b_proj", values, (heads * (self.qk_nope_head_dim + self.v_head_dim), rank))
        k, v = values.view(heads, -1, rank).split([self.qk_nope_head_dim, self.v_head_dim], 1)
        exact = dtype == "F32" or (dtype is None and self.w_uk_t.qtype is QTYPES["F32"])
        halves = [QuantizedTensor.of(half.contiguous()) for half in (k.transpose(1, 2), v)]
        packed = self._packed(halves[0], halves[1], exact, False)
        self.w_uk_t, self.w_uv, self.w_uk = (*packed, None) if len(packed) == 2 else packed

    def is_exact(self, source: WeightSource) -> bool:
        """Whether the file itself holds W_UK in f32."""
        spec = source.spec(self.tensors()[0])
        return spec is not None and spec.qtype is QTYPES["F32"]

    def ready(self) -> None:
        expansion = self._modules.get("kv_b_proj") or Expansion(self)
        self._modules["kv_b_proj"] = expansion
        self.expansion = Guard((), [expansion])
        self.block = MLABlock.of(self)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        given, cache = self.call.split(args, kwargs)
        drops = self.training and self.dropout > 0
        if drops and self.placement.gpu:
            raise not_dropped(self.dropout, f"{self.path} on a GPU")
        shown = recorded(given["hidden_states"]) and self.choice.shows(
            given, cache
        )  # whose weights have a gradient too
        if drops or shown or self.choice.foreign or self._expands():
            return self.by_transformers(given, cache)
        return self.computed(cache, **given)

    @property
    def dropout(self) -> float:
        """Of attention weights, in training."""
        return float(getattr(self, "attention_dropout", 0.0))

    def by_class(self, *args: Any, **kwargs: Any) -> Any:
        if self.placement.gpu:
            return super().by_class(*args, **kwargs)
        return self.by_transformers(*self.call.split(args, kwargs))

    def _expands(self) -> bool:
        """Whether somebody listens to kv_b_proj, or has patched or exchanged it."""
        if self.expansion is None or torch.compiler.is_compiling():
            return False
        return self._modules.get("kv_b_proj") is not self.expansion.states[0].module or not self.expansion.holds()

    def by_transformers(self, given: dict[str, Any], cache: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward of the replaced module, which expands all keys and values by its `kv_b_proj`, for who listens to that or has exchanged it, for other functions than the kernel, and to drop attention weights. UsageError on an engine's pages."""
        if paged(cache, self.layer_idx) is not None and self.training and self.dropout > 0:
            raise not_dropped(self.dropout, "an engine's forward")
        if paged(cache, self.layer_idx) is not None:
            raise UsageError(
                f"{self.path}: an engine keeps keys compressed, so a hook on kv_b_proj and attn_implementation"
                f" {self.choice.config._attn_implementation!r} would not count there; remove the one and choose 'ktx'"
            )
        if cache is not None:
            cache = Expandable(cache, float_type(self.kv_dtype, given["hidden_states"].dtype))
        found: tuple[torch.Tensor, torch.Tensor | None] = super().forward(**self.call.joined(given, cache))
        return found

    def computed(
        self,
        kv_cache: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward, by whatever name the cache came: the result, and weights [B, H, S, T] where somebody asks for them."""
        if (block := current(self)) is not None:
            done = block(hidden_states, position_embeddings, attention_mask, kv_cache)
            if done is not None:
                return done, None
        if recorded(hidden_states):
            as_stock(kv_cache, self.layer_idx)
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
        pages = paged(kv_cache, self.layer_idx)
        if pages is not None:
            if not is_causal(self, kwargs):
                raise causal_pages(self)
            pools = pages.update(latent, k_rope)
            assert pages.owner.batch is not None
            return self.o_proj(self.ragged(q_nope, q_rope, *pools, pages.owner.batch)), None
        whole = self._num_expanded_rows(kv_cache, batch, length)
        if kv_cache is not None:
            stored = float_type(self.kv_dtype, latent.dtype)
            latent, k_rope = kv_cache.update(latent.to(stored), k_rope.to(stored), self.layer_idx)
        keys, parts = latent.shape[2], []
        ranges, mask = split_mask(attention_mask, batch, length, keys)
        if not hides(self, self.choice, attention_mask, kwargs):
            ranges = uncausal(ranges, mask, (batch, length, keys))
        more = None if (lora := self.lora) is None else lora.whole(0)
        for mix, first, last in ((self.expanded, 0, whole), (self.absorbed, whole, length)):
            if first < last:
                end = keys - length + last if ranges is None and mask is None else keys
                own = slice(first, last)
                seen = None if ranges is None else ranges[:, own].contiguous()
                matrix = None if mask is None else mask[:, :, own]
                q = q_nope[:, :, own], q_rope[:, :, own]
                parts.append(mix(*q, latent[:, 0, :end], k_rope[:, 0, :end], seen, matrix, more))
        out = self.o_proj(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        if not self.choice.shows(kwargs):
            return out, None
        states = torch.cat([values_of(latent).float(), values_of(k_rope).float()], -1)
        queries = torch.cat([self._absorbed_queries(q_nope, more), q_rope], -1)
        return out, attention_weights(queries, states, ranges, mask, self.scaling)

    def ragged(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latents: torch.Tensor,
        ropes: torch.Tensor,
        batch: BatchMetadata,
    ) -> torch.Tensor:
        """The same for a batch of sequences: q_nope [1, H, T, nope], q_rope [1, H, T, rope] on pools -> [1, T, H * v].

        Whole pages of a prompt are expanded, sequence by sequence, everything else is absorbed.
        """
        out = q_nope.new_empty(1, batch.tokens, q_nope.shape[1] * self.v_head_dim)
        for span, (first, _, _), pages in zip(batch.spans, batch.rows, batch.pages, strict=True):
            if span.full_page_tokens:
                own = slice(first + span.lead_tokens, first + span.lead_tokens + span.full_page_tokens)
                end = span.past + span.lead_tokens + span.full_page_tokens
                latent, rope = (gather_pages(pool, pages, end) for pool in (latents, ropes))
                more = None if (lora := self.lora) is None else lora.whole(own.start)
                out[:, own] = self.expanded(q_nope[:, :, own], q_rope[:, :, own], latent, rope, None, None, more)
        if batch.rest is not None:
            places, sequences, pages = batch.rest
            few = q_nope.index_select(2, places), q_rope.index_select(2, places)
            about = {"sequences": sequences, "pages": pages}
            some = None if (lora := self.lora) is None else lora.among(places)
            out[:, places] = self.absorbed(*few, latents[:, 0], ropes[:, 0], None, None, some, **about)
        return out

    def _num_expanded_rows(self, cache: Any, sequences: int, length: int) -> int:
        """How many of a call's tokens, the first ones, take the expanded form: whole pages, whatever the piece of the prompt they come in."""
        if self.w_uk is None or torch.compiler.is_exporting():  # one graph for any length has one form
            return 0
        batch = batch_of(cache)
        if batch is not None:
            return max(span.full_page_tokens for span in batch.spans)
        past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
        if sequences > 1 or past % PAGE_TOKENS:
            return length if length >= EXPAND_FROM else 0
        return length // PAGE_TOKENS * PAGE_TOKENS

    def absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        ranges: Any,
        mask: Any,
        more: Latents | None = None,
        **pages: torch.Tensor,
    ) -> torch.Tensor:
        """q_nope [B, H, S, nope], q_rope [B, H, S, rope], latent [B, T, rank], k_rope [B, T, rope] -> [B, S, H * v]. `more`: adapters of kv_b_proj, by rows; `pages`: as cpu.mla_attention takes them."""
        batch, heads, length, _ = q_nope.shape
        context = cpu.mla_attention(
            self._absorbed_queries(q_nope, more), q_rope, latent, k_rope, ranges, mask, self.scaling, **pages
        )  # [B, S, H, rank]
        by_head = context.permute(2, 0, 1, 3).reshape(heads, batch * length, -1)
        out = cpu.linear_batched(by_head, self.w_uv)
        if more is not None:
            out = more.values(by_head, out)
        return out.view(heads, batch, length, -1).permute(1, 2, 0, 3).reshape(batch, length, -1)

    def _absorbed_queries(self, q_nope: torch.Tensor, more: Latents | None = None) -> torch.Tensor:
        """[B, H, S, nope] times W_UK -> [B, H, S, rank]."""
        batch, heads, length, _ = q_nope.shape
        flat = q_nope.transpose(0, 1).reshape(heads, batch * length, -1)
        by_head = cpu.linear_batched(flat, self.w_uk_t)
        if more is not None:
            by_head = more.queries(flat, by_head)
        return by_head.view(heads, batch, length, -1).transpose(0, 1)

    def expanded(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        ranges: Any,
        mask: Any,
        more: Latents | None = None,
    ) -> torch.Tensor:
        """The same with keys and values made from the latent, in its type: k = [W_UK c | k_rope], v = W_UV c. `more`: adapters of kv_b_proj, the same for all rows."""
        batch, heads, length, nope = q_nope.shape
        keys, width = latent.shape[1], self.v_head_dim
        flat = values_of(latent[:, None])[:, 0].reshape(batch * keys, -1)
        each = batch * keys * (nope + width) * flat.element_size()
        step = max(1, EXPAND_BYTES // each)
        if (nope | width) % cpu.GROUP_ROWS:  # heads are no whole groups of rows: one cannot be told from its neighbours
            step = heads
        out = q_nope.new_empty(batch, length, heads, width)
        for head in range(0, heads, step):
            some = range(head, min(head + step, heads))
            both = cpu.linear(flat, _rows(self.w_uk, some, nope), wide=True), self._values(flat, some)
            if more is not None:
                both = more.expanded(flat, *both, some)
            k_nope, values = (part.view(batch, keys, len(some), -1).transpose(1, 2) for part in both)
            chosen = slice(some.start, some.stop)
            out[:, :, chosen] = cpu.attention(
                q_nope[:, chosen],
                k_nope,
                values,
                ranges,
                mask if mask is None or mask.shape[1] == 1 else mask[:, chosen],
                self.scaling,
                q_rope=q_rope[:, chosen],
                k_rope=k_rope[:, None],
            )
        return out.view(batch, length, -1)

    def _values(self, flat: torch.Tensor, heads: range) -> torch.Tensor:
        """W_UV of some heads on flat [rows, rank] -> [rows, heads * v]. Heads of whole groups of rows lie in memory as one matrix."""
        w = self.w_uv
        assert w is not None
        if w.n % cpu.GROUP_ROWS == 0:
            return cpu.linear(flat, _rows(cpu.Packed(w.data, w.qtype, w.matrices * w.n, w.k), heads, w.n), wide=True)
        return cpu.linear_batched(flat.expand(w.matrices, -1, -1), w).transpose(0, 1).reshape(flat.shape[0], -1)

    def floats(self) -> dict[str, Floats]:
        self.check_loaded()
        k, v = self.w_uk_t, self.w_uv
        each = k.k + v.n  # rows of a head
        if self.placement.gpu:
            about = f"{self.path}.kv_b_proj is on {self.placement}, from where it is not read back; load the model on the CPU for it (device='cpu')"
            return {"kv_b_proj.weight": out_of_reach((k.matrices * each, k.n), about, id(k))}

        def read(first: int, last: int) -> torch.Tensor:
            heads = range(first // each, -(-last // each))
            rows = [torch.cat([_head(k, head).T, _head(v, head)]) for head in heads]
            return torch.cat(rows)[first - heads.start * each : last - heads.start * each]

        return {"kv_b_proj.weight": Floats((k.matrices * each, k.n), read, k.data.data_ptr())}

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        self.check_loaded()
        k_b, v_b = (name.removeprefix(f"{self.path}.") for name in self.tensors())
        found: dict[str, list[PackedState] | torch.Tensor] = {
            k_b: [stored.stack(_heads(self.w_uk_t))],
            v_b: [stored.stack(_heads(self.w_uv))],
        }
        return found if self.w_uk is None else found | {f"{k_b}{EXPANDED}": [stored.matrix(self.w_uk)]}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        if self.placement.gpu:
            raise UsageError(
                f"{self.path}: kv_b_proj on a GPU takes no other weights; load the model on the CPU for it"
            )
        heads = values["kv_b_proj.weight"].float().reshape(self.num_heads, -1, self.kv_lora_rank)
        k_b, v_b = heads.split([self.qk_nope_head_dim, self.v_head_dim], 1)
        packed = self._packed(QuantizedTensor.of(k_b.transpose(1, 2)), QuantizedTensor.of(v_b), True, False)
        self.w_uk_t, self.w_uv, self.w_uk = (*packed, None) if len(packed) == 2 else packed

    def weight_bytes(self) -> tuple[int, int]:
        read = sum(w.nbytes for w in (self.w_uk_t, self.w_uv) if w is not None)
        return read + (0 if self.w_uk is None else self.w_uk.nbytes), read


class Expansion(nn.Module):
    """kv_b_proj as transformers has it: latents [..., rank] -> keys without their rotated columns and values, [..., heads * (nope + v)]. The matrices are its owner's."""

    bias = None

    def __init__(self, owner: MLA):
        super().__init__()
        self.__dict__["owner"] = owner  # not a child
        self.path, self.home = f"{owner.path}.kv_b_proj", owner.placement
        offered = OfferedParameters()
        offered.names, offered.owner = frozenset({"weight"}), self
        self.__dict__["_buffers"] = offered
        self.replaces = nn.Linear
        self.in_features = owner.kv_lora_rank
        self.out_features = owner.num_heads * (owner.qk_nope_head_dim + owner.v_head_dim)

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], read-only: see ktx.ops.float_views."""
        owner: MLA = self.__dict__["owner"]
        floats, label = owner.floats()["kv_b_proj.weight"], f"{owner.path}.kv_b_proj.weight"
        return Dequantized(floats, owner.dtype, label, replace=self._replaced)

    def _replaced(self, values: torch.Tensor) -> Floats:
        """Packs other values."""
        owner: MLA = self.__dict__["owner"]
        owner.take({"kv_b_proj.weight": fitting(f"{owner.path}.kv_b_proj", values, self.weight.shape)})
        return owner.floats()["kv_b_proj.weight"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._replaced(value)
        else:
            super().__setattr__(name, value)

    def replaced(self, name: str, values: torch.Tensor) -> None:
        """Has its owner pack other values."""
        self.__dict__["owner"].take({f"kv_b_proj.{name}": values})

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        owner: MLA = self.__dict__["owner"]
        if nn.Linear in patched:  # a method was put on torch's own class
            linear: Any = nn.Linear
            return linear.forward(self, latent)  # type: ignore[no-any-return]
        if owner.w_uk is None:
            raise UsageError(
                f"{owner.path}.kv_b_proj: absorb_for_prefill leaves keys compressed; load the model without that option"
            )
        flat, heads = latent.reshape(-1, self.in_features), owner.num_heads
        parts = cpu.linear(flat, owner.w_uk, wide=True), owner._values(flat, range(heads))
        if (lora := owner.lora) is not None and (more := lora.whole(0)) is not None:
            parts = more.expanded(flat, *parts, range(heads))
        return torch.cat([part.view(flat.shape[0], heads, -1) for part in parts], -1).view(*latent.shape[:-1], -1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not prefix:  # asked by itself: otherwise its owner answers
            destination["weight"] = self.weight

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        state, prefix, unexpected = args[0], args[1], args[5]
        if not prefix and "weight" in state:
            self._replaced(state["weight"])
        if f"{prefix}weight" in unexpected:  # which the owner takes
            unexpected.remove(f"{prefix}weight")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's. UsageError where its weight is to be trained."""
        if requires_grad:
            self.__dict__["owner"].trained("kv_b_proj.weight")
        return super().requires_grad_(requires_grad)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class Expandable(CastingCache):
    """A cache that stores a type and gives back floats of the type that it was handed."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return tuple(values_of(states).to(keys.dtype) for states in super().update(keys, values, *args, **kwargs))


class MLABlock:
    """The absorbed form in one kernel call, on a cache that grows in place."""

    def __init__(self, owner: MLA, matrices: WeightDescriptor):
        self.owner = owner
        low: Any = None if owner.q_lora_rank is None else owner.q_a_layernorm
        norm, rank, turned = owner.kv_a_layernorm, owner.kv_lora_rank, owner.qk_rope_head_dim
        self.heads, self.columns, self.halved, self.drops = 1, (rank, turned), False, owner.dropout > 0
        self.guard = Guard([owner], below(owner), [norm.copied(), None if low is None else low.copied()])
        self.made = FusedStep(
            "mla_step",
            matrices.packed,
            matrices.descriptor,
            [matrices.hidden, owner.num_heads, owner.qk_nope_head_dim, owner.v_head_dim, rank, turned],
            None if low is None else low.in_f32,
            norm.in_f32,
            owner.interleaved,
            [1.0 if low is None else low.epsilon, norm.epsilon, owner.scaling],
        )

    def takes(self, hidden: torch.Tensor, cache: Any) -> bool:
        """Whether the tokens of hidden [B, S, D] take the absorbed form, nobody wants to see how they attend, and nothing is to be dropped."""
        if self.drops and self.owner.training:
            return False
        return not self.owner._num_expanded_rows(cache, *hidden.shape[:2]) and self.owner.choice.plain(cache)

    @classmethod
    def of(cls, owner: MLA) -> MLABlock | None:
        """None where a projection or a norm is something else than ours, or has a bias."""
        low = owner.q_lora_rank is not None
        projections = ["q_a_proj"] * low + ["q_b_proj" if low else "q_proj", "kv_a_proj_with_mqa", "o_proj"]
        norms = ["q_a_layernorm"] * low + ["kv_a_layernorm"]
        children: dict[str, Any] = owner._modules
        if any(not plain_linear(children[name]) or children[name].bias is not None for name in projections):
            return None
        if any(not RMSNorm.is_cpu_norm(children[name]) or children[name].plus_one for name in norms):
            return None
        matrices = WeightDescriptor()
        for name in ([] if low else [""]) + projections:
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
        """hidden f32 [B, S, D] -> [B, S, D], with `before` plus hidden itself; None when this call has to go the long way."""
        return run_attention(self, hidden, embeddings, mask, cache, before) if self.takes(hidden, cache) else None


def _pairs(rope: str, old: Any, ctx: Context) -> str:
    if rope == "config":
        return "interleaved" if old.config.rope_interleave else "halves"
    if rope not in ("interleaved", "halves"):
        known = " ".join(ROPE)
        raise UsageError(
            f"{ctx.path}: {type(old).__name__} may differ from DeepSeek's attention; MLA knows {known}. If it does not"
            " differ, say so by the option rope: interleaved, halves or config"
        )
    return rope


def _head(w: cpu.Packed, head: int) -> torch.Tensor:
    """f32 [n, k]: a head's matrix."""
    return _of_head(w, head).rows(torch.arange(w.n, device="cpu"))


def _of_head(w: cpu.Packed, head: int) -> cpu.Packed:
    size = w.nbytes // w.matrices
    return cpu.Packed(w.data[head * size : (head + 1) * size], w.qtype, w.n, w.k)


def _heads(w: Any) -> list[Any]:
    """The matrix of each head; of a GPU's all in one."""
    return [_of_head(w, head) for head in range(w.matrices)] if isinstance(w, cpu.Packed) else [w]


def _rows(w: cpu.Packed, heads: range, each: int) -> cpu.Packed:
    """The rows of some heads, `each` of a head; heads are whole groups of rows, or all are wanted."""
    if len(heads) * each == w.n:
        return w
    stride = w.nbytes // (w.n // cpu.GROUP_ROWS) * each // cpu.GROUP_ROWS
    return cpu.Packed(w.data[heads.start * stride : heads.stop * stride], w.qtype, len(heads) * each, w.k)


def as_half(weight: QuantizedTensor, exact: bool) -> QuantizedTensor:
    """What had to be computed from a file's type comes as F32; unless the file itself is F32, f16 rounds less than its type did."""
    if weight.qtype is not QTYPES["F32"] or exact:
        return weight
    half = weight.dequantize().half()
    if not half.isfinite().all():
        return weight
    return QuantizedTensor(
        half.contiguous().view(torch.uint8).reshape(*half.shape[:-1], -1), QTYPES["F16"], weight.shape
    )
