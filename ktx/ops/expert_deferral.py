"""Expert deferral: what the experts that weigh least for a token make of it is added one layer later.

In a hybrid the CPU then computes them while the GPU is at the next layer's attention, and neither side waits for the other. The model computes
something else than it was trained to, so it is off unless asked for; the last layer defers nothing.
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
    """A layer's place in the chain: it puts off `count` experts of each token, and adds what the layer `before` put off."""

    count: int
    before: DeferredExperts | None
    chain: list[DeferredExperts] = field(repr=False)
    left: Callable[[], torch.Tensor] | None = (
        None  # gives what is under way for the next layer, which may lie elsewhere
    )

    def mixed(self, owner: MoE, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As MoE.mixed, for flat [tokens, D]."""
        if self.before is None:
            for link in self.chain:  # of a forward that was given up between two layers
                link.left = None
        order = torch.sort(weights, dim=-1, descending=True, stable=True).indices
        first, last = order.split([ids.shape[1] - self.count, self.count], -1)
        under_way = owner.begin(flat, ids.gather(1, first), weights.gather(1, first))
        parts = [owner.shared(flat)]
        if self.before is not None:
            ended, self.before.left = self.before.left, None
            assert ended is not None  # layers come in turn
            parts.append(ended().to(flat))
        if self.count:
            self.left = partial(owner.end, owner.begin(flat, ids.gather(1, last), weights.gather(1, last)))
        out = owner.end(under_way)
        for part in parts:
            out = out if part is None else out + part
        return out


def install(model: Any, count: int) -> None:
    """Lets every layer but the last put off `count` experts of a token, before the model is loaded. UsageError where that leaves none, or there are no layers for it."""
    top = int(getattr(model.config, "num_experts_per_tok", 0) or 0)
    layers = model.get_decoder().layers[: model.config.num_hidden_layers]  # behind them may be one that guesses tokens
    blocks = [module for module in layers.modules() if isinstance(module, MoE)]
    if not top or len(blocks) < 2:
        raise UsageError(
            f"defer_experts={count}: {model.config.model_type} has no two layers of experts that the rules make a MoE of"
        )
    if not 0 < count < top:
        raise UsageError(f"defer_experts={count}: must be 0 to {top - 1}, one less than the experts of a token")
    chain: list[DeferredExperts] = []
    for block in blocks:
        last = block is blocks[-1]
        chain.append(DeferredExperts(0 if last else count, chain[-1] if chain else None, chain))
        block.link = chain[-1]
