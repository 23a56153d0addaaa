"""The plain-torch twin of every kernel: same name, same meaning, no cleverness. Oracle of the tests and definition for readers.

The kernels of ktx/kernels/cpu.py take packed weights; their twins take a QuantizedTensor, so that packing is tested too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., k] times weight [n, k] transposed, plus bias f32 [n]; in f64, returned in x's dtype."""
    y = x.double() @ weight.dequantize(torch.float64).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def linear_batched(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """x [matrices, tokens, k] times weight [matrices, n, k] transposed -> [matrices, tokens, n]."""
    return (x.double() @ weight.dequantize(torch.float64).transpose(1, 2)).to(x.dtype)


def activate(gate: torch.Tensor, up: torch.Tensor, act: str, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    """The gated activation of a feed-forward layer: act(gate) * up, or gpt-oss's clamped variant."""
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
    """x [tokens, hidden] through the chosen experts: sum over j of weights[t, j] * expert[ids[t, j]](x[t]). Ids out of range are skipped."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e in range(gate.shape[0]):
        token, choice = torch.where(ids == e)
        if not len(token):
            continue
        rows = x[token].double()
        g, u = rows @ gate[e].dequantize(torch.float64).T, rows @ up[e].dequantize(torch.float64).T
        g = g if gate_bias is None else g + gate_bias[e].double()
        u = u if up_bias is None else u + up_bias[e].double()
        y = activate(g, u, act, alpha, limit) @ down[e].dequantize(torch.float64).T
        y = y if down_bias is None else y + down_bias[e].double()
        out.index_add_(0, token, y * weights[token, choice, None].double())
    return out.to(x.dtype)


def visible(
    queries: int,
    keys: int,
    ranges: torch.Tensor | None,
    mask: torch.Tensor | None,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a query sees, bool [batch|1, 1|heads, queries, keys], and what is added to its scores (or None).

    `ranges` int [batch, queries, 2] is a key interval [start, end) for each query; without ranges and mask the queries are
    the last of the keys and see what is not after them.
    """
    position = torch.arange(keys, device=device)
    if mask is not None:
        return (mask, None) if mask.dtype == torch.bool else (mask > torch.finfo(mask.dtype).min / 2, mask.double())
    if ranges is not None:
        start, end = ranges[:, None, :, :1], ranges[:, None, :, 1:]
        return (position >= start) & (position < end), None
    return (position <= torch.arange(queries, device=device)[:, None] + keys - queries)[None, None], None


def to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., columns] as Q8_0 blocks, uint8 [..., columns / 32 * 34]."""
    return QTYPES["Q8_0"].quantize(x.float())


def from_q8_0(stored: torch.Tensor) -> torch.Tensor:
    """The f32 values of `to_q8_0`; what is no uint8 comes back as it is."""
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
    """Softmax attention: q [B, H, S, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv] -> [B, S, H, Dv] in q's dtype.

    Each key/value head serves H/Hkv query heads; `sinks` f32 [H] is one more logit in the softmax that attends to nothing
    (gpt-oss); `softcap` c replaces scores s by c*tanh(s/c). A query that sees nothing gives zeros. `q_rope` [B, H, S, P] and `k_rope`
    [B, 1 or Hkv, T, P] are more columns of q and k. Keys and values may be Q8_0 blocks.

    A ragged call has one batch of queries of several sequences, and keys and values (k_rope too) in a pool [pages, heads, positions of a
    page, columns]: `sequences` int64 [n, 3] are a sequence's first query, its queries, which are the last of its keys, and its keys;
    `pages` int32 [n, most] say where these lie. `ranges` count a sequence's own keys.
    """
    if sequences is not None:
        out = q.new_zeros(1, q.shape[2], q.shape[1], from_q8_0(v[:1]).shape[3])
        assert pages is not None
        for (first, queries, keys), own in zip(sequences.tolist(), pages, strict=True):
            these = slice(first, first + queries)
            rope = None if k_rope is None else on_pages(k_rope, own, keys)
            turned = None if q_rope is None else q_rope[:, :, these]
            seen = None if ranges is None else ranges[:, these]
            past = on_pages(k, own, keys), on_pages(v, own, keys)
            out[:, these] = attention(q[:, :, these], *past, seen, None, scale, sinks, softcap, turned, rope)
        return out
    k, v, k_rope = from_q8_0(k), from_q8_0(v), None if k_rope is None else from_q8_0(k_rope)
    if q_rope is not None and k_rope is not None:
        q, k = torch.cat([q, q_rope], -1), torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], -1)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ keys.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen, extra = visible(q.shape[2], k.shape[2], ranges, mask, q.device)
    scores = (scores if extra is None else scores + extra).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    share = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (share @ values).transpose(1, 2).to(q.dtype)


def on_pages(pool: torch.Tensor, pages: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` positions of a sequence: pool [pages, heads, positions, columns] -> [1, heads, count, columns]."""
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
    """Attention on the compressed latent (absorbed MLA): q_nope [B, H, S, R] already times W_UK, q_rope [B, H, S, P],
    ckv [B, T, R], kpe [B, T, P] -> [B, S, H, R]. Source: DeepSeek-V2, section 2.1.2 and appendix C.
    """
    latent = from_q8_0(ckv)
    keys = torch.cat([latent, from_q8_0(kpe)], -1)[:, None]
    return attention(
        torch.cat([q_nope, q_rope], -1), keys, latent[:, None], ranges, mask, scale, sequences=sequences, pages=pages
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (or 1 + weight) over the last dimension, in f32, returned in x's dtype."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (y * (1 + weight.float())).to(x.dtype)
    return (weight.float() * y.to(x.dtype).float()).to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary embedding: x [B, H, S, D], cos and sin [B, S, R] with R <= D; columns from R on pass through.

    Halves: pair (i, i + R/2), as transformers' rotate_half. Interleaved: pair (2i, 2i + 1) in, halves out, as DeepSeek-V3 does.
    """
    width = cos.shape[-1]
    turn, rest = x[..., :width], x[..., width:]
    if interleaved:
        turn = turn.unflatten(-1, (width // 2, 2)).transpose(-1, -2).flatten(-2)
    low, high = turn.chunk(2, -1)
    turned = turn * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    return torch.cat([turned.to(x.dtype), rest], -1)


def to_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale as float8 e4m3; what lies outside its range becomes the largest number of its sign."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-most, most).to(torch.float8_e4m3fn)


def put_rows(rows: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, scale: float = 1.0) -> None:
    """Writes rows [1, heads, tokens, columns] to their slots (page times PAGE plus place) of a pool [pages, heads, PAGE, columns], as
    e4m3 over `scale` if that is its type. A token whose slot is negative is left out.
    """
    size = pool.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            row = rows[0, :, token]
            pool[slot // size, :, slot % size] = to_e4m3(row, scale) if pool.dtype == torch.float8_e4m3fn else row


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
    """q [1, H, T, D] rotated; k [1, Hkv, T, D] rotated and v [1, Hkv, T, Dv] go to their slots of the pools."""
    put_rows(rope(k, cos, sin, interleaved), k_pool, slots, k_scale)
    put_rows(v, v_pool, slots, v_scale)
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
    """q_rope [1, H, T, P] rotated; latent [1, T, R], normalised, and k_rope [1, T, P], rotated, go to their slots of the pools ckv
    [pages, PAGE, R] and kpe [pages, PAGE, P].
    """
    latent = latent if norm is None else rms_norm(latent, norm, eps)
    put_rows(latent[:, None], ckv[:, None], slots, kv_scale)
    put_rows(rope(k_rope[:, None], cos, sin, interleaved), kpe[:, None], slots, kv_scale)
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
    """Chooses experts: logits f32 [T, E] -> ids int64 [T, K] by falling score, weights f32 [T, K].

    `scoring` softmax | sigmoid | softmax_topk (softmax over the chosen); `bias` counts for the choice only; group_mode "max"
    (DeepSeek-V2: groups by their best score) or "top2" (V3: by the sum of their two best) keeps `topk_group` of `n_group` groups.
    """
    scores = logits.sigmoid() if scoring == "sigmoid" else logits if scoring == "softmax_topk" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias.view(1, -1)
    if group_mode != "none" and n_group > 1:
        groups = choice.view(len(choice), n_group, -1)
        strength = groups.amax(-1) if group_mode == "max" else groups.topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, strength.topk(topk_group, -1)[1], True)
        choice = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = choice.topk(top_k, -1)[1]
    weights = scores.gather(1, ids)
    if scoring == "softmax_topk":
        weights = weights.softmax(-1)
    if renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale
