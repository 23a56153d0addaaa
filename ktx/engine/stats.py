"""Counters of an engine's forwards. They only grow; the engine's thread adds to them, any thread may read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktx.injection.inject import layer_number
from ktx.kernels.cpu import ExpertStats
from ktx.ops.experts import experts_by_path
from ktx.ops.weight_traffic import WeightTraffic
from ktx.utils.deprecation import deprecated_members

if TYPE_CHECKING:
    from ktx.model.loaded import LoadedModel


@deprecated_members(gpu_wait_seconds="gpu_wait_s")
@dataclass(frozen=True)
class StatsSnapshot:
    """Counters since the engine's start: bytes of weights read, seconds of forwards, and the experts' part of both.

    `layers` holds for each layer how often each expert was selected; `node_seconds` holds for each NUMA node the
    seconds that its threads computed experts, on average.
    """

    nbytes: int
    seconds: float
    expert_bytes: int
    expert_seconds: float
    gpu_wait_s: float
    node_seconds: tuple[float, ...]
    layers: dict[int, tuple[int, ...]]
    prompt_tokens: int  # computed, without those from the prefix cache
    answer_tokens: int


@deprecated_members(done="snapshot")
class EngineStats:
    """Counts from its creation on."""

    def __init__(self, model: LoadedModel):
        """Finds the experts of the model and reads their counters, which `snapshot` subtracts."""
        self.weight_traffic = WeightTraffic.from_model(model)
        modules = experts_by_path(model)
        layers = [layer_number(path) for path, _ in modules]
        # (layer, experts); experts whose path has no layer number are counted by their index
        self.experts = [
            (index if layer is None else layer, module)
            for index, (layer, (_, module)) in enumerate(zip(layers, modules, strict=True))
        ]
        # the experts' counters belong to the model: what they counted before this engine is subtracted
        self.baseline = [(module.total_counts(), module.wait_s) for _, module in self.experts]
        self.nbytes, self.seconds = 0, 0.0
        self.prompt_tokens = self.answer_tokens = 0

    @contextmanager
    def forward(self, forwards: int, tokens: int, logit_forwards: int) -> Iterator[None]:
        """Context around a step's forwards. A forward that fails adds its time, and only the bytes of its experts.

        Args:
            forwards: number of the step's forwards.
            tokens: number of their tokens.
            logit_forwards: number of the forwards that compute logits.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
        self.nbytes += self.weight_traffic.bytes(forwards, tokens, logit_forwards)

    def snapshot(self) -> StatsSnapshot:
        """Returns the counters from this engine's start up to now. Any thread may call it."""
        # ((layer, experts), (their counts, their seconds of waiting, at this engine's start))
        modules = list(zip(self.experts, self.baseline, strict=True))
        experts = [ExpertStats.read(module.total_counts() - start_counts) for (_, module), (start_counts, _) in modules]
        waited_s = sum(module.wait_s - start_wait_s for (_, module), (_, start_wait_s) in modules)
        expert_bytes = sum(stats.nbytes for stats in experts)
        return StatsSnapshot(
            nbytes=self.nbytes + expert_bytes,
            seconds=self.seconds,
            expert_bytes=expert_bytes,
            expert_seconds=sum(stats.seconds for stats in experts),
            gpu_wait_s=waited_s,
            node_seconds=tuple(map(sum, zip(*(stats.node_seconds for stats in experts), strict=True))),
            layers={layer: stats.activations for (layer, _), stats in zip(self.experts, experts, strict=True)},
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
        )
