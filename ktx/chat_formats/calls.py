"""The calls of one answer: their numbers and ids, and which functions there are."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ktx.chat_formats.events import CallArguments, CallEnd, CallStart, Event
from ktx.chat_formats.json_repair import Value, collect, strict
from ktx.chat_formats.reader import Broken, Marks, TextReader

_LETTERS = string.ascii_letters + string.digits
_PREFIX = "functions."
MOST = 1000  # calls of one answer: nobody runs more, and a model that writes more has lost its way


def new_id() -> str:
    """An id as OpenAI's look."""
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(24))


def schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Function name -> JSON schema of its arguments; a tool is OpenAI's {"type", "function"} or the function alone."""
    functions = [tool.get("function") or tool for tool in tools]
    found = {function["name"]: function.get("parameters") for function in functions if function.get("name")}
    return {name: dict(schema) if isinstance(schema, Mapping) else {} for name, schema in found.items()}


class Calls:
    """Makes the events of calls."""

    def __init__(self, tools: Iterable[Mapping[str, Any]], ids: Callable[[], str] = new_id):
        self.schemas, self.ids = schemas(tools), ids
        self.index, self.open = -1, False

    def begin(self, name: str, id: str = "") -> CallStart:
        if self.index + 1 >= MOST:
            raise Broken
        self.index, self.open = self.index + 1, True
        return CallStart(self.index, id or self.ids(), self.known(name))

    def put(self, text: str) -> CallArguments:
        return CallArguments(self.index, text)

    def end(self) -> CallEnd:
        self.open = False
        return CallEnd(self.index)

    def whole(self, name: str, arguments: str = "{}", id: str = "") -> Iterator[Event]:
        yield self.begin(name, id)
        yield self.put(arguments)
        yield self.end()

    def known(self, name: str) -> str:
        """The function's name as the request has it: models write functions.name for name, and the other way round."""
        if name in self.schemas:
            return name
        bare = name.removeprefix(_PREFIX)
        return next((known for known in (bare, _PREFIX + name) if known in self.schemas), bare)


def object_text(text: str) -> str:
    """The arguments that a whole JSON value stands for: an object, one inside a string, or nothing at all. Broken else."""
    if text.startswith('"'):
        inner = json.loads(text).strip()
        text = "" if not inner else strict(inner) or "no object"
    if text in ("", "null"):
        return "{}"
    if not text.startswith("{"):
        raise Broken
    return text


def stream_object(source: TextReader, ends: Marks) -> Iterator[str | None]:
    """The object that comes, in pieces; brackets left open before `ends` or the stream's end are closed. Broken else."""
    value = Value(source)
    yield from value.pieces()
    if value.done:
        return
    mark = yield from source.comes(ends)
    if not value.closable or not (mark or (yield from source.char()) == ""):
        raise Broken
    yield value.closing()


def read_arguments(source: TextReader, ends: Marks) -> Iterator[str | None]:
    """What stands where arguments belong, as the text of one object: streamed when it is one."""
    char = yield from source.char()
    if char == "{":
        yield from stream_object(source, ends)
    elif char == "" or (yield from source.comes(ends)):
        yield "{}"
    else:
        text = yield from collect(source)
        if text is None:
            raise Broken
        yield object_text(text)


def stream_call(source: TextReader, calls: Calls, ends: Marks, name: str, id: str = "") -> Iterator[Event | None]:
    """A call whose name is known, from its arguments on."""
    started = False
    for piece in read_arguments(source, ends):
        if piece is None:
            yield None
            continue
        if not started:
            started = True
            yield calls.begin(name, id)
        yield calls.put(piece)
    yield calls.end()
