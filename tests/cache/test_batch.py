"""How the tokens of a forward are divided: into snapshots, pages and pieces, rows, slots and ranges of keys.

A page has 64 tokens, and recurrent states are copied every 4 * 64 = 256 tokens.
"""

from __future__ import annotations

import pytest
import torch

from ktx.cache.batch import BatchMetadata, PageTables, SequenceSpan

CPU = torch.device("cpu")


def span(past, count, prompt=0, owner=0, pages=range(64), shared=True):
    return SequenceSpan(owner, past, count, list(pages), prompt, shared)


def test_a_span_of_decode_tokens_shares_no_prompt():
    alone = SequenceSpan(0, 64, 256, list(range(8)))
    assert alone.num_prompt_tokens == 0 and alone.full_page_tokens == 0
    assert SequenceSpan(0, 0, 600, list(range(10)), 600).snapshot_lengths == []


def test_snapshots_are_taken_every_four_pages_and_at_the_prompt_s_last_page():
    # 600 = 9 * 64 + 24: the last page ends at 576
    assert span(0, 600, 600).snapshot_lengths == [256, 512, 576]
    assert span(256, 344, 600 - 256).snapshot_lengths == [512, 576]
    assert span(255, 345, 600 - 255).snapshot_lengths == [256, 512, 576]
    assert span(300, 300, 300).snapshot_lengths == [512, 576]
    assert span(576, 24, 24).snapshot_lengths == []
    assert span(575, 25, 25).snapshot_lengths == [576]
    # 65536 + 600 = 1033 * 64 + 24
    assert span(65536, 600, 600).snapshot_lengths == [65536 + 256, 65536 + 512, 65536 + 576]


def test_a_snapshot_at_the_span_s_end_is_not_taken_before_it():
    assert span(0, 512, 512).snapshot_lengths == [256]
    assert span(0, 513, 513).snapshot_lengths == [256, 512]
    assert span(0, 513, 512).snapshot_lengths == [256, 512], "the last of the tokens is no longer the prompt's"
    assert span(0, 700, 100).snapshot_lengths == [64], "none after the prompt"


def test_only_the_latest_eight_snapshots_are_taken():
    # 3000 = 46 * 64 + 56: 11 multiples of 256 up to 2816, and the last page's end at 2944
    assert span(0, 3000, 3000, pages=range(47)).snapshot_lengths == [1280, 1536, 1792, 2048, 2304, 2560, 2816, 2944]


@pytest.mark.parametrize(
    ("past", "count", "prompt", "lead", "full", "pieces"),
    [
        (0, 64, 64, 0, 64, [64]),
        (0, 63, 63, 0, 0, [63]),
        (0, 65, 65, 0, 64, [64, 1]),
        (63, 2, 2, 1, 0, [1, 1]),
        (63, 65, 65, 1, 64, [1, 64]),
        (10, 203, 200, 54, 128, [54, 64, 64, 18, 1, 1, 1]),  # 10 + 54 = 64, 64 + 128 = 192, 192 + 18 = 210
        (10, 20, 20, 20, 0, [20]),
        (10, 60, 20, 54, 0, [20] + [1] * 40),  # the lead goes beyond the prompt
        (64, 3, 0, 0, 0, [1, 1, 1]),
    ],
)
def test_tokens_are_divided_into_lead_full_pages_remainder_and_decode_tokens(past, count, prompt, lead, full, pieces):
    tokens = span(past, count, prompt)
    assert tokens.lead_tokens == lead
    assert tokens.full_page_tokens == full
    assert tokens.piece_lengths == pieces and sum(pieces) == count


def two_sequences():
    """The first two tokens of one sequence on page 3; four of another, which go from its page 5 to its page 1."""
    return BatchMetadata([span(0, 2, pages=[3]), span(62, 4, owner=1, pages=[5, 1])])


def test_tokens_follow_one_another_as_rows():
    batch = two_sequences()
    assert batch.tokens == 6
    assert batch.rows == [(0, 2, 0 + 2), (2, 4, 62 + 4)]
    assert batch.sequences.tolist() == [[0, 2, 2], [2, 4, 66]] and batch.sequences.dtype == torch.int64
    assert batch.positions.tolist() == [0, 1, 62, 63, 64, 65]
    assert batch.position_ids.tolist() == [[0, 1, 62, 63, 64, 65]]


