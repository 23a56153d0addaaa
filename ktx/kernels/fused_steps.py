"""Modules made into steps of the block kernels (csrc/bindings_blocks.cpp): what is the same at every call is handed over once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import finalize

import torch

from ktx.kernels.cpu import ops
from ktx.kernels.gradients import backward_only, refuse


class FusedStepHandle:
    """What `mla_step`, `gqa_step` or `moe_step` made of a module's weights and style; it is forgotten with the object."""

    def __init__(self, make: str, *args: Any):
        self.made = make, args
        self.number: int = getattr(ops, make)(*args)
        finalize(self, ops.forget_step, self.number).atexit = False

    def __reduce__(self) -> Any:  # a copy has a number of its own
        make, args = self.made
        return FusedStepHandle, (make, *args)


def run(x: torch.Tensor, steps: Sequence[FusedStepHandle], outs: Sequence[torch.Tensor], *args: Any) -> None:
    """Steps one after another on x f32 [B, S, D]; each of `outs`, shaped as x, gets the result of as many of them, one or two.

    What follows is what attention needs: of each step that attends the two tensors of its cache, positions in it, cos, sin, ranges, mask,
    sequences, pages, slots.
    """
    backward_only(x)
    refuse("a fused call", "call the modules one by one, or under torch.no_grad()", x)
    ops.run_steps(x, outs, [step.number for step in steps], *(args or ([],)))
