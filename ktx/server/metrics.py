"""Prometheus metrics for /metrics.

The names are vLLM's with the prefix `ktx:`, so that a dashboard for vLLM needs one replacement.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ktx.engine.engine import Engine
from ktx.engine.request import Finished
from ktx.engine.stats import StatsSnapshot
from ktx.server.state import ServerState

log = logging.getLogger("ktx.server")
LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
TOKEN_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
TOKEN_BUCKETS = tuple(2**n for n in range(18))


class Metrics:
    """The server's metrics: counters that `finished` updates, and values that `collect` reads from the engine.

    Args:
        state: the server's state; its engine may be None when a metric is read.
    """

    def __init__(self, state: ServerState):
        self.state, self.registry = state, CollectorRegistry()
        model = state.names.first

        # These are registered once and updated by `finished`; `collect` creates the others when /metrics is read.
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"ktx:{name}", text, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"ktx:{name}", text, ["model_name"], registry=self.registry).labels(model)

        self.model = model
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Seconds from arrival to the first token.", LATENCY_BUCKETS_S
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds",
            "Mean seconds between two output tokens of a request.",
            TOKEN_LATENCY_BUCKETS_S,
        )
        self.request_latency = histogram(
            "e2e_request_latency_seconds", "Seconds from arrival to the last token.", LATENCY_BUCKETS_S
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "Seconds from arrival to the first forward.", LATENCY_BUCKETS_S
        )
        self.prefill_time = histogram(
            "request_prefill_time_seconds", "Seconds from the first forward to the first token.", LATENCY_BUCKETS_S
        )
        self.decode_time = histogram(
            "request_decode_time_seconds", "Seconds from the first token to the last.", LATENCY_BUCKETS_S
        )
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens per request.", TOKEN_BUCKETS)
        self.output_length = histogram("request_generation_tokens", "Output tokens per request.", TOKEN_BUCKETS)
        self.prompt_tokens = counter("prompt_tokens", "Number of prompt tokens.")
        self.output_tokens = counter("generation_tokens", "Number of output tokens.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens that were verified.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
        self.request_success = Counter(
            "ktx:request_success",
            "Finished requests by finish reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.last_stats: StatsSnapshot | None = None  # of the previous collection
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def record_finished(self, event: Finished) -> None:
        """Counts and logs a finished request, its tokens and its times. The engine's thread calls it."""
        usage = event.usage
        token_counts = {"prompt_tokens": usage.prompt, "cached_tokens": usage.cached, "answer_tokens": usage.answer}
        durations = {"first_token": round(usage.first_token_seconds, 3), "seconds": round(usage.seconds, 3)}
        log.info(
            "answered",
            extra={
                "reason": event.reason,
                **token_counts,
                **durations,
                "tokens_a_second": round(usage.output_tokens_per_s, 2),
            },
        )
        self.request_success.labels(self.model, event.reason).inc()
        self.prompt_tokens.inc(usage.prompt)
        self.output_tokens.inc(usage.answer)
        self.draft_tokens.inc(usage.drafted)
        self.accepted_tokens.inc(usage.accepted)
        self.prompt_length.observe(usage.prompt)
        self.output_length.observe(usage.answer)
        self.request_latency.observe(usage.seconds)
        self.queue_time.observe(usage.queued_seconds)
        if usage.answer:
            self.time_to_first_token.observe(usage.first_token_seconds)
            self.prefill_time.observe(usage.first_token_seconds - usage.queued_seconds)
            self.decode_time.observe(usage.seconds - usage.first_token_seconds)
        if usage.answer > 1:
            self.inter_token_latency.observe((usage.seconds - usage.first_token_seconds) / (usage.answer - 1))

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics that are read from the engine at collection time; the registry calls it for /metrics."""
        progress, engine = self.state.progress, self.state.engine
        yield self._make_gauge("model_load_bytes", "Bytes of weights read so far.", progress.done)
        yield self._make_gauge("model_load_total_bytes", "Bytes of weights to read.", progress.total)
        if engine is None:
            return
        scheduler, pages = engine.scheduler, engine.scheduler.pages
        yield self._make_gauge("num_requests_running", "Requests in the batch.", len(scheduler.running))
        yield self._make_gauge("num_requests_waiting", "Requests in the queue.", len(scheduler.waiting))
        yield self._make_gauge(
            "kv_cache_usage_perc",
            "Fraction of the KV cache that running requests use, 0 to 1.",
            pages.used / pages.count,
        )
        yield self._make_counter(
            "num_preemptions", "Preempted requests: their KV cache was freed for older ones.", scheduler.preemptions
        )
        yield self._make_counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.", scheduler.prefix_queries
        )
        yield self._make_counter(
            "prefix_cache_hits", "Prompt tokens that were found in the prefix cache.", scheduler.prefix_hits
        )
        yield from self._collect_budget(engine)
        yield self._make_counter("engine_steps", "Forward passes of the model.", engine.steps)
        yield self._make_counter("engine_restarts", "Restarts of the engine's thread.", engine.num_restarts)
        yield from self._collect_stats(engine)

    def _collect_budget(self, engine: Engine) -> Iterator[Metric]:
        """Yields the prefill budget and the speed of the latest prefill step, without and with decoding requests."""
        # the label `answers` -> whether requests decode in the step
        budget, labels = engine.budget, {"none": False, "some": True}
        latest = {label: budget.latest[decoding] for label, decoding in labels.items() if decoding in budget.latest}
        yield self._make_gauge(
            "max_num_batched_tokens",
            "Max prompt tokens per step, by whether requests decode in the same step.",
            {label: budget.max_prompt_tokens(decoding=decoding) for label, decoding in labels.items()},
            "answers",
        )
        yield self._make_gauge("max_itl_seconds", "Max seconds of a step in which requests decode.", budget.target_s)
        yield self._make_gauge(
            "prefill_tokens_per_second",
            "Prompt tokens per second in the latest prefill step.",
            {label: prefill.rate for label, prefill in latest.items()},
            "answers",
        )
        yield self._make_gauge(
            "prefill_step_seconds",
            "Seconds of the forward pass of the latest prefill step.",
            {label: prefill.seconds for label, prefill in latest.items()},
            "answers",
        )

    def _collect_stats(self, engine: Engine) -> Iterator[Metric]:
        """Yields memory, bandwidth and expert statistics of the engine."""
        stats, bandwidth = engine.stats.snapshot(), self.state.bandwidth
        node_seconds = {str(node): seconds for node, seconds in enumerate(stats.node_seconds)}
        yield self._make_gauge("kv_cache_bytes", "Memory of the KV cache.", engine.runner.nbytes())
        yield self._make_counter("forward_seconds", "Seconds of forward passes.", stats.seconds)
        yield self._make_counter("weight_bytes_read", "Bytes of packed weights read by forward passes.", stats.nbytes)
        yield self._make_counter(
            "expert_bytes_read", "Bytes of packed expert weights read by forward passes.", stats.expert_bytes
        )
        yield self._make_counter(
            "expert_seconds", "Mean seconds that the threads of a NUMA node computed experts.", node_seconds, "node"
        )
        yield self._make_counter("gpu_wait_seconds", "Seconds that the CPU waited for a GPU.", stats.gpu_wait_s)
        activations = {str(layer): sum(counts) for layer, counts in stats.layers.items()}
        imbalances = {str(layer): imbalance(counts) for layer, counts in stats.layers.items()}
        yield self._make_counter(
            "expert_activations",
            "Number of expert activations (one per token and routed expert).",
            activations,
            "layer",
        )
        yield self._make_gauge(
            "expert_imbalance",
            "Activations of the most used expert divided by the mean of its layer.",
            imbalances,
            "layer",
        )
        if bandwidth is not None:
            yield self._make_gauge(
                "bandwidth_measured_bytes_per_second", "Memory read bandwidth measured at the start.", bandwidth * 1e9
            )
            yield self._make_gauge(
                "bandwidth_used_ratio",
                "Weight bytes read per second of forward pass over the measured bandwidth, since the last collection.",
                self._bytes_per_second(stats) / bandwidth / 1e9,
            )
        self.last_stats = stats

    def _bytes_per_second(self, stats: StatsSnapshot) -> float:
        """Returns the weight bytes read per second of forward passes since the last collection; 0 without any."""
        last_bytes, last_seconds = (self.last_stats.nbytes, self.last_stats.seconds) if self.last_stats else (0, 0.0)
        return (stats.nbytes - last_bytes) / (stats.seconds - last_seconds) if stats.seconds > last_seconds else 0.0

    def _make_gauge(self, name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
        return self._make_family(GaugeMetricFamily, name, text, value, label)

    def _make_counter(self, name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
        return self._make_family(CounterMetricFamily, name, text, value, label)

    def _make_family(
        self,
        family_class: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        value: float | Mapping[str, float],
        label: str,
    ) -> Metric:
        """Returns a metric with one value, or with one value per label value if `value` is a mapping."""
        family = family_class(f"ktx:{name}", text, labels=["model_name", label] if label else ["model_name"])
        for label_value, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            family.add_metric([self.model, label_value] if label else [self.model], number)
        return family

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def imbalance(counts: Sequence[int]) -> float:
    """Returns the highest count divided by the mean count; 1 if all counts are 0."""
    return max(counts) * len(counts) / sum(counts) if any(counts) else 1.0
