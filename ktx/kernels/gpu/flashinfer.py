"""FlashInfer's paged attention, with the interface of paged_attention.py and mla_decode.py.

Only `make gpu-check` tests it. FlashInfer plans on the host: `AttentionSchedule.plan` copies the lengths to the CPU,
which synchronizes once a forward and not once a layer, so a CUDA graph cannot capture a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import flashinfer
import torch

from ktx.kernels.gpu.split_kv import AttentionShape
from ktx.kernels.gradients import refuse_gpu_gradient

MLA_COLUMNS = (512, 64)  # latent and rotated columns that FlashInfer's MLA kernels support
WORKSPACE_BYTES = 128 << 20


def unsupported_reason(
    shape: AttentionShape, rope_columns: int = 0, sinks: bool = False, stored: torch.dtype = torch.bfloat16
) -> str:
    """Returns why FlashInfer cannot compute attention of this shape; "" if it can.

    Args:
        shape: heads and columns.
        rope_columns: columns of q_rope and k_rope; 0 for none.
        sinks: whether attention has sinks.
        stored: dtype of the KV cache.
    """
    if sinks:
        return "attention sinks are not supported by this wrapper"
    if shape.latent:
        fits = (shape.key_columns, rope_columns) == MLA_COLUMNS and stored in (torch.float16, torch.bfloat16)
        return (
            ""
            if fits
            else f"its MLA kernels take latents of {MLA_COLUMNS[0]} + {MLA_COLUMNS[1]} columns in float16 or bfloat16"
        )
    if rope_columns:
        return "its paged kernels do not take separate rotated columns"
    fits = (shape.key_columns, shape.value_columns) in ((64, 64), (128, 128), (256, 256))
    return "" if fits else f"its kernels do not support heads of {shape.key_columns} and {shape.value_columns} columns"


@dataclass
class Plan:
    """The sequences of a call.

    Attributes:
        schedule: the schedule that created the plan.
        queries: int32 [n + 1] on the host, the first query of each sequence and the end.
        pages: int32 [n, max pages], the pages of each sequence.
        lengths: int32 [n], number of keys of each sequence.
        window: size of the sliding window, 0 for none.
        ready: planned wrappers by scale and dtypes.
    """

    schedule: AttentionSchedule
    queries: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    window: int
    ready: dict[tuple[Any, ...], Any] = field(default_factory=dict)


class AttentionSchedule:
    """The counterpart of ktx.kernels.gpu.split_kv.AttentionSchedule.

    FlashInfer chooses its own tiles, so `tiles` is ignored. `scratch` may be that of another instance.
    """

    def __init__(
        self,
        counts: Sequence[int],
        shape: AttentionShape,
        device: torch.device | str,
        tiles: Any = None,
        scratch: torch.Tensor | None = None,
    ):
        """Stores the counts and allocates the workspace; nothing else is planned before the keys are known.

        Args:
            counts: number of new tokens of each sequence.
            shape: heads and columns.
            device: the GPU.
            tiles: ignored.
            scratch: workspace of WORKSPACE_BYTES bytes; allocated by default.
        """
        self.counts, self.shape, self.device = list(counts), shape, torch.device(device)
        self.scratch = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device) if scratch is None else scratch

    def plan(self, sequences: torch.Tensor, pages: torch.Tensor, window: int = 0) -> Plan:
        """Stores the sequences of a forward, with the interface of ktx.kernels.gpu.split_kv.AttentionSchedule.plan.

        FlashInfer itself plans in the first `attention` that uses the plan, where scale and dtypes are known.

        Raises:
            ValueError: for a sliding window with MLA.
        """
        if self.shape.latent and window:
            raise ValueError("FlashInfer's MLA has no sliding window")
        return Plan(self, _exclusive_sums(torch.tensor(self.counts)), pages, sequences[:, 2].int(), window)


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
    """As ktx.kernels.gpu.paged_attention.attention; the first layer with some scale and dtypes plans for all.

    Raises:
        ValueError: if FlashInfer does not support the shape or dtype, see `unsupported_reason`.
    """
    refuse_gpu_gradient("attention", q, k, v, sinks, q_rope, k_rope)
    if reason := unsupported_reason(
        plan.schedule.shape, 0 if q_rope is None else q_rope.shape[3], sinks is not None, k.dtype
    ):
        raise ValueError(f"FlashInfer: {reason}")
    key = (scale, softcap, q.dtype, k.dtype, k.shape[2])
    if key not in plan.ready:
        plan.ready[key] = _plan_attention(plan, q, k, scale, softcap)
    rows = q[0].transpose(0, 1).contiguous()
    result = plan.ready[key].run(rows, (k, v), k_scale=k_scale, v_scale=v_scale)[None]
    return result if out is None else out.copy_(result)


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
    """As ktx.kernels.gpu.mla_decode.mla_attention; the first layer with some scale and dtypes plans for all.

    Raises:
        ValueError: if FlashInfer does not support the shape or dtype, see `unsupported_reason`.
    """
    refuse_gpu_gradient("attention", q_nope, q_rope, ckv, kpe)
    if reason := unsupported_reason(plan.schedule.shape, kpe.shape[2], stored=ckv.dtype):
        raise ValueError(f"FlashInfer: {reason}")
    key = (scale, q_nope.dtype, ckv.dtype, ckv.shape[1])
    if key not in plan.ready:
        plan.ready[key] = _plan_mla(plan, q_nope, ckv, kpe, scale)
    rows = (x[0].transpose(0, 1).contiguous() for x in (q_nope, q_rope))
    result = plan.ready[key].run(*rows, ckv, kpe)[None]
    return result if out is None else out.copy_(result)


def _exclusive_sums(counts: torch.Tensor) -> torch.Tensor:
    """Returns the exclusive prefix sums and the total, int32 [n + 1]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()