def test_a_token_s_slot_is_on_the_page_of_its_position():
    batch = two_sequences()
    assert batch.pages.tolist() == [[3, 0], [5, 1]] and batch.pages.dtype == torch.int32
    assert batch.slots.tolist() == [3 * 64, 3 * 64 + 1, 5 * 64 + 62, 5 * 64 + 63, 64, 65]


def test_tables_are_moved_to_a_device_once():
    batch = two_sequences()
    tables = batch.tables_on(CPU)
    assert batch.tables_on(CPU) is tables
    assert [tables.sequences.tolist(), tables.pages.tolist(), tables.slots.tolist()] == [
        [[0, 2, 2], [2, 4, 66]],
        [[3, 0], [5, 1]],
        [192, 193, 382, 383, 64, 65],
    ]
    meta = torch.device("meta")
    assert batch.tables_on(meta).slots.device == meta


def test_tables_that_are_on_the_device_already_are_taken():
    given = PageTables(torch.zeros(1, 3), torch.zeros(1, 1), torch.zeros(1))
    batch = BatchMetadata([span(0, 1)], tables={CPU: given})
    assert batch.tables_on(CPU) is given


def test_a_copy_of_tables_begins_without_plans():
    tables = PageTables(torch.ones(1, 3), torch.ones(1, 1), torch.ones(1), {"a": 1}, {"b": 2}, {"c": torch.ones(1)})
    copied = tables.to(CPU)
    assert (copied.plans, copied.token_plans, copied.scratch) == ({}, {}, {})


def test_rows_of_full_pages_are_those_after_each_lead():
    # rows 0..5: decode; 6..208: lead 54, then 128; 209..273: 64, then 1
    spans = [span(100, 6), span(10, 203, 200, 1), span(0, 65, 65, 2)]
    batch = BatchMetadata(spans)
    assert batch.has_full_pages
    assert batch.full_page_rows() == [6 + 54, 128, 6 + 203, 64]
    assert batch.full_page_rows(excluded=[1]) == [209, 64]
    assert batch.full_page_rows(excluded=[0, 2]) == [60, 128]
    assert not two_sequences().has_full_pages and two_sequences().full_page_rows() == []


def test_the_remainder_is_what_full_pages_leave():
    # of the first sequence 6 tokens of a lead; of the second 2 of a lead, 64 of a page, 3; a page; a decode token
    spans = [
        span(100, 6, pages=[0, 1]),
        span(62, 69, 69, 1, [2, 3, 4]),
        span(0, 64, 64, 2, [5]),
        span(64, 1, 0, 3, [6, 7]),
    ]
    rows, sequences, pages = BatchMetadata(spans).remainder
    assert rows.tolist() == [*range(6), 6, 7, 6 + 66, 6 + 67, 6 + 68, 6 + 69 + 64]
    # the first of these rows, how many, and the keys up to their end
    assert sequences.tolist() == [[0, 6, 100 + 6], [6, 2, 62 + 2], [8, 3, 62 + 69], [11, 1, 64 + 1]]
    assert pages.tolist() == [[0, 1, 0], [2, 3, 4], [2, 3, 4], [6, 7, 0]]


def test_full_pages_alone_leave_no_remainder():
    assert BatchMetadata([span(0, 64, 64)]).remainder is None


def test_a_window_ends_at_the_token_s_own_key_and_begins_at_the_first_at_the_earliest():
    batch = two_sequences()  # positions 0, 1, 62..65
    ranges = batch.window_ranges(3)
    assert ranges.dtype == torch.int32
    assert ranges.tolist() == [[[0, 1], [0, 2], [60, 63], [61, 64], [62, 65], [63, 66]]]
    assert batch.window_ranges(3) is ranges
    assert batch.window_ranges(1).tolist() == [[[0, 1], [1, 2], [62, 63], [63, 64], [64, 65], [65, 66]]]


def test_without_a_window_there_are_no_ranges():
    assert two_sequences().window_ranges() is None and two_sequences().window_ranges(0) is None
