"""Continuous batching: decides which tokens of which requests the next forward computes. No tensors: pages are numbers.

There are no separate prefill and decode phases. A request has tokens that are not computed yet: the rest of its prompt,
or the token that it sampled last. A forward computes as many as its budget allows. Requests are served in the order of
arrival. When pages run out, the youngest request is preempted: it frees its pages and recomputes them later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ktx.cache.page_pool import PAGE_TOKENS, PagePool, PartialPage, hash_page
from ktx.engine.budget import StepBudget
from ktx.engine.request import Request

# A quarter of the budget, at least a page, is for the prompts behind the oldest one, shortest first, so that a short
# prompt need not wait for a long one.
SHORT_PROMPT_DIVISOR = 4
# Prompt tokens in a chunk that needs the logits of all of them, because each takes as much memory as the vocabulary.
MAX_ECHO_TOKENS = 256


@dataclass(frozen=True)
class ScheduledChunk:
    """Tokens of a request in a forward: `count` tokens from `start` on; tokens past the end of its ids are draft
    tokens.
    """

    request: Request
    start: int
    count: int

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return (self.request.ids + self.request.draft)[self.start : self.start + self.count]

    @property
    def num_prompt_tokens(self) -> int:
        """How many of the tokens, the first ones, belong to the prompt."""
        return max(0, min(self.count, len(self.request.prompt) - self.start))

    @property
    def is_decode(self) -> bool:
        """Whether the chunk starts at the request's latest token: its forward samples the next one and verifies the
        draft.
        """
        return self.start + 1 == len(self.request.ids)


def common_prefix_len(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of ids that two sequences have in common at their beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def num_pages(tokens: int) -> int:
    """Returns the number of pages for `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


class PageStore(Protocol):
    """A second level of the prefix cache, see ktx.cache.disk."""

    def has(self, key: bytes) -> bool:
        """Whether a page with this hash is stored."""

    def put(self, key: bytes, page: int) -> None:
        """Stores a full page."""

    def fetch(self, key: bytes, page: int) -> bool:
        """Fills a page of the pool; False when that fails."""


class Scheduler:
    """Decides what each forward computes and which pages hold it. `waiting` and `running` are in the order of arrival.

    Args:
        pages: the page allocator.
        max_batch: maximum number of running requests.
        budget: limits the prompt tokens of a step.
        prefix_caching: enables the prefix cache.
        recurrent: the model has recurrent layers, whose states belong to sequences and not to pages.
        on_free: called with a request whose computed tokens are freed.
        on_restore: called with a request that starts from a snapshot of the recurrent layers, and the snapshot.
        on_snapshot: returns a snapshot of the recurrent layers after a request's first tokens; None if there is none.
        page_kernels_differ: the model computes full pages of a prompt with other kernels than single tokens, with
            other rounding errors; then a partial page inside a prompt is reused only in full.
        store: a second level of the prefix cache.
        granularity: chunks of a prompt end at multiples of this number of tokens, a number of full pages, and at the
            prompt's end.
    """

    def __init__(
        self,
        pages: PagePool,
        max_batch: int,
        budget: StepBudget,
        prefix_caching: bool = True,
        recurrent: bool = False,  # states belong to sequences, not to pages
        on_free: Callable[[Request], None] = lambda request: None,
        on_restore: Callable[[Request, Any], None] = lambda request, snapshot: None,
        on_snapshot: Callable[[Request, int], Any] = lambda request, tokens: None,
        page_kernels_differ: bool = False,  # for full pages and for single tokens
        store: PageStore | None = None,
        granularity: int = PAGE_TOKENS,  # of a prompt's chunks
    ):
        """Starts without requests. The callbacks let the runner keep its recurrent states in step with the pages."""
        self.pages, self.max_batch, self.budget, self.granularity = pages, max_batch, budget, granularity
        self.prefix_caching, self.recurrent, self.on_free, self.on_restore = (
            prefix_caching,
            recurrent,
            on_free,
            on_restore,
        )
        self.on_snapshot, self.page_kernels_differ, self.store = on_snapshot, page_kernels_differ, store
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.pages_in_flight: dict[bytes, Request] = {}  # hashes of pages that a running request is about to compute
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # prompt tokens, and how many of them came from the prefix cache

    # ---- adding, freeing and preempting requests

    def add(self, request: Request) -> None:
        """Appends a request to the waiting queue."""
        self._update_hashes(request)
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Removes a request from its queue; its pages stay in the prefix cache."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self._free(request)

    def _free(self, request: Request) -> None:
        """Frees a request's pages. A last page that is not full stays in the prefix cache as a partial page; with
        recurrent layers only together with a snapshot of their states, which a request that continues there needs.
        """
        page_index, remainder = divmod(request.num_computed, PAGE_TOKENS)
        cacheable = bool(remainder) and self._cacheable(request)
        snapshot = self.on_snapshot(request, request.num_computed) if cacheable and self.recurrent else None
        if cacheable and (snapshot is not None or not self.recurrent):
            partial = PartialPage(
                request.pages[page_index],
                self._parent_hash(request, page_index),
                tuple(request.ids[page_index * PAGE_TOKENS : request.num_computed]),
            )
            self.pages.free(request.pages[page_index + 1 :])
            self.pages.cache_partial(partial)
            if self.recurrent:
                self.pages.save_snapshot(partial.hash, snapshot)
            del request.pages[page_index:]
        self.pages.free(request.pages)
        request.pages, request.num_computed, request.draft = [], 0, []
        self.pages_in_flight = {key: owner for key, owner in self.pages_in_flight.items() if owner is not request}
        self.on_free(request)

    def preempt(self, request: Request) -> None:
        """Moves a running request back to its place in the waiting queue; its tokens are recomputed."""
        self.running.remove(request)
        self._free(request)
        request.preempted += 1
        self.preemptions += 1
        self.waiting.insert(sum(other.id < request.id for other in self.waiting), request)

    def undo(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Handles a forward that did not finish. Keys and values are written again; recurrent states are invalid, so
        their requests are preempted.
        """
        if self.recurrent:
            for chunk in chunks:
                if chunk.request in self.running:
                    self.preempt(chunk.request)

    # ---- scheduling a forward

    def schedule(self) -> list[ScheduledChunk]:
        """Returns the chunks of the next forward; empty when there is nothing to compute.

        Decode tokens of all requests come first, with their draft tokens; then prompts share the budget.
        """
        self._admit()
        # After a failed forward each of its requests is computed alone, until the failing one is found.
        suspect = next((request for request in self.running if request.isolated), None)
        chunks: list[ScheduledChunk] = []
        for request in [suspect] if suspect else list(self.running):
            if request.num_uncomputed == 1 and request in self.running:
                self._add_chunk(chunks, request, 1 + len(request.draft))
        prompts = [request for request in ([suspect] if suspect else self.running) if request.num_uncomputed > 1]
        for request in prompts:
            self._match_prefix(request)
        ready = [request for request in prompts if not self._waits_for_prefix(request)]
        # Never nothing: if there is no other work, prompts that wait for each other's pages are computed.
        self._prefill(chunks, ready if ready or chunks else prompts)
        return chunks

    def _prefill(self, chunks: list[ScheduledChunk], prompts: list[Request]) -> None:
        """Schedules chunked prefill. Prompts share the budget: the oldest one takes most of it, the shortest of the
        others the rest, and what they leave returns to the oldest.

        The oldest prompt always gets at least `granularity` tokens, or the budget if that is smaller, however many
        short prompts arrive.
        """
        if not prompts:
            return
        oldest, others = prompts[0], sorted(prompts[1:], key=lambda request: request.num_uncomputed)
        # `chunks` has the decode tokens so far: if there are any, the latency target limits the prompts
        budget_left = self.budget.max_prompt_tokens(oldest.num_computed, bool(chunks))
        min_tokens = min(budget_left, self.granularity)
        budget_others = (
            budget_left - oldest.num_uncomputed
            if oldest.num_uncomputed < budget_left
            else max(budget_left // SHORT_PROMPT_DIVISOR, min_tokens)
        )
        for request in others:
            if request in self.running:
                count = self._add_chunk(chunks, request, min(request.num_uncomputed, budget_others))
                budget_left, budget_others = budget_left - count, budget_others - count
        if oldest in self.running:
            self._add_chunk(chunks, oldest, min(oldest.num_uncomputed, max(budget_left, min_tokens)))

    def _add_chunk(self, chunks: list[ScheduledChunk], request: Request, count: int) -> int:
        """Adds a chunk and returns its number of tokens; 0 when there are no pages for it, or too little budget.

        When pages run out, first the request's draft is dropped, then the youngest running requests are preempted,
        whose chunks are removed from `chunks`; if that reaches `request` itself, it waits for a later step.
        """
        count = self._align_chunk(request, min(count, MAX_ECHO_TOKENS) if request.sampling.echo else count)
        if not count:
            return 0
        while not self._allocate(request, request.num_computed + count):
            if request.draft:
                request.draft, count = [], 1
                continue
            victim = self.running[-1]
            chunks[:] = [chunk for chunk in chunks if chunk.request is not victim]
            self.preempt(victim)
            if victim is request:
                return 0
        chunks.append(ScheduledChunk(request, request.num_computed, count))
        return count

    def _align_chunk(self, request: Request, count: int) -> int:
        """Returns how many of `count` tokens a chunk computes.

        Inside a prompt's full pages a chunk ends at a multiple of `granularity`: each page is computed in one forward,
        so that its content does not depend on the budget. The tokens after the last full page may be cut anywhere, but
        not with recurrent layers, because their sums depend on how tokens are split (SequenceSpan.piece_lengths). A
        step budget below one page cuts anywhere.
        """
        end, prompt = request.num_computed + count, len(request.prompt)
        if self.budget.base_tokens >= PAGE_TOKENS and (
            end < prompt // PAGE_TOKENS * PAGE_TOKENS or (self.recurrent and end < prompt)
        ):
            end = end // self.granularity * self.granularity
        return max(0, end - request.num_computed)

    def _allocate(self, request: Request, tokens: int) -> bool:
        """Allocates pages for `tokens` tokens of a request; False when there are none."""
        allocated = self.pages.allocate(max(0, num_pages(tokens) - len(request.pages)))
        request.pages += allocated or []
        return allocated is not None

    def commit(self, request: Request, count: int) -> None:
        """Records that `count` more tokens of a request are computed and stay in the KV cache (rejected draft tokens do
        not), and registers its new full pages in the prefix cache.
        """
        first_page, request.num_computed = request.num_computed // PAGE_TOKENS, request.num_computed + count
        self._update_hashes(request)
        for i in range(first_page, request.num_computed // PAGE_TOKENS):
            self.pages_in_flight.pop(request.page_hashes[i], None)
            if self._cacheable(request):
                self.pages.register_hash(request.pages[i], request.page_hashes[i])
                if self.recurrent and (snapshot := self.on_snapshot(request, (i + 1) * PAGE_TOKENS)) is not None:
                    self.pages.save_snapshot(request.page_hashes[i], snapshot)
                if self.store is not None:
                    self.store.put(request.page_hashes[i], request.pages[i])

    # ---- admission and prefix cache

    def _admit(self) -> None:
        """Moves waiting requests to the running ones while there are batch slots and pages, in the order of arrival.

        A request is admitted only if there are pages for it and all running ones together, so that it does not preempt
        one of them at once. Requests whose prefix is just being computed are skipped.
        """
        for request in list(self.waiting):
            if len(self.running) >= self.max_batch:
                return
            if self._waits_for_prefix(request):
                continue
            if (
                self.running
                and self._num_pages_needed(request) + sum(map(self._num_pages_needed, self.running))
                > self.pages.available
            ):
                return
            self.waiting.remove(request)
            self.running.insert(sum(other.id < request.id for other in self.running), request)
            self._match_prefix(request)
            if request.cached is None:
                request.cached = request.num_computed
                self.prefix_queries, self.prefix_hits = (
                    self.prefix_queries + len(request.prompt),
                    self.prefix_hits + request.num_computed,
                )
            for key in request.page_hashes[request.num_computed // PAGE_TOKENS :]:
                self.pages_in_flight.setdefault(key, request)

    def _num_pages_needed(self, request: Request) -> int:
        """Returns the number of pages that a request needs for its present tokens and one more, without pages that
        running requests share.
        """
        num_shared = len(request.pages)
        while self._cacheable(request) and num_shared < len(request.page_hashes):
            page = self.pages.find(request.page_hashes[num_shared])
            if page is None or not self.pages.ref_counts[page]:
                break
            num_shared += 1
        return num_pages(len(request.ids) + 1) - num_shared

    def _cacheable(self, request: Request) -> bool:
        """Whether the prefix cache applies: with `echo` all logits of the prompt are needed."""
        return self.prefix_caching and not request.sampling.echo

    def _update_hashes(self, request: Request) -> None:
        """Appends the hashes of the request's new full pages."""
        while (len(request.page_hashes) + 1) * PAGE_TOKENS <= len(request.ids):
            start, parent_hash = (
                len(request.page_hashes) * PAGE_TOKENS,
                request.page_hashes[-1] if request.page_hashes else request.salt,
            )
            request.page_hashes.append(hash_page(parent_hash, request.ids[start : start + PAGE_TOKENS]))

    def _parent_hash(self, request: Request, page: int) -> bytes:
        """Returns the hash of the page before `page`; the salt before the first one."""
        return request.page_hashes[page - 1] if page else request.salt

    def _next_hash(self, request: Request) -> bytes | None:
        """Returns the hash of the next page to look up, None if it cannot come from the cache: only full pages before
        the last token do.
        """
        page_index = request.num_computed // PAGE_TOKENS
        usable = (
            self._cacheable(request)
            and request.num_computed == page_index * PAGE_TOKENS == len(request.pages) * PAGE_TOKENS
        )
        return request.page_hashes[page_index] if usable and (page_index + 1) * PAGE_TOKENS < len(request.ids) else None

    def _match_prefix(self, request: Request) -> None:
        """Takes over pages of the prefix cache, instead of computing them. With recurrent layers only before the first
        chunk, and only up to a page with a snapshot of their states.
        """
        num_before = request.num_computed
        if self.recurrent and num_before:
            return
        while (page_hash := self._next_hash(request)) is not None and (page := self._find_page(page_hash)) is not None:
            request.pages.append(page)
            request.num_computed += PAGE_TOKENS
        if not self._reuse_partial(request) and self.recurrent:
            self._restore_snapshot(request)
        # pages that another request has computed since this one's admission, which counted the earlier ones
        if num_before and request.num_computed > num_before:
            self.prefix_hits += request.num_computed - num_before
            request.cached = (request.cached or 0) + request.num_computed - num_before

    def _find_page(self, page_hash: bytes) -> int | None:
        """Returns a page with this hash and increments its reference count; None if there is none.

        A page that only the store has (the prefix cache on disk) is read into a newly allocated one.
        """
        page = self.pages.find(page_hash)
        if page is not None:
            self.pages.touch(page)
            return page
        if self.store is None or not self.store.has(page_hash):
            return None
        allocated = self.pages.allocate(1)
        if allocated is not None and not self.store.fetch(page_hash, allocated[0]):
            self.pages.free(allocated)
            allocated = None
        if allocated is None:
            return None
        self.pages.register_hash(allocated[0], page_hash)
        return allocated[0]

    def _reuse_partial(self, request: Request) -> bool:
        """Continues a partial page where another sequence ended, instead of computing it; returns whether it does.

        Where only a page that was computed in one forward gives the same numbers, and with recurrent layers, a partial
        page is taken only from a sequence that ended exactly there, as a conversation's last turn does.
        """
        page_index = len(request.pages)
        if not self._cacheable(request) or request.num_computed != page_index * PAGE_TOKENS:
            return False
        partial = self.pages.partial_pages.get(self._parent_hash(request, page_index))
        if partial is None:
            return False
        num_common = common_prefix_len(partial.ids, request.ids[request.num_computed : -1])
        exact_only = self.recurrent or (
            self.page_kernels_differ and (page_index + 1) * PAGE_TOKENS <= len(request.prompt)
        )
        if (
            not num_common
            or (exact_only and num_common < len(partial.ids))
            or (self.recurrent and partial.hash not in self.pages.snapshots)
        ):
            return False
        self.pages.reuse_partial(partial)
        request.pages.append(partial.page)
        request.num_computed += num_common
        if self.recurrent:
            self.on_restore(request, self.pages.snapshots.pop(partial.hash))
        return True

    def _restore_snapshot(self, request: Request) -> None:
        """Frees matched pages back to the last one with a snapshot, and restores that."""
        while request.pages and request.page_hashes[len(request.pages) - 1] not in self.pages.snapshots:
            self.pages.free([request.pages.pop()])
            request.num_computed -= PAGE_TOKENS
        if request.pages:
            self.on_restore(request, self.pages.snapshots[request.page_hashes[len(request.pages) - 1]])

    def _waits_for_prefix(self, request: Request) -> bool:
        """Whether another request is just computing the page that this one needs next; then this one waits for it.

        So requests with a common prefix that arrive together compute it only once.
        """
        page_index = len(request.pages)
        if (
            request.num_computed != page_index * PAGE_TOKENS
            or not self._cacheable(request)
            or (self.recurrent and page_index)
        ):
            return False
        while page_index < len(request.page_hashes) and self.pages.find(request.page_hashes[page_index]) is not None:
            page_index += 1
        if (page_index + 1) * PAGE_TOKENS >= len(request.ids):
            return False
        return self.pages_in_flight.get(request.page_hashes[page_index], request) is not request

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages and requests agree: only running requests have pages, each has enough of
        them, and both queues are in the order of arrival.
        """
        self.pages.check_integrity(request.pages for request in self.running)
        assert not any(request.pages or request.num_computed for request in self.waiting), (
            "a waiting request holds pages"
        )
        for request in self.running:
            assert request.num_computed <= len(request.pages) * PAGE_TOKENS, (
                "a request has more tokens than its pages hold"
            )
        assert set(map(id, self.pages_in_flight.values())) <= set(map(id, self.running)), (
            "a page in flight has no running request"
        )
        for queue in (self.waiting, self.running):
            assert [r.id for r in queue] == sorted(r.id for r in queue), "requests are out of order"
