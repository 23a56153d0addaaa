"""Gradients of the CPU kernels with respect to their inputs: weights are frozen, and stay packed.

Autograd saves what a kernel was given, nothing that is dequantised: backward takes a matrix SPAN numbers at a time, and recomputes what lies between the
projections of experts and the scores of attention. Where a kernel rounds activations to eight bits, backward passes straight through. What has no gradient
says so in forward (`refuse`); so does a second derivative through experts, feed-forward layers or attention, in backward. Each backward is an operator
(`ktx::linear_backward`, ...) with a fake version, so that torch.compile sees one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ktx.errors import NoGradient
from ktx.kernels import reference

SPAN = 1 << 20  # numbers of a matrix that are dequantised at once, in f32
SCORES = 1 << 23  # scores of attention that are recomputed at once, in f32
GROUP_ROWS = 16  # as in cpu.py

CPU = torch.device("cpu")  # whatever torch's default is
Tensor = torch.Tensor
ops: Any = torch.ops.ktx


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse(what: str, remedy: str, *tensors: Tensor | None) -> None:
    """NoGradient where autograd would record one of the tensors, which `what` does not pass on."""
    if recorded(*tensors):
        raise NoGradient(f"{what} has no gradient, and one of its inputs requires grad: {remedy}")


def backward_only(x: Tensor) -> None:
    """NoGradient for an input of forward-mode differentiation, whose tangent the kernels would drop, and for one that torch.func has wrapped."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NoGradient(
            "an input has a tangent (torch.func.jvp, jacfwd, torch.autograd.forward_ad), and the kernels are differentiated backwards only:"
            " use torch.autograd.grad, or torch.autograd.functional.vjp"
        )
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):  # type: ignore[attr-defined]
        raise NoGradient(
            "an input is inside a transform of torch.func (grad, vjp, jacrev, hessian, vmap), which kernels are not made for: use torch.autograd.grad,"
            " torch.autograd.functional.vjp or jacobian, and a batch or a loop in place of vmap"
        )


def none_on_gpu(what: str, *tensors: Tensor | None) -> None:
    """NoGradient for tensors that autograd would record, before a kernel of a GPU takes them."""
    refuse(
        f"{what} on a GPU", "put the module on the CPU (device: cpu), or call the model under torch.no_grad()", *tensors
    )


def _only(kernel: str, inputs: Sequence[Any], differentiable: Sequence[int]) -> None:
    """NoGradient for an input that requires grad and is none of those that backward knows."""
    for i, value in enumerate(inputs):
        if i not in differentiable and isinstance(value, Tensor) and value.requires_grad:
            raise NoGradient(
                f"ktx::{kernel} has no gradient with respect to its argument {i}, of shape {tuple(value.shape)}: detach it"
            )


def _places(count: int, places: dict[int, Any]) -> tuple[Any, ...]:
    """Gradients by the number of the input, None for the others."""
    return tuple(places.get(i) for i in range(count))


def _operator(name: str) -> Callable[[Any], Any]:
    """Makes a function an operator of torch's, which computes in its own types also inside torch.autocast."""

    def make(function: Any) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        computing = torch.autocast("cpu", enabled=False)(function)
        return torch.library.custom_op(name, computing, mutates_args=(), schema=schema)

    return make


def _wanted(ctx: Any, i: int) -> bool:
    """Whether the gradient of input i is asked for; torch leaves out inputs that are as their defaults."""
    return i < len(ctx.needs_input_grad) and bool(ctx.needs_input_grad[i])


# Matrices


