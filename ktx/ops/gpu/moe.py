"""The MoE block on a GPU, with its experts on the GPU, in CPU memory, or split between both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ktx.ops import experts, moe
from ktx.ops.base import Context
from ktx.ops.gpu import padding
from ktx.ops.gpu.experts import Experts
from ktx.ops.gpu.offload import ExpertOffload, Pending, install
from ktx.ops.guard import ChildrenGuard
from ktx.ops.protocols import ExpertStreamer


class PendingMoE(NamedTuple):
    """Routed experts in flight: the output [tokens, D] of those on the GPU, and the pending job of those on the CPU."""

    gpu_output: torch.Tensor | None
    cpu_job: Pending | None


class MoE(moe.MoE):
    """GPU version of ktx.ops.moe.MoE.

    The CPU computes its experts while the device computes its own and the shared experts.
    """

    offload: ExpertOffload | None
    streamer: ExpertStreamer | None  # see ktx.ops.gpu.expert_streaming
    stream_min_tokens: int  # minimum number of tokens to stream experts for

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> moe.MoE:
        """Builds the operator; offload and streamer are installed when the model is loaded."""
        new = super().from_hf(old, ctx, **kwargs)
        new.offload = new.streamer = None
        return new

    def ready(self) -> None:
        """Builds the guard of the children, and no fused step: those are for the CPU."""
        self.inside = ChildrenGuard.of(self)

    def children_observed(self) -> bool:
        """Whether a module inside has a hook or was replaced; never with offloaded experts."""
        return self.offload is None and super().children_observed()

    @property
    def experts_on_cpu(self) -> bool:
        """Whether the experts are in CPU memory."""
        return isinstance(self.experts, experts.Experts) and not isinstance(self.experts, Experts)

    def start_experts(self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        """Starts the routed experts: those in CPU memory, on the CPU or streamed to the GPU, and those on the GPU.

        Returns:
            A PendingMoE for `finish_experts`; without offload, what the base class returns.
        """
        if self.offload is None:
            return super().start_experts(flat, ids, weights)
        gpu_experts, pending, streamed = self.experts.on_gpu, None, None
        if self.should_stream(flat):
            assert self.streamer is not None
            streamed = self.streamer(self.experts, flat, ids, weights)
        elif self.experts.num_experts:
            pending = self.offload.submit(self.experts, flat, ids, weights)
        gpu_output = None if gpu_experts is None else gpu_experts(flat, ids, weights)
        if streamed is not None:
            gpu_output = streamed if gpu_output is None else streamed + gpu_output
        return PendingMoE(gpu_output, pending)

    def should_stream(self, flat: torch.Tensor) -> bool:
        """Whether to stream the CPU's experts to the GPU for these tokens.

        Never if the experts have forward hooks, which must run, nor in a step captured as a CUDA graph, because a
        graph cannot depend on which chunk is resident.
        """
        if self.streamer is None or len(flat) < self.stream_min_tokens or padding.num_tokens() is not None:
            return False
        return not (self.experts._forward_hooks or self.experts._forward_pre_hooks)

    def finish_experts(self, started: Any) -> torch.Tensor:
        """Waits for the experts on the CPU, and adds their output to that of the GPU; [tokens, D]."""
        if self.offload is None:
            return super().finish_experts(started)
        gpu_output, cpu_job = started
        if cpu_job is None:
            return gpu_output
        cpu_output = self.offload.result(cpu_job)
        return cpu_output if gpu_output is None else cpu_output + gpu_output


def install_offload(model: Any) -> None:
    """Installs expert offload on all MoE blocks of a model whose experts are in CPU memory. Call it after `ready`."""
    install(model, [module for module in model.modules() if isinstance(module, MoE) and module.experts_on_cpu])
