"""Handles of the fused kernels (csrc/bindings_blocks.cpp), which run modules as steps of one C++ call.

The weights and options of a module, which are equal in every call, are passed once, when its step is created.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import finalize

import torch

from ktx.kernels.cpu import ops
from ktx.kernels.gradients import refuse_forward_mode, refuse_gradient


class FusedStepHandle:
    """A C++ step, created by one of the operators mla_step, gqa_step and moe_step from weights and options of a module.

    The C++ step is freed together with this object.
    """

    def __init__(self, factory: str, *args: Any):
        self.factory_args = factory, args
        self.step_id: int = getattr(ops, factory)(*args)
        finalize(self, ops.erase_step, self.step_id).atexit = False

    def __reduce__(self) -> Any:
        """Copies and pickles create a step of their own, because the identifier is valid in this process only."""
        factory, args = self.factory_args
        return FusedStepHandle, (factory, *args)


def run_steps(x: torch.Tensor, steps: Sequence[FusedStepHandle], outs: Sequence[torch.Tensor], *args: Any) -> None:
    """Runs steps one after another on x f32 [B, S, D], in one call, so that Python runs once for several modules.

    Args:
        x: the input of the first step.
        steps: the steps, one or two per output.
        outs: output tensors, shaped as x; each receives the result of its share of the steps.
        *args: the arguments of attention: the two KV cache tensors of each step that attends, the past length, cos,
            sin, ranges, mask, sequences, pages, slots.

    Raises:
        NoGradient: if autograd records x.
    """
    refuse_forward_mode(x)
    refuse_gradient("a fused call", "call the modules one by one, or under torch.no_grad()", x)
    # without attention there are no cache tensors: []
    ops.run_steps(x, outs, [step.step_id for step in steps], *(args or ([],)))
