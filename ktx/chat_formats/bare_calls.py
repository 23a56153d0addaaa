"""Reads Llama's calls without marks: a JSON object, or Python's f(a=1), at the start of a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ktx.chat_formats.calls import CallEvents
from ktx.chat_formats.events import Event, Text
from ktx.chat_formats.json_repair import JsonValue
from ktx.chat_formats.objects import ObjectCall, read_list
from ktx.chat_formats.reader import NotACall, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat

_FUNCTION = re.compile(r"[A-Za-z_][\w.-]{0,255}")
_KEY = re.compile(r"[A-Za-z_]\w{0,255}")


def read_bare(source: TextReader, calls: CallEvents, call_format: CallFormat, mark: str) -> Iterator[Event | None]:
    """Reads calls after `mark`: `{` of an object, or `[` of a list: of objects if a brace follows, else of Python's."""
    ends = marks_of(*call_format.ends, *call_format.sections, "```")
    if mark[-1] == "{":
        source.pos -= 1  # back to the brace
        yield from ObjectCall(source, calls, ends, marked=False).read()
        yield from _read_separator(source)
        return
    yield from source.read_whitespace()
    if (yield from source.peek_char()) == "{":
        source.pos -= 1  # `read_list` skips the bracket
        yield from read_list(source, calls, ends, marked=False)
    else:
        yield from _read_python_calls(source, calls)


def _read_separator(source: TextReader) -> Iterator[Event | None]:
    """Reads the separator between objects that are not in a list."""
    space = yield from source.read_whitespace()
    if (char := (yield from source.peek_char())) and char in ",;":
        source.pos += 1
    elif space:
        yield Text(space)


def _read_python_calls(source: TextReader, calls: CallEvents) -> Iterator[Event | None]:
    """Reads a list of calls in Python's syntax (Llama 4), [f(a=1), g()], from after the bracket. Each complete call
    stays a call if a later one is broken.
    """
    while True:
        yield from _read_python_call(source, calls)
        yield from source.read_whitespace()
        if not (yield from source.accept_mark(marks_of(","))):
            break
        yield from source.read_whitespace()
        source.start_call()  # the calls so far are complete
    yield from source.accept_mark(marks_of("]"))


def _read_python_call(source: TextReader, calls: CallEvents) -> Iterator[Event | None]:
    """Reads one call f(a=1); its values are JSON or Python's literals. NotACall for positional arguments."""
    name, mark = yield from source.read_short_until(marks_of("("), 256)
    if not mark or not _FUNCTION.fullmatch(name):
        raise NotACall
    source.pos += 1
    yield calls.begin(name)
    prefix = "{"
    while True:
        yield from source.read_whitespace()
        if (yield from source.accept_mark(marks_of(")"))):
            break
        key, mark = yield from source.read_short_until(marks_of("="), 256)
        if not mark or not _KEY.fullmatch(key.strip()):
            raise NotACall
        source.pos += 1
        yield from source.read_whitespace()
        yield calls.arguments(f"{prefix}{json.dumps(key.strip())}: ")
        prefix = ", "
        value = JsonValue(source)
        for piece in value.pieces():
            yield None if piece is None else calls.arguments(piece)
        yield from source.read_whitespace()
        if not value.done or (
            not (yield from source.accept_mark(marks_of(","))) and (yield from source.peek_char()) != ")"
        ):
            raise NotACall
    yield calls.arguments("{}" if prefix == "{" else "}")
    yield calls.end()
