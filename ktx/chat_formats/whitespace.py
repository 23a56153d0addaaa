"""What of the text is shown: all of it but marks, and the white space around blocks, which is layout.

White space around calls is shown where text stands on both sides of them: "Let me look.", a call and "Done." stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from ktx.chat_formats.events import Text
from ktx.chat_formats.reader import SPACE


class WhitespaceFilter:
    """Text on its way out. White space waits for what follows: before a mark it is layout and not shown."""

    def __init__(self, kind: str, said: str = ""):
        self.kind = kind
        self.pending: list[str] = []
        self.fresh = not said  # nothing has been shown since a mark
        self.leading = "\n"  # what is layout behind that mark
        self.last = said[-1:] or "\n"  # the character before what comes next
        self.spoken = bool(said) and kind == "answer"  # whether there is text of the answer before calls
        self.gap = ""  # white space around the calls since then
        self.outer = 0  # characters of it that are known to stand outside of a call's own marks
        self.called = False  # a call was the last thing

    def show(self, text: str) -> Iterator[Text]:
        if self.fresh and not self.pending:
            shown = text.lstrip(self.leading)
            if self.called:
                self.gap += text[: len(text) - len(shown)]
            text = shown
        if not text:
            return
        self.last = text[-1]
        body = text.rstrip(SPACE)
        if body:
            body = "".join(self.pending) + body
            if self.kind == "answer":
                body = (self.gap if self.spoken else "") + body
                self.spoken, self.gap = True, ""
            self.pending, self.fresh, self.called = [], False, False
            yield Text(body, self.kind)
            text = text[len(text.rstrip(SPACE)) :]
        if text:
            self.pending.append(text)

    def wait(self, mark: str) -> None:
        """A mark that is layout if a call follows."""
        self.pending.append(mark)
        self.last = "\n"

    def drop(self) -> str:
        """A call follows: what waited was layout. Given back for the case that the call breaks."""
        layout, self.pending = "".join(self.pending), []
        return layout

    def turn(self, kind: str, leading: str = "\n") -> Iterator[Text]:
        """Behind a mark of reasoning; `kind` is what follows, `leading` is layout before it."""
        if any(piece.strip(SPACE) for piece in self.pending):
            yield from self.rest()
        self.kind, self.pending, self.fresh, self.leading, self.last = kind, [], True, leading, "\n"
        self.called = False

    def after_call(self, layout: str) -> None:
        """Behind a call; `layout` is what was dropped before it."""
        self.gap += layout[: len(layout) - len(layout.lstrip(SPACE))]
        self.outer = len(self.gap)
        self.pending, self.fresh, self.leading, self.last = [], True, SPACE, "\n"
        self.called = True

    def end_mark(self) -> None:
        """Behind a mark that ends a call which has been read: white space before it was the call's."""
        self.gap = self.gap[: self.outer]

    def rest(self) -> Iterator[Text]:
        """What waited, when nothing follows."""
        text, self.pending = "".join(self.pending), []
        if text:
            if self.kind == "answer":
                text = (self.gap if self.spoken and text.strip(SPACE) else "") + text
                self.gap = ""
            yield Text(text, self.kind)

    @property
    def behind_call(self) -> bool:
        return self.fresh and self.leading == SPACE
