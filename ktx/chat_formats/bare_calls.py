"""Reads Llama's calls without marks: a JSON object, or Python's f(a=1), at the start of a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ktx.chat_formats.calls import Calls
from ktx.chat_formats.events import Event, Text
from ktx.chat_formats.json_repair import Value
from ktx.chat_formats.objects import ObjectCall, read_list
from ktx.chat_formats.reader import Broken, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat

_FUNCTION = re.compile(r"[A-Za-z_][\w.-]{0,255}")
_KEY = re.compile(r"[A-Za-z_]\w{0,255}")


def read_bare(source: TextReader, calls: Calls, call_format: CallFormat, mark: str) -> Iterator[Event | None]:
    """Reads calls after `mark`: `{` of an object, or `[` of a list of objects or of Python calls."""
    ends = marks_of(*call_format.ends, *call_format.sections, "```")
    if mark[-1] == "{":
        source.at -= 1
        yield from ObjectCall(source, calls, ends, False).read()
        yield from _between(source)
        return
    yield from source.space()
    if (yield from source.char()) == "{":
        source.at -= 1
        yield from read_list(source, calls, ends, False)
    else:
        yield from _python_calls(source, calls)


def _between(source: TextReader) -> Iterator[Event | None]:
    """Reads the separator between objects that are not in a list."""
    space = yield from source.space()
    if (char := (yield from source.char())) and char in ",;":
        source.at += 1
    elif space:
        yield Text(space)


def _python_calls(source: TextReader, calls: Calls) -> Iterator[Event | None]:
    """Reads [f(a=1), g()], from after the bracket."""
    while True:
        yield from _python_call(source, calls)
        yield from source.space()
        if not (yield from source.accept(marks_of(","))):
            break
        yield from source.space()
        source.keep()
    yield from source.accept(marks_of("]"))


def _python_call(source: TextReader, calls: Calls) -> Iterator[Event | None]:
    """Reads one call f(a=1)."""
    name, mark = yield from source.upto(marks_of("("), 256)
    if not mark or not _FUNCTION.fullmatch(name):
        raise Broken
    source.at += 1
    yield calls.begin(name)
    prefix = "{"
    while True:
        yield from source.space()
        if (yield from source.accept(marks_of(")"))):
            break
        key, mark = yield from source.upto(marks_of("="), 256)
        if not mark or not _KEY.fullmatch(key.strip()):
            raise Broken
        source.at += 1
        yield from source.space()
        yield calls.put(f"{prefix}{json.dumps(key.strip())}: ")
        prefix = ", "
        value = Value(source)
        for piece in value.pieces():
            yield None if piece is None else calls.put(piece)
        yield from source.space()
        if not value.done or (not (yield from source.accept(marks_of(","))) and (yield from source.char()) != ")"):
            raise Broken
    yield calls.put("{}" if prefix == "{" else "}")
    yield calls.end()
