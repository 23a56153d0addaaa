"""A forward of the model over the parts that the scheduler chose."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ktx.cache.kv import KVCache
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import BatchMetadata, PagedCache, SequenceSpan
from ktx.engine.budget import SMALLEST
from ktx.engine.graphs import Graphs, Token, gpu_of, unsupported_reason
from ktx.engine.request import Request
from ktx.engine.sampler import SamplingParams
from ktx.engine.scheduler import ScheduledChunk
from ktx.errors import UsageError
from ktx.hardware import memory
from ktx.kernels import cpu
from ktx.model.lora import Adapters, Step
from ktx.ops.gpu import offload
from ktx.ops.mla import MLA
from ktx.placement.workspace import step_bytes
from ktx.transformers_compat import cache_argument, cache_of, keeps_own_cache

log = logging.getLogger("ktx.engine")
Logits = dict[
    Request, torch.Tensor
]  # [rows, vocabulary]: of all tokens of an echo, of what is to be chosen from, or none


class ForwardCancelled(Exception):
    """A forward computes more for those who have gone than the others lose by its end."""


class ModelRunner:
    """Several sequences in one forward, on pages. `alive` is the moment of the last sign of life, `pages` how many there are.

    Steps of up to `captured` requests may become CUDA graphs, which `capture` makes; 0: none.
    """

    supports_prefix_cache = True  # whether a sequence can begin with pages of another
    two_forms = False  # whether whole pages of a prompt are computed in another way than single tokens
    grain = PAGE_TOKENS  # a forward computes a prompt up to multiples of it: so its results do not depend on how the prompt is cut
    recurrent = False
    shared = False  # whether sequences are to begin with states of another; the engine says so
    captured = 0
    reason = ""  # why requests are computed one after another, where they are
    unsupported_reason = ""  # why steps are not captured, where that was asked for
    graphs: Graphs | None = None

    def __init__(self, model: Any, pages: int, captured: int = 0):
        self.model, self.pages, self.adapters = model, pages, adapters_of(model)
        self.two_forms = cpu.ops.has_wide() or any(isinstance(module, MLA) for module in model.modules())
        if captured and gpu_of(model) is not None:
            self.unsupported_reason = unsupported_reason(model)
            self.captured = 0 if self.unsupported_reason else captured
        spare = int(self.captured > 0)  # a page for rows of a graph that no request has
        self.cache = PagedCache(model.config, pages + spare, model.ktx.kv_dtype, more=int(hasattr(model, "mtp")))
        self.recurrent = self.cache.recurrent
        self.last_progress = time.monotonic()

    def capture(self, context: int) -> None:
        """Makes graphs of steps with up to `context` tokens a request, once the pools are there. What goes wrong is told, and costs only speed."""
        if not self.captured:
            return
        try:
            with self.adapters.step([], []):  # of steps without adapters, the others are computed kernel by kernel
                self.graphs = Graphs(self.model, self.cache, self.captured, context, self.pages)
                self.graphs.capture()
        except Exception as error:
            self.graphs = None
            offload.give_up(self.model)
            log.warning(
                "capturing CUDA graphs failed, steps will be launched kernel by kernel (--no-cuda-graphs does not try): %s: %s",
                type(error).__name__,
                error,
            )

    def largest_step(self, most: int, share: float = 1.0) -> int:
        """Tokens of a step whose activations fit into a share of the memory that is free beside weights and caches: `most`, or that halved; at least SMALLEST."""
        for device, each in step_bytes(self.model).items():
            free = device.memory[1] if device.gpu else memory()[1] - self.nbytes()
            while most > SMALLEST and most * each > share * free:
                most = max(SMALLEST, most // 2)
        return most

    def check(self, sampling: SamplingParams) -> None:
        """UsageError for what this model's forwards cannot give."""

    @torch.inference_mode()
    def run(self, parts: Sequence[ScheduledChunk]) -> Logits:
        """Raises Abandoned between two layers when most of it is for those who have gone; a graph is one piece."""
        replayed = self._replayed(parts)
        return self._forward(parts) if replayed is None else replayed

    def _replayed(self, parts: Sequence[ScheduledChunk]) -> Logits | None:
        """By a graph, if all parts are single tokens that logits are wanted of, and there is one."""
        if self.graphs is None or any(part.count != 1 or num_logits(part) != 1 or part.request.lora for part in parts):
            return None
        self.last_progress = time.monotonic()
        logits = self.graphs.step([Token(part.ids[0], part.start, part.request.pages) for part in parts])
        if logits is None:
            return None
        rows = to_cpu(self.model, logits, copy=True).split(1)
        return {part.request: row for part, row in zip(parts, rows, strict=True)}

    def _forward(self, parts: Sequence[ScheduledChunk]) -> Logits:
        spans = [
            SequenceSpan(
                p.request.id,
                p.start,
                p.count,
                p.request.pages,
                p.prompt,
                self.shared and not p.request.sampling.echo,
            )
            for p in parts
        ]
        batch = BatchMetadata(spans, lambda: self._look(parts))
        ids = torch.tensor([[token for part in parts for token in part.ids]])
        rows = [
            torch.arange(first + count - num_logits(part), first + count)
            for part, (first, count, _) in zip(parts, batch.rows, strict=True)
        ]
        echoes = [
            i for i, part in enumerate(parts) if part.request.sampling.echo
        ]  # logits of all rows: as many as there are tokens
        try:
            self.cache.begin(batch)
            with cpu.bf16_rows(batch.tokens, batch.wide(echoes)), self.adapters.step(*adapted(parts)):
                out = self.model(
                    input_ids=ids,
                    position_ids=batch.position_ids,
                    **cache_argument(self.model, self.cache),
                    use_cache=True,
                    logits_to_keep=torch.cat(rows),
                )
        finally:
            self.cache.batch = None
        found = to_cpu(self.model, out.logits)[0].split([len(row) for row in rows])
        self.cache.end(batch)
        return {part.request: logits for part, logits in zip(parts, found, strict=True)}

    def reads(self, parts: Sequence[ScheduledChunk]) -> tuple[int, int, int]:
        """Forwards that `run` makes of the parts, their tokens, and how many of the forwards make logits."""
        return 1, sum(part.count for part in parts), int(any(map(num_logits, parts)))

    def _look(self, parts: Sequence[ScheduledChunk]) -> None:
        self.last_progress = time.monotonic()
        gone = sum(part.count for part in parts if part.request.cancelled)
        if gone and gone > sum(self._again(part) for part in parts if not part.request.cancelled):
            raise ForwardCancelled

    def _again(self, part: ScheduledChunk) -> int:
        """Tokens that are computed again when a forward with this part is given up: a running state goes back to its beginning."""
        return part.start + part.count if self.recurrent else part.count

    def forget(self, request: Request) -> None:
        """The request's past is given up."""
        self.cache.forget(request.id)

    def snapshot(self, request: Request, tokens: int) -> Any:
        """What recurrent layers know of a request's first tokens, to be kept; None if that is not known."""
        return self.cache.snapshot(request.id, tokens)

    def resume(self, request: Request, snapshot: Any) -> None:
        self.cache.restore(request.id, snapshot, request.num_computed)

    def clear(self) -> None:
        self.cache.states.clear()
        self.cache.known.clear()
        self.cache.marked.clear()

    def nbytes(self) -> int:
        """Memory of the CPU that all keys and values take when they are filled."""
        return self.cache.nbytes(host=True)


