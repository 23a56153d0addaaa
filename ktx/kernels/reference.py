"""Plain-torch reference implementation of every kernel, with the same name and meaning.

Tests compare the kernels with it, and it defines for readers what they compute. The kernels of ktx/kernels/cpu.py take
packed weights; the reference takes a QuantizedTensor, so that packing is tested as well.

Letters in shapes: B sequences of a batch, S or T tokens of a sequence, H query heads, Hkv key/value heads, D (Dk, Dv)
columns of a head. In MLA R is the rank of the latent and P the number of rotated columns; in `rope` R is the number of
rotated columns. E is the number of experts, K of selected ones. PAGE is the number of positions of a page.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies x [..., k] by weight [n, k] transposed, plus bias f32 [n].

    Returns:
        [..., n] in x's dtype, computed in f64.
    """
    y = x.double() @ weight.dequantize(torch.float64).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def linear_batched(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """Multiplies x [matrices, tokens, k] by each weight of [matrices, n, k] transposed -> [matrices, tokens, n]."""
    return (x.double() @ weight.dequantize(torch.float64).transpose(1, 2)).to(x.dtype)


def activate(gate: torch.Tensor, up: torch.Tensor, act: str, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    """Applies the gated activation of a feed-forward layer: act(gate) * up.

    "swiglu_oai" is the clamped variant of gpt-oss, the only one that uses `alpha` and `limit`.
    """
    if act == "swiglu_oai":  # openai/gpt-oss: torch/model.py, swiglu
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    functions: dict[str, Any] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda v: F.relu(v).square(),
    }
    return functions[act](gate) * up


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: QuantizedTensor,
    up: QuantizedTensor,
    down: QuantizedTensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    act: str = "silu",
    alpha: float = 0.0,
    limit: float = 0.0,
) -> torch.Tensor:
    """Computes routed experts: the sum over j of weights[t, j] * expert[ids[t, j]](x[t]).

    Ids outside of the experts are skipped.

    Args:
        x: [tokens, hidden].
        ids: int [tokens, top].
        weights: f32 [tokens, top].
        gate, up: [experts, ff, hidden].
        down: [experts, hidden, ff].
        gate_bias, up_bias: f32 [experts, ff].
        down_bias: f32 [experts, hidden].
        act, alpha, limit: as for `activate`.

    Returns:
        [tokens, hidden] in x's dtype.
    """
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(gate.shape[0]):
        token, slot = torch.where(ids == expert)
        if not len(token):
            continue
        rows = x[token].double()
        g, u = rows @ gate[expert].dequantize(torch.float64).T, rows @ up[expert].dequantize(torch.float64).T
        g = g if gate_bias is None else g + gate_bias[expert].double()
        u = u if up_bias is None else u + up_bias[expert].double()
        y = activate(g, u, act, alpha, limit) @ down[expert].dequantize(torch.float64).T
        y = y if down_bias is None else y + down_bias[expert].double()
        out.index_add_(0, token, y * weights[token, slot, None].double())
    return out.to(x.dtype)


