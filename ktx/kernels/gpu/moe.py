"""Experts on a GPU, in Triton, on packed weights: all of a layer or a share of them (`first`), in two grouped products and a weighted sum.

A pair is a token and one of its choices. Few pairs are multiplied one by one, each by its expert's rows (`products.few`). Many are sorted by expert
and cut into groups of one expert each (`products.many`); the number of groups is bounded by the shapes alone, and a program whose group is empty ends at once. Pairs of experts
outside the share cost nothing and count nothing: another device adds them. No launch looks at a value on the device, so a CUDA graph may hold all of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ktx.errors import KtxError
from ktx.kernels.gpu import quant_matmul
from ktx.kernels.gpu.dequant import book, decoding
from ktx.kernels.gpu.soa_layout import SoAWeight
from ktx.kernels.gradients import none_on_gpu

FEW_PAIRS = 64  # most pairs that are multiplied one by one
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai")


@triton.jit
def activate(gate, up, ACT: tl.constexpr, alpha, limit):
    """reference.activate in f32."""
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
def group_of(
    pairs, group_expert, group_first, expert_end, ids, first, experts, SORTED: tl.constexpr, PAIRS: tl.constexpr
):
    """A program's expert (none from `experts` on), its pairs [PAIRS] and which of them are pairs."""
    group = tl.program_id(1)
    if SORTED:
        expert = tl.load(group_expert + group).to(tl.int64)
        at = tl.load(group_first + group) + tl.arange(0, PAIRS)
        known = at < tl.load(expert_end + expert)
        pair = tl.load(pairs + at, mask=known, other=0).to(tl.int64)
    else:
        expert = tl.load(ids + group).to(tl.int64) - first
        expert = tl.where(expert < 0, experts, expert)
        known = tl.arange(0, PAIRS) == 0
        pair = group.to(tl.int64) + tl.zeros([PAIRS], tl.int64)
    return expert, pair, known


