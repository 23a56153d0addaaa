"""Gradients of the CPU kernels with respect to their inputs; weights are frozen and stay packed.

Autograd saves the inputs of a kernel, and nothing dequantized: backward dequantizes DEQUANT_CHUNK_WEIGHTS weights of a
matrix at a time, and recomputes the activations between the projections of experts and the scores of attention. Where
a kernel rounds activations to eight bits, backward uses the straight-through estimator. An operation without a
gradient raises NoGradient in forward (`refuse`); a second derivative through experts, feed-forward layers or attention
raises it in backward. Each backward is an operator (`ktx::linear_backward`, ...) with a fake implementation, so that
torch.compile sees one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ktx.errors import NoGradient
from ktx.kernels import reference

DEQUANT_CHUNK_WEIGHTS = 1 << 20  # weights of a matrix that are dequantized at once, to f32
MAX_SCORES = 1 << 23  # attention scores that are recomputed at once, in f32
GROUP_ROWS = 16  # as in cpu.py

CPU = torch.device("cpu")  # named because torch's default device may be another
Tensor = torch.Tensor
ops: Any = torch.ops.ktx


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_gradient(what: str, remedy: str, *tensors: Tensor | None) -> None:
    """Raises NoGradient if autograd would record one of the tensors, for an operation without a gradient.

    Args:
        what: the operation, for the message.
        remedy: what the user can do instead.
        *tensors: the inputs of the operation.
    """
    if is_recorded(*tensors):
        raise NoGradient(f"{what} has no gradient, and one of its inputs requires grad: {remedy}")


def refuse_forward_mode(x: Tensor) -> None:
    """Refuses inputs that the kernels cannot differentiate.

    Raises:
        NoGradient: if the input has a tangent of forward-mode differentiation, which the kernels would drop, or is
            wrapped by a transform of torch.func.
    """
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NoGradient(
            "an input has a tangent (torch.func.jvp, jacfwd, torch.autograd.forward_ad), and the kernels can be"
            " differentiated backwards only: use torch.autograd.grad, or torch.autograd.functional.vjp"
        )
    if (
        not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]
    ):
        raise NoGradient(
            "an input is inside a transform of torch.func (grad, vjp, jacrev, hessian, vmap), which the kernels do not"
            " support: use torch.autograd.grad, torch.autograd.functional.vjp or jacobian, and a batch or a loop"
            " instead of vmap"
        )


def refuse_gpu_gradient(what: str, *tensors: Tensor | None) -> None:
    """Raises NoGradient if autograd would record one of the inputs of a GPU kernel."""
    refuse_gradient(
        f"{what} on a GPU", "put the module on the CPU (device: cpu), or call the model under torch.no_grad()", *tensors
    )


def _check_differentiable(kernel: str, inputs: Sequence[Any], indices: Sequence[int]) -> None:
    """Raises NoGradient if an input requires grad for which backward computes no gradient."""
    for i, value in enumerate(inputs):
        if i not in indices and isinstance(value, Tensor) and value.requires_grad:
            raise NoGradient(
                f"ktx::{kernel} has no gradient with respect to its argument {i}, of shape {tuple(value.shape)}:"
                " detach it"
            )


def _grads_by_index(count: int, grads: dict[int, Any]) -> tuple[Any, ...]:
    """Returns `count` gradients in the order of the inputs, None for those that `grads` lacks."""
    return tuple(grads.get(i) for i in range(count))


def _custom_op(name: str) -> Callable[[Any], Any]:
    """Decorator that registers a function as torch operator `name`, so that torch.compile sees one node.

    The operator computes in its own dtypes also inside torch.autocast.
    """

    def decorate(function: Any) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        without_autocast = torch.autocast("cpu", enabled=False)(function)
        return torch.library.custom_op(name, without_autocast, mutates_args=(), schema=schema)

    return decorate


def _needs_grad(ctx: Any, i: int) -> bool:
    """Whether the gradient of input i is needed; torch omits inputs that are equal to their defaults."""
    return i < len(ctx.needs_input_grad) and bool(ctx.needs_input_grad[i])


# `_save_X` stores what the backward of kernel X needs, `_X_backward` computes the gradients; torch calls both with the
# inputs of the kernel in the order of its schema, and wants a gradient, or None, for each. The numbers in them are
# positions of inputs: linear(x, packed, code, n, k, bias, all_bf16), linear_batched(x, packed, code, n, k).
# Gradients are named d_x; g and u are the products with the gate and up matrices.

# Matrices


def _row_chunks(data: Tensor, code: int, n: int, k: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of a packed matrix [n, k] in chunks: the slice of rows, and their f32 values."""
    chunk_rows = max(1, DEQUANT_CHUNK_WEIGHTS // k // GROUP_ROWS) * GROUP_ROWS
    for first in range(0, n, chunk_rows):
        last = min(first + chunk_rows, n)
        yield slice(first, last), ops.unpack_rows(data, code, n, k, torch.arange(first, last, device=CPU))


def _expert_row_chunks(
    data: Tensor, code: int, experts: int, index: int, n: int, k: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of one expert's matrix in chunks, as `_row_chunks` does.

    Each NUMA node holds its share of the rows of every matrix (cpu.pack_experts), so the rows of one expert are not
    contiguous in `data`.
    """
    groups = -(-n // GROUP_ROWS)
    group_bytes = data.numel() // (experts * groups)
    node_groups = [ops.node_begin(groups, node) for node in range(ops.nodes() + 1)]
    for start, end in pairwise(node_groups):
        share_bytes, first_row = (end - start) * group_bytes, start * GROUP_ROWS
        if not share_bytes:
            continue
        offset = start * group_bytes * experts + index * share_bytes
        for rows, values in _row_chunks(
            data[offset : offset + share_bytes], code, min(n, end * GROUP_ROWS) - first_row, k
        ):
            yield slice(first_row + rows.start, first_row + rows.stop), values


def _matmul_chunks(grad: Tensor, chunks: Iterator[tuple[slice, Tensor]], k: int) -> Tensor:
    """Multiplies grad f32 [tokens, n] by a matrix [n, k] in chunks of rows -> f32 [tokens, k]."""
    out = grad.new_zeros(grad.shape[0], k)
    for rows, values in chunks:
        out.addmm_(grad[:, rows], values)
    return out


@_custom_op("ktx::linear_backward")
def linear_backward(grad: Tensor, packed: Tensor, code: int, n: int, k: int) -> Tensor:
    """Multiplies grad [..., n] by the matrix [n, k] -> [..., k] in grad's dtype."""
    out = _matmul_chunks(grad.reshape(-1, n).float(), _row_chunks(packed, code, n, k), k)
    return out.reshape(*grad.shape[:-1], k).to(grad.dtype)


@_custom_op("ktx::linear_batched_backward")
def linear_batched_backward(grad: Tensor, packed: Tensor, code: int, n: int, k: int) -> Tensor:
    """Multiplies grad [matrices, tokens, n] by each matrix [n, k] -> [matrices, tokens, k] in grad's dtype."""
    pairs = zip(grad.float(), packed.view(grad.shape[0], -1), strict=True)
    return torch.stack([_matmul_chunks(rows, _row_chunks(data, code, n, k), k) for rows, data in pairs]).to(grad.dtype)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Stores the packed matrix; x is not needed, because the weights get no gradient."""
    _check_differentiable("linear", inputs, (0, 5))
    ctx.save_for_backward(inputs[1])
    ctx.matrix = inputs[2:5]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    grads: dict[int, Any] = {}
    if _needs_grad(ctx, 0):
        grads[0] = ops.linear_backward(grad, packed, *ctx.matrix)
    if _needs_grad(ctx, 5):
        grads[5] = grad.float().flatten(0, -2).sum(0)
    return _grads_by_index(7, grads)


def _save_batched(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _check_differentiable("linear_batched", inputs, (0,))
    ctx.save_for_backward(inputs[1])
    ctx.matrix = inputs[2:]


def _batched_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    return _grads_by_index(5, {0: ops.linear_batched_backward(grad, packed, *ctx.matrix)})


# Activations and experts

# (gradient of act(gate), gate) -> gradient of gate
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda grad, gate: torch.ops.aten.silu_backward(grad, gate),
    "gelu": lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate),
    "gelu_tanh": lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"),
    "relu": lambda grad, gate: grad * (gate > 0),
    "relu2": lambda grad, gate: grad * 2 * F.relu(gate),
}


def _activation_grads(
    grad: Tensor, gate: Tensor, up: Tensor, act: str, alpha: float = 0.0, limit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up, given the gradient of reference.activate.

    Except for swiglu_oai the activation is act(gate) * up, so the gradient of up is grad * act(gate).
    """
    if act == "swiglu_oai":
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * g)
        slope = sigmoid * (1 + alpha * g * (1 - sigmoid))
        return grad * (u + 1) * slope * (gate <= limit), grad * g * sigmoid * (up.abs() <= limit)
    return ACTIVATION_GRADS[act](grad * up, gate), grad * reference.activate(gate, torch.ones_like(gate), act)


@_custom_op("ktx::experts_backward")
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
    """Gradients of routed experts, computed expert by expert and in chunks of an expert's rows.

    Nothing between the projections was saved in forward: g and u are recomputed for a chunk of rows of gate and up.

    Returns:
        The gradient of x [tokens, hidden], in its dtype, and of weights f32 [tokens, top].
    """
    hidden = x.shape[1]
    d_x = torch.zeros(x.shape, dtype=torch.float32, device=CPU)
    d_weights = torch.zeros(weights.shape, dtype=torch.float32, device=CPU)
    for expert in ids.unique().tolist():
        if not 0 <= expert < n_experts:
            continue
        token, slot = torch.where(ids == expert)
        x_rows, grad_rows, weight = x[token].float(), grad[token].float(), weights[token, slot, None]
        # The gradient of the activations for a routing weight of 1.
        d_hidden = _matmul_chunks(grad_rows, _expert_row_chunks(down, down_code, n_experts, expert, hidden, ff), ff)
        d_x_rows, d_weight_rows = torch.zeros_like(x_rows), x_rows.new_zeros(len(x_rows))
        gate_chunks = _expert_row_chunks(gate, gate_code, n_experts, expert, ff, hidden)
        up_chunks = _expert_row_chunks(up, up_code, n_experts, expert, ff, hidden)
        for (rows, w_gate), (_, w_up) in zip(gate_chunks, up_chunks, strict=True):
            g, u = x_rows @ w_gate.T, x_rows @ w_up.T
            if gate_bias is not None:
                g += gate_bias.view(n_experts, ff)[expert, rows]
            if up_bias is not None:
                u += up_bias.view(n_experts, ff)[expert, rows]
            d_weight_rows += (reference.activate(g, u, act, alpha, limit) * d_hidden[:, rows]).sum(-1)
            d_gate, d_up = _activation_grads(d_hidden[:, rows] * weight, g, u, act, alpha, limit)
            d_x_rows.addmm_(d_gate, w_gate).addmm_(d_up, w_up)
        if down_bias is not None:
            d_weight_rows += grad_rows @ down_bias.view(n_experts, hidden)[expert]
        d_x.index_add_(0, token, d_x_rows)
        d_weights[token, slot] = d_weight_rows
    return d_x.to(x.dtype), d_weights


class Experts(torch.autograd.Function):
    """Autograd function of ktx::experts.

    It is needed because torch.library registers no formula for an operator that modifies an input, here the counts.
    Indices of inputs are those of the schema: x, ids, weights, three matrices, five codes and sizes, three biases, act,
    alpha, limit, counts.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Computes the experts with the kernel and saves what backward reads."""
        out: Tensor = ops.experts(*inputs)
        x, ids, weights, *others = inputs
        matrices, biases = others[:3], others[8:11]  # of gate, up and down
        ctx.save_for_backward(x, ids, weights, *matrices, *biases)
        ctx.codes_and_sizes, ctx.activation = others[3:8], others[11:14]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Returns the gradients of the hidden states and the routing weights."""
        x, ids, weights, gate, up, down, *biases = ctx.saved_tensors
        input_grads = ops.experts_backward(
            grads[0], x, ids, weights, gate, up, down, *ctx.codes_and_sizes, *biases, *ctx.activation
        )
        return _grads_by_index(18, {0: input_grads[0], 2: input_grads[1]})


def experts(*inputs: Any) -> Tensor:
    """Runs ktx::experts with gradients for x and the routing weights."""
    refuse_forward_mode(inputs[0])
    if not torch.is_grad_enabled() or not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        return ops.experts(*inputs)  # type: ignore[no-any-return]
    _check_differentiable("experts", inputs, (0, 2))
    return Experts.apply(*inputs)  # type: ignore[no-untyped-call,no-any-return]


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.act = inputs[2]


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return (*(part.to(gate.dtype) for part in _activation_grads(grad.float(), gate.float(), up.float(), ctx.act)), None)


# Attention


def _attention_grads(
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
    """Gradients of attention, given the gradient of its result [B, S, H, Dv].

    The scores are recomputed for a chunk of queries at a time, over the keys between the first and the last that these
    queries see. With P the probabilities and dP their gradients, the gradients of the scores are
    P * (dP - sum(P * dP)). Heads that share a key/value head (a group, G of them) are computed as more rows of one
    product.

    Returns:
        f32 gradients of q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv] and sinks [H].
    """
    q, k, v = q.float(), k.float(), v.float()
    (batches, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
    heads_per_group = heads // groups
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_sinks = q.new_zeros(heads)
    chunk_queries = max(1, MAX_SCORES // max(1, batches * heads * keys))
    for start in range(0, queries, chunk_queries):
        chunk = slice(start, min(start + chunk_queries, queries))
        first_key, last_key, visible, additive = _visible_keys(chunk, queries, keys, ranges, mask)
        if first_key == last_key:
            continue
        keys_in_range, values_in_range = k[:, :, first_key:last_key], v[:, :, first_key:last_key]

        def by_group(x: Tensor, chunk: slice = chunk) -> Tensor:  # [B, H, S, D] -> [B, G, H / G * chunk, D]
            return x[:, :, chunk].reshape(batches, groups, -1, x.shape[3])

        def by_head(x: Tensor) -> Tensor:  # [B, G, H / G * chunk, keys] -> [B, H, chunk, keys]
            return x.view(batches, heads, -1, x.shape[3])

        q_rows, grad_rows = by_group(q), by_group(grad.float().transpose(1, 2))
        scores = by_head(q_rows @ keys_in_range.transpose(2, 3) * scale)
        capped = softcap * torch.tanh(scores / softcap) if softcap else scores
        logits = (capped if additive is None else capped + additive.float()).masked_fill(~visible, -torch.inf)
        # Clamped because the maximum is -inf where a query has no visible keys.
        row_max = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        sink = None if sinks is None else sinks.float().view(1, heads, 1, 1)
        row_max = row_max if sink is None else torch.maximum(row_max, sink)
        probs = torch.exp(logits - row_max)
        total = probs.sum(-1, keepdim=True)
        total = total if sink is None else total + torch.exp(sink - row_max)
        probs /= total.clamp(min=torch.finfo(torch.float32).tiny)
        d_probs = by_head(grad_rows @ values_in_range.transpose(2, 3))
        weighted_mean = (probs * d_probs).sum(-1, keepdim=True)
        if sink is not None:
            d_sinks -= (torch.exp(sink - row_max) / total * weighted_mean).sum((0, 2, 3))
        d_scores = probs * (d_probs - weighted_mean)
        if softcap:
            d_scores *= 1 - (capped / softcap).square()
        d_scores = d_scores.view(batches, groups, heads_per_group * (chunk.stop - chunk.start), -1) * scale
        d_q[:, :, chunk] = (d_scores @ keys_in_range).view(batches, heads, -1, q.shape[3])
        d_k[:, :, first_key:last_key] += d_scores.transpose(2, 3) @ q_rows
        d_v[:, :, first_key:last_key] += probs.view(d_scores.shape).transpose(2, 3) @ grad_rows
    return d_q, d_k, d_v, d_sinks


def _visible_keys(
    chunk: slice, queries: int, keys: int, ranges: Tensor | None, mask: Tensor | None
) -> tuple[int, int, Tensor, Tensor | None]:
    """Returns the keys that a chunk of queries may attend to, so that backward skips keys that none of them sees.

    Args:
        chunk: the queries.
        queries: number of all queries.
        keys: number of all keys.
        ranges, mask: as in reference.visible_keys.

    Returns:
        The first and the last (exclusive) key that any of the queries sees, and for the keys between them the result
        of reference.visible_keys.
    """
    if mask is not None:
        return (0, keys, *reference.visible_keys(chunk.stop - chunk.start, keys, None, mask[:, :, chunk], CPU))
    if ranges is None:
        ends = torch.arange(chunk.start, chunk.stop, device=CPU) + keys - queries + 1
        ranges = torch.stack([torch.zeros_like(ends), ends.clamp(min=0)], -1)[None]
    else:
        ranges = ranges[:, chunk]
    nonempty = ranges[ranges[..., 0] < ranges[..., 1]]
    first_key, last_key = (
        (max(0, int(nonempty[:, 0].min())), min(keys, int(nonempty[:, 1].max()))) if len(nonempty) else (0, 0)
    )
    return (
        first_key,
        last_key,
        *reference.visible_keys(ranges.shape[1], last_key - first_key, ranges - first_key, None, CPU),
    )


@_custom_op("ktx::attention_backward")
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
    """Gradients of q, k, v, sinks (zeros if there are none), and of q_rope and k_rope if they are given.

    Rotated columns are more columns of q and k, so they are concatenated for the computation. A k_rope that all heads
    share gets the sum of their gradients.
    """
    full_q, full_k = q, k
    if q_rope is not None and k_rope is not None:
        full_q = torch.cat([q, q_rope], -1)
        full_k = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], -1)
    d_q, d_k, d_v, d_sinks = _attention_grads(grad, full_q, full_k, v, ranges, mask, scale, sinks, softcap)
    if q_rope is None or k_rope is None:
        return [d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_sinks]
    (d_q, d_q_rope), (d_k, d_k_rope) = (part.split([q.shape[3], q_rope.shape[3]], -1) for part in (d_q, d_k))
    d_k_rope = d_k_rope.sum(1, keepdim=True) if k_rope.shape[1] == 1 else d_k_rope
    parts = zip((d_q, d_k, d_v, d_sinks, d_q_rope, d_k_rope), (q, k, v, d_sinks, q_rope, k_rope), strict=True)
    return [part.to(like.dtype).contiguous() for part, like in parts]


@_custom_op("ktx::mla_attention_backward")
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
    """Gradients of MLA: of q_nope, q_rope, ckv and kpe.

    MLA is attention with one key/value head: keys are the latent ckv and kpe, values the latent. So the gradient of ckv
    is the sum of its gradients as keys and as values.
    """
    q, k = torch.cat([q_nope, q_rope], -1), torch.cat([ckv, kpe], -1)[:, None]
    d_q, d_k, d_v, _ = _attention_grads(grad, q, k, ckv[:, None], ranges, mask, scale)
    (d_nope, d_rope), (d_ckv, d_kpe) = (part.split([ckv.shape[2], kpe.shape[2]], -1) for part in (d_q, d_k))
    parts = (d_nope, q_nope), (d_rope, q_rope), ((d_ckv + d_v)[:, 0], ckv), (d_kpe[:, 0], kpe)
    grad_nope, grad_rope, grad_ckv, grad_kpe = (part.to(like.dtype).contiguous() for part, like in parts)
    return grad_nope, grad_rope, grad_ckv, grad_kpe


def _refuse_paged_or_quantized(kernel: str, keys: Tensor, sequences: Tensor | None) -> None:
    """Raises NoGradient for keys in the pages of an engine, and for Q8_0 keys: backward computes neither."""
    if sequences is not None or keys.dtype == torch.uint8:
        location = "pages of an engine" if sequences is not None else "keys and values in eight bits"
        raise NoGradient(
            f"ktx::{kernel} on {location} has no gradient, and one of its inputs requires grad: {WITHOUT_CACHE}"
        )


WITHOUT_CACHE = "call the model with use_cache=False, or with one of transformers' caches, or under torch.no_grad()"


# The inputs of attention that have gradients: q, k, v, sinks, q_rope, k_rope.
ATTENTION_GRAD_INPUTS = (0, 1, 2, 6, 8, 9)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ranges, mask, scale, sinks, softcap, q_rope, k_rope, sequences, _ = inputs
    _refuse_paged_or_quantized("attention", k, sequences)
    _check_differentiable("attention", inputs, ATTENTION_GRAD_INPUTS)
    ctx.save_for_backward(q, k, v, ranges, mask, sinks, q_rope, k_rope)
    ctx.scalars = scale, softcap


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, ranges, mask, sinks, q_rope, k_rope = ctx.saved_tensors
    scale, softcap = ctx.scalars
    input_grads = ops.attention_backward(grad, q, k, v, ranges, mask, scale, sinks, softcap, q_rope, k_rope)
    return _grads_by_index(
        12, dict(zip(ATTENTION_GRAD_INPUTS, input_grads, strict=False)) | ({} if sinks is not None else {6: None})
    )


def _save_mla(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _refuse_paged_or_quantized("mla_attention", inputs[2], inputs[7])
    _check_differentiable("mla_attention", inputs, (0, 1, 2, 3))
    ctx.save_for_backward(*inputs[:6])
    ctx.scale = inputs[6]


def _mla_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input_grads = ops.mla_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return _grads_by_index(9, dict(enumerate(input_grads)))


# Norms, rotary embedding, routing: composed of torch's operators, so that they have second derivatives


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Computes the gradients of rms_norm(x, weight, eps, plus_one) for x and weight.

    With y = x / rms and s = grad * weight, the gradient of x is (s - y * mean(s * y)) / rms, that of weight grad * y.
    """
    x, weight = ctx.saved_tensors
    eps, plus_one = ctx.options
    x_f32, grad_f32 = x.float(), grad.float()
    inv_rms = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    normalized = x_f32 * inv_rms
    grads: dict[int, Any] = {}
    if _needs_grad(ctx, 0):
        scaled = grad_f32 * (1 + weight if plus_one else weight)
        grads[0] = (inv_rms * (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True))).to(x.dtype)
    if _needs_grad(ctx, 1):
        grads[1] = (grad_f32 * normalized).flatten(0, -2).sum(0)
    return _grads_by_index(4, grads)


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _check_differentiable("rope", inputs, (0,))
    ctx.save_for_backward(*inputs[1:3])
    ctx.interleaved = inputs[3]