class SequentialRunner(ModelRunner):
    """One sequence after another, each with a cache of its own: for models with an attention that is not ours.

    `in_chunks`: whether a prompt may be computed in several forwards; if not, it is computed in one, when its last part comes.
    """

    supports_prefix_cache = False
    grain = 4 * PAGE_TOKENS
    in_chunks = True

    def __init__(self, model: Any, pages: int):
        self.model, self.pages, self.adapters = model, pages, adapters_of(model)
        self.recurrent = True  # what a forward began to write cannot be taken back
        self.caches: dict[int, Any] = {}
        self.own_cache = keeps_own_cache(model)
        self.last_progress = time.monotonic()

    def check(self, sampling: SamplingParams) -> None:
        if sampling.echo and not self.in_chunks:
            raise UsageError(
                f"log-probabilities of a prompt: a {self.model.config.model_type} computes prompts in one piece; ask for those of the answer only"
            )

    @torch.inference_mode()
    def run(self, parts: Sequence[ScheduledChunk]) -> Logits:
        found = {}
        for part in parts:
            rows = []
            for start, count in self._pieces(part):
                self._look(parts)
                rows.append(self._forward_of(part, start, count))
            found[part.request] = (
                torch.cat(rows) if rows else torch.empty(0, self.model.config.vocab_size, dtype=torch.float32)
            )
        return found

    def _pieces(self, part: ScheduledChunk) -> list[tuple[int, int]]:
        """First token and tokens of the forwards that a part takes: of a prompt `grain` tokens at once, since a family's own code may add up otherwise in another
        number of them; an answer that is computed again comes token by token, as it came before.
        """
        first = part.start + part.prompt
        answer = [(at, 1) for at in range(first, part.start + part.count)]
        if not part.prompt or (not self.in_chunks and first < len(part.request.prompt)):
            return answer
        if not self.in_chunks:
            return [(0, first), *answer]
        cuts = [part.start, *range((part.start // self.grain + 1) * self.grain, first, self.grain), first]
        return [*((at, end - at) for at, end in pairwise(cuts)), *answer]

    def _forward_of(self, part: ScheduledChunk, start: int, count: int) -> torch.Tensor:
        """Logits of those of the tokens that the part wants them of."""
        request = part.request
        rows = max(0, start + count - max(start, part.start + part.count - num_logits(part)))
        span = SequenceSpan(request.id, start, count, (), max(0, min(count, len(request.prompt) - start)))
        ranges = (
            (span.lead_tokens, span.full_page_tokens) if span.full_page_tokens and not request.sampling.echo else ()
        )
        if not self.own_cache and request.id not in self.caches:
            self.caches[request.id] = KVCache(self.model.config, self.model.ktx.kv_dtype)
        whose = [(count, request.lora)], [(max(1, rows), request.lora)]
        with cpu.bf16_rows(count, ranges), self.adapters.step(*whose):
            out = self.model(
                input_ids=torch.tensor([request.ids[start : start + count]]),
                position_ids=torch.arange(start, start + count)[None],
                **cache_argument(self.model, self.caches.get(request.id)),
                use_cache=True,
                logits_to_keep=max(1, rows),
            )
        self.caches[request.id] = cache_of(out)
        logits = to_cpu(self.model, out.logits)[0]
        return logits[len(logits) - rows :]

    def reads(self, parts: Sequence[ScheduledChunk]) -> tuple[int, int, int]:
        forwards = sum(len(self._pieces(part)) for part in parts)
        return forwards, sum(part.count for part in parts), forwards

    def forget(self, request: Request) -> None:
        self.caches.pop(request.id, None)

    def clear(self) -> None:
        self.caches.clear()

    def nbytes(self) -> int:
        return 0


def adapters_of(model: Any) -> Adapters:
    """The LoRA adapters of a model; of one that ktx has not loaded: none."""
    found: Adapters = getattr(getattr(model, "ktx", None), "adapters", None) or Adapters()
    return found


def adapted(parts: Sequence[ScheduledChunk]) -> tuple[Step, Step]:
    """The adapters of a step's tokens, and of those whose logits are wanted."""
    tokens = [(part.count, part.request.lora) for part in parts]
    return tokens, [(num_logits(part), part.request.lora) for part in parts]


def to_cpu(model: Any, logits: torch.Tensor, copy: bool = False) -> torch.Tensor:
    """A model's logits on the CPU, where tokens are chosen; `copy`: even if they are there. Raises what went wrong in experts that its GPU handed over."""
    logits = logits.to("cpu", copy=copy)
    offload.check(model)
    return logits


def num_logits(part: ScheduledChunk) -> int:
    """How many of a part's last tokens need logits."""
    request = part.request
    if request.sampling.echo and part.start < len(request.prompt):
        return part.count
    return 1 + len(request.draft) if part.start + part.count >= len(request.ids) else 0
