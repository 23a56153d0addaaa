"""Who computes what in the next forward. No tensors: pages are numbers.

There are no phases. A request has tokens that are not computed yet, the rest of its prompt or the one it has just chosen; a forward
takes as many as its budget allows. Requests are served in the order they came. When pages run out, the youngest one
gives its own back and computes them again later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ktx.cache.page_pool import PAGE_TOKENS, PagePool, PartialPage, hash_page
from ktx.engine.budget import StepBudget
from ktx.engine.request import Request

SHORT_PROMPT_DIVISOR = 4  # a quarter of the budget, a page at least, is for prompts behind the oldest one, shortest first: a short question need not wait for a long one
ECHO = 256  # tokens of a prompt computed at once where all of their logits are wanted: each takes as much memory as the vocabulary


@dataclass(frozen=True)
class ScheduledChunk:
    """Tokens of a request in a forward: `count` from `start` on; those past the end of its ids are its draft."""

    request: Request
    start: int
    count: int

    @property
    def ids(self) -> list[int]:
        return (self.request.ids + self.request.draft)[self.start : self.start + self.count]

    @property
    def prompt(self) -> int:
        """How many of the tokens, the first ones, are the prompt's."""
        return max(0, min(self.count, len(self.request.prompt) - self.start))

    @property
    def answers(self) -> bool:
        """Whether these are the request's latest token and its draft, after which the next one is chosen."""
        return self.start + 1 == len(self.request.ids)


