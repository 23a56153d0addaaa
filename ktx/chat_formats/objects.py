"""Reads calls that are JSON objects: {"name": ..., "arguments": {...}}, alone or in a list, with the members in any
order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ktx.chat_formats.calls import CallEvents, read_arguments, stream_call
from ktx.chat_formats.events import Event
from ktx.chat_formats.json_repair import read_value
from ktx.chat_formats.reader import Marks, NotACall, Step, TextReader

# a family's own keys first: without marks around the object, only the first two of each make it a call
NAME_KEYS = ("name", "function", "tool", "tool_name", "function_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
ID_KEYS = ("id", "call_id", "tool_call_id")
IGNORED_KEYS = ("type", "index")  # other keys of a call, which are ignored


class ObjectCall:
    """One call object, read from `{` on.

    Streams the arguments if the name comes first, else stores them until it comes.

    `marked` is whether marks already show that it is a call; without them, only the keys that a family itself uses make
    it one.
    """

    def __init__(self, source: TextReader, calls: CallEvents, ends: Marks, marked: bool):
        self.source, self.calls, self.ends, self.marked = source, calls, ends, marked
        self.name = self.id = ""
        self._early_arguments: list[str] | None = None  # arguments before the name
        self._emitted = False
        self._inner_braces = 0  # open braces of an inner {"function": {...}}

    def read(self) -> Iterator[Event | None]:
        """Yields the events of the call, None where more text is needed. Raises NotACall when the object is not a call.

        Members are read up to the arguments or, where these come first, the name: then the call is emitted, and the
        rest of the object is skipped.
        """
        self.source.pos += 1
        while not self._emitted:
            key = yield from self._read_key()
            if key == "":
                break
            yield from self._read_member(key)
        if not self._emitted:
            yield from self._emit_without_arguments()
            return
        yield from self._skip_rest()

    def _read_key(self) -> Step[str]:
        """Returns the next member's key and consumes its colon; empty after the last member."""
        while True:
            yield from self.source.read_whitespace()
            char = yield from self.source.peek_char()
            if char == "}" and self._inner_braces:
                self._inner_braces -= 1
            elif char in ("}", ""):
                self.source.pos += len(char)
                return ""
            elif char != ",":
                break
            self.source.pos += 1
        if (yield from self.source.peek_mark(self.ends)):  # the model left the object open
            return ""
        return (yield from _read_key_text(self.source))

    def _read_member(self, key: str) -> Iterator[Event | None]:
        """Reads one member's value, by its key: an inner function object, the name, the arguments, or a key to skip. An
        object without marks is a call only with a family's own keys, the first two, because it may be an answer.
        """
        char = yield from self.source.peek_char()
        if key == "function" and char == "{" and not self._inner_braces:
            self._inner_braces += 1
            self.source.pos += 1
        elif key in (NAME_KEYS if self.marked else NAME_KEYS[:2]) and not self.name:
            self.name = yield from _read_name(self.source)
            if self._early_arguments is not None:
                yield from self._emit_stored_call()
        elif key in (ARGUMENT_KEYS if self.marked else ARGUMENT_KEYS[:2]) and self._early_arguments is None:
            yield from self._read_arguments()
        elif key in ID_KEYS or key in IGNORED_KEYS:
            text = yield from self._skip_value()
            if key in ID_KEYS and text.startswith('"'):
                self.id = json.loads(text)[:256]
        else:
            raise NotACall  # not a call object

    def _read_arguments(self) -> Iterator[Event | None]:
        """Streams the arguments if the name is known, otherwise stores them until the name comes."""
        if self.name and (yield from self.source.peek_char()) in '{"n':  # an object, a string or null
            yield from self._stream_arguments()
            return
        self._early_arguments = []
        for piece in read_arguments(self.source, self.ends):
            if piece is None:
                yield None
            else:
                self._early_arguments.append(piece)

    def _stream_arguments(self) -> Iterator[Event | None]:
        """Emits the call while its arguments arrive."""
        yield from stream_call(self.source, self.calls, self.ends, self.name, self.id)
        self._emitted = True

    def _emit_stored_call(self) -> Iterator[Event | None]:
        """Emits the call when its name follows its arguments."""
        yield from self.calls.complete_call(self.name, "".join(self._early_arguments or ["{}"]), self.id)
        self._emitted = True

    def _emit_without_arguments(self) -> Iterator[Event | None]:
        """Emits a call that has only a name, if marks show a call or a function has this name."""
        if not self.name or not (self.marked or self.calls.resolve_name(self.name) in self.calls.schemas):
            raise NotACall
        yield from self.calls.complete_call(self.name, id=self.id)

    def _skip_value(self) -> Step[str]:
        """Reads a value and returns its text."""
        text = yield from read_value(self.source)
        if text is None:
            raise NotACall
        return text

    def _skip_rest(self) -> Step[None]:
        """Skips the members after the arguments, up to the object's end. No error there makes the call invalid."""
        try:
            while (yield from self._read_key()):
                yield from self._skip_value()
        except NotACall:
            pass


def read_list(source: TextReader, calls: CallEvents, ends: Marks, marked: bool = True) -> Iterator[Event | None]:
    """Reads calls [{...}, {...}], from `[` on; each complete call stays one if a later object is broken."""
    index_before = calls.index
    while True:
        source.pos += 1  # the bracket or a comma
        yield from source.read_whitespace()
        if (yield from source.peek_char()) != "{":
            break
        if calls.index > index_before:
            source.start_call()
        yield from ObjectCall(source, calls, ends, marked).read()
        yield from source.read_whitespace()
        if (yield from source.peek_char()) != ",":
            break
    char = yield from source.peek_char()
    if calls.index == index_before or char not in ("]", ""):
        raise NotACall
    source.pos += len(char)


def _read_key_text(source: TextReader) -> Step[str]:
    """Returns a member's key, with or without quotes, and consumes its colon. Raises NotACall for a text without a
    colon, or longer than any key of a call.
    """
    char = yield from source.peek_char()
    if char in "\"'":
        source.pos += 1
        key, mark = yield from source.read_short_until(_QUOTES[char], 40)
        source.pos += len(mark)
    else:
        key, _ = yield from source.read_short_until(_COLON, 40)
    yield from source.read_whitespace()
    if (yield from source.peek_char()) != ":" or not key:
        raise NotACall
    source.pos += 1
    yield from source.read_whitespace()
    return key.strip()


def _read_name(source: TextReader) -> Step[str]:
    """Returns a function's name from a JSON string."""
    if (yield from source.peek_char()) not in ('"', "'"):
        raise NotACall
    text = yield from read_value(source)
    name = str(json.loads(text)) if text else ""
    if not name or len(name) > 256:
        raise NotACall
    return name.strip()


_QUOTES = {quote: Marks((quote,)) for quote in "\"'"}
_COLON = Marks((":",))
