"""Reads calls after a mark: a JSON object, a list of them, tags, or the function's name first.

Models vary between these syntaxes, so the text after the mark decides, not the family.
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

MAX_HEADER_CHARS = 300  # maximum characters between a call's mark and its arguments
_NAME = re.compile(r"[^\s\"'<>{}()\[\]|,;`｜]{1,256}")
_CALL_TYPES = ("function", "tool")  # DeepSeek writes a call's type before its name
_MODEL_ID = re.compile(r"(?:functions\.)?(.+?):\d+")


def read_marked(source: TextReader, calls: Calls, call_format: CallFormat, mark: str) -> Iterator[Event | None]:
    """Reads one call or a list of calls after `mark`."""
    if call_format.tag_call[0] and mark.startswith(call_format.tag_call[0]):
        source.at -= len(mark)
    fenced = yield from _fence(source)
    yield from _read(source, calls, call_format)
    if fenced:
        yield from _fence(source)


def _read(source: TextReader, calls: Calls, call_format: CallFormat) -> Iterator[Event | None]:
    """Reads calls in the syntax that the next text shows."""
    ends = marks_of(*call_format.ends, *call_format.starts, *call_format.sections, *call_format.tag_call[1:], "```")
    char = yield from source.char()
    if char == "{":
        yield from _objects(source, calls, ends)
    elif char == "[" and not (yield from source.comes(marks_of(call_format.id_mark, *call_format.separators))):
        yield from read_list(source, calls, ends)
    elif (yield from source.accept(marks_of(call_format.tag_call[0]))):
        name = yield from _tag_name(source)
        source.begun()
        yield from source.space()
        if (yield from source.char()) == "{":
            yield from stream_call(source, calls, ends, name)
        else:
            yield from TagCall(source, calls, call_format, name).read()
    else:
        yield from _named(source, calls, call_format)


def _objects(source: TextReader, calls: Calls, ends: Marks) -> Iterator[Event | None]:
    """Reads {...} and further objects before the end mark, each a call. Other text after them is left as text."""
    while True:
        yield from ObjectCall(source, calls, ends, True).read()
        yield from _spare_brackets(source)
        source.keep()  # the calls so far are complete
        space = yield from source.space()
        if (char := (yield from source.char())) and char in ",;":
            source.at += 1
            space = yield from source.space()
        if (yield from source.char()) != "{":
            if space:
                yield Text(space)
            break


def _named(source: TextReader, calls: Calls, call_format: CallFormat) -> Iterator[Event | None]:
    """Reads name<separator>{...}, with marks or only line breaks between."""
    ends = marks_of(*call_format.ends, *call_format.starts, *call_format.sections, "```")
    stops = marks_of(
        *call_format.separators,
        call_format.id_mark,
        "\n",
        "{",
        "```",
        call_format.pair_key[0],
        *call_format.ends,
        *call_format.starts,
    )
    text, mark = yield from source.upto(stops, MAX_HEADER_CHARS)
    yield from source.space()
    if text.strip() in _CALL_TYPES and (yield from source.accept(marks_of(*call_format.separators))):
        yield from source.space()
        text, mark = yield from source.upto(stops, MAX_HEADER_CHARS)
        yield from source.space()
    name, call_id = text.strip(), ""
    if not _NAME.fullmatch(name):
        raise Broken
    if call_format.named_ids:
        match = _MODEL_ID.fullmatch(name)
        name, call_id = (match.group(1), name) if match else (name, "")
    if mark and mark == call_format.id_mark:
        source.at += len(mark)
        text, mark = yield from source.upto(stops, MAX_HEADER_CHARS)
        call_id = text.strip()
    separator = yield from source.accept(marks_of(*call_format.separators))
    fenced = yield from _fence(source)
    if (yield from source.comes(marks_of(call_format.pair_key[0]))):
        yield from TagCall(source, calls, call_format, name).read()
        return
    if not (separator or fenced) and (yield from source.char()) != "{":  # a name without arguments, or text
        ended = yield from source.comes(marks_of(*call_format.ends))
        if not ended and calls.known(name) not in calls.schemas:
            raise Broken
        if not ended and (yield from source.char()) and not (yield from source.comes(ends)):
            raise Broken
    yield from stream_call(source, calls, ends, name, call_id)
    if fenced:
        yield from _fence(source)


def _tag_name(source: TextReader) -> Wait[str]:
    """Reads the name and the end of <function=name> or <invoke name="name">."""
    text, mark = yield from source.upto(marks_of(">"), MAX_HEADER_CHARS)
    source.at += len(mark)
    name = re.sub(r"^\s*(?:name)?\s*=?", "", text).strip().strip("\"'").strip()
    if not mark or not _NAME.fullmatch(name):
        raise Broken
    return name


def _fence(source: TextReader) -> Wait[bool]:
    """Reads white space, and the fence of a Markdown code block if there is one; returns whether there was."""
    yield from source.space()
    if not (yield from source.accept(marks_of("```json", "```"))):
        return False
    yield from source.space()
    return True


def _spare_brackets(source: TextReader) -> Wait[None]:
    """Skips closing brackets without an opening one."""
    while (yield from source.char()) in ("}", "]"):
        source.at += 1