def _rope_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Computes the gradient of x in rope(x, cos, sin, interleaved): rotates by the opposite angle, in x's order."""
    cos, sin = (table[:, None] for table in ctx.saved_tensors)
    rope_dim = cos.shape[-1]
    (low, high), rest = grad[..., :rope_dim].float().chunk(2, -1), grad[..., rope_dim:]
    (cos_low, cos_high), (sin_low, sin_high) = cos.chunk(2, -1), sin.chunk(2, -1)
    halves = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    rotated = torch.stack(halves, -1).flatten(-2) if ctx.interleaved else torch.cat(halves, -1)
    return _grads_by_index(4, {0: torch.cat([rotated.to(grad.dtype), rest], -1)})


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _check_differentiable("route", inputs, (0, 3))  # the bias affects the selection only, so its gradient is zero
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(inputs[0], output[0])
    ctx.scoring, ctx.renorm, ctx.scale = inputs[2], inputs[7], inputs[8]


def _softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    """Returns the gradient of logits, given that of their softmax `probs`."""
    return probs * (grad - (probs * grad).sum(-1, keepdim=True))


def _route_backward(ctx: Any, ids_grad: Any, grad: Tensor) -> tuple[Any, ...]:
    """Computes the gradient of the logits in route(logits, top_k, scoring, bias, ..., renorm, scale).

    `grad` is that of the selected experts' weights. It goes back through scale, renormalization, and scoring; logits of
    experts that were not selected get a gradient only if the softmax is over all experts.
    """
    logits, ids = ctx.saved_tensors
    grad = grad * ctx.scale
    if ctx.scoring == "softmax_topk":
        selected = logits.gather(1, ids).softmax(-1)
    else:
        scores = logits.sigmoid() if ctx.scoring == "sigmoid" else logits.softmax(-1)
        selected = scores.gather(1, ids)
    if ctx.renorm:
        total = selected.sum(-1, keepdim=True) + 1e-20  # as in the kernel, against a zero sum
        grad = (grad - (grad * selected).sum(-1, keepdim=True) / total) / total
    if ctx.scoring == "softmax_topk":
        grad = _softmax_backward(grad, selected)
    if ctx.scoring == "sigmoid":
        grad = grad * selected * (1 - selected)
    d_scores = torch.zeros_like(logits).scatter(1, ids, grad)
    return _grads_by_index(9, {0: _softmax_backward(d_scores, scores) if ctx.scoring == "softmax" else d_scores})


