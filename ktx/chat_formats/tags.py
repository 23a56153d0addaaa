"""Reads calls whose arguments are between tags: <parameter=key>value</parameter>,
<arg_key>key</arg_key><arg_value>...
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ktx.chat_formats.calls import CallEvents
from ktx.chat_formats.events import Event
from ktx.chat_formats.reader import NotACall, Step, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat
from ktx.chat_formats.schema import is_string_only, property_schema, to_json

MAX_TAG_CHARS = 200  # maximum characters of an opening tag
_STRING = re.compile(r"""\bstring\s*=\s*["']?true\b""")
_ATTRIBUTE = re.compile(r"""\s*(?:(?:name)?\s*=)?\s*["']?([^"'<>]*)["']?""")


class TagCall:
    """The arguments of one call in tags. A string is streamed, any other value is emitted at its end."""

    def __init__(self, source: TextReader, calls: CallEvents, call_format: CallFormat, name: str):
        """Selects the family's tags: <parameter=key>, or <arg_key> and <arg_value>. The reader is after the name."""
        self.source, self.calls, self.format, self.name = source, calls, call_format, name
        self.schema = calls.schemas.get(calls.resolve_name(name))
        self.open_mark = call_format.pair_key[0] or call_format.tag_parameter[0]
        self.close_mark = call_format.pair_value[1] or call_format.tag_parameter[1]
        self.key_end = call_format.pair_key[1] or ">"  # ends a key
        self.value_open = call_format.pair_value[0]  # opens a value; empty for <parameter
        ends = (call_format.tag_call[1], *call_format.ends)
        self.ends = marks_of(*ends)
        # A closing tag is one only where the call continues or ends after it; elsewhere it is part of the value.
        self._value_end_marks = marks_of(self.open_mark, self.close_mark, *ends)
        self._call_ends = marks_of(*ends, *call_format.starts, *call_format.sections)
        self._keys: set[str] = set()  # keys of the arguments so far
        # the key of an opening tag that ended the previous value, and whether the call's end did
        self._next_key, self._done = "", False
        self._is_string = False  # whether the last tag marked its value as a string

    def read(self) -> Iterator[Event | None]:
        """Yields the events of the call, from after the name to its end, None where more text is needed. Raises
        NotACall when the text is not a call.
        """
        while not self._done:
            yield from self.source.read_whitespace()
            if self._next_key:
                yield from self._read_parameter()
            elif (yield from self.source.accept_mark(marks_of(self.open_mark))):
                self._next_key, _ = yield from self._read_key()
                yield from self._read_parameter()
            elif (yield from self.source.accept_mark(marks_of(self.close_mark))):
                pass  # a repeated closing tag
            elif (yield from self.source.accept_mark(self.ends)) or (yield from self.source.peek_char()) == "":
                break
            else:
                raise NotACall
        if not self._keys:
            yield self.calls.begin(self.name)
        yield self.calls.arguments("}" if self._keys else "{}")
        yield self.calls.end()

    def _read_parameter(self) -> Iterator[Event | None]:
        """Reads one argument, whose opening tag was read. A string is emitted while it arrives; any other value only at
        its end, because its text is converted as a whole.
        """
        key, self._next_key = self._next_key, ""
        if self.format.pair_key[0]:
            yield from self.source.read_whitespace()
            if not (yield from self.source.accept_mark(marks_of(self.value_open))):
                raise NotACall
        if not key:
            raise NotACall
        schema = {"type": "string"} if self._is_string else property_schema(self.schema, key)
        lead = json.dumps(key, ensure_ascii=False) + ": "
        if is_string_only(schema):
            yield from self._emit_lead(key, lead + '"')
            for piece in self._read_value():
                yield None if piece is None else self.calls.arguments(json.dumps(piece, ensure_ascii=False)[1:-1])
            yield self.calls.arguments('"')
            return
        value: list[str] = []
        for piece in self._read_value():
            if piece is None:
                yield None
            else:
                value.append(piece)
        yield from self._emit_lead(key, lead + to_json("".join(value), schema))

    def _emit_lead(self, key: str, text: str) -> Iterator[Event]:
        """Emits the text before a value; starts the call with the first one."""
        if not self._keys:
            yield self.calls.begin(self.name)
        yield self.calls.arguments((", " if self._keys else "{") + text)
        self._keys.add(key)

    def _read_key(self) -> Step[tuple[str, str]]:
        """Reads the rest of an opening tag: `=key>` or ` name="key" string="true">` of <parameter, or `key</arg_key>`.

        Returns the key, empty when it has none, and the text that was read; sets `_is_string` for a <parameter.
        """
        text, mark = yield from self.source.read_short_until(
            marks_of(self.key_end, self.value_open, "<"), MAX_TAG_CHARS
        )
        if not mark or mark == "<":
            return "", text
        key = text
        if mark == self.key_end:
            self.source.pos += len(mark)
            text += mark
        if self.key_end == ">":
            self._is_string = self.format.typed_parameters and bool(_STRING.search(key))
            match = _ATTRIBUTE.match(key)
            key = match.group(1) if match else ""
        return key.strip(), text

    def _read_value(self) -> Iterator[str | None]:
        """Yields the pieces of an argument's value up to the mark that ends it; None when more text has to arrive.

        Line breaks that are layout are left out: with `values_on_lines`, one after the opening tag and one before the
        closing tag.
        """
        source, own_lines, at_start = self.source, self.format.values_on_lines, self.format.values_on_lines
        line_break = ""  # a line break, which is layout if the value ends after it
        while True:
            text, mark = source.read_until(self._value_end_marks)
            if at_start and text:
                text, at_start = text.removeprefix("\n"), False
            text = line_break + text
            line_break = "\n" if own_lines and text.endswith("\n") else ""
            if text[: len(text) - len(line_break)]:
                yield text[: len(text) - len(line_break)]
            if mark:
                more = yield from self._read_after_mark(mark)
                if more is None:  # the mark ends the value; else it is part of it
                    return
                yield line_break + mark + more
                at_start, line_break = False, ""
            elif source.finished:
                raise NotACall
            else:
                yield None

    def _read_after_mark(self, mark: str) -> Step[str | None]:
        """Returns None if `mark` ends the value, else the text after it that still belongs to the value.

        A value is free text, which may contain tags. So a mark ends it only if the call continues or ends after it.
        """
        source = self.source
        # an opening tag without a closing tag before it ends the value only if it names a missing argument
        if mark == self.open_mark:
            key, raw = yield from self._read_key()
            # only the function's own arguments are known, whatever else its schema allows
            known = property_schema({**(self.schema or {}), "additionalProperties": None}, key) is not None
            self._next_key = key if key and known and key not in self._keys else ""
            return None if self._next_key else raw
        space = yield from source.read_whitespace()
        ends = yield from source.peek_mark(self._value_end_marks if mark == self.close_mark else self._call_ends)
        if not ends and (yield from source.peek_char()):
            return space
        self._done = mark != self.close_mark
        return None
