"""Calls whose arguments stand between tags: <parameter=key>value</parameter>, <arg_key>key</arg_key><arg_value>..."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ktx.chat_formats.calls import Calls
from ktx.chat_formats.events import Event
from ktx.chat_formats.reader import Broken, TextReader, Wait, marks_of
from ktx.chat_formats.registry import CallFormat
from ktx.chat_formats.schema import convert, only_string, property_schema

TAG = 200  # characters of an opening tag
_STRING = re.compile(r"""\bstring\s*=\s*["']?true\b""")
_ATTRIBUTE = re.compile(r"""\s*(?:(?:name)?\s*=)?\s*["']?([^"'<>]*)["']?""")


class TagCall:
    """The arguments of one call in tags. A string flows while it comes, anything else waits for its end."""

    def __init__(self, source: TextReader, calls: Calls, format: CallFormat, name: str):
        self.source, self.calls, self.format, self.name = source, calls, format, name
        self.schema = calls.schemas.get(calls.known(name))
        self.opens = format.pair_key[0] or format.tag_parameter[0]
        self.close = format.pair_value[1] or format.tag_parameter[1]
        ends = (format.tag_call[1], *format.ends)
        self.ends = marks_of(*ends)
        # a closing tag counts where the call goes on or ends behind it; elsewhere the value speaks about tags
        self.follow = marks_of(self.opens, self.close, *ends)
        self.closed_by = marks_of(*ends, *format.starts, *format.sections)
        self.given: set[str] = set()
        self.next_key, self.over = "", False
        self.string = False  # what the last tag said of its value

    def read(self) -> Iterator[Event | None]:
        """From behind the name to behind the call."""
        while not self.over:
            yield from self.source.space()
            if self.next_key:
                yield from self._parameter()
            elif (yield from self.source.accept(marks_of(self.opens))):
                self.next_key, _ = yield from self._key()
                yield from self._parameter()
            elif (yield from self.source.accept(marks_of(self.close))):
                pass  # closed twice
            elif (yield from self.source.accept(self.ends)) or (yield from self.source.char()) == "":
                break
            else:
                raise Broken
        if not self.given:
            yield self.calls.begin(self.name)
        yield self.calls.put("}" if self.given else "{}")
        yield self.calls.end()

    def _parameter(self) -> Iterator[Event | None]:
        key, self.next_key = self.next_key, ""
        if self.format.pair_key[0]:
            yield from self.source.space()
            if not (yield from self.source.accept(marks_of(self.format.pair_value[0]))):
                raise Broken
        if not key:
            raise Broken
        schema = {"type": "string"} if self.string else property_schema(self.schema, key)
        lead = json.dumps(key, ensure_ascii=False) + ": "
        if only_string(schema):
            yield from self._lead(key, lead + '"')
            for piece in self._value():
                yield None if piece is None else self.calls.put(json.dumps(piece, ensure_ascii=False)[1:-1])
            yield self.calls.put('"')
            return
        value: list[str] = []
        for piece in self._value():
            if piece is None:
                yield None
            else:
                value.append(piece)
        yield from self._lead(key, lead + convert("".join(value), schema))

    def _lead(self, key: str, text: str) -> Iterator[Event]:
        if not self.given:
            yield self.calls.begin(self.name)
        yield self.calls.put((", " if self.given else "{") + text)
        self.given.add(key)

    def _key(self) -> Wait[tuple[str, str]]:
        """The key that an opening tag names, empty when it names none; and the text that was taken."""
        close = self.format.pair_key[1] or ">"
        text, mark = yield from self.source.upto(marks_of(close, self.format.pair_value[0], "<"), TAG)
        if not mark or mark == "<":
            return "", text
        key = text
        if mark == close:
            self.source.at += len(mark)
            text += mark
        if close == ">":
            self.string = self.format.typed and bool(_STRING.search(key))
            match = _ATTRIBUTE.match(key)
            key = match.group(1) if match else ""
        return key.strip(), text

    def _value(self) -> Iterator[str | None]:
        """The words up to the closing tag, without the line breaks that are layout."""
        source, lines, first = self.source, self.format.lines, self.format.lines
        closing = self.follow
        held = ""  # a line break: layout if the value ends behind it
        while True:
            text, mark = source.until(closing)
            if first and text:
                text, first = text.removeprefix("\n"), False
            text = held + text
            held = "\n" if lines and text.endswith("\n") else ""
            if text[: len(text) - len(held)]:
                yield text[: len(text) - len(held)]
            if mark:
                more = yield from self._after(mark)
                if more is None:
                    return
                yield held + mark + more
                first, held = False, ""
            elif source.ended:
                raise Broken
            else:
                yield None

    def _after(self, mark: str) -> Wait[str | None]:
        """None where `mark` ends the value, else what follows it that still belongs to the value."""
        source = self.source
        if mark == self.opens:  # without a closing tag before it: only where it names an argument that is missing
            key, raw = yield from self._key()
            known = property_schema({**(self.schema or {}), "additionalProperties": None}, key) is not None
            self.next_key = key if key and known and key not in self.given else ""
            return None if self.next_key else raw
        space = yield from source.space()
        ends = yield from source.comes(self.follow if mark == self.close else self.closed_by)
        if not ends and (yield from source.char()):
            return space
        self.over = mark != self.close
        return None
