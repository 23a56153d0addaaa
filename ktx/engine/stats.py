"""What an engine's forwards have done: numbers that only grow. The engine's thread adds to them, any thread may read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktx.injection.inject import layer_of
from ktx.kernels.cpu import ExpertStats
from ktx.ops.experts import of_layers
from ktx.ops.weight_traffic import WeightTraffic


@dataclass(frozen=True)
class StatsSnapshot:
    """Since the engine began: bytes of weights read and seconds of forwards, and what of both was experts'.

    `layers` holds by layer how often each expert was chosen; `node_seconds` what each memory node's threads worked for experts, on average.
    """

    nbytes: int
    seconds: float
    expert_bytes: int
    expert_seconds: float
    gpu_wait_seconds: float
    node_seconds: tuple[float, ...]
    layers: dict[int, tuple[int, ...]]
    prompt_tokens: int  # computed
    answer_tokens: int


class EngineStats:
    """Counts from now on. A model that is none, as a script's, has no experts and reads nothing."""

    def __init__(self, model: Any):
        real = isinstance(model, nn.Module)
        self.reads = WeightTraffic.of(model) if real else WeightTraffic()
        modules = of_layers(model) if real else []
        layers = [layer_of(path) for path, _ in modules]
        self.experts = [
            (place if layer is None else layer, module)
            for place, (layer, (_, module)) in enumerate(zip(layers, modules, strict=True))
        ]
        self.before = [(module.counted(), module.waited) for _, module in self.experts]
        self.nbytes, self.seconds = 0, 0.0
        self.prompt_tokens = self.answer_tokens = 0

    @contextmanager
    def forward(self, forwards: int, tokens: int, heads: int) -> Iterator[None]:
        """Around a step's forwards; `heads` of them make logits. One that fails takes its time, and reads but what its experts did."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
        self.nbytes += self.reads.bytes(forwards, tokens, heads)

    def snapshot(self) -> StatsSnapshot:
        pairs = list(zip(self.experts, self.before, strict=True))
        experts = [ExpertStats.read(module.counted() - before) for (_, module), (before, _) in pairs]
        waited = sum(module.waited - before for (_, module), (_, before) in pairs)
        read = sum(one.nbytes for one in experts)
        return StatsSnapshot(
            nbytes=self.nbytes + read,
            seconds=self.seconds,
            expert_bytes=read,
            expert_seconds=sum(one.seconds for one in experts),
            gpu_wait_seconds=waited,
            node_seconds=tuple(map(sum, zip(*(one.node_seconds for one in experts), strict=True))),
            layers={layer: one.activations for (layer, _), one in zip(self.experts, experts, strict=True)},
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
        )