def visible_keys(
    queries: int,
    keys: int,
    ranges: torch.Tensor | None,
    mask: torch.Tensor | None,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the keys that each query may attend to, and an additive mask.

    Args:
        queries: number of queries.
        keys: number of keys.
        ranges: int [batch, queries, 2], a key interval [start, end) for each query.
        mask: bool, or an additive mask of a float type, [batch, heads, queries, keys].
        device: device of the result.

    Returns:
        bool [batch|1, 1|heads, queries, keys], and what is added to the scores or None. Without ranges and mask the
        queries are the last of the keys and attend causally.
    """
    position = torch.arange(keys, device=device)
    if mask is not None:
        return (mask, None) if mask.dtype == torch.bool else (mask > torch.finfo(mask.dtype).min / 2, mask.double())
    if ranges is not None:
        start, end = ranges[:, None, :, :1], ranges[:, None, :, 1:]
        return (position >= start) & (position < end), None
    return (position <= torch.arange(queries, device=device)[:, None] + keys - queries)[None, None], None


def to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """Quantizes keys or values [..., columns] to Q8_0 blocks, uint8 [..., columns / 32 * 34]."""
    return QTYPES["Q8_0"].quantize(x.float())


def from_q8_0(stored: torch.Tensor) -> torch.Tensor:
    """Dequantizes Q8_0 blocks (uint8) to f32; returns tensors of other dtypes unchanged."""
    return QTYPES["Q8_0"].dequantize(stored) if stored.dtype == torch.uint8 else stored


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention, over a contiguous or a paged KV cache.

    A query without visible keys yields zeros.

    In a ragged call q has one batch with the queries of several sequences, and k, v and k_rope are pools [pages,
    heads, positions of a page, columns], which `pages` indexes. `ranges` then count a sequence's own keys.

    Args:
        q: [B, H, S, Dk].
        k: [B, Hkv, T, Dk], also as Q8_0 blocks. Each key/value head serves H / Hkv query heads.
        v: [B, Hkv, T, Dv], also as Q8_0 blocks.
        ranges: int [B, S, 2], see `visible_keys`.
        mask: see `visible_keys`.
        scale: factor of the scores.
        sinks: f32 [H], one more logit in the softmax of each head, without a value (gpt-oss).
        softcap: c, which replaces scores s by c * tanh(s / c); 0 for none.
        q_rope: [B, H, S, P], more columns of q.
        k_rope: [B, 1 or Hkv, T, P], more columns of k.
        sequences: int64 [n, 3] for a ragged call: first query, number of queries, and number of keys of each sequence.
            The queries are the last of the keys.
        pages: int32 [n, max pages] for a ragged call: the pages of each sequence.

    Returns:
        [B, S, H, Dv] in q's dtype.
    """
    if sequences is not None:
        out = q.new_zeros(1, q.shape[2], q.shape[1], from_q8_0(v[:1]).shape[3])
        assert pages is not None
        for (first, queries, keys), page_table in zip(sequences.tolist(), pages, strict=True):
            span = slice(first, first + queries)
            rope_keys = None if k_rope is None else gather_pages(k_rope, page_table, keys)
            rope_queries = None if q_rope is None else q_rope[:, :, span]
            span_ranges = None if ranges is None else ranges[:, span]
            cached = gather_pages(k, page_table, keys), gather_pages(v, page_table, keys)
            out[:, span] = attention(
                q[:, :, span], *cached, span_ranges, None, scale, sinks, softcap, rope_queries, rope_keys
            )
        return out
    k, v, k_rope = from_q8_0(k), from_q8_0(v), None if k_rope is None else from_q8_0(k_rope)
    if q_rope is not None and k_rope is not None:
        q, k = torch.cat([q, q_rope], -1), torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], -1)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ keys.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible, additive = visible_keys(q.shape[2], k.shape[2], ranges, mask, q.device)
    scores = (scores if additive is None else scores + additive).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probs = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (probs @ values).transpose(1, 2).to(q.dtype)


def gather_pages(pool: torch.Tensor, pages: torch.Tensor, count: int) -> torch.Tensor:
    """Gathers the first `count` positions of a sequence: pool [pages, heads, PAGE, D] -> [1, heads, count, D]."""
    return pool[pages.long()].transpose(0, 1).flatten(1, 2)[None, :, :count]


def mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    ranges: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    sequences: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention on the compressed latent (absorbed MLA).

    Source: DeepSeek-V2, section 2.1.2 and appendix C.

    Args:
        q_nope: [B, H, S, R], already multiplied by W_UK.
        q_rope: [B, H, S, P].
        ckv: [B, T, R], the latent.
        kpe: [B, T, P], the rotated key columns.
        ranges, mask, scale, sequences, pages: as for `attention`.

    Returns:
        [B, S, H, R].
    """
    latent = from_q8_0(ckv)
    keys = torch.cat([latent, from_q8_0(kpe)], -1)[:, None]
    return attention(
        torch.cat([q_nope, q_rope], -1), keys, latent[:, None], ranges, mask, scale, sequences=sequences, pages=pages
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * weight, computed in f32, in x's dtype.

    With `plus_one` the factor is 1 + weight.
    """
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (y * (1 + weight.float())).to(x.dtype)
    return (weight.float() * y.to(x.dtype).float()).to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary embedding of x [B, H, S, D] with cos and sin [B, S, R], R <= D; columns from R on are unchanged.

    By default column i is paired with column i + R/2, as in transformers' rotate_half. With `interleaved` columns 2i
    and 2i + 1 of the input are paired, and the output is in the order of halves, as in DeepSeek-V3.
    """
    rope_dim = cos.shape[-1]
    rotary, rest = x[..., :rope_dim], x[..., rope_dim:]
    if interleaved:
        rotary = rotary.unflatten(-1, (rope_dim // 2, 2)).transpose(-1, -2).flatten(-2)
    low, high = rotary.chunk(2, -1)
    rotated = rotary * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    return torch.cat([rotated.to(x.dtype), rest], -1)


def to_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Converts x / scale to float8 e4m3, with values outside its range clamped."""
    max_value = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-max_value, max_value).to(torch.float8_e4m3fn)


