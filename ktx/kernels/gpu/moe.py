"""Routed experts on a GPU, in Triton, on packed weights: two grouped products and a weighted sum.

A call computes all experts of a layer, or those from `first` on. A pair is a token and one of its selected experts.
Small numbers of pairs are multiplied one by one, each by the rows of its expert (`quant_matmul.gemv`). Larger numbers
are sorted by expert and divided into groups of one expert each (`quant_matmul.gemm`); the number of groups is bounded
by the shapes alone, and a program whose group is empty ends at once. Pairs of experts that are not on this device cost
and contribute nothing: another device adds them. No launch reads a value on the device, so a CUDA graph can capture
all of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ktx.errors import KtxError
from ktx.kernels.gpu import quant_matmul
from ktx.kernels.gpu.dequant import codebook_of, decode_constants
from ktx.kernels.gpu.soa_layout import SoAWeight
from ktx.kernels.gradients import refuse_gpu_gradient

MAX_GEMV_PAIRS = 64  # largest number of pairs that are multiplied one by one
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai")


@triton.jit
def activate(gate, up, ACT: tl.constexpr, alpha, limit):
    """Computes reference.activate, act(gate) * up, in f32; ACT is one of ACTIVATIONS."""
    if ACT == "swiglu_oai":
        gate = tl.minimum(gate, limit)
        y = gate * tl.sigmoid(alpha * gate) * (tl.minimum(tl.maximum(up, -limit), limit) + 1)
    elif ACT == "silu":
        y = gate * tl.sigmoid(gate) * up
    elif ACT == "gelu":
        y = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACT == "gelu_tanh":  # (1 + tanh(z)) / 2 is the sigmoid of 2 z
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gate = tl.maximum(gate, 0.0)
        y = (gate * gate if ACT == "relu2" else gate) * up
    return y


@triton.jit
def load_group(
    pairs, group_expert, group_first, expert_end, ids, first, experts, SORTED: tl.constexpr, PAIRS: tl.constexpr
):
    """Loads which pairs of a token and an expert a program computes: a group of one expert's (SORTED), or a single one.

    The first four arguments are the tensors of `Sorting`, which only SORTED reads. `first` and `experts` are the first
    expert on this device and the number of experts on it.

    Returns:
        Its expert (`experts` or more if there is none), its pairs [PAIRS], and the mask of valid pairs.
    """
    group = tl.program_id(1)
    if SORTED:
        expert = tl.load(group_expert + group).to(tl.int64)
        index = tl.load(group_first + group) + tl.arange(0, PAIRS)
        pair_mask = index < tl.load(expert_end + expert)
        pair = tl.load(pairs + index, mask=pair_mask, other=0).to(tl.int64)
    else:
        expert = tl.load(ids + group).to(tl.int64) - first
        expert = tl.where(expert < 0, experts, expert)
        pair_mask = tl.arange(0, PAIRS) == 0
        pair = group.to(tl.int64) + tl.zeros([PAIRS], tl.int64)
    return expert, pair, pair_mask


@triton.jit
def expert_matmul(
    x, token, token_mask, expert, planes, codebook, bias, n, k, blocks,
    HAS_BIAS: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, DECODE: tl.constexpr, MINIMUM: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Multiplies rows of x by a program's rows of an expert's matrix and adds the bias: f32 [PAIRS, ROWS].

    `token` are the rows of x; PRODUCT is quant_matmul.gemv or gemm, which takes the rest. Rows past the end are
    computed as the last row, so that no address is out of bounds; the caller masks them.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight_row = expert * n + tl.minimum(row, n - 1)
    y = PRODUCT(
        x, token, token_mask, planes, codebook, weight_row, n, k, blocks, 0, k, SPAN, BLOCK, DECODE, MINIMUM, RUN
    )
    if HAS_BIAS:
        y += tl.load(bias + expert * n + row, mask=row < n, other=0.0)[None, :]
    return y


@triton.jit
def _gate_up(
    x, out, sorting, ids, first, experts, top,
    gate, gate_codebook, gate_bias, gate_blocks, up, up_codebook, up_bias, up_blocks, n, k, alpha, limit,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SORTED: tl.constexpr, PRODUCT: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    GATE_BLOCK: tl.constexpr, GATE_DECODE: tl.constexpr, GATE_MINIMUM: tl.constexpr, GATE_RUN: tl.constexpr,
    UP_BLOCK: tl.constexpr, UP_DECODE: tl.constexpr, UP_MINIMUM: tl.constexpr, UP_RUN: tl.constexpr,
):  # fmt: skip
    """Computes act(gate(x)) * up(x) for pairs of a token and a selected expert -> out [pairs, n], the input of `_down`.

    `sorting` has the tensors of `Sorting`, which `load_group` reads. `first` and `experts` are the first expert on this
    device and the number of experts on it, `top` the selected experts of a token; the rest goes to `expert_matmul`.
    """
    expert, pair, pair_mask = load_group(
        sorting[0], sorting[1], sorting[2], sorting[3], ids, first, experts, SORTED, PAIRS
    )
    if expert < experts:
        token = pair // top
        g = expert_matmul(
            x, token, pair_mask, expert, gate, gate_codebook, gate_bias, n, k, gate_blocks,
            HAS_BIAS, PRODUCT, ROWS, SPAN, GATE_BLOCK, GATE_DECODE, GATE_MINIMUM, GATE_RUN,
        )  # fmt: skip
        u = expert_matmul(
            x, token, pair_mask, expert, up, up_codebook, up_bias, n, k, up_blocks,
            HAS_BIAS, PRODUCT, ROWS, SPAN, UP_BLOCK, UP_DECODE, UP_MINIMUM, UP_RUN,
        )  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        y = activate(g, u, ACT, alpha, limit).to(out.dtype.element_ty)
        tl.store(out + pair[:, None] * n + row[None, :], y, mask=pair_mask[:, None] & (row < n)[None, :])


@triton.jit
def _down(
    x, out, sorting, ids, first, experts, planes, codebook, bias, blocks, n, k,
    HAS_BIAS: tl.constexpr, SORTED: tl.constexpr, PRODUCT: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, DECODE: tl.constexpr, MINIMUM: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Multiplies x [pairs, k], the result of `_gate_up`, by the down matrix of each pair's expert -> out [pairs, n].

    Arguments as those of `_gate_up`. `_combine` adds up the results of a token's pairs.
    """
    expert, pair, pair_mask = load_group(
        sorting[0], sorting[1], sorting[2], sorting[3], ids, first, experts, SORTED, PAIRS
    )
    if expert < experts:
        y = expert_matmul(
            x, pair, pair_mask, expert, planes, codebook, bias, n, k, blocks,
            HAS_BIAS, PRODUCT, ROWS, SPAN, BLOCK, DECODE, MINIMUM, RUN,
        )  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = pair_mask[:, None] & (row < n)[None, :]
        tl.store(out + pair[:, None] * n + row[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine(y, ids, weights, out, expert_counts, first, experts, top, n, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over a token's selected experts on this device, in their order -> out [tokens, n].

    Each program sums WIDTH columns of one token, so no atomic additions make the result depend on timing.
    With COUNT it adds one to `expert_counts` for each of these experts.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for slot in range(top):
        pair = token * top + slot
        expert = tl.load(ids + pair) - first
        is_local = (expert >= 0) & (expert < experts)
        value = tl.load(y + pair * n + column, mask=column < tl.where(is_local, n, 0), other=0.0)
        total += tl.where(is_local, tl.load(weights + pair), 0.0) * value
        if COUNT:
            tl.atomic_add(expert_counts + first + expert, 1, mask=is_local & (tl.program_id(1) == 0), sem="relaxed")
    tl.store(out + token * n + column, total.to(out.dtype.element_ty), mask=column < n)


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: SoAWeight,
    up: SoAWeight,
    down: SoAWeight,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    act: str = "silu",
    alpha: float = 0.0,
    limit: float = 0.0,
    first: int = 0,
    expert_counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes routed experts; see reference.experts.

    Args:
        x: [tokens, hidden].
        ids: int64 [tokens, top].
        weights: f32 [tokens, top].
        gate, up, down: the matrices of the experts from `first` on; other experts are skipped.
        gate_bias, up_bias, down_bias: f32, of the same experts.
        act: one of ACTIVATIONS; `alpha` and `limit` are its parameters.
        first: index of the first expert on this device.
        expert_counts: int64 on the device, to which the kernel adds how often each expert was selected.

    Returns:
        [tokens, hidden] in x's dtype.

    Raises:
        KtxError: if shapes do not fit or the activation is not supported.
        NoGradient: if autograd records x or weights.
    """
    _check(x, ids, weights, gate, up, down, gate_bias, up_bias, act)
    tokens, top = ids.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not tokens or not top:
        return out.zero_()
    x, ids, weights, pairs = x.contiguous(), ids.contiguous(), weights.contiguous(), tokens * top
    shape = choose_tile(pairs, gate.matrices, gate.n, gate.k)
    sorting, groups = group_pairs(ids, first, gate.matrices, shape["PAIRS"]) if shape["SORTED"] else ((ids,) * 4, pairs)
    activated = torch.empty(pairs, gate.n, dtype=x.dtype, device=x.device)
    _gate_up[(triton.cdiv(gate.n, shape["ROWS"]), groups)](
        x, activated, sorting, ids, first, gate.matrices, top,
        gate.planes, codebook_of(gate), gate_bias, gate.row_blocks, up.planes, codebook_of(up), up_bias, up.row_blocks,
        gate.n, gate.k, alpha, limit,
        ACT=act, HAS_BIAS=gate_bias is not None, **shape,
        **decode_constants(gate, "GATE_"), **decode_constants(up, "UP_"),
    )  # fmt: skip
    shape = choose_tile(pairs, gate.matrices, down.n, down.k)
    y = torch.empty(pairs, down.n, dtype=torch.float32, device=x.device)
    _down[(triton.cdiv(down.n, shape["ROWS"]), groups)](
        activated, y, sorting, ids, first, gate.matrices,
        down.planes, codebook_of(down), down_bias, down.row_blocks, down.n, down.k,
        HAS_BIAS=down_bias is not None, **shape, **decode_constants(down),
    )  # fmt: skip
    _combine[(tokens, triton.cdiv(down.n, 1024))](
        y,
        ids,
        weights,
        out,
        expert_counts,
        first,
        gate.matrices,
        top,
        down.n,
        COUNT=expert_counts is not None,
        WIDTH=1024,
    )
    return out


def choose_tile(pairs: int, experts: int, n: int, k: int) -> dict[str, Any]:
    """Returns how the kernels compute a number of pairs of a token and an expert, as keyword arguments.

    Up to MAX_GEMV_PAIRS pairs each run on their own. More are sorted by expert, in groups of about the pairs of an
    expert on average, so that a group reads its expert's weights once.
    """
    if pairs <= MAX_GEMV_PAIRS:
        return {"SORTED": False, "PAIRS": 1, **quant_matmul.gemv_tile(n, k, pairs)}
    padded_pairs = triton.next_power_of_2(max(1, pairs // experts))
    return {"SORTED": True, "PAIRS": min(quant_matmul.GEMM_TOKENS, max(16, padded_pairs)), **quant_matmul.gemm_tile()}


class Sorting(NamedTuple):
    """Pairs sorted by expert, those of other devices last, and the groups they are divided into."""

    pairs: torch.Tensor  # [pairs]: indices of the pairs, sorted
    expert: torch.Tensor  # [groups]: the group's expert; the number of experts for an empty group
    first: torch.Tensor  # [groups]: start of the group in `pairs`
    end: torch.Tensor  # [experts + 1]: end of the expert's pairs in `pairs`


def group_pairs(ids: torch.Tensor, first: int, experts: int, max_pairs: int) -> tuple[tuple[torch.Tensor, ...], int]:
    """Sorts pairs by expert and divides them into groups of at most `max_pairs` pairs of one expert.

    The number of groups has to be known without reading the device, so it is the largest that any distribution of
    pairs can need: each expert may add one incomplete group. `first` and `experts` are the first expert on this device
    and the number of experts on it; pairs of other experts are in no group.

    Returns:
        The tensors of `Sorting`, and the number of groups, including empty ones.
    """
    local_ids = ids.reshape(-1) - first
    local_ids = torch.where((local_ids >= 0) & (local_ids < experts), local_ids, experts)
    by_expert, pairs = torch.sort(local_ids, stable=True)
    expert_index = torch.arange(experts + 1, device=ids.device)
    end = torch.searchsorted(by_expert, expert_index, right=True)
    begin = torch.cat([end.new_zeros(1), end[:-1]])
    # Groups up to and including this expert's.
    last_group = torch.cumsum((end - begin + max_pairs - 1)[:experts] // max_pairs, 0)
    groups = min(len(local_ids), len(local_ids) // max_pairs + experts)
    group = torch.arange(groups, device=ids.device)
    expert = torch.searchsorted(last_group, group, right=True)
    first_group = torch.cat([last_group.new_zeros(1), last_group])[expert]
    start = begin[expert] + (group - first_group) * max_pairs
    return tuple(Sorting(pairs, expert, start, end)), groups


def _check(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate: SoAWeight, up: SoAWeight, down: SoAWeight,
    gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None, act: str,
) -> None:  # fmt: skip
    """Raises KtxError unless shapes and the activation fit, because the kernels check nothing; refuses gradients."""
    refuse_gpu_gradient("Experts", x, weights)
    if act not in ACTIVATIONS:
        raise KtxError(f"activation {act} is not supported for experts; available: {', '.join(ACTIVATIONS)}")
    shapes = (gate.n, gate.k, gate.matrices), (up.n, up.k, up.matrices), (down.k, down.n, down.matrices)
    if len(set(shapes)) > 1:
        raise KtxError(f"gate, up and down (transposed) have rows, columns, experts {shapes}: they must be equal")
    if x.dim() != 2 or x.shape[1] != gate.k:
        raise KtxError(f"x has shape {list(x.shape)}, the experts take [tokens, {gate.k}]")
    if ids.shape != weights.shape or ids.dim() != 2 or len(ids) != len(x):
        raise KtxError(
            f"ids {list(ids.shape)} and weights {list(weights.shape)} for {len(x)} tokens: both must be [tokens, top]"
        )
    if (gate_bias is None) != (up_bias is None):
        raise KtxError("gate and up must have biases both or neither")
