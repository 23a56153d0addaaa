"""Expert deferral: the output of a token's experts with the lowest routing weights is added one layer later.

In hybrid placement the CPU computes these experts while the GPU computes the next layer's attention, so neither side
waits for the other. The result differs from the function that the model was trained to compute, so deferral is off by
default; the last layer defers nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.ops.moe import MoE


@dataclass
class DeferredExperts:
    """A layer's link in the chain of deferred experts.

    Attributes:
        count: number of experts of each token that this layer defers.
        previous: the previous link, whose deferred output this layer adds; None for the first layer.
        chain: all links.
        pending_output: waits for this layer's deferred output and returns it, on the device of this layer.
    """

    count: int
    previous: DeferredExperts | None
    chain: list[DeferredExperts] = field(repr=False)
    pending_output: Callable[[], torch.Tensor] | None = None

    def routed_and_shared(
        self, owner: MoE, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes the MoE layer with deferral: flat [tokens, D] with ids and weights [tokens, K] -> [tokens, D].

        The output is the sum of the experts with the highest weights, the shared experts, and the deferred output of
        the previous layer; the experts with the lowest weights are started for the next layer to add.
        """
        if self.previous is None:
            for link in self.chain:  # left over from a forward that was aborted between two layers
                link.pending_output = None
        order = torch.sort(weights, dim=-1, descending=True, stable=True).indices
        immediate, deferred = order.split([ids.shape[1] - self.count, self.count], -1)
        started = owner.start_experts(flat, ids.gather(1, immediate), weights.gather(1, immediate))
        parts = [owner.shared_output(flat)]
        if self.previous is not None:
            wait_for_deferred, self.previous.pending_output = self.previous.pending_output, None
            assert wait_for_deferred is not None  # layers run in order
            parts.append(wait_for_deferred().to(flat))
        if self.count:
            self.pending_output = partial(
                owner.finish_experts, owner.start_experts(flat, ids.gather(1, deferred), weights.gather(1, deferred))
            )
        out = owner.finish_experts(started)
        for part in parts:
            out = out if part is None else out + part
        return out


def install_deferral(model: Any, count: int) -> None:
    """Makes every MoE layer except the last defer `count` experts of each token. Call it before the model is loaded.

    Raises:
        UsageError: no expert would be left, or there are not two MoE layers.
    """
    top_k = int(getattr(model.config, "num_experts_per_tok", 0) or 0)
    layers = model.get_decoder().layers[: model.config.num_hidden_layers]  # MTP layers may follow
    blocks = [module for module in layers.modules() if isinstance(module, MoE)]
    if not top_k or len(blocks) < 2:
        raise UsageError(
            f"defer_experts={count}: {model.config.model_type} has fewer than two MoE layers that the rules replace"
            " with MoE operators"
        )
    if not 0 < count < top_k:
        raise UsageError(
            f"defer_experts={count}: must be 0 to {top_k - 1}, one less than the number of experts per token"
        )
    chain: list[DeferredExperts] = []
    for block in blocks:
        is_last = block is blocks[-1]
        chain.append(DeferredExperts(0 if is_last else count, chain[-1] if chain else None, chain))
        block.deferral = chain[-1]
