"""What operators require of the objects that other modules attach to them.

An operator computes without these objects. The modules that define them (LoRA adapters, expert deferral, expert
streaming) import the operators, so the operators name only their interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ktx.ops.lora import AdapterUse

AdapterRows = tuple[
    AdapterUse, torch.Tensor | None
]  # an adapter, and the indices of the rows that use it; None: all rows


class ExpertsAdapters(Protocol):
    """The LoRA adapters of a layer's experts, see ktx.ops.expert_lora."""

    def adapters_by_expert(
        self, tokens: torch.Tensor, count: int, per_expert: Sequence[int]
    ) -> list[list[AdapterRows]]: ...

    def add_output(
        self, half: str, rows: torch.Tensor, expert: int, chosen: Sequence[AdapterRows], y: torch.Tensor
    ) -> torch.Tensor: ...


class MLAAdapters(Protocol):
    """The LoRA adapters of a kv_b_proj in one call, see ktx.ops.latent_lora."""

    def queries(self, q: torch.Tensor, base: torch.Tensor) -> torch.Tensor: ...

    def values(self, context: torch.Tensor, base: torch.Tensor) -> torch.Tensor: ...

    def expanded(
        self, latent: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: range
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class MLALora(Protocol):
    """The LoRA adapters of a kv_b_proj, by rows of a step."""

    def of_sequence(self, row: int) -> MLAAdapters | None: ...

    def of_rows(self, row_indices: torch.Tensor) -> MLAAdapters | None: ...


class ExpertDeferral(Protocol):
    """Adds part of the experts' outputs one layer later, see ktx.ops.expert_deferral."""

    def routed_and_shared(
        self, owner: Any, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...


class ExpertStreamer(Protocol):
    """Computes experts of the CPU's memory on a GPU, see ktx.ops.gpu.expert_streaming."""

    def __call__(
        self, experts: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...
