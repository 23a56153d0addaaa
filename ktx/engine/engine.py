"""The engine: one thread that schedules requests, runs forwards, and sends events to the requests' callbacks."""

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
from typing import TYPE_CHECKING

import torch

from ktx.cache.page_pool import PAGE_TOKENS, PagePool
from ktx.engine.budget import ACTIVATION_MEMORY_SHARE, MAX_ITL_MS, MAX_STEP_TOKENS, STEP_TOKENS, StepBudget
from ktx.engine.client import Listener, Lora, generate
from ktx.engine.notes import ENGINES, engine_notes
from ktx.engine.output_state import OutputState
from ktx.engine.request import Constraint, Event, Finished, Reason, Request
from ktx.engine.runner import ForwardCancelled, ModelRunner
from ktx.engine.runner_selection import select_runner
from ktx.engine.sampler import SamplingParams
from ktx.engine.scheduler import ScheduledChunk, Scheduler, num_pages
from ktx.engine.speculation import DRAFTERS, MAX_DRAFT_TOKENS, PromptLookup, SpeculativeDecoder
from ktx.engine.stats import EngineStats
from ktx.errors import ContextExceeded, DoesNotFit, Overloaded, QueueFull, UsageError, did_you_mean
from ktx.hardware import memory
from ktx.model.lora import check_memory, match_modules, read_adapter
from ktx.model.notes import add_notes
from ktx.utils.deprecation import deprecated_arguments, deprecated_members
from ktx.weights.lora import AdapterSpec, AdapterUse, AdapterUses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktx.cache.disk import DiskPageStore
    from ktx.model.loaded import LoadedModel

log = logging.getLogger("ktx.engine")
FALLBACK_CONTEXT_TOKENS = 1 << 15
STALL_TIMEOUT_S = 30.0  # a busy engine counts as stuck when no layer has finished for so long
MAX_RESTARTS = 3  # restarts of the engine's thread before the engine stops for good


@deprecated_members(cache_lens="kv_cache_tokens")
@deprecated_arguments(cache_lens="kv_cache_tokens")
@dataclass(frozen=True)
class Options:
    """How an engine is set up.

    Args:
        max_batch_size: requests that one step computes.
        chunk_size: prompt tokens in a step without decode tokens; None: 2048, after a long past up to 8192, or fewer
            where memory is short.
        max_itl_ms: target of the inter-token latency: while requests decode, a step takes as many prompt tokens as fit
            into this number of milliseconds, a page at least.
        kv_cache_tokens: tokens of the KV cache, shared by running requests and the prefix cache.
        max_context: tokens of one request; None: what the model and the KV cache allow.
        max_queue: requests that may wait.
        prefix_cache: whether a request reuses pages of earlier requests that begin with the same tokens.
        speculative: "mtp" or "prompt_lookup" for speculative decoding, None for none.
        draft_tokens: draft tokens of a request in one step.
        prefix_cache_dir: a folder that stores pages of prompts and outputs beyond this engine's life.
        prefix_cache_gb: size limit of that folder.
        cuda_graphs: captures decode steps as CUDA graphs when the engine starts, where all layers are on one GPU.
    """

    max_batch_size: int = 4
    chunk_size: int | None = None
    max_itl_ms: float = MAX_ITL_MS
    kv_cache_tokens: int = 32768
    max_context: int | None = None
    max_queue: int = 256
    prefix_cache: bool = True
    speculative: str | None = None
    draft_tokens: int = MAX_DRAFT_TOKENS
    prefix_cache_dir: str | Path | None = None
    prefix_cache_gb: float = 16.0
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        """Raises UsageError for values that no engine can use."""
        for name in ("max_batch_size", "chunk_size", "kv_cache_tokens", "max_queue", "draft_tokens", "max_itl_ms"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.max_context is not None and self.max_context < 8:
            raise UsageError(f"max_context is {self.max_context}, it must be at least 8")
        if self.prefix_cache_gb <= 0:
            raise UsageError(f"prefix_cache_gb is {self.prefix_cache_gb}, it must be more than 0")
        if self.prefix_cache_dir is not None and not self.prefix_cache:
            raise UsageError("prefix_cache_dir stores the pages of the prefix cache, which is off")
        if self.speculative is not None and self.speculative not in DRAFTERS:
            raise UsageError(
                f"speculative {self.speculative!r} is not a drafter{did_you_mean(self.speculative, DRAFTERS)}; "
                f"give one of {' '.join(DRAFTERS)}"
            )


@deprecated_members(
    listen="stream",
    clear="reset_prefix_cache",
    ids="tokenize",
    checked="check_request",
    activity="stats",
    stuck="stalled",
    submitted="num_submitted",
    restarts="num_restarts",
)
class Engine:
    """Serves requests from any thread. Use it as a context manager, or call `close`.

    Args:
        model: a model loaded by ktx.
        tokenizer: its tokenizer.
        options: the configuration; None: the defaults.
        runner: computes the forwards; None: `select_runner` chooses one.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: Options | None = None,
        runner: ModelRunner | None = None,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options or Options()
        pages = runner.pages if runner else num_pages(self.options.kv_cache_tokens)
        model_context = getattr(model.config, "max_position_embeddings", None) or FALLBACK_CONTEXT_TOKENS
        self.context = min(self.options.max_context or model_context, model_context, pages * PAGE_TOKENS)
        self.stop_ids = end_token_ids(model, tokenizer)
        self.runner = runner or select_runner(model, pages, self.options.max_batch_size * self.options.cuda_graphs)
        self.runner.shares_recurrent_states = self.options.prefix_cache
        self.speculation = self._build_speculation()
        self._check_memory()
        self.runner.capture(self.context)
        self.budget = self._build_budget()
        self.store = self._open_store()
        self.stats = EngineStats(model)
        self.scheduler = self._build_scheduler(pages)
        self.outputs: dict[Request, OutputState] = {}  # of all unfinished requests
        # calls that other threads want on the engine's thread; None ends it
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.lock = threading.Lock()  # guards `outputs`, the adapters' names, `closed` and `failure`
        self.num_submitted = 0
        # adapters that were unloaded while unfinished requests still use them
        self.unloading_adapters: set[str] = set()
        self.steps = 0
        self.failure = ""  # why the engine has stopped for good; empty while it runs
        self.num_restarts = 0
        self.closed = False
        # called on the engine's thread with the last event of each request
        self.on_finished: Callable[[Finished], None] | None = None
        self.thread = threading.Thread(target=self._run, name="ktx-engine", daemon=True)
        self.thread.start()
        self.process = os.getpid()
        add_notes(
            model.ktx.notes,
            engine_notes(self.runner, self.options.prefix_cache, self.context, model_context),
            ENGINES,
        )

    def _build_scheduler(self, pages: int) -> Scheduler:
        """Returns a scheduler without requests and with `pages` free pages, at the start and after a failure."""
        return Scheduler(
            PagePool(pages),
            self.options.max_batch_size,
            self.budget,
            prefix_caching=self.options.prefix_cache and self.runner.supports_prefix_cache,
            recurrent=self.runner.recurrent,
            on_free=self.runner.free,
            on_restore=self.runner.restore,
            on_snapshot=self.runner.snapshot,
            page_kernels_differ=self.runner.page_kernels_differ,
            store=self.store,
            granularity=self.runner.granularity,
        )

    def _build_budget(self) -> StepBudget:
        """Returns the step budget that the free memory allows: all of it for a configured `chunk_size`, DoesNotFit when
        that needs more; without one, a share of it.
        """
        granularity, requested, seconds = (
            self.runner.granularity,
            self.options.chunk_size,
            self.options.max_itl_ms / 1000,
        )
        max_tokens = self.runner.largest_step(
            requested or MAX_STEP_TOKENS, 1.0 if requested else ACTIVATION_MEMORY_SHARE
        )
        if requested is not None:
            if requested > max_tokens:
                raise DoesNotFit(
                    f"a step of {requested} prompt tokens needs more memory than weights and KV cache leave free, "
                    f"{max_tokens} tokens would fit; lower --max-num-batched-tokens"
                )
            # Chunks of a page or more end at multiples of `granularity`, so a step must hold one of them.
            step = max(requested, granularity) if requested >= PAGE_TOKENS else requested
            return StepBudget(step, max_tokens=step, target_s=seconds, min_tokens=granularity)
        if max_tokens < MAX_STEP_TOKENS:
            log.info("a step computes at most %d prompt tokens: more need more memory than is free", max_tokens)
        return StepBudget(min(STEP_TOKENS, max_tokens), max_tokens=max_tokens, target_s=seconds, min_tokens=granularity)

    def _build_speculation(self) -> SpeculativeDecoder | None:
        """Returns the speculative decoder that the options select, None for none. UsageError when the model does not
        support it.
        """
        if self.options.speculative is None:
            return None
        if self.runner.recurrent:
            raise UsageError(
                f"speculative {self.options.speculative}: some layers of this {self.model.config.model_type} have a "
                "recurrent state, which cannot be rolled back to before rejected draft tokens; leave the option out"
            )
        if self.options.speculative == "prompt_lookup":
            return SpeculativeDecoder(PromptLookup(), self.options.draft_tokens)
        if not hasattr(self.model, "mtp"):
            raise UsageError("speculative mtp: the model was loaded without its MTP layer; give mtp=True to ktx.load")
        from ktx.engine.mtp import MTPDrafter

        return SpeculativeDecoder(MTPDrafter(self.runner), self.options.draft_tokens)

    def _open_store(self) -> DiskPageStore | None:
        """Returns the prefix cache on disk, None without `prefix_cache_dir`. UsageError for models whose state is not
        in pages.
        """
        folder = self.options.prefix_cache_dir
        if folder is None:
            return None
        if not self.runner.supports_prefix_cache or self.runner.recurrent:
            raise UsageError(
                f"prefix_cache_dir: some layers of this {self.model.config.model_type} have a state that is not "
                "stored in pages of the KV cache; leave the option out"
            )
        from ktx.cache.disk import DiskPageStore

        handle = self.model.ktx
        name = Path(handle.weights).stem
        return DiskPageStore(folder, name, handle.identity, self.runner.cache, int(self.options.prefix_cache_gb * 1e9))

    def _check_memory(self) -> None:
        """Runs one token through the model, which allocates the KV cache. DoesNotFit when memory does not suffice to
        fill it.
        """
        probe = Request([0], SamplingParams(), lambda event: None, pages=[0])
        free = memory()[1]  # before the forward, which allocates the KV cache
        try:
            self.runner.run([ScheduledChunk(probe, 0, 1)])
        except torch.OutOfMemoryError as error:  # a GPU allocates the whole cache at once
            raise DoesNotFit(
                f"the KV cache of {self.runner.pages * PAGE_TOKENS} tokens does not fit on a GPU with the weights; "
                "lower --kv_cache_tokens (for ktx chat: --max-context)"
            ) from error
        finally:
            self.runner.free(probe)
        need = self.runner.nbytes()
        if need > free:
            raise DoesNotFit(
                f"the KV cache of {self.runner.pages * PAGE_TOKENS} tokens needs {need / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB of memory are free; "
                "lower --kv_cache_tokens (for ktx chat: --max-context), or store it as --kv_dtype q8_0"
            )

    # ---- called from any thread

    @deprecated_arguments(sink="on_event")
    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        on_event: Callable[[Event], None],
        constraint: Constraint | None = None,
        salt: bytes = b"",
        lora: Lora = None,
    ) -> Request:
        """Queues a request.

        Args:
            prompt: token ids.
            sampling: how tokens are chosen, and when the output ends.
            on_event: receives the request's events, on the engine's thread.
            constraint: a GrammarMatcher that the output follows, or None.
            salt: the prefix cache is shared only by requests with the same salt.
            lora: the adapters of the model to apply, () for none; None: those in use (`model.ktx.use_lora`).

        Raises:
            UsageError: the request can never be served.
            QueueFull: too many requests wait.
            Overloaded: the engine has stopped.
        """
        self._check_process()
        sampling = self.check_request(prompt, sampling)
        with self.lock:
            if self.closed or self.failure:
                raise Overloaded(self.failure or "the engine is closed")
            if len(self.outputs) >= self.options.max_queue + self.options.max_batch_size:
                raise QueueFull(f"{len(self.outputs)} requests are waiting or running; try again later")
            # under the lock, so that no adapter is unloaded before the request is registered
            adapters = self._resolve_adapters(lora)
            digest = self.runner.adapters.digest(adapters)
            request = Request(list(prompt), sampling, on_event, digest + salt, constraint, adapters)
            self.num_submitted += 1
            request.id = self.num_submitted
            self.outputs[request] = OutputState(request, self.tokenizer, self.stop_ids, self.context)
        self.inbox.put(lambda: self.scheduler.add(request))
        return request

    def _resolve_adapters(self, lora: Lora) -> AdapterUses:
        """Resolves the `lora` argument of a request to loaded adapters; None: those in use."""
        adapters = self.runner.adapters
        return (
            adapters.in_use
            if lora is None
            else adapters.resolve([lora] if isinstance(lora, str | AdapterUse) else lora)
        )

    def load_lora(self, path: str | Path, name: str | None = None, scale: float = 1.0, replace: bool = False) -> str:
        """As `model.ktx.load_lora`, while requests run: the caller's thread reads and packs the adapter, which is
        available from the next step on.

        Args:
            path: the adapter's folder or file.
            name: the adapter's name; None: derived from the path.
            scale: factor of the adapter.
            replace: unloads a loaded adapter with this name.

        Returns:
            The adapter's name.

        Raises:
            DoesNotFit: memory is short.
        """
        file = read_adapter(AdapterSpec.parse(path).with_name(name, scale))
        modules = match_modules(self.model, file)
        check_memory(modules)
        adapters, adapter = self.runner.adapters, file.adapter
        packed = adapters.pack(modules)

        def attach() -> None:
            """Attaches the packed adapter; runs between two steps, so that no forward sees half of it."""
            with self.lock:
                if replace and adapter.name in adapters.known:
                    self._unload(adapter.name)
                adapters.attach(adapter, packed)

        self.between_steps(attach)
        return adapter.name

    def unload_lora(self, name: str) -> None:
        """Unloads an adapter between two steps: new requests cannot use it, those already submitted continue with it.
        UsageError for an unknown name.
        """

        def unload() -> None:
            with self.lock:
                self._unload(name)

        self.between_steps(unload)

    def _unload(self, name: str) -> None:
        """Unloads an adapter; the caller holds the lock. Unfinished requests continue with it under another name, so
        that its name is free at once; `_send_finished` drops it after the last of them.
        """
        adapters = self.runner.adapters
        if not self._adapter_in_use(name):
            return adapters.drop(name)
        retired_name = adapters.retire(name)
        for request in self.outputs:
            request.lora = tuple(use._replace(name=retired_name) if use.name == name else use for use in request.lora)
        self.unloading_adapters.add(retired_name)

    def _adapter_in_use(self, name: str) -> bool:
        """Whether an unfinished request uses an adapter."""
        return any(use.name == name for request in self.outputs for use in request.lora)

    @deprecated_arguments(do="function")
    def between_steps(self, function: Callable[[], None]) -> None:
        """Calls `function` on the engine's thread after the current step, and waits for it. Overloaded when that thread
        has ended.
        """
        self._check_process()
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()  # the function's error; None: it succeeded

        def run() -> None:
            """Passes the end of the function, or its error, to the waiting thread."""
            try:
                function()
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

    def check_request(self, prompt: Sequence[int], sampling: SamplingParams) -> SamplingParams:
        """Returns the sampling parameters with max_new_tokens limited to the capacity left in the context. UsageError
        when the prompt is empty or holds an unknown token id, ContextExceeded when no capacity is left.
        """
        vocabulary = self.model.config.vocab_size
        self.runner.check(sampling)
        if not prompt:
            raise UsageError("the prompt is empty")
        if invalid := [token for token in prompt if not 0 <= token < vocabulary]:
            raise UsageError(f"the prompt holds the token id {invalid[0]}, the model has {vocabulary} tokens")
        capacity = self.context - len(prompt)
        if capacity < min(1, sampling.max_new_tokens):
            raise ContextExceeded(
                f"the prompt has {len(prompt)} tokens, the context holds {self.context}: "
                "shorten the prompt, or raise --kv_cache_tokens or --max_context"
            )
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, capacity))

    def cancel(self, request: Request) -> None:
        """Ends a request after the current layer or step; its last event has the reason "cancelled"."""
        request.cancelled = True
        self.inbox.put(lambda: None)  # wakes the engine's thread, whose next `step` ends the request

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | None = None, lora: Lora = None
    ) -> Iterator[tuple[int, Event]]:
        """Computes several prompts concurrently and yields pairs of a prompt's index and an event, in the order of the
        events. Closing the iterator cancels unfinished requests. `lora`: see `submit`.
        """
        return generate(self, prompts, sampling or SamplingParams(), lora)

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        constraint: Constraint | None = None,
        salt: bytes = b"",
        lora: Lora = None,
    ) -> Listener:
        """Queues one prompt, whose events arrive on the running event loop: `async with engine.stream(prompt) as
        events: async for event in events`. For the arguments see `submit`.
        """
        return Listener(self, self.tokenize(prompt), sampling or SamplingParams(), constraint, salt, lora)

    def tokenize(self, prompt: str | Sequence[int]) -> Sequence[int]:
        """Returns token ids; tokenizes text."""
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    @property
    def stalled(self) -> bool:
        """Whether requests are unfinished and no layer has finished for STALL_TIMEOUT_S seconds."""
        return bool(self.outputs) and time.monotonic() - self.runner.last_progress > STALL_TIMEOUT_S

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache; pages of unfinished requests stay."""
        self.inbox.put(lambda: self.scheduler.pages.reset_prefix_cache())

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages, requests and prefix cache agree. Waits for the current step; call it when
        no request runs.
        """
        self.between_steps(lambda: self.scheduler.check_integrity())

    def close(self) -> None:
        """Cancels unfinished requests and ends the thread. Does nothing in a forked child, which has no such thread."""
        if self.process != os.getpid():
            return
        with self.lock:
            self.closed = True
        for request in list(self.outputs):
            request.cancelled = True
        self.inbox.put(None)  # ends the thread
        self.thread.join(timeout=60)
        if self.speculation is not None:
            self.speculation.drafter.close()
        if self.store is not None:
            self.store.close()
        self.runner.adapters.end_steps()

    def _check_process(self) -> None:
        """Raises UsageError in a forked child, because the engine's thread exists only in the parent process."""
        if self.process != os.getpid():
            raise UsageError(
                f"this engine belongs to process {self.process}, from which this process ({os.getpid()}) was forked; "
                "create an engine in this process (model.ktx.engine())"
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # ---- the engine's thread

    def _run(self) -> None:
        """Runs on the engine's thread until `close`: commands of other threads, then a step, and again.

        After an exception here all unfinished requests fail, and the engine restarts, at most MAX_RESTARTS times.
        """
        while True:
            try:
                while self._process_inbox():
                    self.step()
                break
            except BaseException as error:  # of any kind, because callers wait for their requests' events
                log.exception("the engine's thread failed")
                if not self._restart(error):
                    break
        for output in list(self.outputs.values()):
            self._finish(output, "cancelled")

    def _restart(self, error: BaseException) -> bool:
        """Fails all unfinished requests and restarts with empty pages. Returns False after MAX_RESTARTS restarts."""
        self.num_restarts += 1
        with self.lock:
            if self.num_restarts > MAX_RESTARTS:
                self.failure = f"the engine has stopped: {type(error).__name__}: {error}"
            failed = list(self.outputs.values())
        self.scheduler = self._build_scheduler(self.scheduler.pages.count)
        self.runner.clear()
        for output in failed:
            self._send_finished(output, "error", error=f"the engine failed: {type(error).__name__}")
        return not self.failure

    def _process_inbox(self) -> bool:
        """Runs the commands of other threads; blocks while no request is unfinished. Returns False when the engine is
        to end.
        """
        idle = not self.scheduler.running and not self.scheduler.waiting
        if idle:
            # an error here restarts with empty pages, before requests can read each other's pages
            self.scheduler.check_integrity()
        while idle or not self.inbox.empty():
            command = self.inbox.get()
            self.runner.last_progress = time.monotonic()
            if command is None:
                return False
            command()
            idle = False
        return True

    def step(self) -> None:
        """Schedules and runs one forward and processes its logits, after ending cancelled requests.

        A forward that was cancelled is scheduled again; one that failed is repeated request by request, to find the
        request that fails.
        """
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.cancelled:
                self._finish(self.outputs[request], "cancelled")
        chunks = self.scheduler.schedule()
        if not chunks:
            return
        self.steps += 1
        now = time.perf_counter()
        num_drafted = {chunk.request: len(chunk.request.draft) for chunk in chunks}
        for chunk in chunks:
            chunk.request.started = chunk.request.started or now
        try:
            with self.stats.forward(*self.runner.count_forwards(chunks)):
                start = time.perf_counter()
                logits = self.runner.run(chunks)
        except ForwardCancelled:
            self.scheduler.undo(chunks)
        except Exception as error:
            self._isolate_failure(chunks, error)
        else:
            num_prompt_tokens = sum(chunk.count for chunk in chunks if not chunk.is_decode)
            self.budget.record(num_prompt_tokens, any(chunk.is_decode for chunk in chunks), time.perf_counter() - start)
            results = [(chunk, self._sample_chunk(chunk, logits[chunk.request])) for chunk in chunks]
            if self.speculation is not None:
                self._draft(self.speculation, results, num_drafted, now)
            if self.store is not None:
                self.store.flush()

    def _draft(
        self,
        speculation: SpeculativeDecoder,
        results: Sequence[tuple[ScheduledChunk, int]],
        num_drafted: dict[Request, int],
        start: float,
    ) -> None:
        """Computes draft tokens for the next forward. An error here costs only speed: speculative decoding is switched
        off.

        `results` are the chunks of this step, each with the number of its tokens that stay in the cache; `num_drafted`
        are the draft tokens that the step verified for each request; `start` is when the step began.
        """
        for chunk, num_kept in results:
            if num_drafted[chunk.request]:
                # of the tokens that stay, the first was no draft token
                speculation.record_verified(chunk.request, num_drafted[chunk.request], num_kept - 1)
        # one less than output and context can still take, because the next forward also samples a token
        max_drafts = {
            chunk.request: min(
                chunk.request.sampling.max_new_tokens - chunk.request.num_output,
                self.context - len(chunk.request.ids),
            )
            - 1
            for chunk, _ in results
            if chunk.request in self.outputs and chunk.request.num_uncomputed == 1 and not chunk.request.isolated
        }
        try:
            # nothing stays of a request that has ended
            kept_results = [(chunk, num_kept if chunk.request in self.outputs else 0) for chunk, num_kept in results]
            speculation.prepare(kept_results, max_drafts, time.perf_counter() - start)
        except Exception:
            log.exception("computing draft tokens failed; speculative decoding is off from now on")
            self.speculation = None

    def _sample_chunk(self, chunk: ScheduledChunk, logits: torch.Tensor) -> int:
        """Samples from a chunk's logits, and updates statistics and scheduler; an error ends only this request.

        Returns how many of the chunk's tokens stay in the cache: rejected draft tokens do not; 0 after an error.
        """
        request, output = chunk.request, self.outputs[chunk.request]
        num_output_before = request.num_output
        self.stats.prompt_tokens += chunk.num_prompt_tokens
        try:
            num_kept, reason = output.process_logits(chunk, logits)
        except UsageError as error:  # its grammar exceeds the parser's limits
            self._finish(output, "error", str(error), client_error=True)
            return 0
        except Exception as error:  # an error in one request must not stop the others
            request.context.run(log.exception, "request %d failed", request.id)
            self._finish(output, "error", error=f"{type(error).__name__}: {error}")
            return 0
        request.isolated = False  # its forward succeeded, so it may share forwards again
        self.stats.answer_tokens += request.num_output - num_output_before
        self.scheduler.commit(request, num_kept)
        if reason:
            self._finish(output, reason)
        return num_kept

    def _isolate_failure(self, chunks: Sequence[ScheduledChunk], error: Exception) -> None:
        """Isolates the failing request: each request of the failed forward is computed alone, and the one that fails
        alone ends with the error.
        """
        log.exception("a forward of %d requests failed", len(chunks))
        self.scheduler.undo(chunks)
        if len(chunks) > 1:
            for chunk in chunks:
                chunk.request.isolated = True
        else:
            self._finish(self.outputs[chunks[0].request], "error", error=f"{type(error).__name__}: {error}")

    def _finish(self, output: OutputState, reason: Reason, error: str = "", client_error: bool = False) -> None:
        """Ends a request: removes it from the scheduler and sends its last event."""
        self.scheduler.remove(output.request)
        self._send_finished(output, reason, error, client_error)

    def _send_finished(self, output: OutputState, reason: Reason, error: str = "", client_error: bool = False) -> None:
        """Sends a request's last event, and drops unloaded adapters that no unfinished request uses any more."""
        with self.lock:
            self.outputs.pop(output.request, None)
            for name in [adapter for adapter in self.unloading_adapters if not self._adapter_in_use(adapter)]:
                self.runner.adapters.drop(name)
                self.unloading_adapters.discard(name)
        finished = output.finish(reason, error, client_error)
        if self.on_finished is not None:
            output.request.context.run(self.on_finished, finished)


def end_token_ids(model: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the token ids that end an output, from the generation config, the model's config and the tokenizer."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} if ids is not None else set()
    return frozenset(found)
