"""/metrics: the names of vLLM with `ktx:` before them, so that boards made for it need one replacement."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ktx.engine.engine import Engine
from ktx.engine.request import Finished
from ktx.engine.stats import StatsSnapshot
from ktx.server.state import ServerState

log = logging.getLogger("ktx.server")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
STEPS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
TOKENS = tuple(2**n for n in range(18))


class Metrics:
    """What is counted when an answer ends, and what the engine is asked for when somebody looks."""

    def __init__(self, state: ServerState):
        self.state, self.registry = state, CollectorRegistry()
        model = state.names[0]

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
        self.last: StatsSnapshot | None = None  # at the last look
        ProcessCollector(registry=self.registry)
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
        progress, engine = self.state.progress, self.state.engine
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
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens that were looked for in the cache.", scheduler.prefix_queries
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens that were found there.", scheduler.prefix_hits)
        yield from self._steps(engine)
        yield self._counter("engine_steps", "Forwards of the model.", engine.steps)
        yield self._counter("engine_restarts", "Times the engine's thread was replaced.", engine.restarts)
        yield from self._activity(engine)

    def _steps(self, engine: Engine) -> Iterator[Any]:
        """How large a step with prompts may be, and how fast the latest one was, alone and beside answers."""
        budget, kinds = engine.budget, {"none": False, "some": True}
        latest = {word: budget.latest[answers] for word, answers in kinds.items() if answers in budget.latest}
        yield self._gauge(
            "max_num_batched_tokens",
            "Tokens of prompts that a step may compute, by whether answers go on in it.",
            {word: budget.tokens(answers=answers) for word, answers in kinds.items()},
            "answers",
        )
        yield self._gauge("max_itl_seconds", "Seconds that a step with answers may take.", budget.seconds)
        yield self._gauge(
            "prefill_tokens_per_second",
            "Tokens of prompts a second in the latest step that computed some.",
            {word: took.rate for word, took in latest.items()},
            "answers",
        )
        yield self._gauge(
            "prefill_step_seconds",
            "Seconds of that step's forward.",
            {word: took.seconds for word, took in latest.items()},
            "answers",
        )

    def _activity(self, engine: Engine) -> Iterator[Any]:
        """What the machine did for it."""
        done, measured = engine.activity.snapshot(), self.state.bandwidth
        nodes = {str(node): seconds for node, seconds in enumerate(done.node_seconds)}
        yield self._gauge("kv_cache_bytes", "Memory of all keys and values.", engine.runner.nbytes())
        yield self._counter("forward_seconds", "Seconds of forwards.", done.seconds)
        yield self._counter("weight_bytes_read", "Packed bytes that forwards read.", done.nbytes)
        yield self._counter("expert_bytes_read", "Those of experts.", done.expert_bytes)
        yield self._counter(
            "expert_seconds", "Seconds of a memory node's threads in experts, on average.", nodes, "node"
        )
        yield self._counter("gpu_wait_seconds", "Seconds the CPU waited for a GPU.", done.gpu_wait_seconds)
        chosen = {str(layer): sum(counts) for layer, counts in done.layers.items()}
        shares = {str(layer): imbalance(counts) for layer, counts in done.layers.items()}
        yield self._counter("expert_activations", "Times that a token chose an expert.", chosen, "layer")
        yield self._gauge(
            "expert_imbalance", "The most chosen expert's activations over the mean of its layer.", shares, "layer"
        )
        if measured is not None:
            yield self._gauge("bandwidth_measured_bytes_per_second", "Read from memory at the start.", measured * 1e9)
            yield self._gauge(
                "bandwidth_used_ratio",
                "Weights read a second of forwards over the measured bandwidth, since the last look.",
                self._speed(done) / measured / 1e9,
            )
        self.last = done

    def _speed(self, done: StatsSnapshot) -> float:
        """Bytes a second of the forwards since the last look; 0 without any."""
        nbytes, seconds = (self.last.nbytes, self.last.seconds) if self.last else (0, 0.0)
        return (done.nbytes - nbytes) / (done.seconds - seconds) if done.seconds > seconds else 0.0

    def _gauge(self, name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Any:
        return self._family(GaugeMetricFamily, name, text, value, label)

    def _counter(self, name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Any:
        return self._family(CounterMetricFamily, name, text, value, label)

    def _family(self, kind: Any, name: str, text: str, value: float | Mapping[str, float], label: str) -> Any:
        """One value, or one for each word of a label."""
        family = kind(f"ktx:{name}", text, labels=["model_name", label] if label else ["model_name"])
        for word, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            family.add_metric([self.model, word] if label else [self.model], number)
        return family

    def text(self) -> bytes:
        return generate_latest(self.registry)


def imbalance(counts: Sequence[int]) -> float:
    """How many times the mean the highest count is; 1 when nothing was counted."""
    return max(counts) * len(counts) / sum(counts) if any(counts) else 1.0