@triton.jit
def product(
    x, token, known, expert, planes, book, bias, n, k, blocks,
    HAS_BIAS: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, DECODE: tl.constexpr, MINIMUM: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Rows of x by a program's rows of an expert's matrix, with the bias: f32 [PAIRS, ROWS]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = expert * n + tl.minimum(row, n - 1)
    y = PRODUCT(x, token, known, planes, book, inside, n, k, blocks, 0, k, SPAN, BLOCK, DECODE, MINIMUM, RUN)
    if HAS_BIAS:
        y += tl.load(bias + expert * n + row, mask=row < n, other=0.0)[None, :]
    return y


@triton.jit
def _gate_up(
    x, out, sorting, ids, first, experts, top,
    gate, gate_book, gate_bias, gate_blocks, up, up_book, up_bias, up_blocks, n, k, alpha, limit,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SORTED: tl.constexpr, PRODUCT: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    GATE_BLOCK: tl.constexpr, GATE_DECODE: tl.constexpr, GATE_MINIMUM: tl.constexpr, GATE_RUN: tl.constexpr,
    UP_BLOCK: tl.constexpr, UP_DECODE: tl.constexpr, UP_MINIMUM: tl.constexpr, UP_RUN: tl.constexpr,
):  # fmt: skip
    """act(gate(x)) * up(x) of pairs -> out [pairs, n]."""
    expert, pair, known = group_of(sorting[0], sorting[1], sorting[2], sorting[3], ids, first, experts, SORTED, PAIRS)
    if expert < experts:
        token = pair // top
        g = product(
            x, token, known, expert, gate, gate_book, gate_bias, n, k, gate_blocks,
            HAS_BIAS, PRODUCT, ROWS, SPAN, GATE_BLOCK, GATE_DECODE, GATE_MINIMUM, GATE_RUN,
        )  # fmt: skip
        u = product(
            x, token, known, expert, up, up_book, up_bias, n, k, up_blocks,
            HAS_BIAS, PRODUCT, ROWS, SPAN, UP_BLOCK, UP_DECODE, UP_MINIMUM, UP_RUN,
        )  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        y = activate(g, u, ACT, alpha, limit).to(out.dtype.element_ty)
        tl.store(out + pair[:, None] * n + row[None, :], y, mask=known[:, None] & (row < n)[None, :])


@triton.jit
def _down(
    x, out, sorting, ids, first, experts, planes, book, bias, blocks, n, k,
    HAS_BIAS: tl.constexpr, SORTED: tl.constexpr, PRODUCT: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, DECODE: tl.constexpr, MINIMUM: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """x [pairs, k] by each pair's expert -> out [pairs, n]."""
    expert, pair, known = group_of(sorting[0], sorting[1], sorting[2], sorting[3], ids, first, experts, SORTED, PAIRS)
    if expert < experts:
        y = product(
            x, pair, known, expert, planes, book, bias, n, k, blocks,
            HAS_BIAS, PRODUCT, ROWS, SPAN, BLOCK, DECODE, MINIMUM, RUN,
        )  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        some = known[:, None] & (row < n)[None, :]
        tl.store(out + pair[:, None] * n + row[None, :], y.to(out.dtype.element_ty), mask=some)


@triton.jit
def _combine(y, ids, weights, out, chosen, first, experts, top, n, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Sum over a token's choices inside the share, in their order -> out [tokens, n]; adds these choices to `chosen`, by their numbers."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for choice in range(top):
        pair = token * top + choice
        expert = tl.load(ids + pair) - first
        inside = (expert >= 0) & (expert < experts)
        part = tl.load(y + pair * n + column, mask=column < tl.where(inside, n, 0), other=0.0)
        total += tl.where(inside, tl.load(weights + pair), 0.0) * part
        if COUNT:
            tl.atomic_add(chosen + first + expert, 1, mask=inside & (tl.program_id(1) == 0), sem="relaxed")
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
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [tokens, hidden], ids int64 and weights f32 [tokens, top] -> [tokens, hidden] in x's dtype; see reference.experts.

    The packed matrices (and biases) are those of the experts from `first` on; choices of others are skipped. `chosen`, int64 on the device, counts by an
    expert's number how often it was chosen.
    """
    _check(x, ids, weights, gate, up, down, gate_bias, up_bias, act)
    tokens, top = ids.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not tokens or not top:
        return out.zero_()
    x, ids, weights, pairs = x.contiguous(), ids.contiguous(), weights.contiguous(), tokens * top
    size = shape_of(pairs, gate.matrices, gate.n, gate.k)
    sorting, groups = grouped(ids, first, gate.matrices, size["PAIRS"]) if size["SORTED"] else ((ids,) * 4, pairs)
    inner = torch.empty(pairs, gate.n, dtype=x.dtype, device=x.device)
    _gate_up[(triton.cdiv(gate.n, size["ROWS"]), groups)](
        x, inner, sorting, ids, first, gate.matrices, top,
        gate.planes, book(gate), gate_bias, gate.row_blocks, up.planes, book(up), up_bias, up.row_blocks,
        gate.n, gate.k, alpha, limit,
        ACT=act, HAS_BIAS=gate_bias is not None, **size, **decoding(gate, "GATE_"), **decoding(up, "UP_"),
    )  # fmt: skip
    size = shape_of(pairs, gate.matrices, down.n, down.k)
    y = torch.empty(pairs, down.n, dtype=torch.float32, device=x.device)
    _down[(triton.cdiv(down.n, size["ROWS"]), groups)](
        inner, y, sorting, ids, first, gate.matrices, down.planes, book(down), down_bias, down.row_blocks, down.n, down.k,
        HAS_BIAS=down_bias is not None, **size, **decoding(down),
    )  # fmt: skip
    _combine[(tokens, triton.cdiv(down.n, 1024))](
        y, ids, weights, out, chosen, first, gate.matrices, top, down.n, COUNT=chosen is not None, WIDTH=1024
    )
    return out


def shape_of(pairs: int, experts: int, n: int, k: int) -> dict[str, Any]:
    """The kernels' way with that many pairs, as keyword arguments."""
    if pairs <= FEW_PAIRS:
        return {"SORTED": False, "PAIRS": 1, **quant_matmul.few_tile(n, k, pairs)}
    size = triton.next_power_of_2(max(1, pairs // experts))
    return {"SORTED": True, "PAIRS": min(quant_matmul.MANY_TOKENS, max(16, size)), **quant_matmul.many_tile()}


class Sorting(NamedTuple):
    """Pairs by expert, those outside the share last, and the groups they are cut into."""

    pairs: torch.Tensor  # [pairs]: their numbers, sorted
    expert: torch.Tensor  # [groups]: the share's number of experts for those that are empty
    first: torch.Tensor  # [groups]: where in `pairs` a group begins
    end: torch.Tensor  # [experts + 1]: where an expert's pairs end


def grouped(ids: torch.Tensor, first: int, experts: int, size: int) -> tuple[tuple[torch.Tensor, ...], int]:
    """Sorts pairs and cuts them into groups of at most `size` of one expert; also the number of groups there are room for."""
    local = ids.reshape(-1) - first
    local = torch.where((local >= 0) & (local < experts), local, experts)
    by_expert, pairs = torch.sort(local, stable=True)
    numbers = torch.arange(experts + 1, device=ids.device)
    end = torch.searchsorted(by_expert, numbers, right=True)
    begin = torch.cat([end.new_zeros(1), end[:-1]])
    last = torch.cumsum((end - begin + size - 1)[:experts] // size, 0)  # groups up to and with this expert
    groups = min(len(local), len(local) // size + experts)
    group = torch.arange(groups, device=ids.device)
    expert = torch.searchsorted(last, group, right=True)
    before = torch.cat([last.new_zeros(1), last])[expert]
    start = begin[expert] + (group - before) * size
    return tuple(Sorting(pairs, expert, start, end)), groups


def _check(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate: SoAWeight, up: SoAWeight, down: SoAWeight,
    gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None, act: str,
) -> None:  # fmt: skip
    none_on_gpu("Experts", x, weights)
    if act not in ACTIVATIONS:
        raise KtxError(f"{act} is no activation that experts are computed with; there are {', '.join(ACTIVATIONS)}")
    shapes = (gate.n, gate.k, gate.matrices), (up.n, up.k, up.matrices), (down.k, down.n, down.matrices)
    if len(set(shapes)) > 1:
        raise KtxError(f"gate, up and down (transposed) have rows, columns, experts {shapes}: they must be the same")
    if x.dim() != 2 or x.shape[1] != gate.k:
        raise KtxError(f"x has shape {list(x.shape)}, the experts take [tokens, {gate.k}]")
    if ids.shape != weights.shape or ids.dim() != 2 or len(ids) != len(x):
        raise KtxError(f"ids {list(ids.shape)} and weights {list(weights.shape)} for {len(x)} tokens")
    if (gate_bias is None) != (up_bias is None):
        raise KtxError("gate and up have biases both or neither")
