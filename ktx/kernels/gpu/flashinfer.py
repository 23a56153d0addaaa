"""FlashInfer's attention on pages behind the names of ktx.kernels.gpu.paged_attention and ktx.kernels.gpu.mla_decode; checked by `make gpu-check` alone.

FlashInfer plans on the host: `Work.plan` fetches the lengths (one wait a forward, none a layer), so a plan cannot be inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import flashinfer
import torch

from ktx.kernels.gpu.split_kv import Shape
from ktx.kernels.gradients import none_on_gpu

LATENT = (512, 64)  # columns of a latent and of its rotated part that FlashInfer has kernels for
WORKSPACE = 128 << 20


def refusal(shape: Shape, rope_columns: int = 0, sinks: bool = False, stored: torch.dtype = torch.bfloat16) -> str:
    """Why FlashInfer cannot do this; empty if it can."""
    if sinks:
        return "attention sinks are not among what this wrapper passes on"
    if shape.latent:
        fits = (shape.key_columns, rope_columns) == LATENT and stored in (torch.float16, torch.bfloat16)
        return "" if fits else f"its MLA kernels take latents of {LATENT[0]} + {LATENT[1]} columns in f16 or bf16"
    if rope_columns:
        return "its kernels on pages take keys in one piece"
    fits = (shape.key_columns, shape.value_columns) in ((64, 64), (128, 128), (256, 256))
    return "" if fits else f"its kernels take no heads of {shape.key_columns} and {shape.value_columns} columns"


@dataclass
class Plan:
    """Where the tokens (`queries`: sums of their counts, on the host) and pages of each sequence lie; `ready` keeps a planned wrapper for each scale and type."""

    work: Work
    queries: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    window: int
    ready: dict[tuple[Any, ...], Any] = field(default_factory=dict)


class Work:
    """As ktx.kernels.gpu.split_kv.Work; tiles are FlashInfer's own, and `scratch` may be that of another Work."""

    def __init__(
        self,
        counts: Sequence[int],
        shape: Shape,
        device: torch.device | str,
        tiles: Any = None,
        scratch: torch.Tensor | None = None,
    ):
        self.counts, self.shape, self.device = list(counts), shape, torch.device(device)
        self.scratch = torch.empty(WORKSPACE, dtype=torch.uint8, device=device) if scratch is None else scratch

    def plan(self, sequences: torch.Tensor, pages: torch.Tensor, window: int = 0) -> Plan:
        """As ktx.kernels.gpu.split_kv.Work.plan; waits for the device."""
        if self.shape.latent and window:
            raise ValueError("FlashInfer's MLA has no sliding window")
        return Plan(self, _sums(torch.tensor(self.counts)), pages, sequences[:, 2].int(), window)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ktx.kernels.gpu.paged_attention.attention, for what `refusal` has no objection to."""
    none_on_gpu("attention", q, k, v, sinks, q_rope, k_rope)
    if reason := refusal(plan.work.shape, 0 if q_rope is None else q_rope.shape[3], sinks is not None, k.dtype):
        raise ValueError(f"FlashInfer: {reason}")
    key = (scale, softcap, q.dtype, k.dtype, k.shape[2])
    if key not in plan.ready:
        plan.ready[key] = _heads(plan, q, k, scale, softcap)
    rows = q[0].transpose(0, 1).contiguous()
    done = plan.ready[key].run(rows, (k, v), k_scale=k_scale, v_scale=v_scale)[None]
    return done if out is None else out.copy_(done)


def mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    plan: Plan,
    scale: float,
    kv_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ktx.kernels.gpu.mla_decode.mla_attention, for what `refusal` has no objection to."""
    none_on_gpu("attention", q_nope, q_rope, ckv, kpe)
    if reason := refusal(plan.work.shape, kpe.shape[2], stored=ckv.dtype):
        raise ValueError(f"FlashInfer: {reason}")
    key = (scale, q_nope.dtype, ckv.dtype, ckv.shape[1])
    if key not in plan.ready:
        plan.ready[key] = _latent(plan, q_nope, ckv, kpe, scale)
    rows = (x[0].transpose(0, 1).contiguous() for x in (q_nope, q_rope))
    done = plan.ready[key].run(*rows, ckv, kpe)[None]
    return done if out is None else out.copy_(done)


def _sums(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()


def _pages(plan: Plan, page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each sequence's pages begin in one list, the list, and the lengths: the first and the last on the host."""
    lengths = plan.lengths.cpu()
    need = (lengths + page - 1) // page
    wanted = torch.arange(plan.pages.shape[1], device=plan.pages.device) < need.to(plan.pages.device)[:, None]
    return _sums(need), plan.pages[wanted], lengths


def _heads(plan: Plan, q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> Any:
    shape, page = plan.work.shape, k.shape[2]
    begins, pages, lengths = _pages(plan, page)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(plan.work.scratch, "HND")
    wrapper.plan(
        plan.queries,
        begins,
        pages,
        (lengths - 1) % page + 1,
        shape.heads,
        shape.kv_heads,
        shape.key_columns,
        page,
        head_dim_vo=shape.value_columns,
        causal=True,
        sm_scale=scale,
        window_left=plan.window - 1,
        logits_soft_cap=softcap or None,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return wrapper


def _latent(plan: Plan, q: torch.Tensor, ckv: torch.Tensor, kpe: torch.Tensor, scale: float) -> Any:
    begins, pages, lengths = _pages(plan, ckv.shape[1])
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(plan.work.scratch)
    on_device = (x.to(plan.work.device) for x in (plan.queries, begins, pages, lengths))
    wrapper.plan(
        *on_device,
        plan.work.shape.heads,
        ckv.shape[2],
        kpe.shape[2],
        ckv.shape[1],
        True,
        scale,
        q.dtype,
        ckv.dtype,
    )
    return wrapper
