"""Page allocator and prefix cache. Bookkeeping only: the keys and values are in ktx.cache.paged.

A full page has a hash of all tokens up to its end, so any sequence that begins with the same tokens can share it. The
last page of a finished sequence is rarely full: it is cached as a partial page, and a sequence that continues there
takes it over. A page without users stays cached until its capacity is needed; the least recently used one is evicted
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from ktx.errors import UsageError

PAGE_TOKENS = 64  # tokens of a page: one block of the attention kernels
MAX_SNAPSHOTS = 8  # maximum number of recurrent states that are cached; one is tens of megabytes


def hash_page(parent_hash: bytes, ids: Sequence[int]) -> bytes:
    """Returns the hash of a page that holds `ids`, after the page with the hash `parent_hash` (b"" for the first
    page).
    """
    return blake2b(parent_hash + np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class PartialPage:
    """A page that is not full: its ids, and the hash `parent_hash` of the page before it."""

    page: int
    parent_hash: bytes
    ids: tuple[int, ...]

    @property
    def hash(self) -> bytes:
        """The hash of its recurrent snapshot."""
        return hash_page(self.parent_hash, self.ids)


class PagePool:
    """Allocates `count` pages. A page is free, idle (cached, without users) or used by one or more sequences."""

    def __init__(self, count: int):
        """Starts with free pages only."""
        if count < 1:
            raise UsageError(f"a KV cache needs at least one page, it has {count}")
        self.count = count
        self.free_pages = list(range(count - 1, -1, -1))  # a stack: low page numbers are allocated first
        self.ref_counts = [0] * count  # number of sequences that use each page
        # the prefix cache's full pages, used and idle ones: page -> hash, and hash -> page
        self.hash_of: dict[int, bytes] = {}
        self.page_of_hash: dict[bytes, int] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()  # the idle pages, least recently used first
        self.partial_pages: dict[bytes, PartialPage] = {}  # by the hash of the page before them, the latest of each
        self.partial_of_page: dict[int, PartialPage] = {}
        # recurrent states at the end of a full or partial page, by its hash
        self.snapshots: OrderedDict[bytes, Any] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `allocate` can return: free and idle ones."""
        return len(self.free_pages) + len(self.evictable)

    @property
    def used(self) -> int:
        """Pages with users."""
        return self.count - self.available

    def allocate(self, count: int) -> list[int] | None:
        """Returns `count` pages of undefined content with one user each, after evicting idle pages where needed; None,
        without any change, when there are not enough.
        """
        if count > self.available:
            return None
        allocated = []
        for _ in range(count):
            if not self.free_pages:
                self._evict(next(iter(self.evictable)))
            page = self.free_pages.pop()
            self.ref_counts[page] = 1
            allocated.append(page)
        return allocated

    def _evict(self, page: int) -> None:
        """Evicts an idle page, full or partial, and its recurrent snapshot; the page is then free."""
        del self.evictable[page]
        if page in self.partial_of_page:
            partial = self.partial_of_page.pop(page)
            del self.partial_pages[partial.parent_hash]
            self.snapshots.pop(partial.hash, None)
        else:
            page_hash = self.hash_of.pop(page)
            del self.page_of_hash[page_hash]
            self.snapshots.pop(page_hash, None)
        self.free_pages.append(page)

    def cache_partial(self, partial: PartialPage) -> None:
        """Frees a partial page with one user and leaves it in the prefix cache."""
        self.ref_counts[partial.page] -= 1
        if partial.parent_hash in self.partial_pages:
            self._evict(self.partial_pages[partial.parent_hash].page)
        self.partial_pages[partial.parent_hash] = self.partial_of_page[partial.page] = partial
        self.evictable[partial.page] = None

    def reuse_partial(self, partial: PartialPage) -> None:
        """Gives a partial page to a sequence that continues writing it."""
        del self.evictable[partial.page], self.partial_of_page[partial.page], self.partial_pages[partial.parent_hash]
        self.ref_counts[partial.page] = 1

    def find(self, page_hash: bytes) -> int | None:
        """Returns the page with this hash, None if there is none; does not count as a user."""
        return self.page_of_hash.get(page_hash)

    def touch(self, page: int) -> None:
        """Adds a user to a cached page."""
        self.evictable.pop(page, None)
        self.ref_counts[page] += 1

    def register_hash(self, page: int, page_hash: bytes) -> None:
        """Adds a full page, which no longer changes, to the prefix cache. If another page already has the hash, that
        one stays the cached page.
        """
        if page_hash not in self.page_of_hash and page not in self.hash_of:
            self.hash_of[page], self.page_of_hash[page_hash] = page_hash, page

    def free(self, pages: Iterable[int]) -> None:
        """Removes one user of each page. The last pages of a sequence are evicted before its first ones, because a
        shorter prefix is shared by more requests.
        """
        for page in reversed(list(pages)):
            self.ref_counts[page] -= 1
            if self.ref_counts[page]:
                continue
            if page in self.hash_of:
                self.evictable[page] = None
            else:
                self.free_pages.append(page)

    def save_snapshot(self, page_hash: bytes, snapshot: Any) -> None:
        """Caches recurrent states at the end of a page; beyond MAX_SNAPSHOTS the oldest one is evicted."""
        self.snapshots[page_hash] = snapshot
        self.snapshots.move_to_end(page_hash)
        while len(self.snapshots) > MAX_SNAPSHOTS:
            self.snapshots.popitem(last=False)

    def reset_prefix_cache(self) -> None:
        """Evicts all pages without users."""
        for page in list(self.evictable):
            self._evict(page)

    def check_integrity(self, used_pages: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless every page is in exactly one state and `used_pages`, the pages of each sequence,
        match the reference counts.
        """
        ref_counts = [0] * self.count
        for pages in used_pages:
            for page in pages:
                ref_counts[page] += 1
        free, idle, used = (
            set(self.free_pages),
            set(self.evictable),
            {page for page in range(self.count) if ref_counts[page]},
        )
        assert ref_counts == self.ref_counts, "reference counts do not match the sequences' pages"
        assert len(self.free_pages) == len(free), "a page is free twice"
        assert not free & idle and not free & used and not idle & used, "a page is in two states"
        assert free | idle | used == set(range(self.count)), "a page is in no state"
        assert {page: page_hash for page_hash, page in self.page_of_hash.items()} == self.hash_of, (
            "hashes and pages do not match"
        )
        assert idle <= set(self.hash_of) | set(self.partial_of_page), "an idle page is not cached"
        assert set(self.partial_of_page) <= idle - set(self.hash_of), "a partial page in the prefix cache is in use"
        assert {partial.page: partial for partial in self.partial_pages.values()} == self.partial_of_page, (
            "partial pages and their pages do not match"
        )
        assert not free & set(self.hash_of), "a free page is cached"