def common_prefix_len(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


class PageStore(Protocol):
    """Where pages are kept beside the pool, see ktx.cache.disk."""

    def has(self, key: bytes) -> bool:
        """Whether there is such a page."""

    def put(self, key: bytes, page: int) -> None:
        """The page is full."""

    def fetch(self, key: bytes, page: int) -> bool:
        """Fills a page of the pool; False when that is not possible."""


class Scheduler:
    """`waiting` and `running` are in the order of arrival. `released` is told of a request whose past is given up,
    `resumed` of one that begins with what recurrent layers knew somewhere; `state` tells what they know of a request's first
    tokens, None if that is not known.

    `two_forms`: the model computes whole pages of a prompt in another way than single tokens, with other rounding errors.
    `grain`: a prompt is computed up to multiples of so many tokens, whole pages, and to its end.
    """

    def __init__(
        self,
        pages: PagePool,
        max_batch: int,
        budget: StepBudget,
        share: bool = True,
        recurrent: bool = False,
        released: Callable[[Request], None] = lambda request: None,
        resumed: Callable[[Request, Any], None] = lambda request, snapshot: None,
        state: Callable[[Request, int], Any] = lambda request, tokens: None,
        two_forms: bool = False,
        store: PageStore | None = None,
        grain: int = PAGE_TOKENS,
    ):
        self.pages, self.max_batch, self.budget, self.grain = pages, max_batch, budget, grain
        self.share, self.recurrent, self.on_free, self.on_restore = share, recurrent, released, resumed
        self.on_snapshot, self.page_aligned_numerics, self.store = state, two_forms, store
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.pages_in_flight: dict[bytes, Request] = {}  # pages that a running request is about to compute
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # prompt tokens, and how many of them were in the cache

    # ---- requests come and go

    def add(self, request: Request) -> None:
        self._extend_keys(request)
        self.waiting.append(request)

    def drop(self, request: Request) -> None:
        """Takes a request out, wherever it is; its pages stay findable."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self._free(request)

    def _free(self, request: Request) -> None:
        at, beyond = divmod(request.num_computed, PAGE_TOKENS)
        share = bool(beyond) and self._may_share(request)
        state = self.on_snapshot(request, request.num_computed) if share and self.recurrent else None
        if share and (state is not None or not self.recurrent):
            tail = PartialPage(
                request.pages[at],
                self._before(request, at),
                tuple(request.ids[at * PAGE_TOKENS : request.num_computed]),
            )
            self.pages.free(request.pages[at + 1 :])
            self.pages.cache_partial(tail)
            if self.recurrent:
                self.pages.save_snapshot(tail.key, state)
            del request.pages[at:]
        self.pages.free(request.pages)
        request.pages, request.num_computed, request.draft = [], 0, []
        self.pages_in_flight = {key: maker for key, maker in self.pages_in_flight.items() if maker is not request}
        self.on_free(request)

    def preempt(self, request: Request) -> None:
        """Back into the queue, at its place; what it had is computed again."""
        self.running.remove(request)
        self._free(request)
        request.preempted += 1
        self.preemptions += 1
        self.waiting.insert(sum(other.id < request.id for other in self.waiting), request)

    def undo(self, parts: Sequence[ScheduledChunk]) -> None:
        """A forward of the parts came to no end. Keys and values are written again; a running state is not what it was, so its request begins anew."""
        if self.recurrent:
            for part in parts:
                if part.request in self.running:
                    self.preempt(part.request)

    # ---- a forward

    def schedule(self) -> list[ScheduledChunk]:
        """What the next forward computes; empty when there is nothing to do."""
        self._admit()
        suspect = next((request for request in self.running if request.isolated), None)
        parts: list[ScheduledChunk] = []
        for request in [suspect] if suspect else list(self.running):
            if request.num_uncomputed == 1 and request in self.running:
                self._add_chunk(parts, request, 1 + len(request.draft))
        prompts = [request for request in ([suspect] if suspect else self.running) if request.num_uncomputed > 1]
        for request in prompts:
            self._match_prefix(request)
        ready = [request for request in prompts if not self._waits_for_prefix(request)]
        self._prefill(parts, ready if ready or parts else prompts)
        return parts

    def _prefill(self, parts: list[ScheduledChunk], prompts: list[Request]) -> None:
        """Prompts share the budget: the oldest takes most of it, the shortest of the others the rest, and what is left goes back to it.

        It is never left with less than what it can go on by, however small the budget and however many short ones come.
        """
        if not prompts:
            return
        head, others = prompts[0], sorted(prompts[1:], key=lambda request: request.num_uncomputed)
        left = self.budget.tokens(head.num_computed, bool(parts))
        least = min(left, self.grain)
        rest = left - head.num_uncomputed if head.num_uncomputed < left else max(left // SHORT_PROMPT_DIVISOR, least)
        for request in others:
            if request in self.running:
                count = self._add_chunk(parts, request, min(request.num_uncomputed, rest))
                left, rest = left - count, rest - count
        if head in self.running:
            self._add_chunk(parts, head, min(head.num_uncomputed, max(left, least)))

    def _add_chunk(self, parts: list[ScheduledChunk], request: Request, count: int) -> int:
        """Adds a part and returns its tokens, 0 when there are no pages for it, or too little budget."""
        count = self._in_pages(request, min(count, ECHO) if request.sampling.echo else count)
        if not count:
            return 0
        while not self._grow(request, request.num_computed + count):
            if request.draft:
                request.draft, count = [], 1
                continue
            victim = self.running[-1]
            parts[:] = [part for part in parts if part.request is not victim]
            self.preempt(victim)
            if victim is request:
                return 0
        parts.append(ScheduledChunk(request, request.num_computed, count))
        return count

    def _in_pages(self, request: Request, count: int) -> int:
        """A prompt's full pages are computed whole, by whatever budget: so their content does not depend on it. Recurrent layers want its end whole too."""
        end, prompt = request.num_computed + count, len(request.prompt)
        if self.budget.step >= PAGE_TOKENS and (
            end < prompt // PAGE_TOKENS * PAGE_TOKENS or (self.recurrent and end < prompt)
        ):
            end = end // self.grain * self.grain
        return max(0, end - request.num_computed)

    def _grow(self, request: Request, tokens: int) -> bool:
        taken = self.pages.allocate(max(0, pages_for(tokens) - len(request.pages)))
        request.pages += taken or []
        return taken is not None

    def commit(self, request: Request, count: int) -> None:
        """`count` more tokens are computed and stay."""
        before, request.num_computed = request.num_computed // PAGE_TOKENS, request.num_computed + count
        self._extend_keys(request)
        for i in range(before, request.num_computed // PAGE_TOKENS):
            self.pages_in_flight.pop(request.page_hashes[i], None)
            if self._may_share(request):
                self.pages.register_hash(request.pages[i], request.page_hashes[i])
                if self.recurrent and (state := self.on_snapshot(request, (i + 1) * PAGE_TOKENS)) is not None:
                    self.pages.save_snapshot(request.page_hashes[i], state)
                if self.store is not None:
                    self.store.put(request.page_hashes[i], request.pages[i])

    # ---- admission and what is shared

    def _admit(self) -> None:
        for request in list(self.waiting):
            if len(self.running) >= self.max_batch:
                return
            if self._waits_for_prefix(request):
                continue
            if self.running and self._wanted(request) + sum(map(self._wanted, self.running)) > self.pages.available:
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

    def _wanted(self, request: Request) -> int:
        """Pages that it takes to finish what the request has now, and one token more."""
        known = len(request.pages)
        while self._may_share(request) and known < len(request.page_hashes):
            page = self.pages.find(request.page_hashes[known])
            if page is None or not self.pages.ref_counts[page]:
                break
            known += 1
        return pages_for(len(request.ids) + 1) - known

    def _may_share(self, request: Request) -> bool:
        return self.share and not request.sampling.echo

    def _extend_keys(self, request: Request) -> None:
        """Keys of all full pages of the request's ids."""
        while (len(request.page_hashes) + 1) * PAGE_TOKENS <= len(request.ids):
            at, before = (
                len(request.page_hashes) * PAGE_TOKENS,
                request.page_hashes[-1] if request.page_hashes else request.salt,
            )
            request.page_hashes.append(hash_page(before, request.ids[at : at + PAGE_TOKENS]))

    def _before(self, request: Request, page: int) -> bytes:
        return request.page_hashes[page - 1] if page else request.salt

    def _next_key(self, request: Request) -> bytes | None:
        """The key of the page that comes next and need not be computed if it is there: of full pages before the last token."""
        at = request.num_computed // PAGE_TOKENS
        usable = (
            self._may_share(request) and request.num_computed == at * PAGE_TOKENS == len(request.pages) * PAGE_TOKENS
        )
        return request.page_hashes[at] if usable and (at + 1) * PAGE_TOKENS < len(request.ids) else None

    def _match_prefix(self, request: Request) -> None:
        """Takes over what is there already. Where layers have a running state, only up to where one was kept."""
        start = request.num_computed
        if self.recurrent and start:
            return
        while (key := self._next_key(request)) is not None and (page := self._found(key)) is not None:
            request.pages.append(page)
            request.num_computed += PAGE_TOKENS
        if not self._adopt_tail(request) and self.recurrent:
            self._back_to_snapshot(request)
        if start and request.num_computed > start:
            self.prefix_hits += request.num_computed - start
            request.cached = (request.cached or 0) + request.num_computed - start

    def _found(self, key: bytes) -> int | None:
        """A page with this content, held for one more user."""
        page = self.pages.find(key)
        if page is not None:
            self.pages.touch(page)
            return page
        if self.store is None or not self.store.has(key):
            return None
        room = self.pages.allocate(1)
        if room is not None and not self.store.fetch(key, room[0]):
            self.pages.free(room)
            room = None
        if room is None:
            return None
        self.pages.register_hash(room[0], key)
        return room[0]

    def _adopt_tail(self, request: Request) -> bool:
        """Goes on where another sequence ended. A page of the prompt that would be computed as a whole is taken only from one
        that ended just there, as a conversation's last turn does.
        """
        at = len(request.pages)
        if not self._may_share(request) or request.num_computed != at * PAGE_TOKENS:
            return False
        tail = self.pages.tails.get(self._before(request, at))
        if tail is None:
            return False
        same = common_prefix_len(tail.ids, request.ids[request.num_computed : -1])
        inside = self.recurrent or (self.page_aligned_numerics and (at + 1) * PAGE_TOKENS <= len(request.prompt))
        if not same or (inside and same < len(tail.ids)) or (self.recurrent and tail.key not in self.pages.snapshots):
            return False
        self.pages.reuse_partial(tail)
        request.pages.append(tail.page)
        request.num_computed += same
        if self.recurrent:
            self.on_restore(request, self.pages.snapshots.pop(tail.key))
        return True

    def _back_to_snapshot(self, request: Request) -> None:
        while request.pages and request.page_hashes[len(request.pages) - 1] not in self.pages.snapshots:
            self.pages.free([request.pages.pop()])
            request.num_computed -= PAGE_TOKENS
        if request.pages:
            self.on_restore(request, self.pages.snapshots[request.page_hashes[len(request.pages) - 1]])

    def _waits_for_prefix(self, request: Request) -> bool:
        """Whether another one is just computing the page that this one would need next."""
        at = len(request.pages)
        if request.num_computed != at * PAGE_TOKENS or not self._may_share(request) or (self.recurrent and at):
            return False
        while at < len(request.page_hashes) and self.pages.find(request.page_hashes[at]) is not None:
            at += 1
        if (at + 1) * PAGE_TOKENS >= len(request.ids):
            return False
        return self.pages_in_flight.get(request.page_hashes[at], request) is not request

    def check_integrity(self) -> None:
        """AssertionError unless pages and requests agree."""
        self.pages.check_integrity(request.pages for request in self.running)
        assert not any(request.pages or request.num_computed for request in self.waiting), (
            "a waiting request holds pages"
        )
        for request in self.running:
            assert request.num_computed <= len(request.pages) * PAGE_TOKENS, "a request has more tokens than room"
        assert set(map(id, self.pages_in_flight.values())) <= set(map(id, self.running)), "a page is made by nobody"
        for queue in (self.waiting, self.running):
            assert [r.id for r in queue] == sorted(r.id for r in queue), "requests are out of order"