def _list_pages(plan: Plan, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the pages of all sequences as FlashInfer takes them, one after another without padding.

    Returns:
        Start of each sequence in the list of pages (on the host), the list, and the lengths (on the host).
    """
    lengths = plan.lengths.cpu()
    num_pages = (lengths + page_size - 1) // page_size
    page_mask = torch.arange(plan.pages.shape[1], device=plan.pages.device) < num_pages.to(plan.pages.device)[:, None]
    return _exclusive_sums(num_pages), plan.pages[page_mask], lengths


def _plan_attention(plan: Plan, q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> Any:
    """Plans attention for separate keys and values, and returns the wrapper that runs it.

    FlashInfer's plan depends on scale, softcap and dtypes, which only `attention` knows, so it is made in its first
    call and stored in `Plan.ready` for the other layers.
    """
    shape, page_size = plan.schedule.shape, k.shape[2]
    page_starts, pages, lengths = _list_pages(plan, page_size)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(plan.schedule.scratch, "HND")
    wrapper.plan(
        plan.queries,
        page_starts,
        pages,
        (lengths - 1) % page_size + 1,
        shape.heads,
        shape.kv_heads,
        shape.key_columns,
        page_size,
        head_dim_vo=shape.value_columns,
        causal=True,
        sm_scale=scale,
        window_left=plan.window - 1,
        logits_soft_cap=softcap or None,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return wrapper


def _plan_mla(plan: Plan, q: torch.Tensor, ckv: torch.Tensor, kpe: torch.Tensor, scale: float) -> Any:
    """Plans attention on latents, and returns the wrapper that runs it; see `_plan_attention`."""
    page_starts, pages, lengths = _list_pages(plan, ckv.shape[1])
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(plan.schedule.scratch)
    on_device = (x.to(plan.schedule.device) for x in (plan.queries, page_starts, pages, lengths))
    wrapper.plan(
        *on_device,
        plan.schedule.shape.heads,
        ckv.shape[2],
        kpe.shape[2],
        ckv.shape[1],
        True,  # causal
        scale,
        q.dtype,
        ckv.dtype,
    )
    return wrapper
