"""Reads calls after a mark: a JSON object, a list of them, tags, or the function's name first.

Models vary between these syntaxes, so the text after the mark decides, not the family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ktx.chat_formats.calls import CallEvents, stream_call
from ktx.chat_formats.events import Event, Text
from ktx.chat_formats.objects import ObjectCall, read_list
from ktx.chat_formats.reader import Marks, NotACall, Step, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat
from ktx.chat_formats.tags import TagCall

MAX_HEADER_CHARS = 300  # maximum characters between a call's mark and its arguments
_NAME = re.compile(r"[^\s\"'<>{}()\[\]|,;`｜]{1,256}")
_CALL_TYPES = ("function", "tool")  # DeepSeek writes a call's type before its name
_MODEL_ID = re.compile(r"(?:functions\.)?(.+?):\d+")


def read_marked(source: TextReader, calls: CallEvents, call_format: CallFormat, mark: str) -> Iterator[Event | None]:
    """Reads one call or a list of calls after `mark`."""
    if call_format.tag_call[0] and mark.startswith(call_format.tag_call[0]):
        source.pos -= len(mark)
    fenced = yield from _read_fence(source)
    yield from _read_calls(source, calls, call_format)
    if fenced:
        yield from _read_fence(source)


def _read_calls(source: TextReader, calls: CallEvents, call_format: CallFormat) -> Iterator[Event | None]:
    """Reads calls in the syntax that the next text shows: JSON objects, a list of them, tags, or the name first. The
    family's own syntax does not decide, because models also write those of others.
    """
    ends = marks_of(*call_format.ends, *call_format.starts, *call_format.sections, *call_format.tag_call[1:], "```")
    char = yield from source.peek_char()
    if char == "{":
        yield from _read_objects(source, calls, ends)
    elif char == "[" and not (yield from source.peek_mark(marks_of(call_format.id_mark, *call_format.separators))):
        yield from read_list(source, calls, ends)
    elif (yield from source.accept_mark(marks_of(call_format.tag_call[0]))):
        name = yield from _read_tag_name(source)
        source.mark_lead()  # no other call begins within the tag
        yield from source.read_whitespace()
        if (yield from source.peek_char()) == "{":
            yield from stream_call(source, calls, ends, name)
        else:
            yield from TagCall(source, calls, call_format, name).read()
    else:
        yield from _read_named(source, calls, call_format)


def _read_objects(source: TextReader, calls: CallEvents, ends: Marks) -> Iterator[Event | None]:
    """Reads {...} and further objects before the end mark, each a call. Other text after them is left as text."""
    while True:
        yield from ObjectCall(source, calls, ends, marked=True).read()
        yield from _skip_spare_brackets(source)
        source.start_call()  # the calls so far are complete
        space = yield from source.read_whitespace()
        if (char := (yield from source.peek_char())) and char in ",;":
            source.pos += 1
            space = yield from source.read_whitespace()
        if (yield from source.peek_char()) != "{":
            if space:
                yield Text(space)
            break


def _read_named(source: TextReader, calls: CallEvents, call_format: CallFormat) -> Iterator[Event | None]:
    """Reads name<separator>{...}, with marks or only line breaks between.

    The header may also have a type before the name (DeepSeek), an id after it (Mistral), or be an id that contains the
    name (Kimi). Without a separator, only a known function's name makes it a call.
    """
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
    text, mark = yield from source.read_short_until(stops, MAX_HEADER_CHARS)
    yield from source.read_whitespace()
    if text.strip() in _CALL_TYPES and (yield from source.accept_mark(marks_of(*call_format.separators))):
        yield from source.read_whitespace()
        text, mark = yield from source.read_short_until(stops, MAX_HEADER_CHARS)
        yield from source.read_whitespace()
    name, call_id = text.strip(), ""
    if not _NAME.fullmatch(name):
        raise NotACall
    if call_format.named_ids:
        match = _MODEL_ID.fullmatch(name)
        name, call_id = (match.group(1), name) if match else (name, "")
    if mark and mark == call_format.id_mark:
        source.pos += len(mark)
        text, mark = yield from source.read_short_until(stops, MAX_HEADER_CHARS)
        call_id = text.strip()
    separator = yield from source.accept_mark(marks_of(*call_format.separators))
    fenced = yield from _read_fence(source)
    if (yield from source.peek_mark(marks_of(call_format.pair_key[0]))):
        yield from TagCall(source, calls, call_format, name).read()
        return
    if not (separator or fenced) and (yield from source.peek_char()) != "{":  # a name without arguments, or text
        ended = yield from source.peek_mark(marks_of(*call_format.ends))
        if not ended and calls.resolve_name(name) not in calls.schemas:
            raise NotACall
        if not ended and (yield from source.peek_char()) and not (yield from source.peek_mark(ends)):
            raise NotACall
    yield from stream_call(source, calls, ends, name, call_id)
    if fenced:
        yield from _read_fence(source)


def _read_tag_name(source: TextReader) -> Step[str]:
    """Reads the name and the end of <function=name> or <invoke name="name">."""
    text, mark = yield from source.read_short_until(marks_of(">"), MAX_HEADER_CHARS)
    source.pos += len(mark)
    name = re.sub(r"^\s*(?:name)?\s*=?", "", text).strip().strip("\"'").strip()
    if not mark or not _NAME.fullmatch(name):
        raise NotACall
    return name


def _read_fence(source: TextReader) -> Step[bool]:
    """Reads white space, and the fence of a Markdown code block if there is one; returns whether there was."""
    yield from source.read_whitespace()
    if not (yield from source.accept_mark(marks_of("```json", "```"))):
        return False
    yield from source.read_whitespace()
    return True


def _skip_spare_brackets(source: TextReader) -> Step[None]:
    """Skips closing brackets without an opening one."""
    while (yield from source.peek_char()) in ("}", "]"):
        source.pos += 1
