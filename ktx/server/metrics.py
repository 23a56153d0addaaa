"""/metrics: the names of vLLM with `ktx:` before them, so that boards made for it need one replacement."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ktx.engine.request import Finished
from ktx.server.served import Served

log = logging.getLogger("ktx.server")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
STEPS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
TOKENS = tuple(2**n for n in range(18))


class Metrics:
    """What is counted when an answer ends, and what the engine is asked for when somebody looks."""

    def __init__(self, served: Served):
        self.served, self.registry = served, CollectorRegistry()
        model = served.names[0]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return Histogram(f"ktx:{name}", text, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        def counter(name: str, text: str) -> Any:
            return Counter(f"ktx:{name}", text, ["model_name"], registry=self.registry).labels(model)

        self.model = model
        self.first = histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.", SECONDS)
        self.between = histogram(
            "inter_token_latency_seconds", "Seconds between two tokens of an answer, its mean.", STEPS
        )
        self.whole = histogram("e2e_request_latency_seconds", "Seconds from arrival to the last token.", SECONDS)
        self.queued = histogram("request_queue_time_seconds", "Seconds from arrival to the first forward.", SECONDS)
        self.prefill = histogram(
            "request_prefill_time_seconds", "Seconds from the first forward to the first token.", SECONDS
        )
        self.decode = histogram("request_decode_time_seconds", "Seconds from the first token to the last.", SECONDS)
        self.asked = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.said = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of all prompts.")
        self.answer_tokens = counter("generation_tokens", "Tokens of all answers.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens of answers that were guessed.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.")
        self.ended = Counter(
            "ktx:request_success",
            "Answers by why they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.registry.register(self)

    def finished(self, event: Finished) -> None:
        """On the engine's thread, for each answer that ended."""
        usage = event.usage
        numbers = {"prompt_tokens": usage.prompt, "cached_tokens": usage.cached, "answer_tokens": usage.answer}
        seconds = {"first_token": round(usage.first_token_seconds, 3), "seconds": round(usage.seconds, 3)}
        log.info(
            "answered",
            extra={"reason": event.reason, **numbers, **seconds, "tokens_a_second": round(usage.answer_speed, 2)},
        )
        self.ended.labels(self.model, event.reason).inc()
        self.prompt_tokens.inc(usage.prompt)
        self.answer_tokens.inc(usage.answer)
        self.drafted.inc(usage.drafted)
        self.accepted.inc(usage.accepted)
        self.asked.observe(usage.prompt)
        self.said.observe(usage.answer)
        self.whole.observe(usage.seconds)
        self.queued.observe(usage.queued_seconds)
        if usage.answer:
            self.first.observe(usage.first_token_seconds)
            self.prefill.observe(usage.first_token_seconds - usage.queued_seconds)
            self.decode.observe(usage.seconds - usage.first_token_seconds)
        if usage.answer > 1:
            self.between.observe((usage.seconds - usage.first_token_seconds) / (usage.answer - 1))

    def collect(self) -> Iterator[Any]:
        """What the engine knows at this moment."""
        progress, engine = self.served.progress, self.served.engine
        yield self._gauge("model_load_bytes", "Bytes of weights read so far.", progress.done)
        yield self._gauge("model_load_total_bytes", "Bytes of weights to read.", progress.total)
        if engine is None:
            return
        scheduler, pages = engine.scheduler, engine.scheduler.pages
        yield self._gauge("num_requests_running", "Requests in a batch.", len(scheduler.running))
        yield self._gauge("num_requests_waiting", "Requests in the queue.", len(scheduler.waiting))
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the cache that running requests hold, 0 to 1.", pages.used / pages.count
        )
        yield self._counter(
            "num_preemptions", "Requests that gave their cache up for older ones.", scheduler.preemptions
        )
        yield self._counter("prefix_cache_queries", "Prompt tokens that were looked for in the cache.", scheduler.asked)
        yield self._counter("prefix_cache_hits", "Prompt tokens that were found there.", scheduler.found)
        yield self._counter("engine_steps", "Forwards of the model.", engine.steps)
        yield self._counter("engine_restarts", "Times the engine's thread was replaced.", engine.restarts)

    def _gauge(self, name: str, text: str, value: float) -> Any:
        family = GaugeMetricFamily(f"ktx:{name}", text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Any:
        family = CounterMetricFamily(f"ktx:{name}", text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def text(self) -> bytes:
        return generate_latest(self.registry)
