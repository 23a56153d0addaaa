"""Pages: who holds what, what is found again, what goes first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ktx.cache.page_pool import MAX_SNAPSHOTS, PagePool, PartialPage, hash_page
from ktx.errors import UsageError


def test_a_full_page_is_found_again_and_shared():
    pages, key = PagePool(4), hash_page(b"", range(64))
    (page,) = pages.allocate(1)
    pages.register_hash(page, key)
    pages.free([page])
    assert pages.available == 4 and pages.find(key) == page
    pages.touch(page)
    pages.touch(page)
    assert pages.available == 3 and pages.allocate(4) is None
    pages.check_integrity([[page], [page]])


def test_what_was_used_longest_ago_goes_first_and_of_one_sequence_its_end():
    pages = PagePool(4)
    keys = [hash_page(b"", [i]) for i in range(4)]
    first, second = pages.allocate(2), pages.allocate(2)
    for page, key in zip(first + second, keys, strict=True):
        pages.register_hash(page, key)
    pages.free(first)
    pages.free(second)
    pages.allocate(1)
    assert [pages.find(key) is None for key in keys] == [False, True, False, False]
    pages.allocate(2)
    assert [pages.find(key) is None for key in keys] == [True, True, False, True]


def test_the_first_of_two_equal_pages_stays_the_one_that_is_found():
    pages = PagePool(2)
    a, b = pages.allocate(2)
    pages.register_hash(a, b"key")
    pages.register_hash(b, b"key")
    pages.free([b])
    assert pages.find(b"key") == a and pages.free_pages == [b]
    pages.free([a])
    pages.check_integrity([])


def test_a_key_says_everything_that_came_before():
    assert hash_page(hash_page(b"", [1]), [2]) != hash_page(hash_page(b"", [3]), [2]) != hash_page(b"", [2])
    assert hash_page(b"salt", [1]) != hash_page(b"", [1])
    assert hash_page(b"", [1, 2]) == hash_page(b"", (1, 2))


def test_few_snapshots_are_kept_and_go_with_their_page():
    pages = PagePool(MAX_SNAPSHOTS + 2)
    taken = pages.allocate(MAX_SNAPSHOTS + 1)
    for page in taken:
        pages.register_hash(page, str(page).encode())
        pages.save_snapshot(str(page).encode(), page)
    assert len(pages.snapshots) == MAX_SNAPSHOTS and str(taken[0]).encode() not in pages.snapshots
    pages.free(taken)
    pages.reset_prefix_cache()
    assert not pages.snapshots and pages.available == pages.count


def test_no_pages_are_refused():
    with pytest.raises(UsageError, match="at least one page"):
        PagePool(0)


class Users(RuleBasedStateMachine):
    """Sequences that come, share, grow and go, in any order."""

    def __init__(self):
        super().__init__()
        self.pages, self.held, self.contents = PagePool(7), [], {}

    @rule(count=st.integers(0, 4))
    def grow(self, count):
        taken = self.pages.allocate(count)
        assert (taken is None) == (count > 7 - len({page for own in self.held for page in own}))
        if taken is not None:
            self.held.append(taken)
            for page in taken:
                self.contents.pop(page, None)

    @rule(which=st.integers(0, 9), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def fill(self, which, key):
        if self.held and self.held[which % len(self.held)]:
            page = self.held[which % len(self.held)][0]
            known = self.pages.find(key)
            self.pages.register_hash(page, key)
            if known is None and page not in self.contents:
                self.contents[page] = key

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def share(self, key):
        page = self.pages.find(key)
        if page is not None:
            assert self.contents[page] == key
            self.pages.touch(page)
            self.held.append([page])

    @rule(which=st.integers(0, 9), key=st.sampled_from([b"a", b"b"]))
    def leave(self, which, key):
        mine = [own for own in self.held if len(own) == 1 and self.pages.ref_counts[own[0]] == 1]
        alone = [own for own in mine if own[0] not in self.pages.hash_of]
        if alone:
            own = alone[which % len(alone)]
            self.held.remove(own)
            self.pages.cache_partial(PartialPage(own[0], key, (1, 2)))

    @rule(key=st.sampled_from([b"a", b"b"]))
    def claim(self, key):
        if key in self.pages.partial_pages:
            tail = self.pages.partial_pages[key]
            self.pages.reuse_partial(tail)
            self.held.append([tail.page])

    @rule(which=st.integers(0, 9))
    def go(self, which):
        if self.held:
            self.pages.free(self.held.pop(which % len(self.held)))

    @invariant()
    def whole(self):
        self.pages.check_integrity(self.held)


TestUsers = Users.TestCase
TestUsers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
