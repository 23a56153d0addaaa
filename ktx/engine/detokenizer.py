"""Token ids -> text as it may be shown: whole characters, no piece of a stop string."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any


class Detokenizer:
    """Decodes with a few tokens of context, and holds back what is not yet a whole character.

    Decoding a token alone would lose the spaces that some tokenizers keep between tokens, so the text is the difference
    of two decodings that start at the same token. `hidden` tokens have no text.
    """

    def __init__(self, tokenizer: Any, hidden: Container[int] = ()):
        self.tokenizer, self.hidden, self.ids = tokenizer, hidden, list[int]()
        self.start, self.shown = 0, 0  # decoding starts at `start`; tokens before `shown` have been given out

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token in self.hidden:
            return ""
        self.ids.append(token)
        before, now = self._decode(self.ids[self.start : self.shown]), self._decode(self.ids[self.start :])
        if now.endswith("�") or len(now) <= len(before):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        before, now = self._decode(self.ids[self.start : self.shown]), self._decode(self.ids[self.start :])
        self.start = self.shown = len(self.ids)
        return now[len(before) :]


class StopChecker:
    """Looks for stop strings in a stream and holds back what might become one. `include`: the one that was found is shown."""

    def __init__(self, stop: Iterable[str] = (), include: bool = False):
        self.stop, self.include, self.held = [s for s in stop if s], include, ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """The text that may be shown; nothing more once a stop string was found."""
        if self.found is not None:
            return ""
        self.held += piece
        hits = [(self.held.find(stop), stop) for stop in self.stop if stop in self.held]
        if hits:
            at, self.found = min(hits)
            at += len(self.found) if self.include else 0
        else:
            at = len(self.held) - max((_overlap(self.held, stop) for stop in self.stop), default=0)
        shown, self.held = self.held[:at], self.held[at:]
        return shown

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        rest, self.held = self.held, ""
        return "" if self.found is not None else rest


def _overlap(text: str, mark: str) -> int:
    """Length of the longest proper start of `mark` that `text` ends with."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