def scatter_rows(rows: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, scale: float = 1.0) -> None:
    """Writes rows to their slots of a paged pool, converted to e4m3 if that is the pool's dtype.

    Args:
        rows: [1, heads, tokens, columns].
        pool: [pages, heads, PAGE, columns].
        slots: int [tokens], page * PAGE + position in the page; tokens with a negative slot are skipped.
        scale: e4m3 pools store rows / scale.
    """
    page_size = pool.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            row = rows[0, :, token]
            pool[slot // page_size, :, slot % page_size] = (
                to_e4m3(row, scale) if pool.dtype == torch.float8_e4m3fn else row
            )


def store_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Rotates q and k, and writes k and v to their slots of the KV cache, as a GPU kernel does in one launch.

    Args:
        q: [1, H, T, D].
        k: [1, Hkv, T, D].
        v: [1, Hkv, T, Dv].

    Returns:
        q rotated.
    """
    scatter_rows(rope(k, cos, sin, interleaved), k_pool, slots, k_scale)
    scatter_rows(v, v_pool, slots, v_scale)
    return rope(q, cos, sin, interleaved)


def store_latent(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    q_rope: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    kv_scale: float = 1.0,
) -> torch.Tensor:
    """Writes MLA's latent and rotated key columns to their slots of the KV cache, as a GPU kernel does in one launch.

    Args:
        latent: [1, T, R], normalized by `norm` if given.
        k_rope: [1, T, P], to be rotated.
        q_rope: [1, H, T, P], to be rotated.
        ckv: pool [pages, PAGE, R].
        kpe: pool [pages, PAGE, P].

    Returns:
        q_rope rotated.
    """
    latent = latent if norm is None else rms_norm(latent, norm, eps)
    scatter_rows(latent[:, None], ckv[:, None], slots, kv_scale)
    scatter_rows(rope(k_rope[:, None], cos, sin, interleaved), kpe[:, None], slots, kv_scale)
    return rope(q_rope, cos, sin, interleaved)


def route(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_mode: str = "none",
    renorm: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the top-k experts of each token.

    Args:
        logits: f32 [T, E].
        top_k: K, the number of experts of a token.
        scoring: "softmax", "sigmoid", or "softmax_topk" (softmax over the selected experts).
        bias: f32 [E], added to the scores for the selection only.
        n_group: number of groups that the experts are divided into.
        topk_group: number of groups from which experts are selected.
        group_mode: "none"; "max" ranks groups by their best score (DeepSeek-V2); "top2" by the sum of their two best
            scores (DeepSeek-V3).
        renorm: whether the weights of a token are divided by their sum.
        scale: factor of the weights.

    Returns:
        ids int64 [T, K] by descending score, and weights f32 [T, K].
    """
    scores = logits.sigmoid() if scoring == "sigmoid" else logits if scoring == "softmax_topk" else logits.softmax(-1)
    ranking = scores if bias is None else scores + bias.view(1, -1)
    if group_mode != "none" and n_group > 1:
        groups = ranking.view(len(ranking), n_group, -1)
        group_scores = groups.amax(-1) if group_mode == "max" else groups.topk(2, -1)[0].sum(-1)
        selected_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(
            1, group_scores.topk(topk_group, -1)[1], True
        )
        ranking = groups.masked_fill(~selected_groups[..., None], -torch.inf).flatten(1)
    ids = ranking.topk(top_k, -1)[1]
    weights = scores.gather(1, ids)
    if scoring == "softmax_topk":
        weights = weights.softmax(-1)
    if renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale
