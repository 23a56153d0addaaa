"""Runs the model's forward over the chunks of a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.forward_context import ForwardContext, enter
from ktx.cache.kv import KVCache
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import PagedCache
from ktx.engine.budget import MIN_STEP_TOKENS
from ktx.engine.graphs import DecodeToken, Graphs, first_gpu, unsupported_reason
from ktx.engine.request import Request
from ktx.engine.sampler import SamplingParams
from ktx.engine.scheduler import ScheduledChunk
from ktx.errors import UsageError
from ktx.hardware import memory
from ktx.kernels import cpu
from ktx.model.lora import Adapters
from ktx.ops.gpu import offload
from ktx.ops.mla import MLA
from ktx.placement.workspace import decode_step_bytes
from ktx.transformers_compat import cache_argument, cache_of, keeps_own_cache
from ktx.weights.lora import Spans

if TYPE_CHECKING:
    from ktx.model.loaded import LoadedModel

log = logging.getLogger("ktx.engine")
# [rows, vocabulary]: of all tokens of an echo, of the tokens to sample from, or none
Logits = dict[Request, torch.Tensor]


class ForwardCancelled(Exception):
    """A forward was cancelled between two layers, because it computes more tokens for cancelled requests than tokens
    of the other requests have to be recomputed.
    """


class ModelRunner:
    """Computes several sequences in one forward, on a paged KV cache.

    `last_progress` is the time of the latest finished layer, `pages` the number of pages.

    Args:
        model: a model loaded by ktx.
        pages: pages of the KV cache.
        max_captured_requests: maximum number of requests of decode steps that `capture` records as CUDA graphs; 0: no
            graphs.
    """

    supports_prefix_cache = True  # whether a sequence can reuse pages of another one
    page_kernels_differ = False  # whether full pages of a prompt are computed with other kernels than single tokens
    # Chunks of a prompt end at multiples of this number of tokens, so that results do not depend on how the prompt is
    # split.
    granularity = PAGE_TOKENS
    # whether the cache has states that a forward overwrites, so that it cannot go back to an earlier position
    recurrent = False
    shares_recurrent_states = False  # whether sequences reuse recurrent states of other ones; the engine sets it
    max_captured_requests = 0
    sequential_reason = ""  # why requests are computed one after another, if they are
    unsupported_reason = ""  # why steps are not captured although that was requested
    graphs: Graphs | None = None

    def __init__(self, model: LoadedModel, pages: int, max_captured_requests: int = 0):
        """Reads what the model's kernels and layers allow, and creates the cache, which the first forward allocates."""
        self.model, self.pages, self.adapters = model, pages, lora_adapters(model)
        # AMX tiles and MLA compute full pages of a prompt with other kernels than single tokens.
        self.page_kernels_differ = cpu.ops.has_bf16_tiles() or any(
            isinstance(module, MLA) for module in model.modules()
        )
        if max_captured_requests and first_gpu(model) is not None:
            self.unsupported_reason = unsupported_reason(model)
            self.max_captured_requests = 0 if self.unsupported_reason else max_captured_requests
        spare = int(self.max_captured_requests > 0)  # a page for a graph's rows without a request
        self.cache = PagedCache(
            model.config, pages + spare, model.ktx.kv_dtype, extra_layers=int(hasattr(model, "mtp"))
        )
        self.recurrent = self.cache.recurrent
        self.last_progress = time.monotonic()

    def capture(self, context: int) -> None:
        """Captures CUDA graphs of decode steps with up to `context` tokens a request, after the KV cache is allocated.
        A failure is logged and costs only speed.
        """
        if not self.max_captured_requests:
            return
        try:
            # graphs are for steps without adapters; other steps launch kernel by kernel
            no_adapters = self.adapters.activate_step([], [])
            self.graphs = Graphs(self.model, self.cache, self.max_captured_requests, context, self.pages, no_adapters)
            self.graphs.capture()
        except Exception as error:
            self.graphs = None
            offload.reset_offloads(self.model)
            log.warning(
                "capturing CUDA graphs failed, steps launch kernel by kernel "
                "(--no-cuda-graphs disables the attempt): %s: %s",
                type(error).__name__,
                error,
            )

    def largest_step(self, max_tokens: int, memory_share: float = 1.0) -> int:
        """Returns the tokens of a step whose activations fit into `memory_share` of the memory that weights and caches
        leave free.

        It is `max_tokens`, halved until the step fits, but at least MIN_STEP_TOKENS.
        """
        for device, bytes_per_token in decode_step_bytes(self.model).items():
            free_bytes = device.memory[1] if device.gpu else memory()[1] - self.nbytes()
            while max_tokens > MIN_STEP_TOKENS and max_tokens * bytes_per_token > memory_share * free_bytes:
                max_tokens = max(MIN_STEP_TOKENS, max_tokens // 2)
        return max_tokens

    def check(self, sampling: SamplingParams) -> None:
        """Raises UsageError for sampling parameters that this model's forwards do not support."""

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk]) -> Logits:
        """Computes the chunks and returns their logits. Raises ForwardCancelled between two layers when most of the
        work is for cancelled requests; a graph cannot be cancelled.
        """
        replayed = self._replay(chunks)
        return self._forward(chunks) if replayed is None else replayed

    def _replay(self, chunks: Sequence[ScheduledChunk]) -> Logits | None:
        """Replays a graph, if each chunk is a single token whose logits are needed and there is a graph for them;
        otherwise returns None, and `run` launches the kernels one by one.
        """
        if self.graphs is None or any(
            chunk.count != 1 or num_logits(chunk) != 1 or chunk.request.lora for chunk in chunks
        ):
            return None
        self.last_progress = time.monotonic()
        logits = self.graphs.step([DecodeToken(chunk.ids[0], chunk.start, chunk.request.pages) for chunk in chunks])
        if logits is None:
            return None
        rows = to_cpu(self.model, logits, copy=True).split(1)
        return {chunk.request: row for chunk, row in zip(chunks, rows, strict=True)}

    def _forward(self, chunks: Sequence[ScheduledChunk]) -> Logits:
        """Computes all chunks in one forward: their tokens are concatenated to one row, because the cache knows from
        the spans which tokens belong to which sequence. Used where no CUDA graph can be replayed.
        """
        spans = [
            SequenceSpan(
                owner=chunk.request.id,
                past=chunk.start,
                count=chunk.count,
                pages=chunk.request.pages,
                num_prompt_tokens=chunk.num_prompt_tokens,
                # the prefix cache does not apply to requests with echo
                shared=self.shares_recurrent_states and not chunk.request.sampling.echo,
            )
            for chunk in chunks
        ]
        batch = BatchMetadata(spans, lambda: self._on_layer(chunks))
        ids = torch.tensor([[token for chunk in chunks for token in chunk.ids]])
        # rows of the batch whose logits are needed, the last ones of each chunk
        rows = [
            torch.arange(first + count - num_logits(chunk), first + count)
            for chunk, (first, count, _) in zip(chunks, batch.rows, strict=True)
        ]
        # Chunks that need the logits of all their rows; their full pages are excluded from multiplication in bf16.
        echo_indices = [i for i, chunk in enumerate(chunks) if chunk.request.sampling.echo]
        self.cache.begin(batch)
        adapters = self.adapters.activate_step(*chunk_adapters(chunks))
        with self.cache.forward(batch, batch.full_page_rows(echo_indices), adapters):
            out = self.model(
                input_ids=ids,
                position_ids=batch.position_ids,
                **cache_argument(self.model, self.cache),
                use_cache=True,
                logits_to_keep=torch.cat(rows),
            )
        chunk_logits = to_cpu(self.model, out.logits)[0].split([len(row) for row in rows])
        self.cache.end(batch)
        return {chunk.request: logits for chunk, logits in zip(chunks, chunk_logits, strict=True)}

    def count_forwards(self, chunks: Sequence[ScheduledChunk]) -> tuple[int, int, int]:
        """Returns what EngineStats counts: the number of forwards that `run` makes for the chunks, of their tokens, and
        of the forwards that compute logits.
        """
        return 1, sum(chunk.count for chunk in chunks), int(any(map(num_logits, chunks)))

    def _on_layer(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Called after each layer: records progress and raises ForwardCancelled when that costs fewer recomputed tokens
        than it saves.
        """
        self.last_progress = time.monotonic()
        num_cancelled = sum(chunk.count for chunk in chunks if chunk.request.cancelled)
        if num_cancelled and num_cancelled > sum(
            self._num_recomputed(chunk) for chunk in chunks if not chunk.request.cancelled
        ):
            raise ForwardCancelled

    def _num_recomputed(self, chunk: ScheduledChunk) -> int:
        """Returns how many tokens are recomputed when a forward with this chunk is cancelled: a recurrent state starts
        from the beginning.
        """
        return chunk.start + chunk.count if self.recurrent else chunk.count

    def free(self, request: Request) -> None:
        """Frees the request's recurrent states."""
        self.cache.free(request.id)

    def snapshot(self, request: Request, tokens: int) -> Any:
        """Returns a copy of the recurrent layers' states after a request's first `tokens` tokens; None if there is
        none.
        """
        return self.cache.snapshot(request.id, tokens)

    def restore(self, request: Request, snapshot: Any) -> None:
        """Restores a snapshot of the recurrent layers' states for a request."""
        self.cache.restore(request.id, snapshot, request.num_computed)

    def clear(self) -> None:
        """Frees all recurrent states."""
        self.cache.states.clear()
        self.cache.state_lengths.clear()
        self.cache.snapshots.clear()

    def nbytes(self) -> int:
        """Returns the bytes of CPU memory that the KV cache takes when it is full."""
        return self.cache.nbytes(host=True)


class SequentialRunner(ModelRunner):
    """Computes one sequence after another, each with a cache of its own: for models whose attention does not use the
    paged cache.

    `in_chunks`: whether a prompt may be computed in several forwards; if not, one forward computes it with its last
    chunk.
    """

    supports_prefix_cache = False
    granularity = 4 * PAGE_TOKENS
    in_chunks = True

    def __init__(self, model: LoadedModel, pages: int):
        self.model, self.pages, self.adapters = model, pages, lora_adapters(model)
        self.recurrent = True  # a forward that began to write cannot be rolled back
        self.caches: dict[int, Any] = {}
        self.own_cache = keeps_own_cache(model)
        self.last_progress = time.monotonic()

    def check(self, sampling: SamplingParams) -> None:
        """Raises UsageError for log-probabilities of a prompt that is computed in one forward."""
        if sampling.echo and not self.in_chunks:
            raise UsageError(
                f"log-probabilities of a prompt: a {self.model.config.model_type} computes prompts in one forward; "
                "request those of the output only"
            )

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk]) -> Logits:
        """Computes the chunks one after another, each in the forwards that `_split_chunk` returns. Raises
        ForwardCancelled between two forwards, as the base class between two layers.
        """
        logits = {}
        for chunk in chunks:
            rows = []
            for start, count in self._split_chunk(chunk):
                self._on_layer(chunks)
                rows.append(self._forward_chunk(chunk, start, count))
            logits[chunk.request] = (
                torch.cat(rows) if rows else torch.empty(0, self.model.config.vocab_size, dtype=torch.float32)
            )
        return logits

    def _split_chunk(self, chunk: ScheduledChunk) -> list[tuple[int, int]]:
        """Returns the first token and the number of tokens of the forwards that a chunk takes.

        A prompt is computed `granularity` tokens at once, because a family's own code may sum in another order for
        another number of tokens. Output tokens that are recomputed come one by one, as they came before.
        """
        prompt_end = chunk.start + chunk.num_prompt_tokens
        decode_steps = [(start, 1) for start in range(prompt_end, chunk.start + chunk.count)]
        if not chunk.num_prompt_tokens or (not self.in_chunks and prompt_end < len(chunk.request.prompt)):
            return decode_steps
        if not self.in_chunks:  # the last chunk of a prompt computes all of it
            return [(0, prompt_end), *decode_steps]
        cuts = [
            chunk.start,
            *range((chunk.start // self.granularity + 1) * self.granularity, prompt_end, self.granularity),
            prompt_end,
        ]
        return [*((start, end - start) for start, end in pairwise(cuts)), *decode_steps]

    def _forward_chunk(self, chunk: ScheduledChunk, start: int, count: int) -> torch.Tensor:
        """Computes `count` tokens from `start` on and returns the logits that the chunk needs of them.

        The keys and values go to the request's own cache, which its first chunk creates.
        """
        request = chunk.request
        num_rows = max(0, start + count - max(start, chunk.start + chunk.count - num_logits(chunk)))
        span = SequenceSpan(request.id, start, count, (), max(0, min(count, len(request.prompt) - start)))
        # the rows that AMX multiplies in bf16: full pages of the prompt
        bf16_ranges = (
            (span.lead_tokens, span.full_page_tokens) if span.full_page_tokens and not request.sampling.echo else ()
        )
        if not self.own_cache and request.id not in self.caches:
            self.caches[request.id] = KVCache(self.model.config, self.model.ktx.kv_dtype)
        adapters = self.adapters.activate_step([(count, request.lora)], [(max(1, num_rows), request.lora)])
        with cpu.bf16_rows(count, bf16_ranges), enter(ForwardContext(adapters=adapters)):
            out = self.model(
                input_ids=torch.tensor([request.ids[start : start + count]]),
                position_ids=torch.arange(start, start + count)[None],
                **cache_argument(self.model, self.caches.get(request.id)),
                use_cache=True,
                logits_to_keep=max(1, num_rows),  # 0 would be all of them
            )
        self.caches[request.id] = cache_of(out)
        logits = to_cpu(self.model, out.logits)[0]
        return logits[len(logits) - num_rows :]

    def count_forwards(self, chunks: Sequence[ScheduledChunk]) -> tuple[int, int, int]:
        """Returns the number of forwards, of tokens, and again of forwards, because each computes logits."""
        forwards = sum(len(self._split_chunk(chunk)) for chunk in chunks)
        return forwards, sum(chunk.count for chunk in chunks), forwards

    def free(self, request: Request) -> None:
        """Frees the request's cache."""
        self.caches.pop(request.id, None)

    def clear(self) -> None:
        """Frees all caches."""
        self.caches.clear()

    def nbytes(self) -> int:
        """Returns 0: caches grow with their sequences."""
        return 0


def lora_adapters(model: LoadedModel) -> Adapters:
    """Returns a model's LoRA adapters; none for a model that ktx did not load."""
    adapters: Adapters = getattr(getattr(model, "ktx", None), "adapters", None) or Adapters()
    return adapters


def chunk_adapters(chunks: Sequence[ScheduledChunk]) -> tuple[Spans, Spans]:
    """Returns the adapters of a step's tokens, and the adapters of the tokens whose logits are needed: the output layer
    computes fewer rows than the other layers.
    """
    tokens = [(chunk.count, chunk.request.lora) for chunk in chunks]
    return tokens, [(num_logits(chunk), chunk.request.lora) for chunk in chunks]


def to_cpu(model: LoadedModel, logits: torch.Tensor, copy: bool = False) -> torch.Tensor:
    """Returns a model's logits on the CPU, where tokens are sampled; `copy`: always copies. Raises the error of experts
    that the GPU offloaded to the CPU, if there was one.
    """
    logits = logits.to("cpu", copy=copy)
    offload.raise_offload_errors(model)
    return logits


def num_logits(chunk: ScheduledChunk) -> int:
    """Returns how many of a chunk's last tokens need logits."""
    request = chunk.request
    if request.sampling.echo and chunk.start < len(request.prompt):
        return chunk.count
    return 1 + len(request.draft) if chunk.start + chunk.count >= len(request.ids) else 0
