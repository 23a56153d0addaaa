"""What operators require of the objects that other modules attach to them.

An operator computes without these objects. The modules that define them (LoRA adapters, expert deferral, expert
streaming) import the operators, so the operators name only their interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ktx.weights.lora import AdapterUse

AdapterRows = tuple[
    AdapterUse, torch.Tensor | None
]  # an adapter, and the indices of the rows that use it; None: all rows


class ExpertsAdapters(Protocol):
    """The LoRA adapters of a layer's experts, see ktx.ops.expert_lora."""

    def adapters_by_expert(
        self, tokens: torch.Tensor, num_tokens: int, per_expert: Sequence[int]
    ) -> list[list[AdapterRows]]:
        """Returns for each expert the adapters of its rows, see ktx.ops.expert_lora."""

    def add_output(
        self, projection: str, rows: torch.Tensor, expert: int, chosen: Sequence[AdapterRows], y: torch.Tensor
    ) -> torch.Tensor:
        """Adds the adapters' outputs to the output y [rows, n] of one expert's projection."""


class MLAAdapters(Protocol):
    """The LoRA adapters of a kv_b_proj in one call, see ktx.ops.latent_lora."""

    def queries(self, q: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Returns `base` [H, rows, rank] plus the adapters' part of the absorbed queries q [H, rows, nope]."""

    def values(self, context: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Returns `base` [H, rows, v] plus the adapters' part of the values from context [H, rows, rank]."""

    def expanded(
        self, latent: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns k [keys, heads * nope] and v [keys, heads * v] of some heads plus the adapters' part."""


class MLALora(Protocol):
    """The LoRA adapters of a kv_b_proj, by rows of a step."""

    def of_sequence(self, row: int) -> MLAAdapters | None:
        """Returns the adapters for tokens of the sequence that has row `row` of the step; None if there are none."""

    def of_rows(self, row_indices: torch.Tensor) -> MLAAdapters | None:
        """Returns the adapters for rows of the step, given by ascending indices; None if there are none."""


class ExpertDeferral(Protocol):
    """Adds part of the experts' outputs one layer later, see ktx.ops.expert_deferral."""

    def routed_and_shared(
        self, owner: Any, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes the MoE layer with deferral: flat [tokens, D] with ids and weights [tokens, K] -> [tokens, D]."""


class ExpertStreamer(Protocol):
    """Computes experts of the CPU's memory on a GPU, see ktx.ops.gpu.expert_streaming."""

    def __call__(self, experts: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Computes hidden [tokens, D] with ids and weights [tokens, K], all on the device; returns [tokens, D]."""
