"""Filters white space from the output: text is emitted without marks and without the white space around blocks, which
is layout.

White space around calls is emitted where text stands on both sides of them: "Let me look.", a call and "Done." stay
apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from ktx.chat_formats.events import Text
from ktx.chat_formats.reader import WHITESPACE


class WhitespaceFilter:
    """Filters the text of an output. White space is held until the next text: before a mark it is layout and is
    dropped.

    Args:
        kind: "answer" or "think": the kind of the first text.
        prefill_text: text in the prompt that the output continues.
    """

    def __init__(self, kind: str, prefill_text: str = ""):
        """Starts before the output's first character."""
        self.kind = kind
        self.pending: list[str] = []
        self.after_mark = not prefill_text  # no text was emitted since a mark
        self.leading = "\n"  # characters that are layout after that mark
        self.last = prefill_text[-1:] or "\n"  # the character before the next text
        self._answer_precedes = bool(prefill_text) and kind == "answer"  # whether there was answer text before calls
        self._space_around_calls = ""  # white space around calls since the last answer text
        self._num_outside = 0  # characters of `_space_around_calls` that are known to be outside of a call's own marks
        self._follows_call = False  # whether the next text follows a call

    def emit(self, text: str) -> Iterator[Text]:
        """Emits a piece of text. Drops characters in `leading` that directly follow a mark (a tag of reasoning or of a
        call) or begin the output, and holds trailing white space in `pending`, because it is dropped if a mark follows
        and emitted if text does. White space after a call waits in `_space_around_calls`: it is emitted only if answer
        text stands on both sides of the call.
        """
        if self.after_mark and not self.pending:
            stripped = text.lstrip(self.leading)
            if self._follows_call:  # not layout if answer text stands on both sides of the call
                self._space_around_calls += text[: len(text) - len(stripped)]
            text = stripped
        if not text:
            return
        self.last = text[-1]
        body = text.rstrip(WHITESPACE)
        if body:
            body = "".join(self.pending) + body
            if self.kind == "answer":
                body = (self._space_around_calls if self._answer_precedes else "") + body
                self._answer_precedes, self._space_around_calls = True, ""
            self.pending, self.after_mark, self._follows_call = [], False, False
            yield Text(body, self.kind)
            text = text[len(text.rstrip(WHITESPACE)) :]
        if text:
            self.pending.append(text)

    def hold_mark(self, mark: str) -> None:
        """Holds a mark that is layout if a call follows."""
        self.pending.append(mark)
        self.last = "\n"

    def drop_pending(self) -> str:
        """Drops held text, because a call follows, and returns it for the case that the call is broken."""
        layout, self.pending = "".join(self.pending), []
        return layout

    def switch_kind(self, kind: str, leading: str = "\n") -> Iterator[Text]:
        """Starts text of another kind after a mark of reasoning; characters in `leading` are layout before it."""
        if any(piece.strip(WHITESPACE) for piece in self.pending):
            yield from self.flush()
        self.kind, self.pending, self.after_mark, self.leading, self.last = kind, [], True, leading, "\n"
        self._follows_call = False

    def after_call(self, layout: str) -> None:
        """Records the end of a call; `layout` is the text that `drop_pending` returned before it."""
        self._space_around_calls += layout[: len(layout) - len(layout.lstrip(WHITESPACE))]
        self._num_outside = len(self._space_around_calls)
        self.pending, self.after_mark, self.leading, self.last = [], True, WHITESPACE, "\n"
        self._follows_call = True

    def end_mark(self) -> None:
        """Records a mark after a call that ends it: white space before the mark belongs to the call."""
        self._space_around_calls = self._space_around_calls[: self._num_outside]

    def flush(self) -> Iterator[Text]:
        """Emits the held text at the end of the output, or before a mark of reasoning."""
        text, self.pending = "".join(self.pending), []
        if text:
            if self.kind == "answer":
                text = (self._space_around_calls if self._answer_precedes and text.strip(WHITESPACE) else "") + text
                self._space_around_calls = ""
            yield Text(text, self.kind)

    @property
    def after_call_only(self) -> bool:
        """Whether no text follows the last call yet."""
        return self.after_mark and self.leading == WHITESPACE
