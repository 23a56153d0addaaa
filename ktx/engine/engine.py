"""The engine: one thread that turns requests into forwards, and forwards into events."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ktx.cache.page_pool import PAGE_TOKENS, PagePool
from ktx.engine.budget import ITL, LONGEST, SHARE, STEP, StepBudget
from ktx.engine.client import Listener, Lora, generate
from ktx.engine.notes import ENGINES, notes_of
from ktx.engine.output_state import OutputState
from ktx.engine.request import Event, Finished, Request
from ktx.engine.runner import ForwardCancelled, ModelRunner
from ktx.engine.runner_selection import runner_for
from ktx.engine.sampler import SamplingParams
from ktx.engine.scheduler import ScheduledChunk, Scheduler, pages_for
from ktx.engine.speculation import KINDS, MAX_DRAFT_TOKENS, PromptLookup, SpeculativeDecoder
from ktx.engine.stats import EngineStats
from ktx.errors import ContextExceeded, DoesNotFit, Overloaded, QueueFull, UsageError, did_you_mean
from ktx.hardware import memory
from ktx.model.lora import check_memory, fitted, read
from ktx.model.notes import tell
from ktx.ops.lora import Use, Uses
from ktx.weights.lora import Wish

log = logging.getLogger("ktx.engine")
FALLBACK_CONTEXT = 1 << 15
STALL_TIMEOUT_S = 30.0  # seconds without a layer's end after which a busy engine counts as stuck
MAX_RESTARTS = 3  # of the thread, before the engine gives up


@dataclass(frozen=True)
class Options:
    """How an engine is set up. `cache_lens` tokens are kept in all, of running requests and of what they may share.

    `chunk_size` tokens of prompts are computed at once where no answer goes on; None: 2048, after a long past up to 8192, or fewer where
    memory is short. Beside answers as many as take `max_itl_ms` milliseconds, a page at least. `speculative` ("mtp" or "prompt_lookup") guesses up to `draft_tokens` tokens of an answer at once.
    `cuda_graphs` captures steps of one token a request, where all layers are on one GPU, when the engine starts.
    `prefix_cache_dir` is a folder that keeps pages of prompts and answers beyond this engine's life, `prefix_cache_gb` of them at most.
    """

    max_batch_size: int = 4
    chunk_size: int | None = None
    max_itl_ms: float = ITL
    cache_lens: int = 32768
    max_context: int | None = None  # of one request; None: what the model and the cache allow
    max_queue: int = 256
    prefix_cache: bool = True
    speculative: str | None = None
    draft_tokens: int = MAX_DRAFT_TOKENS
    prefix_cache_dir: str | Path | None = None
    prefix_cache_gb: float = 16.0
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "chunk_size", "cache_lens", "max_queue", "draft_tokens", "max_itl_ms"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.max_context is not None and self.max_context < 8:
            raise UsageError(f"max_context is {self.max_context}, it must be at least 8")
        if self.prefix_cache_gb <= 0:
            raise UsageError(f"prefix_cache_gb is {self.prefix_cache_gb}, it must be more than 0")
        if self.prefix_cache_dir is not None and not self.prefix_cache:
            raise UsageError("prefix_cache_dir keeps what the prefix cache holds, and that is off")
        if self.speculative is not None and self.speculative not in KINDS:
            raise UsageError(
                f"speculative {self.speculative!r} is no way to guess tokens{did_you_mean(self.speculative, KINDS)}; give one of {' '.join(KINDS)}"
            )


class Engine:
    """Serves requests from any thread. Use it as a context manager, or call `close`."""

    def __init__(self, model: Any, tokenizer: Any, options: Options | None = None, runner: ModelRunner | None = None):
        self.model, self.tokenizer, self.options = model, tokenizer, options or Options()
        pages = runner.pages if runner else pages_for(self.options.cache_lens)
        limit = getattr(model.config, "max_position_embeddings", None) or FALLBACK_CONTEXT
        self.context = min(self.options.max_context or limit, limit, pages * PAGE_TOKENS)
        self.stop_ids = stop_ids(model, tokenizer)
        self.runner = runner or runner_for(model, pages, self.options.max_batch_size * self.options.cuda_graphs)
        self.runner.shared = self.options.prefix_cache
        self.speculation = self._speculation()
        self._measure()
        self.runner.capture(self.context)
        self.budget = self._budget()
        self.store = self._store()
        self.activity = EngineStats(model)
        self.scheduler = self._scheduler(pages)
        self.answers: dict[Request, OutputState] = {}
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.submitted = 0
        self.leaving: set[str] = set()  # adapters that were unloaded while requests had them, and still do
        self.steps = 0
        self.failure = ""  # why the engine has stopped for good
        self.restarts = 0
        self.closed = False
        self.on_finished: Callable[[Finished], None] | None = (
            None  # hears of every answer's end, on the engine's thread
        )
        self.thread = threading.Thread(target=self._run, name="ktx-engine", daemon=True)
        self.thread.start()
        self.process = os.getpid()
        tell(getattr(getattr(model, "ktx", None), "notes", []), notes_of(self, limit), ENGINES)

    def _scheduler(self, pages: int) -> Scheduler:
        return Scheduler(
            PagePool(pages),
            self.options.max_batch_size,
            self.budget,
            self.options.prefix_cache and self.runner.supports_prefix_cache,
            self.runner.recurrent,
            self.runner.forget,
            self.runner.resume,
            self.runner.snapshot,
            self.runner.two_forms,
            self.store,
            self.runner.grain,
        )

    def _budget(self) -> StepBudget:
        """Of steps that memory suffices for. DoesNotFit when it does not for the one that was asked for."""
        grain, given, seconds = self.runner.grain, self.options.chunk_size, self.options.max_itl_ms / 1000
        most = self.runner.largest_step(given or LONGEST, 1.0 if given else SHARE)
        if given is not None:
            if given > most:
                raise DoesNotFit(
                    f"a step of {given} tokens of prompts needs more memory than is free beside weights and caches, {most} would do; lower --max-num-batched-tokens"
                )
            step = max(given, grain) if given >= PAGE_TOKENS else given
            return StepBudget(step, step, seconds, grain)
        if most < LONGEST:
            log.info("a step computes at most %d tokens of prompts: more of them need more memory than is free", most)
        return StepBudget(min(STEP, most), most, seconds, grain)

    def _speculation(self) -> SpeculativeDecoder | None:
        if self.options.speculative is None:
            return None
        if self.runner.recurrent:
            raise UsageError(
                f"speculative {self.options.speculative}: some layers of this {self.model.config.model_type} cannot take back what they have seen; leave it out"
            )
        if self.options.speculative == "prompt_lookup":
            return SpeculativeDecoder(PromptLookup(), self.options.draft_tokens)
        if not hasattr(self.model, "mtp"):
            raise UsageError("speculative mtp: the model was loaded without its MTP layer; give mtp=True to ktx.load")
        from ktx.engine.mtp import MTPDrafter

        return SpeculativeDecoder(MTPDrafter(self.runner), self.options.draft_tokens)

    def _store(self) -> Any:
        folder = self.options.prefix_cache_dir
        if folder is None:
            return None
        if not self.runner.supports_prefix_cache or self.runner.recurrent:
            raise UsageError(
                f"prefix_cache_dir: some layers of this {self.model.config.model_type} keep a state that is no page; leave it out"
            )
        from ktx.cache.disk import DiskPageStore

        handle = self.model.ktx
        name = Path(handle.weights).stem
        return DiskPageStore(folder, name, handle.identity, self.runner.cache, int(self.options.prefix_cache_gb * 1e9))

    def _measure(self) -> None:
        """One token through the model makes the pools; DoesNotFit when there is no memory to fill them."""
        probe = Request([0], SamplingParams(), lambda event: None, pages=[0])
        free = memory()[1]
        try:
            self.runner.run([ScheduledChunk(probe, 0, 1)])
        except torch.OutOfMemoryError as error:  # a GPU's memory is taken at once
            raise DoesNotFit(
                f"keys and values of {self.runner.pages * PAGE_TOKENS} tokens do not fit on a GPU beside the weights; lower --cache_lens (of a chat: --max-context)"
            ) from error
        finally:
            self.runner.forget(probe)
        need = self.runner.nbytes()
        if need > free:
            raise DoesNotFit(
                f"keys and values of {self.runner.pages * PAGE_TOKENS} tokens need {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free;"
                " lower --cache_lens (of a chat: --max-context), or keep them in --kv_dtype q8_0"
            )

    # ---- from any thread

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        sink: Callable[[Event], None],
        constraint: Any = None,
        salt: bytes = b"",
        lora: Lora = None,
    ) -> Request:
        """Queues a request, whose events go to `sink`. UsageError when it can never be answered, QueueFull when too many wait, Overloaded when the engine has stopped.

        `lora` names the adapters of the model that it is computed with, () none; by default those that are in use (`model.ktx.use_lora`).
        """
        self._check_process()
        sampling = self.checked(prompt, sampling)
        with self.lock:
            if self.closed or self.failure:
                raise Overloaded(self.failure or "the engine is closed")
            if len(self.answers) >= self.options.max_queue + self.options.max_batch_size:
                raise QueueFull(f"{len(self.answers)} requests are waiting or running; try again later")
            adapters = self._adapters(lora)  # here, where none is unloaded before the request is known
            digest = self.runner.adapters.digest(adapters)
            request = Request(list(prompt), sampling, sink, digest + salt, constraint, adapters)
            self.submitted += 1
            request.id = self.submitted
            self.answers[request] = OutputState(request, self.tokenizer, self.stop_ids, self.context)
        self.inbox.put(lambda: self.scheduler.add(request))
        return request

    def _adapters(self, lora: Lora) -> Uses:
        known = self.runner.adapters
        return known.in_use if lora is None else known.checked([lora] if isinstance(lora, str | Use) else lora)

    def load_lora(self, path: str | Path, name: str | None = None, scale: float = 1.0, replace: bool = False) -> str:
        """As `model.ktx.load_lora`, while requests are answered: the adapter is read and packed on the caller's thread, and hangs from the next step on.

        `replace`: one that has the name is unloaded. DoesNotFit where memory is short.
        """
        file = read(Wish.of(path).named(name, scale))
        modules = fitted(self.model, file)
        check_memory(modules)
        adapters, adapter = self.runner.adapters, file.adapter
        packed = adapters.packed(modules)

        def hang() -> None:
            with self.lock:
                if replace and adapter.name in adapters.known:
                    self._unload(adapter.name)
                adapters.hang(adapter, packed)

        self.between_steps(hang)
        return adapter.name

    def unload_lora(self, name: str) -> None:
        """Forgets an adapter: no request finds it any more, those that have come go on with it. UsageError for a name that there is not."""

        def unload() -> None:
            with self.lock:
                self._unload(name)

        self.between_steps(unload)

    def _unload(self, name: str) -> None:
        adapters = self.runner.adapters
        if not self._asked_for(name):
            return adapters.drop(name)
        other = adapters.retire(name)
        for request in self.answers:
            request.lora = tuple(use._replace(name=other) if use.name == name else use for use in request.lora)
        self.leaving.add(other)

    def _asked_for(self, name: str) -> bool:
        """Whether a request that has not ended is computed with an adapter."""
        return any(use.name == name for request in self.answers for use in request.lora)

    def between_steps(self, do: Callable[[], None]) -> None:
        """Has the engine's thread do it when the present step is done, and waits for that. Overloaded when that thread has ended."""
        self._check_process()
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                do()
                done.put(None)
            except Exception as error:
                done.put(error)

        self.inbox.put(run)
        while self.thread.is_alive() or not done.empty():
            with suppress(queue.Empty):
                if (error := done.get(timeout=1)) is not None:
                    raise error
                return
        raise Overloaded(self.failure or "the engine is closed")

    def checked(self, prompt: Sequence[int], sampling: SamplingParams) -> SamplingParams:
        """The settings with what the context leaves of max_new_tokens. UsageError with the numbers when nothing is left."""
        vocabulary = self.model.config.vocab_size
        self.runner.check(sampling)
        if not prompt:
            raise UsageError("the prompt is empty")
        if bad := [token for token in prompt if not 0 <= token < vocabulary]:
            raise UsageError(f"the prompt holds the token id {bad[0]}, the model has {vocabulary}")
        room = self.context - len(prompt)
        if room < min(1, sampling.max_new_tokens):
            raise ContextExceeded(
                f"the prompt has {len(prompt)} tokens, the context holds {self.context}: shorten it, or raise --cache_lens or --max_context"
            )
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))

    def cancel(self, request: Request) -> None:
        """Ends a request as soon as the present layer or step is done; its last event says so."""
        request.cancelled = True
        self.inbox.put(lambda: None)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | None = None, lora: Lora = None
    ) -> Iterator[tuple[int, Event]]:
        """Answers prompts side by side: pairs of a prompt's index and an event, as they come. Leaving early cancels what is left. `lora`: see `submit`."""
        return generate(self, prompts, sampling or SamplingParams(), lora)

    def listen(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        constraint: Any = None,
        salt: bytes = b"",
        lora: Lora = None,
    ) -> Listener:
        """Queues one prompt, whose events the running event loop hears: `async with engine.listen(prompt) as events: async for event in events`. `lora`: see `submit`."""
        return Listener(self, self.ids(prompt), sampling or SamplingParams(), constraint, salt, lora)

    def ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    @property
    def stuck(self) -> bool:
        """Whether there is work and no layer has ended for long."""
        return bool(self.answers) and time.monotonic() - self.runner.last_progress > STALL_TIMEOUT_S

    def clear(self) -> None:
        """Forgets what was kept of requests that have ended."""
        self.inbox.put(lambda: self.scheduler.pages.reset_prefix_cache())

    def check_integrity(self) -> None:
        """AssertionError unless pages, requests and answers agree; call it when nothing runs, it waits for the present step."""
        self.between_steps(lambda: self.scheduler.check_integrity())

    def close(self) -> None:
        """Cancels what is left and ends the thread. Nothing in a forked child, which has no such thread."""
        if self.process != os.getpid():
            return
        with self.lock:
            self.closed = True
        for request in list(self.answers):
            request.cancelled = True
        self.inbox.put(None)
        self.thread.join(timeout=60)
        if self.speculation is not None:
            self.speculation.drafter.close()
        if self.store is not None:
            self.store.close()
        self.runner.adapters.rest()

    def _check_process(self) -> None:
        """UsageError in a forked child: the thread that computes is its parent's."""
        if self.process != os.getpid():
            raise UsageError(
                f"this engine belongs to process {self.process}, which this one ({os.getpid()}) was forked from; make an engine here (model.ktx.engine())"
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # ---- the engine's thread

    def _run(self) -> None:
        while True:
            try:
                while self._take_inbox():
                    self.step()
                break
            except BaseException as error:  # whatever it was: those who wait must hear of it
                log.exception("the engine's thread failed")
                if not self._restart(error):
                    break
        for answer in list(self.answers.values()):
            self._finish(answer, "cancelled")

    def _restart(self, error: BaseException) -> bool:
        """Fails all open requests and begins with empty pages; False when that has happened too often."""
        self.restarts += 1
        with self.lock:
            if self.restarts > MAX_RESTARTS:
                self.failure = f"the engine has stopped: {type(error).__name__}: {error}"
            failed = list(self.answers.values())
        self.scheduler = self._scheduler(self.scheduler.pages.count)
        self.runner.clear()
        for answer in failed:
            self._end(answer, "error", error=f"the engine failed: {type(error).__name__}")
        return not self.failure

    def _take_inbox(self) -> bool:
        """Runs what other threads have asked for; sleeps when there is nothing to do. False when the engine is to end."""
        idle = not self.scheduler.running and not self.scheduler.waiting
        if idle:
            self.scheduler.check_integrity()  # an error here begins anew with empty pages, before it can mix answers up
        while idle or not self.inbox.empty():
            command = self.inbox.get()
            self.runner.last_progress = time.monotonic()
            if command is None:
                return False
            command()
            idle = False
        return True

    def step(self) -> None:
        """One forward, and what follows from it."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.cancelled:
                self._finish(self.answers[request], "cancelled")
        parts = self.scheduler.schedule()
        if not parts:
            return
        self.steps += 1
        now = time.perf_counter()
        tried = {part.request: len(part.request.draft) for part in parts}
        for part in parts:
            part.request.started = part.request.started or now
        try:
            with self.activity.forward(*self.runner.reads(parts)):
                start = time.perf_counter()
                logits = self.runner.run(parts)
        except ForwardCancelled:
            self.scheduler.undo(parts)
        except Exception as error:
            self._failed(parts, error)
        else:
            prompts = sum(part.count for part in parts if not part.answers)
            self.budget.took(prompts, any(part.answers for part in parts), time.perf_counter() - start)
            done = [(part, self._computed(part, logits[part.request])) for part in parts]
            if self.speculation is not None:
                self._guess(self.speculation, done, tried, now)
            if self.store is not None:
                self.store.flush()

    def _guess(
        self,
        speculation: SpeculativeDecoder,
        done: Sequence[tuple[ScheduledChunk, int]],
        tried: dict[Request, int],
        start: float,
    ) -> None:
        """Drafts for the next forward. Whatever goes wrong there costs only speed."""
        for part, kept in done:
            if tried[part.request]:
                speculation.checked(part.request, tried[part.request], kept - 1)
        room = {
            part.request: min(
                part.request.sampling.max_new_tokens - part.request.num_output, self.context - len(part.request.ids)
            )
            - 1
            for part, _ in done
            if part.request in self.answers and part.request.num_uncomputed == 1 and not part.request.isolated
        }
        try:
            staying = [(part, kept if part.request in self.answers else 0) for part, kept in done]
            speculation.prepare(staying, room, time.perf_counter() - start)
        except Exception:
            log.exception("guessing tokens failed; it is off from now on")
            self.speculation = None

    def _computed(self, part: ScheduledChunk, logits: torch.Tensor) -> int:
        """What follows from a part's logits; how many of its tokens stay."""
        request, answer = part.request, self.answers[part.request]
        answered = request.num_output
        self.activity.prompt_tokens += part.prompt
        try:
            kept, done = answer.process_logits(part, logits)
        except UsageError as error:  # its grammar goes beyond what can be followed
            self._finish(answer, "error", str(error), refused=True)
            return 0
        except Exception as error:  # a request's own settings must not stop the others
            request.context.run(log.exception, "request %d failed", request.id)
            self._finish(answer, "error", error=f"{type(error).__name__}: {error}")
            return 0
        request.isolated = False
        self.activity.answer_tokens += request.num_output - answered
        self.scheduler.commit(request, kept)
        if done:
            self._finish(answer, done)
        return kept

    def _failed(self, parts: Sequence[ScheduledChunk], error: Exception) -> None:
        """Finds out whose fault it was: each request is tried alone, and one that fails alone has failed."""
        log.exception("a forward of %d requests failed", len(parts))
        self.scheduler.undo(parts)
        if len(parts) > 1:
            for part in parts:
                part.request.isolated = True
        else:
            self._finish(self.answers[parts[0].request], "error", error=f"{type(error).__name__}: {error}")

    def _finish(self, answer: OutputState, reason: Any, error: str = "", refused: bool = False) -> None:
        self.scheduler.drop(answer.request)
        self._end(answer, reason, error, refused)

    def _end(self, answer: OutputState, reason: Any, error: str = "", refused: bool = False) -> None:
        with self.lock:
            self.answers.pop(answer.request, None)
            for name in [one for one in self.leaving if not self._asked_for(one)]:
                self.runner.adapters.drop(name)
                self.leaving.discard(name)
        finished = answer.finish(reason, error, refused)
        if self.on_finished is not None:
            answer.request.context.run(self.on_finished, finished)


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, of whoever names some."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} if ids is not None else set()
    return frozenset(found)
