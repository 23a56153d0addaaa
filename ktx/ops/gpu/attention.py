"""Attention of every family on a GPU: the transformers module with paged attention kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ktx.cache.forward_context import batch_of
from ktx.kernels import reference
from ktx.kernels.gpu.attention_backend import kernels_for
from ktx.kernels.gpu.rope_and_cache import rope_and_cache_kv
from ktx.kernels.gpu.split_kv import AttentionShape
from ktx.kernels.gradients import refuse_gpu_gradient
from ktx.ops import attention
from ktx.ops.base import Context
from ktx.ops.fusion.fused import rotary_tables, sliding_window, split_mask
from ktx.ops.gpu.kv_view import PagedView, prepare_float_layer, reserve_kv, view_of_batch, view_of_states

NAME = "ktx_gpu"
MAX_SCORES = 1 << 26  # attention scores computed at once in `attend_in_torch`, in elements


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
    """Computes attention on a GPU; the contract of ktx.ops.attention.attend (transformers' attention interface).

    Args:
        module: the attention module; its `backend` selects the kernels (triton, flashinfer, auto).
        query: [B, H, S, Dk].
        key: [B, H_kv, T, Dk]; or the pools of a paged cache, see `forward_context.batch_of`.
        value: [B, H_kv, T, Dv].
        attention_mask: transformers' mask, or None for full causal attention.
        scaling: factor on the scores; by default Dk ** -0.5.
        dropout: a rate above 0 dispatches to ktx.ops.attention.attend.
        softcap: limit of tanh soft-capping of the scores; None or 0: none.
        s_aux: attention sinks [H].

    Returns:
        The output [B, S, H, Dv], and None in place of attention weights.

    Raises:
        ValueError: no mask is given for more queries than keys.
    """
    batch = batch_of(key)
    choice = attention.attention_choice(module)
    if choice.is_custom or dropout > 0 or (batch is None and not choice.uses_kernel()):
        args = (query, key, value, attention_mask, scaling, dropout, softcap, s_aux)
        return attention.attend(module, *args, **kwargs)
    num_new = query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    sinks = None if s_aux is None else s_aux.float().contiguous()
    if batch is not None:
        view: PagedView | None = view_of_batch(batch, (key, value), sliding_window(module))
    else:
        if attention_mask is None and num_new > key.shape[2]:
            raise ValueError(f"{num_new} queries on {key.shape[2]} keys need an attention mask")
        view = view_of_states(key, value, num_new, attention_mask)
    cap = float(softcap or 0.0)
    if view is None:
        return attend_in_torch(query, key, value, attention_mask, scale, sinks, cap), None
    flat = query.transpose(1, 2).reshape(1, -1, query.shape[1], query.shape[3]).transpose(1, 2)
    backend = getattr(module, "backend", "triton")
    return attend_on_pages(flat, view, scale, sinks, cap, backend).view(len(query), num_new, query.shape[1], -1), None


def attend_on_pages(
    q: torch.Tensor, view: PagedView, scale: float, sinks: torch.Tensor | None, softcap: float, backend: str
) -> torch.Tensor:
    """Runs paged attention on q [1, H, T, Dk], the sequences of the batch concatenated; returns [1, T, H, Dv]."""
    keys, values = view.pools
    shape = AttentionShape(q.shape[1], keys.shape[1], keys.shape[3], values.shape[3])
    kernels = kernels_for(shape, backend, 0, sinks is not None, keys.dtype)
    return kernels.attention(q, keys, values, view.plan(kernels, shape, q.dtype), scale, sinks, softcap)


def attend_in_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    softcap: float,
) -> torch.Tensor:
    """Computes [B, S, H, Dv] in plain torch, in chunks of queries, for masks that no kernel supports."""
    batch, heads, num_new, _ = query.shape
    ranges, dense_mask = split_mask(mask, batch, num_new, key.shape[2])
    ranges, dense_mask = (None if x is None else x.to(query.device) for x in (ranges, dense_mask))
    rows_per_step = max(1, MAX_SCORES // (batch * heads * key.shape[2]))
    outputs = []
    for rows in (slice(first, first + rows_per_step) for first in range(0, num_new, rows_per_step)):
        mask_parts = None if ranges is None else ranges[:, rows], None if dense_mask is None else dense_mask[:, :, rows]
        outputs.append(reference.attention(query[:, :, rows], key, value, *mask_parts, scale, sinks, softcap))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


AttentionInterface.register(NAME, attend)


class Attention(attention.Attention):
    """GPU version of ktx.ops.attention.Attention.

    The default attention applies RoPE and writes the KV cache in one launch; any other attention runs transformers'
    forward with `attend` as its attention function.
    """

    sinks_f32: torch.Tensor | None
    implementation = NAME

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, backend: str = "triton", **kwargs: Any) -> attention.Attention:
        """Creates the operator; an unsupported backend or shape raises UsageError here, before any weight is loaded."""
        new = super().from_hf(old, ctx, backend, **kwargs)
        new.sinks_f32 = None
        if new.fusable:
            num_heads = old.config.num_attention_heads
            shape = AttentionShape(num_heads, num_heads // old.num_key_value_groups, old.head_dim, old.head_dim)
            kernels_for(shape, backend, sinks=hasattr(old, "sinks"))
        return new

    def ready(self) -> None:
        """Converts the attention sinks to f32, which the kernel reads."""
        sinks = getattr(self, "sinks", None)
        self.sinks_f32 = None if sinks is None else sinks.detach().float().contiguous()

    def compute(self, arguments: dict[str, Any], cache: Any) -> Any:
        """Computes the forward on pages if the kernels support the call, else transformers' forward with `attend`."""
        drops = self.training and getattr(self, "attention_dropout", 0.0) > 0
        if self.fusable and not drops and self.choice.uses_kernel(cache):
            output = self.forward_on_pages(cache=cache, **arguments)
            if output is not None:
                return output, None
        prepare_float_layer(cache, self.layer_idx)
        return super().compute(arguments, cache)

    def forward_on_pages(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        *,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Computes hidden_states [B, S, D] -> [B, S, D] and writes keys and values to the cache.

        Returns:
            The output, or None where this call needs transformers' forward: there is no cache or no rotary table, or
            the kernels support neither the cache's layer nor the mask.
        """
        if position_embeddings is None or cache is None:
            return None
        num_kv_heads = self.k_proj.out_features // self.head_dim
        view = reserve_kv(self, cache, hidden_states, num_kv_heads, (self.head_dim, self.head_dim), attention_mask)
        if view is None:
            return None
        refuse_gpu_gradient("Attention", getattr(self, "sinks", None))
        q, k, v = (self._project_heads(name, hidden_states) for name in "qkv")
        cos, sin = flatten_tables(rotary_tables(position_embeddings, self.half_tables), hidden_states)
        q = rope_and_cache_kv(q, k, v, cos, sin, view.tables.slots, *view.pools)
        attended = attend_on_pages(q, view, float(self.scaling), self.sinks_f32, 0.0, self.backend)  # no softcap
        return self.o_proj(attended.view(*hidden_states.shape[:2], -1))

    def _project_heads(self, which: str, hidden: torch.Tensor) -> torch.Tensor:
        """Projects queries, keys or values to [1, heads, tokens, head_dim] and applies their norm, if there is one.

        `which` is q, k or v. A norm whose weight has head_dim elements applies to each head, any other to a full row.
        """
        rows = getattr(self, f"{which}_proj")(hidden)
        norm = self._modules.get(f"{which}_norm")
        if norm is not None and norm.weight.numel() != self.head_dim:  # type: ignore[union-attr, operator]
            rows, norm = norm(rows), None
        rows = rows.view(1, -1, rows.shape[-1] // self.head_dim, self.head_dim)
        return (rows if norm is None else norm(rows)).transpose(1, 2)


def flatten_tables(
    tables: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flattens rotary tables to cos and sin [1, tokens, columns] for the tokens of hidden [B, S, D].

    The tables may have a batch size of 1; it is broadcast to all sequences.
    """
    cos, sin = (table.expand(len(hidden), -1, -1).reshape(1, -1, table.shape[-1]) for table in tables)
    return cos, sin
