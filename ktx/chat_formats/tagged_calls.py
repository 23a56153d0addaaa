"""Calls behind a mark: a JSON object, a list of them, tags, or the function's name first.

Models drift between these ways of writing, so what follows the mark decides, not the family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ktx.chat_formats.calls import Calls, stream_call
from ktx.chat_formats.events import Event, Text
from ktx.chat_formats.objects import ObjectCall, read_list
from ktx.chat_formats.reader import Broken, Marks, TextReader, Wait, marks_of
from ktx.chat_formats.registry import CallFormat
from ktx.chat_formats.tags import TagCall

HEADER = 300  # characters between a call's mark and its arguments
_NAME = re.compile(r"[^\s\"'<>{}()\[\]|,;`｜]{1,256}")
_KIND = ("function", "tool")  # deepseek writes a call's type before its name
_MODEL_ID = re.compile(r"(?:functions\.)?(.+?):\d+")


def read_marked(source: TextReader, calls: Calls, format: CallFormat, mark: str) -> Iterator[Event | None]:
    """One call or a list of calls, from behind `mark`."""
    if format.tag_call[0] and mark.startswith(format.tag_call[0]):
        source.at -= len(mark)
    fenced = yield from _fence(source)
    yield from _read(source, calls, format)
    if fenced:
        yield from _fence(source)


def _read(source: TextReader, calls: Calls, format: CallFormat) -> Iterator[Event | None]:
    ends = marks_of(*format.ends, *format.starts, *format.sections, *format.tag_call[1:], "```")
    char = yield from source.char()
    if char == "{":
        yield from _objects(source, calls, ends)
    elif char == "[" and not (yield from source.comes(marks_of(format.id_mark, *format.separators))):
        yield from read_list(source, calls, ends)
    elif (yield from source.accept(marks_of(format.tag_call[0]))):
        name = yield from _tag_name(source)
        source.begun()
        yield from source.space()
        if (yield from source.char()) == "{":
            yield from stream_call(source, calls, ends, name)
        else:
            yield from TagCall(source, calls, format, name).read()
    else:
        yield from _named(source, calls, format)


def _objects(source: TextReader, calls: Calls, ends: Marks) -> Iterator[Event | None]:
    """{...}, and those that follow it before the end mark: each is a call. What follows and is none is left, as text."""
    while True:
        yield from ObjectCall(source, calls, ends, True).read()
        yield from _spare_brackets(source)
        source.keep()  # the calls so far are sure
        space = yield from source.space()
        if (char := (yield from source.char())) and char in ",;":
            source.at += 1
            space = yield from source.space()
        if (yield from source.char()) != "{":
            if space:
                yield Text(space)
            break


def _named(source: TextReader, calls: Calls, format: CallFormat) -> Iterator[Event | None]:
    """name<separator>{...}, with marks or only line breaks between."""
    ends = marks_of(*format.ends, *format.starts, *format.sections, "```")
    stops = marks_of(
        *format.separators, format.id_mark, "\n", "{", "```", format.pair_key[0], *format.ends, *format.starts
    )
    word, mark = yield from source.upto(stops, HEADER)
    yield from source.space()
    if word.strip() in _KIND and (yield from source.accept(marks_of(*format.separators))):
        yield from source.space()
        word, mark = yield from source.upto(stops, HEADER)
        yield from source.space()
    name, id = word.strip(), ""
    if not _NAME.fullmatch(name):
        raise Broken
    if format.named_ids:
        match = _MODEL_ID.fullmatch(name)
        name, id = (match.group(1), name) if match else (name, "")
    if mark and mark == format.id_mark:
        source.at += len(mark)
        word, mark = yield from source.upto(stops, HEADER)
        id = word.strip()
    separator = yield from source.accept(marks_of(*format.separators))
    fenced = yield from _fence(source)
    if (yield from source.comes(marks_of(format.pair_key[0]))):
        yield from TagCall(source, calls, format, name).read()
        return
    if not (separator or fenced) and (yield from source.char()) != "{":  # a name alone, or words
        ended = yield from source.comes(marks_of(*format.ends))
        if not ended and calls.known(name) not in calls.schemas:
            raise Broken
        if not ended and (yield from source.char()) and not (yield from source.comes(ends)):
            raise Broken
    yield from stream_call(source, calls, ends, name, id)
    if fenced:
        yield from _fence(source)


def _tag_name(source: TextReader) -> Wait[str]:
    """The name in <function=name> or <invoke name="name">, the tag taken."""
    text, mark = yield from source.upto(marks_of(">"), HEADER)
    source.at += len(mark)
    name = re.sub(r"^\s*(?:name)?\s*=?", "", text).strip().strip("\"'").strip()
    if not mark or not _NAME.fullmatch(name):
        raise Broken
    return name


def _fence(source: TextReader) -> Wait[bool]:
    """White space, and the border of a Markdown code block if there is one."""
    yield from source.space()
    if not (yield from source.accept(marks_of("```json", "```"))):
        return False
    yield from source.space()
    return True


def _spare_brackets(source: TextReader) -> Wait[None]:
    """Closing brackets that no bracket opened."""
    while (yield from source.char()) in ("}", "]"):
        source.at += 1
