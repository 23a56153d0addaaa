"""What of the text is shown: all of it but the white space and marks around blocks, which are layout."""

from __future__ import annotations

from collections.abc import Iterator

from ktx.dialects.events import Text
from ktx.dialects.source import SPACE


class Output:
    """Text on its way out. White space waits for what follows: before a mark it is layout and not shown."""

    def __init__(self, kind: str, said: str = ""):
        self.kind = kind
        self.pending: list[str] = []
        self.fresh = not said  # nothing has been shown since a mark
        self.leading = "\n"  # what is layout behind that mark
        self.last = said[-1:] or "\n"  # the character before what comes next

    def show(self, text: str) -> Iterator[Text]:
        if self.fresh and not self.pending:
            text = text.lstrip(self.leading)
        if not text:
            return
        self.last = text[-1]
        body = text.rstrip(SPACE)
        if body:
            body = "".join(self.pending) + body
            self.pending, self.fresh = [], False
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

    def after_call(self) -> None:
        self.pending, self.fresh, self.leading, self.last = [], True, SPACE, "\n"

    def rest(self) -> Iterator[Text]:
        """What waited, when nothing follows."""
        text, self.pending = "".join(self.pending), []
        if text:
            yield Text(text, self.kind)

    @property
    def behind_call(self) -> bool:
        return self.fresh and self.leading == SPACE
