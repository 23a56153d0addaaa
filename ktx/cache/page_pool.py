"""Which pages of a pool hold what, and for whom. Numbers only: the keys and values lie in ktx.cache.paged.

A page that is full has a key, the hash of everything up to its end, so that any sequence which begins alike can share it. The last page
of a sequence that has ended is rarely full: it is left as a tail, and one that goes on there takes it over. A page nobody uses stays
findable until its room is wanted; the one that was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from ktx.errors import UsageError

PAGE_TOKENS = 64  # positions of a page: one block of the attention kernels
SNAPSHOTS = 8  # states of recurrent layers that are kept; one is tens of megabytes


def hash_page(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a page that holds `ids`, after the page with the key `before` (b"" for the first)."""
    return blake2b(before + np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class PartialPage:
    """A page that is not full: what it holds, after a page with the key `before`."""

    page: int
    before: bytes
    ids: tuple[int, ...]

    @property
    def key(self) -> bytes:
        """Of its snapshot."""
        return hash_page(self.before, self.ids)


class PagePool:
    """`count` pages. A page is free, idle (it has a key or is a tail, and nobody uses it) or used by one or more sequences."""

    def __init__(self, count: int):
        if count < 1:
            raise UsageError(f"a cache needs at least one page, it has {count}")
        self.count = count
        self.free_pages = list(range(count - 1, -1, -1))
        self.ref_counts = [0] * count
        self.hash_of: dict[int, bytes] = {}
        self.page_of_hash: dict[bytes, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self.tails: dict[bytes, PartialPage] = {}  # by what comes before them, the latest of each
        self.tail_of: dict[int, PartialPage] = {}
        self.snapshots: OrderedDict[bytes, Any] = (
            OrderedDict()
        )  # what recurrent layers knew at the end of a page or tail

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self.free_pages) + len(self.idle)

    @property
    def used(self) -> int:
        return self.count - self.available

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages of unknown content for one user; None, and nothing changes, when there are not as many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self.free_pages:
                self._forget(next(iter(self.idle)))
            page = self.free_pages.pop()
            self.ref_counts[page] = 1
            taken.append(page)
        return taken

    def _forget(self, page: int) -> None:
        del self.idle[page]
        if page in self.tail_of:
            tail = self.tail_of.pop(page)
            del self.tails[tail.before]
            self.snapshots.pop(tail.key, None)
        else:
            key = self.hash_of.pop(page)
            del self.page_of_hash[key]
            self.snapshots.pop(key, None)
        self.free_pages.append(page)

    def cache_partial(self, tail: PartialPage) -> None:
        """The only user of a page that is not full goes, and leaves what it holds to whoever goes on there."""
        self.ref_counts[tail.page] -= 1
        if tail.before in self.tails:
            self._forget(self.tails[tail.before].page)
        self.tails[tail.before] = self.tail_of[tail.page] = tail
        self.idle[tail.page] = None

    def reuse_partial(self, tail: PartialPage) -> None:
        """One who goes on writing it takes a tail."""
        del self.idle[tail.page], self.tail_of[tail.page], self.tails[tail.before]
        self.ref_counts[tail.page] = 1

    def find(self, key: bytes) -> int | None:
        """The page with this content, without using it."""
        return self.page_of_hash.get(key)

    def touch(self, page: int) -> None:
        """One more user of a page that has a key."""
        self.idle.pop(page, None)
        self.ref_counts[page] += 1

    def register_hash(self, page: int, key: bytes) -> None:
        """The page is full and will not change. If another already holds the same, that one stays the one to be found."""
        if key not in self.page_of_hash and page not in self.hash_of:
            self.hash_of[page], self.page_of_hash[key] = key, page

    def free(self, pages: Iterable[int]) -> None:
        """One user less of each. Of one sequence's pages the last are given to others first: a beginning serves more."""
        for page in reversed(list(pages)):
            self.ref_counts[page] -= 1
            if self.ref_counts[page]:
                continue
            if page in self.hash_of:
                self.idle[page] = None
            else:
                self.free_pages.append(page)

    def save_snapshot(self, key: bytes, snapshot: Any) -> None:
        """Recurrent layers' states at the end of a page; few are kept, the latest used."""
        self.snapshots[key] = snapshot
        self.snapshots.move_to_end(key)
        while len(self.snapshots) > SNAPSHOTS:
            self.snapshots.popitem(last=False)

    def reset_prefix_cache(self) -> None:
        """Forgets what nobody uses."""
        for page in list(self.idle):
            self._forget(page)

    def check_integrity(self, held: Iterable[Iterable[int]]) -> None:
        """AssertionError unless every page is in exactly one state and `held`, the pages of each sequence, is who uses them."""
        users = [0] * self.count
        for pages in held:
            for page in pages:
                users[page] += 1
        free, idle, used = set(self.free_pages), set(self.idle), {page for page in range(self.count) if users[page]}
        assert users == self.ref_counts, "pages are used by others than who holds them"
        assert len(self.free_pages) == len(free), "a page is free twice"
        assert not free & idle and not free & used and not idle & used, "a page is in two states"
        assert free | idle | used == set(range(self.count)), "a page is lost"
        assert {page: key for key, page in self.page_of_hash.items()} == self.hash_of, "keys and pages do not agree"
        assert idle <= set(self.hash_of) | set(self.tail_of), "an idle page has no key"
        assert set(self.tail_of) <= idle - set(self.hash_of), "a tail is in use"
        assert {tail.page: tail for tail in self.tails.values()} == self.tail_of, "tails and pages do not agree"
        assert not free & set(self.hash_of), "a free page has a key"
