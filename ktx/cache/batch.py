"""The batch of a forward: the tokens of several sequences as one row, and where their keys and values are.

`BatchMetadata` maps tokens to sequences and to slots of the paged KV cache; ktx's attention modules read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ktx.cache.page_pool import MAX_SNAPSHOTS, PAGE_TOKENS

SNAPSHOT_INTERVAL_TOKENS = 4 * PAGE_TOKENS  # prompt tokens between two snapshots of recurrent states


@dataclass(frozen=True)
class PageTables:
    """A batch in the form that the kernels of one device read.

    Args:
        sequences: int64 [n, 3]: first token, number of tokens, number of keys including these tokens.
        pages: int32 [n, max pages]: the pages of each sequence.
        slots: int64 [tokens]: the slot of each token.
        plans: attention schedules that the first layer computes for the following ones.
        token_plans: the same, for schedules that depend on the numbers of tokens alone.
        scratch: scratch buffers; tables of different sizes may share one, if only one is in use at a time.
    """

    sequences: torch.Tensor
    pages: torch.Tensor
    slots: torch.Tensor
    plans: dict[Any, Any] = field(default_factory=dict)
    token_plans: dict[Any, Any] = field(default_factory=dict)
    scratch: dict[Any, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> PageTables:
        """Returns a copy on another device, without schedules and scratch buffers."""
        return PageTables(self.sequences.to(device), self.pages.to(device), self.slots.to(device))


@dataclass(frozen=True)
class SequenceSpan:
    """The tokens of one sequence in a forward.

    An operator with one form for prompts and one for decoding (MLA), or whose sums depend on how tokens are split into
    chunks (recurrent layers), uses `full_page_tokens` and `piece_lengths`, which do not depend on what else is in the
    batch.

    Args:
        owner: identifies the sequence.
        past: number of tokens before these.
        count: number of tokens.
        pages: the pages of the sequence.
        num_prompt_tokens: how many of the tokens, the first ones, belong to the prompt.
        shared: other sequences may reuse the prompt, so snapshots of recurrent states are taken, see
            `snapshot_lengths`.
    """

    owner: int
    past: int
    count: int
    pages: Sequence[int]
    num_prompt_tokens: int = 0
    shared: bool = False

    @property
    def snapshot_lengths(self) -> list[int]:
        """Lengths of the sequence at which a recurrent state is copied before the span's end, so that other sequences
        can continue from there: every SNAPSHOT_INTERVAL_TOKENS, and at the end of the prompt's last page; the latest
        MAX_SNAPSHOTS of them, because no more are cached.
        """
        if not self.shared:
            return []
        end = self.past + self.num_prompt_tokens
        lengths = {
            *range(
                self.past // SNAPSHOT_INTERVAL_TOKENS * SNAPSHOT_INTERVAL_TOKENS + SNAPSHOT_INTERVAL_TOKENS,
                end,
                SNAPSHOT_INTERVAL_TOKENS,
            ),
            end // PAGE_TOKENS * PAGE_TOKENS,
        }
        return sorted(length for length in lengths if self.past < length < self.past + self.count)[-MAX_SNAPSHOTS:]

    @property
    def lead_tokens(self) -> int:
        """How many of the tokens fill up a page that an earlier forward began."""
        return min(self.count, -self.past % PAGE_TOKENS)

    @property
    def full_page_tokens(self) -> int:
        """How many of the tokens after the lead are full pages of the prompt."""
        return max(0, (self.past + self.num_prompt_tokens) // PAGE_TOKENS * PAGE_TOKENS - self.past - self.lead_tokens)

    @property
    def piece_lengths(self) -> list[int]:
        """Numbers of tokens in the pieces that recurrent layers compute, which do not depend on the batch: the prompt's
        lead, its pages, its remainder, then decode tokens one by one.
        """
        lead = min(self.lead_tokens, self.num_prompt_tokens)
        remainder = self.num_prompt_tokens - lead - self.full_page_tokens
        counts = (
            [lead] * (lead > 0) + [PAGE_TOKENS] * (self.full_page_tokens // PAGE_TOKENS) + [remainder] * (remainder > 0)
        )
        return counts + [1] * (self.count - self.num_prompt_tokens)


class BatchMetadata:
    """The metadata of a forward's tokens that attention needs.

    Args:
        spans: the sequences' tokens, in the order of the rows.
        check: called between layers; raises to cancel the forward.
        tables: page tables that are already on a device.
    """

    def __init__(
        self,
        spans: Sequence[SequenceSpan],
        check: Callable[[], None] | None = None,
        tables: Mapping[torch.device, PageTables] | None = None,
    ):
        """Puts the tokens of the spans one after another, and computes what layers and kernels read of each: rows,
        positions, pages and slots.
        """
        self.spans, self.check_cancelled = spans, check
        # for each span: its first row, its number of rows, and its number of keys including these tokens
        rows, num_tokens = [], 0
        for span in spans:
            rows.append((num_tokens, span.count, span.past + span.count))
            num_tokens += span.count
        self.tokens, self.rows = num_tokens, rows
        self.sequences = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.pages = torch.zeros(len(spans), max(len(span.pages) for span in spans), dtype=torch.int32, device="cpu")
        for page_row, span in zip(self.pages, spans, strict=True):
            page_row[: len(span.pages)] = torch.tensor(span.pages, dtype=torch.int32, device="cpu")
        self.positions = torch.cat([torch.arange(span.past, span.past + span.count, device="cpu") for span in spans])
        self.position_ids = self.positions[None]
        span_of_token = torch.repeat_interleave(
            torch.arange(len(spans), device="cpu"), torch.tensor([span.count for span in spans], device="cpu")
        )
        # of each token: where the pools store its keys and values
        self.slots = (
            self.pages[span_of_token, self.positions // PAGE_TOKENS].long() * PAGE_TOKENS + self.positions % PAGE_TOKENS
        )
        self._ranges: dict[int, torch.Tensor] = {}
        self._tables = dict(tables or {})
        self.has_full_pages = any(span.full_page_tokens for span in spans)

    def tables_on(self, device: torch.device) -> PageTables:
        """Returns the page tables on a device; they are transferred once."""
        if device not in self._tables:
            self._tables[device] = PageTables(self.sequences, self.pages, self.slots).to(device)
        return self._tables[device]

    def full_page_rows(self, excluded: Sequence[int] = ()) -> list[int]:
        """Returns first row and number of rows of each range that holds full pages of a prompt, in one flat list as
        cpu.bf16_rows takes it; without those of the spans `excluded`.
        """
        ranges = [
            (first + span.lead_tokens, span.full_page_tokens)
            for i, (span, (first, _, _)) in enumerate(zip(self.spans, self.rows, strict=True))
            if i not in excluded
        ]
        return [value for first, count in ranges if count for value in (first, count)]

    @cached_property
    def remainder(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The tokens outside of full pages, which MLA computes in another form: their rows int64 [n], and `sequences`
        and `pages` for them alone; None if there are none.
        """
        token_rows, rows, span_indices, num_tokens = [], [], [], 0
        for i, (span, (first, _, _)) in enumerate(zip(self.spans, self.rows, strict=True)):
            for begin, end in ((0, span.lead_tokens), (span.lead_tokens + span.full_page_tokens, span.count)):
                if begin < end:
                    token_rows.append(torch.arange(first + begin, first + end, device="cpu"))
                    rows.append((num_tokens, end - begin, span.past + end))
                    span_indices.append(i)
                    num_tokens += end - begin
        return (torch.cat(token_rows), torch.tensor(rows, device="cpu"), self.pages[span_indices]) if rows else None

    def window_ranges(self, window: int = 0) -> torch.Tensor | None:
        """Returns int32 [1, tokens, 2]: the range of keys (first, end) that each token attends to in its own sequence;
        None without a sliding window, where it is all keys up to its own. Computed once for all layers with the window.
        """
        if not window:
            return None
        if window not in self._ranges:
            last = self.positions + 1
            self._ranges[window] = torch.stack([(last - window).clamp(min=0), last], -1).int()[None]
        return self._ranges[window]