# Kernel -> (backward, function that saves the inputs backward needs).
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (_linear_backward, _save_linear),
    "linear_batched": (_batched_backward, _save_batched),
    "gated": (_gated_backward, _save_gated),
    "attention": (_attention_backward, _save_attention),
    "mla_attention": (_mla_backward, _save_mla),
    "rms_norm": (_norm_backward, _save_norm),
    "rope": (_rope_backward, _save_rope),
    "route": (_route_backward, _save_route),
}


# Second derivatives: of linear they exist because its backward is linear again; of others they are refused.


def _save_linear_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.matrix = inputs[2:]


def _linear_double_backward(kernel: str) -> Callable[..., tuple[Any, ...]]:
    """Returns the backward of a product with a transposed matrix, which is the product with the matrix, `kernel`."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        return _grads_by_index(5, {0: getattr(ops, kernel)(grad.contiguous(), packed, *ctx.matrix)})

    return backward


def _refuse_double_backward(remedy: str) -> Callable[..., Any]:
    """Returns a backward that raises NoGradient."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NoGradient(f"a second derivative (create_graph=True, then backward) does not go through {remedy}")

    return backward


ATTENTION_REMEDY = "attention's kernel: call model.set_attn_implementation('eager'), which computes attention in torch"
# Backward operators without a gradient -> what the message names, and the remedy.
FIRST_ORDER_ONLY: dict[Any, str] = {
    experts_backward: "experts and feed-forward layers on packed weights: use first derivatives, or keep these modules"
    " in torch by a rule",
    attention_backward: ATTENTION_REMEDY,
    mla_attention_backward: ATTENTION_REMEDY,
}


def register() -> None:
    """Registers the gradient formulas with torch; called once, after the kernels are loaded."""
    for kernel, (backward, setup) in FORMULAS.items():
        torch.library.register_autograd(f"ktx::{kernel}", backward, setup_context=setup)
    for product, kernel in ((linear_backward, "linear"), (linear_batched_backward, "linear_batched")):
        product.register_autograd(_linear_double_backward(kernel), setup_context=_save_linear_backward)
    for operator, remedy in FIRST_ORDER_ONLY.items():
        operator.register_autograd(_refuse_double_backward(remedy))


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
