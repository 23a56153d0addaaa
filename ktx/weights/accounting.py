"""Accounts for every tensor of a checkpoint: a tensor that no module reads is listed by pattern, or rejected.

A tensor is rejected when it changes the meaning of tensors that are read. Each source classifies its own names
(`WeightSource.classify_unread`), with the patterns common to all formats from ktx.weights.verdict: parameters of other
tensors (scales, zero points, biases).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ktx.weights.base import WeightSource
from ktx.weights.verdict import Reads, Verdict

MAX_LISTED_PATTERNS = 8  # in one note


@dataclass(frozen=True)
class UnreadTensors:
    """A group of tensors that no module reads, with one pattern and one reason."""

    pattern: str
    count: int
    reason: str
    rejected: bool

    def __str__(self) -> str:
        return f"{self.pattern} ({self.count}){', ' * bool(self.reason)}{self.reason}"


def unread_tensors(source: WeightSource, reads: Reads, ignored: Iterable[str] = ()) -> list[UnreadTensors]:
    """Groups the tensors of `source` that no module reads, for a note or an error; rejected groups first.

    Args:
        source: the checkpoint.
        reads: the names of the tensors that are read, and of the modules that read them.
        ignored: regular expressions of tensor names that the modeling code ignores.
    """
    ignored_patterns = [re.compile(pattern) for pattern in ignored]
    groups: dict[tuple[bool, str, str], list[str]] = {}
    for key in source.tensors:
        if key in reads.tensors:
            continue
        name = source.tensors[key].name
        verdict = source.classify_unread(key, reads)
        harmless = verdict.reason and not verdict.rejected
        if not harmless and any(pattern.search(text) for pattern in ignored_patterns for text in (key, name)):
            verdict = Verdict("ignored by transformers")
        # numbers in the name, of layers and experts, become *
        pattern = verdict.pattern or re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        groups.setdefault((not verdict.rejected, pattern, verdict.reason), []).append(name)
    return [
        UnreadTensors(names[0] if len(names) == 1 else pattern, len(names), reason, not accepted)
        for (accepted, pattern, reason), names in sorted(groups.items())
    ]


def summary_line(unread: Iterable[UnreadTensors]) -> str:
    """A one-line summary of the accepted groups; empty when there are none."""
    accepted = [group for group in unread if not group.rejected]
    count = sum(group.count for group in accepted)
    omitted = (
        f"; and {len(accepted) - MAX_LISTED_PATTERNS} other patterns" if len(accepted) > MAX_LISTED_PATTERNS else ""
    )
    listed = "; ".join(map(str, accepted[:MAX_LISTED_PATTERNS]))
    return f"{count} tensor{'s' * (count != 1)} that no module reads: {listed}{omitted}" if accepted else ""
