"""Pages: who holds what, what is found again, what goes first."""

from __future__ import annotations

from hashlib import blake2b

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


def test_low_numbers_are_allocated_first():
    pages = PagePool(3)
    assert (pages.available, pages.used) == (3, 0)
    assert pages.allocate(2) == [0, 1]
    assert (pages.available, pages.used) == (1, 2)
    assert pages.allocate(2) is None and pages.available == 1
    assert pages.allocate(0) == []
    assert pages.allocate(1) == [2] and pages.used == 3
    pages.free([0, 1])
    assert pages.allocate(2) == [0, 1], "the first of a sequence is freed last"
    one = PagePool(1)
    assert one.allocate(1) == [0] and one.allocate(1) is None


def test_a_hash_has_16_bytes_and_ids_eight_each():
    assert hash_page(b"", [1]) == blake2b(b"\1" + bytes(7), digest_size=16).digest()
    assert hash_page(b"ab", [258, -1]) == blake2b(b"ab\2\1" + bytes(6) + b"\xff" * 8, digest_size=16).digest()


def test_a_page_is_idle_only_when_its_last_user_has_gone():
    pages = PagePool(2)
    (page,) = pages.allocate(1)
    pages.register_hash(page, b"key")
    pages.touch(page)
    pages.free([page])
    assert pages.used == 1 and pages.find(b"key") == page
    pages.free([page])
    assert pages.used == 0 and list(pages.evictable) == [page]
    pages.check_integrity([])


def test_a_full_page_has_one_hash():
    pages = PagePool(2)
    (page,) = pages.allocate(1)
    pages.register_hash(page, b"first")
    pages.register_hash(page, b"second")
    assert pages.find(b"first") == page and pages.find(b"second") is None
    pages.check_integrity([[page]])


def test_the_latest_partial_page_after_a_page_replaces_the_one_before():
    pages = PagePool(3)
    old, new, other = (PartialPage(page, parent, (page,)) for page, parent in ((0, b"a"), (1, b"a"), (2, b"b")))
    pages.allocate(3)
    for partial in (old, other, new):
        pages.save_snapshot(partial.hash, partial.page)
        pages.cache_partial(partial)
    assert pages.partial_pages == {b"b": other, b"a": new} and pages.free_pages == [0]
    assert pages.snapshots == {other.hash: 2, new.hash: 1}
    pages.check_integrity([])
    pages.reuse_partial(new)
    assert pages.partial_pages == {b"b": other} and pages.used == 1
    assert pages.snapshots == {other.hash: 2, new.hash: 1}
    pages.check_integrity([[1]])


def test_a_partial_page_has_the_hash_of_its_tokens_after_the_page_before():
    assert PartialPage(3, b"parent", (4, 5)).hash == hash_page(b"parent", [4, 5])


def test_a_partial_page_is_evicted_in_its_turn():
    pages = PagePool(2)
    pages.allocate(2)
    partial = PartialPage(0, b"a", (1,))
    pages.cache_partial(partial)
    pages.register_hash(1, b"full")
    pages.save_snapshot(b"full", None)
    pages.free([1])
    assert pages.allocate(1) == [0] and pages.partial_pages == {} and pages.find(b"full") == 1
    assert pages.allocate(1) == [1] and pages.find(b"full") is None and not pages.snapshots
    pages.check_integrity([[0], [1]])


def test_a_snapshot_that_is_saved_again_is_the_latest():
    pages = PagePool(1)
    keys = [bytes([i]) for i in range(MAX_SNAPSHOTS)]
    for key in (*keys, keys[0]):
        pages.save_snapshot(key, key)
    assert list(pages.snapshots) == [*keys[1:], keys[0]]
    pages.save_snapshot(b"new", None)
    assert list(pages.snapshots) == [*keys[2:], keys[0], b"new"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda pages: pages.ref_counts.__setitem__(0, 2), "reference counts do not match"),
        (lambda pages: pages.free_pages.append(3), "a page is free twice"),
        (lambda pages: pages.free_pages.append(0), "a page is in two states"),
        (lambda pages: pages.evictable.__setitem__(3, None), "a page is in two states"),
        (lambda pages: pages.evictable.__setitem__(0, None), "a page is in two states"),
        (lambda pages: pages.free_pages.remove(3), "a page is in no state"),
        (lambda pages: pages.hash_of.__setitem__(0, b"x"), "hashes and pages do not match"),
        (lambda pages: (pages.hash_of.clear(), pages.page_of_hash.clear()), "an idle page is not cached"),
        (lambda pages: pages.partial_pages.clear(), "partial pages and their pages do not match"),
        (lambda pages: pages.register_hash(2, b"x"), "a partial page in the prefix cache is in use"),
        (lambda pages: pages.register_hash(3, b"x"), "a free page is cached"),
    ],
)
def test_the_check_names_what_is_wrong(harm, message):
    """Page 0 is used, 1 is idle and full, 2 is idle and partial, 3 is free."""
    pages = PagePool(4)
    pages.allocate(3)
    pages.register_hash(1, b"full")
    pages.free([1])
    pages.cache_partial(PartialPage(2, b"full", (1,)))
    pages.check_integrity([[0]])
    harm(pages)
    with pytest.raises(AssertionError, match=message):
        pages.check_integrity([[0]])


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
