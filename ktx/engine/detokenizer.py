"""Streams token ids as text: emits only complete characters, and holds back what may become a stop string."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Decodes with a few tokens of context and holds back incomplete characters.

    Decoding a token alone would lose the spaces that some tokenizers store between tokens, so the text is the
    difference of two decodings that start at the same token.

    Args:
        tokenizer: a tokenizer of transformers.
        hidden: tokens without text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden: Container[int] = ()):
        self.tokenizer, self.hidden, self.ids = tokenizer, hidden, list[int]()
        self.start, self.emitted = 0, 0  # decoding starts at `start`; tokens before `emitted` have been emitted

    def _decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens exactly as they are, with special tokens and spaces."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list only for a batch
        return text

    def feed(self, token: int) -> str:
        """Returns the text that this token completes; empty while a character is incomplete. Tokens from `start` on are
        decoded again as its context, because a token decoded alone may lose its leading space.
        """
        if token in self.hidden:
            return ""
        self.ids.append(token)
        emitted_text, text = self._decode(self.ids[self.start : self.emitted]), self._decode(self.ids[self.start :])
        # U+FFFD stands for the first bytes of a character
        if text.endswith("�") or len(text) <= len(emitted_text):
            return ""
        self.start, self.emitted = self.emitted, len(self.ids)
        return text[len(emitted_text) :]

    def flush(self) -> str:
        """Returns the text that was held back; call it after the last token."""
        emitted_text, text = self._decode(self.ids[self.start : self.emitted]), self._decode(self.ids[self.start :])
        self.start = self.emitted = len(self.ids)
        return text[len(emitted_text) :]


class StopChecker:
    """Looks for stop strings in a stream of text and holds back what might become one. `include`: emits the stop string
    too.
    """

    def __init__(self, stop: Iterable[str] = (), include: bool = False):
        self.stop, self.include, self.pending = [text for text in stop if text], include, ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """Returns the text that is safe to emit: up to the first stop string, or up to an end that may become one;
        nothing more after a stop string.
        """
        if self.found is not None:
            return ""
        self.pending += piece
        hits = [(self.pending.find(stop), stop) for stop in self.stop if stop in self.pending]
        if hits:
            end, self.found = min(hits)
            end += len(self.found) if self.include else 0
        else:
            end = len(self.pending) - max((_overlap_len(self.pending, stop) for stop in self.stop), default=0)
        emitted, self.pending = self.pending[:end], self.pending[end:]
        return emitted

    def flush(self) -> str:
        """Returns the text that was held back; call it after the last piece."""
        rest, self.pending = self.pending, ""
        return "" if self.found is not None else rest


def _overlap_len(text: str, mark: str) -> int:
    """Returns the length of the longest proper prefix of `mark` that `text` ends with."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