def _spans(data: Tensor, code: int, n: int, k: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a packed matrix [n, k], some at a time: which, and their f32 values."""
    step = max(1, SPAN // k // GROUP_ROWS) * GROUP_ROWS
    for first in range(0, n, step):
        last = min(first + step, n)
        yield slice(first, last), ops.unpack_rows(data, code, n, k, torch.arange(first, last, device=CPU))


def _expert_spans(data: Tensor, code: int, experts: int, index: int, n: int, k: int) -> Iterator[tuple[slice, Tensor]]:
    """The same of one of stacked matrices, of whose rows each memory node has a share (cpu.pack_experts)."""
    groups = -(-n // GROUP_ROWS)
    group = data.numel() // (experts * groups)
    borders = [ops.share_of(groups, node) for node in range(ops.nodes() + 1)]
    for begin, end in zip(borders, borders[1:], strict=False):
        size, first = (end - begin) * group, begin * GROUP_ROWS
        if not size:
            continue
        at = begin * group * experts + index * size
        for span, values in _spans(data[at : at + size], code, min(n, end * GROUP_ROWS) - first, k):
            yield slice(first + span.start, first + span.stop), values


def _times(grad: Tensor, spans: Iterator[tuple[slice, Tensor]], k: int) -> Tensor:
    """grad f32 [tokens, n] times a matrix [n, k] -> f32 [tokens, k]."""
    out = grad.new_zeros(grad.shape[0], k)
    for span, values in spans:
        out.addmm_(grad[:, span], values)
    return out


@_operator("ktx::linear_backward")
def linear_backward(grad: Tensor, packed: Tensor, code: int, n: int, k: int) -> Tensor:
    """grad [..., n] times the matrix [n, k] -> [..., k] in grad's dtype."""
    out = _times(grad.reshape(-1, n).float(), _spans(packed, code, n, k), k)
    return out.reshape(*grad.shape[:-1], k).to(grad.dtype)


@_operator("ktx::linear_batched_backward")
def linear_batched_backward(grad: Tensor, packed: Tensor, code: int, n: int, k: int) -> Tensor:
    """grad [matrices, tokens, n] times each matrix [n, k] -> [matrices, tokens, k] in grad's dtype."""
    pairs = zip(grad.float(), packed.view(grad.shape[0], -1), strict=True)
    return torch.stack([_times(rows, _spans(data, code, n, k), k) for rows, data in pairs]).to(grad.dtype)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _only("linear", inputs, (0, 5))
    ctx.save_for_backward(inputs[1])
    ctx.about = inputs[2:5]


def _linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    found: dict[int, Any] = {}
    if _wanted(ctx, 0):
        found[0] = ops.linear_backward(grad, packed, *ctx.about)
    if _wanted(ctx, 5):
        found[5] = grad.float().flatten(0, -2).sum(0)
    return _places(7, found)


def _save_batched(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _only("linear_batched", inputs, (0,))
    ctx.save_for_backward(inputs[1])
    ctx.about = inputs[2:]


def _batched(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    return _places(5, {0: ops.linear_batched_backward(grad, packed, *ctx.about)})


# Activations and experts

SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (gradient of act(gate), gate): the gradient of gate
    "silu": lambda grad, gate: torch.ops.aten.silu_backward(grad, gate),
    "gelu": lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate),
    "gelu_tanh": lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"),
    "relu": lambda grad, gate: grad * (gate > 0),
    "relu2": lambda grad, gate: grad * 2 * F.relu(gate),
}


def _activation(
    grad: Tensor, gate: Tensor, up: Tensor, act: str, alpha: float = 0.0, limit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, given that of reference.activate."""
    if act == "swiglu_oai":
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
        share = torch.sigmoid(alpha * g)
        slope = share * (1 + alpha * g * (1 - share))
        return grad * (u + 1) * slope * (gate <= limit), grad * g * share * (up.abs() <= limit)
    return SLOPES[act](grad * up, gate), grad * reference.activate(gate, torch.ones_like(gate), act)


@_operator("ktx::experts_backward")
def experts_backward(
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_code: int,
    up_code: int,
    down_code: int,
    n_experts: int,
    ff: int,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [tokens, hidden], in its dtype, and of weights f32 [tokens, top]; expert by expert, a span of its rows at a time."""
    hidden = x.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32, device=CPU)
    shares = torch.zeros(weights.shape, dtype=torch.float32, device=CPU)
    for e in ids.unique().tolist():
        if not 0 <= e < n_experts:
            continue
        token, choice = torch.where(ids == e)
        rows, into, share = x[token].float(), grad[token].float(), weights[token, choice, None]
        middle = _times(into, _expert_spans(down, down_code, n_experts, e, hidden, ff), ff)  # for a weight of 1
        back, own = torch.zeros_like(rows), rows.new_zeros(len(rows))
        gates = _expert_spans(gate, gate_code, n_experts, e, ff, hidden)
        ups = _expert_spans(up, up_code, n_experts, e, ff, hidden)
        for (span, w_gate), (_, w_up) in zip(gates, ups, strict=True):
            g, u = rows @ w_gate.T, rows @ w_up.T
            if gate_bias is not None:
                g += gate_bias.view(n_experts, ff)[e, span]
            if up_bias is not None:
                u += up_bias.view(n_experts, ff)[e, span]
            own += (reference.activate(g, u, act, alpha, limit) * middle[:, span]).sum(-1)
            d_gate, d_up = _activation(middle[:, span] * share, g, u, act, alpha, limit)
            back.addmm_(d_gate, w_gate).addmm_(d_up, w_up)
        if down_bias is not None:
            own += into @ down_bias.view(n_experts, hidden)[e]
        out.index_add_(0, token, back)
        shares[token, choice] = own
    return out.to(x.dtype), shares


class Experts(torch.autograd.Function):
    """ktx::experts, which adds to its counts and therefore is none of those that torch.library takes a formula for."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out: Tensor = ops.experts(*inputs)
        x, ids, weights, *rest = inputs
        ctx.save_for_backward(x, ids, weights, *rest[:3], *rest[8:11])
        ctx.sizes, ctx.gate = rest[3:8], rest[11:14]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, ids, weights, gate, up, down, *biases = ctx.saved_tensors
        made = ops.experts_backward(grads[0], x, ids, weights, gate, up, down, *ctx.sizes, *biases, *ctx.gate)
        return _places(18, {0: made[0], 2: made[1]})


def experts(*inputs: Any) -> Tensor:
    """ktx::experts with a gradient for x and the choices' weights."""
    backward_only(inputs[0])
    if not torch.is_grad_enabled() or not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        return ops.experts(*inputs)  # type: ignore[no-any-return]
    _only("experts", inputs, (0, 2))
    return Experts.apply(*inputs)  # type: ignore[no-untyped-call,no-any-return]


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.act = inputs[2]


def _gated(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return (*(part.to(gate.dtype) for part in _activation(grad.float(), gate.float(), up.float(), ctx.act)), None)


# Attention


def _attention(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor | None,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in f32 of q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv] and sinks [H], given that of the result [B, S, H, Dv].

    Scores are recomputed for some queries at a time, on the keys between the first and the last that these see.
    """
    q, k, v = q.float(), k.float(), v.float()
    (batches, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
    each = heads // groups
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_sinks = q.new_zeros(heads)
    step = max(1, SCORES // max(1, batches * heads * keys))
    for at in range(0, queries, step):
        own = slice(at, min(at + step, queries))
        first, last, seen, extra = _seen(own, queries, keys, ranges, mask)
        if first == last:
            continue
        near_k, near_v = k[:, :, first:last], v[:, :, first:last]

        def rows(of: Tensor, own: slice = own) -> Tensor:  # [B, H, S, D] -> [B, G, H / G * some, D]
            return of[:, :, own].reshape(batches, groups, -1, of.shape[3])

        def by_head(of: Tensor) -> Tensor:  # [B, G, H / G * some, keys] -> [B, H, some, keys]
            return of.view(batches, heads, -1, of.shape[3])

        some, given = rows(q), rows(grad.float().transpose(1, 2))
        scores = by_head(some @ near_k.transpose(2, 3) * scale)
        capped = softcap * torch.tanh(scores / softcap) if softcap else scores
        logits = (capped if extra is None else capped + extra.float()).masked_fill(~seen, -torch.inf)
        top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # -inf where a query sees nothing
        sink = None if sinks is None else sinks.float().view(1, heads, 1, 1)
        top = top if sink is None else torch.maximum(top, sink)
        share = torch.exp(logits - top)
        total = share.sum(-1, keepdim=True)
        total = total if sink is None else total + torch.exp(sink - top)
        share /= total.clamp(min=torch.finfo(torch.float32).tiny)
        d_share = by_head(given @ near_v.transpose(2, 3))
        mean = (share * d_share).sum(-1, keepdim=True)
        if sink is not None:
            d_sinks -= (torch.exp(sink - top) / total * mean).sum((0, 2, 3))
        d_scores = share * (d_share - mean)
        if softcap:
            d_scores *= 1 - (capped / softcap).square()
        d_scores = d_scores.view(batches, groups, each * (own.stop - own.start), -1) * scale
        d_q[:, :, own] = (d_scores @ near_k).view(batches, heads, -1, q.shape[3])
        d_k[:, :, first:last] += d_scores.transpose(2, 3) @ some
        d_v[:, :, first:last] += share.view(d_scores.shape).transpose(2, 3) @ given
    return d_q, d_k, d_v, d_sinks


def _seen(
    own: slice, queries: int, keys: int, ranges: Tensor | None, mask: Tensor | None
) -> tuple[int, int, Tensor, Tensor | None]:
    """Of some queries the keys that lie between the first and the last one seen, and of these, as reference.visible, what each query sees and what is added."""
    if mask is not None:
        return (0, keys, *reference.visible(own.stop - own.start, keys, None, mask[:, :, own], CPU))
    if ranges is None:
        ends = torch.arange(own.start, own.stop, device=CPU) + keys - queries + 1
        ranges = torch.stack([torch.zeros_like(ends), ends.clamp(min=0)], -1)[None]
    else:
        ranges = ranges[:, own]
    some = ranges[ranges[..., 0] < ranges[..., 1]]
    first, last = (max(0, int(some[:, 0].min())), min(keys, int(some[:, 1].max()))) if len(some) else (0, 0)
    return (first, last, *reference.visible(ranges.shape[1], last - first, ranges - first, None, CPU))


@_operator("ktx::attention_backward")
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor | None,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    softcap: float,
    q_rope: Tensor | None,
    k_rope: Tensor | None,
) -> list[Tensor]:
    """Gradients of q, k, v, of sinks (zeros where there are none), and of q_rope and k_rope if they were given."""
    whole_q, whole_k = q, k
    if q_rope is not None and k_rope is not None:
        whole_q = torch.cat([q, q_rope], -1)
        whole_k = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], -1)
    d_q, d_k, d_v, d_sinks = _attention(grad, whole_q, whole_k, v, ranges, mask, scale, sinks, softcap)
    if q_rope is None or k_rope is None:
        return [d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_sinks]
    (d_q, d_q_rope), (d_k, d_k_rope) = (part.split([q.shape[3], q_rope.shape[3]], -1) for part in (d_q, d_k))
    d_k_rope = d_k_rope.sum(1, keepdim=True) if k_rope.shape[1] == 1 else d_k_rope
    parts = zip((d_q, d_k, d_v, d_sinks, d_q_rope, d_k_rope), (q, k, v, d_sinks, q_rope, k_rope), strict=True)
    return [part.to(like.dtype).contiguous() for part, like in parts]


@_operator("ktx::mla_attention_backward")
def mla_attention_backward(
    grad: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    ckv: Tensor,
    kpe: Tensor,
    ranges: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the queries and of the latent, which is keys and values, and of its rotated columns."""
    q, k = torch.cat([q_nope, q_rope], -1), torch.cat([ckv, kpe], -1)[:, None]
    d_q, d_k, d_v, _ = _attention(grad, q, k, ckv[:, None], ranges, mask, scale)
    (d_nope, d_rope), (d_ckv, d_kpe) = (part.split([ckv.shape[2], kpe.shape[2]], -1) for part in (d_q, d_k))
    parts = (d_nope, q_nope), (d_rope, q_rope), ((d_ckv + d_v)[:, 0], ckv), (d_kpe[:, 0], kpe)
    a, b, c, d = (part.to(like.dtype).contiguous() for part, like in parts)
    return a, b, c, d


def _on_pages(kernel: str, keys: Tensor, sequences: Tensor | None) -> None:
    if sequences is not None or keys.dtype == torch.uint8:
        where = "pages of an engine" if sequences is not None else "keys and values in eight bits"
        raise NoGradient(
            f"ktx::{kernel} on {where} has no gradient, and one of its inputs requires grad: {WITHOUT_CACHE}"
        )


WITHOUT_CACHE = "call the model with use_cache=False, or with a cache of transformers' own, or under torch.no_grad()"


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ranges, mask, scale, sinks, softcap, q_rope, k_rope, sequences, _ = inputs
    _on_pages("attention", k, sequences)
    _only("attention", inputs, (0, 1, 2, 6, 8, 9))
    ctx.save_for_backward(q, k, v, ranges, mask, sinks, q_rope, k_rope)
    ctx.numbers = scale, softcap


def _attended(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, ranges, mask, sinks, q_rope, k_rope = ctx.saved_tensors
    scale, softcap = ctx.numbers
    made = ops.attention_backward(grad, q, k, v, ranges, mask, scale, sinks, softcap, q_rope, k_rope)
    return _places(12, dict(zip((0, 1, 2, 6, 8, 9), made, strict=False)) | ({} if sinks is not None else {6: None}))


def _save_mla(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _on_pages("mla_attention", inputs[2], inputs[7])
    _only("mla_attention", inputs, (0, 1, 2, 3))
    ctx.save_for_backward(*inputs[:6])
    ctx.scale = inputs[6]


def _mla(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    made = ops.mla_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return _places(9, dict(enumerate(made)))


# Norms, rotary embedding, routing: torch's own operators, so that they can be differentiated again


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.about = inputs[2:]


def _norm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    eps, plus_one = ctx.about
    wide, given = x.float(), grad.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    plain = wide * inverse
    found: dict[int, Any] = {}
    if _wanted(ctx, 0):
        scaled = given * (1 + weight if plus_one else weight)
        found[0] = (inverse * (scaled - plain * (scaled * plain).mean(-1, keepdim=True))).to(x.dtype)
    if _wanted(ctx, 1):
        found[1] = (given * plain).flatten(0, -2).sum(0)
    return _places(4, found)


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _only("rope", inputs, (0,))
    ctx.save_for_backward(*inputs[1:3])
    ctx.interleaved = inputs[3]


def _rope(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cos, sin = (table[:, None] for table in ctx.saved_tensors)
    width = cos.shape[-1]
    (low, high), rest = grad[..., :width].float().chunk(2, -1), grad[..., width:]
    (cos_low, cos_high), (sin_low, sin_high) = cos.chunk(2, -1), sin.chunk(2, -1)
    halves = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    turned = torch.stack(halves, -1).flatten(-2) if ctx.interleaved else torch.cat(halves, -1)
    return _places(4, {0: torch.cat([turned.to(grad.dtype), rest], -1)})


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _only("route", inputs, (0, 3))  # a bias counts for the choice alone, so its gradient is zero
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(inputs[0], output[0])
    ctx.scoring, ctx.renorm, ctx.scale = inputs[2], inputs[7], inputs[8]


def _softmax(grad: Tensor, share: Tensor) -> Tensor:
    """The gradient of logits, given that of their softmax `share`."""
    return share * (grad - (share * grad).sum(-1, keepdim=True))


def _route(ctx: Any, ids_grad: Any, grad: Tensor) -> tuple[Any, ...]:
    logits, ids = ctx.saved_tensors
    grad = grad * ctx.scale
    if ctx.scoring == "softmax_topk":
        chosen = logits.gather(1, ids).softmax(-1)
    else:
        scores = logits.sigmoid() if ctx.scoring == "sigmoid" else logits.softmax(-1)
        chosen = scores.gather(1, ids)
    if ctx.renorm:
        total = chosen.sum(-1, keepdim=True) + 1e-20
        grad = (grad - (grad * chosen).sum(-1, keepdim=True) / total) / total
    if ctx.scoring == "softmax_topk":
        grad = _softmax(grad, chosen)
    if ctx.scoring == "sigmoid":
        grad = grad * chosen * (1 - chosen)
    spread = torch.zeros_like(logits).scatter(1, ids, grad)
    return _places(9, {0: _softmax(spread, scores) if ctx.scoring == "softmax" else spread})


FORMULAS: dict[
    str, tuple[Callable[..., Any], Callable[..., Any]]
] = {  # kernel -> what backward computes, what is saved for it
    "linear": (_linear, _save_linear),
    "linear_batched": (_batched, _save_batched),
    "gated": (_gated, _save_gated),
    "attention": (_attended, _save_attention),
    "mla_attention": (_mla, _save_mla),
    "rms_norm": (_norm, _save_norm),
    "rope": (_rope, _save_rope),
    "route": (_route, _save_route),
}


# Second derivatives


def _save_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.about = inputs[2:]


def _transposed(kernel: str) -> Callable[..., tuple[Any, ...]]:
    """Of a product with a matrix transposed, which is the product itself."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        return _places(5, {0: getattr(ops, kernel)(grad.contiguous(), packed, *ctx.about)})

    return backward


def _no_second(remedy: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NoGradient(f"a second derivative (create_graph=True, then backward) does not go through {remedy}")

    return backward


ATTENTION = "attention's kernel: call model.set_attn_implementation('eager'), whose attention is torch's own"
ONCE: dict[Any, str] = {
    experts_backward: "experts and feed-forward layers on packed weights: use first derivatives, or keep these modules in torch by a rule",
    attention_backward: ATTENTION,
    mla_attention_backward: ATTENTION,
}


def register() -> None:
    """Makes the formulas known to torch; once, after the kernels are loaded."""
    for kernel, (backward, setup) in FORMULAS.items():
        torch.library.register_autograd(f"ktx::{kernel}", backward, setup_context=setup)
    for product, kernel in ((linear_backward, "linear"), (linear_batched_backward, "linear_batched")):
        product.register_autograd(_transposed(kernel), setup_context=_save_transposed)
    for once, remedy in ONCE.items():
        once.register_autograd(_no_second(remedy))


@linear_backward.register_fake
@linear_batched_backward.register_fake
def _(grad, packed, code, n, k):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], k))


@experts_backward.register_fake
def _(grad, x, ids, weights, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weights)


@attention_backward.register_fake
def _(grad, q, k, v, ranges, mask, scale, sinks, softcap, q_rope, k_rope):  # type: ignore[no-untyped-def]
    parts = [q, k, v, q.new_empty(q.shape[1], dtype=torch.float32), *(() if q_rope is None else (q_rope, k_rope))]
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]


@mla_attention_backward.register_fake
def _(grad, q_nope, q_rope, ckv, kpe, ranges, mask, scale):  # type: ignore[no-untyped-def]
    parts = q_nope, q_rope, ckv, kpe
    return tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts)
