"""The tool calls of one output: their indices and ids, and the functions of the request."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ktx.chat_formats.events import CallArguments, CallEnd, CallStart, Event
from ktx.chat_formats.json_repair import JsonValue, read_value, repair_json
from ktx.chat_formats.reader import Marks, NotACall, TextReader

_ID_CHARS = string.ascii_letters + string.digits
_PREFIX = "functions."
MAX_CALLS = 1000  # calls of one output: a model that writes more repeats itself


def new_id() -> str:
    """Returns a random id in OpenAI's form."""
    return "call_" + "".join(secrets.choice(_ID_CHARS) for _ in range(24))


def parameter_schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns function name -> JSON schema of its arguments; a tool is OpenAI's {"type", "function"} or the function
    alone.
    """
    functions = [tool.get("function") or tool for tool in tools]
    parameters = {function["name"]: function.get("parameters") for function in functions if function.get("name")}
    return {name: dict(schema) if isinstance(schema, Mapping) else {} for name, schema in parameters.items()}


class CallEvents:
    """Creates the events of an output's calls. `index` is that of the latest call, `open` whether it is incomplete.

    Args:
        tools: the request's tools.
        ids: returns a new call id.
    """

    def __init__(self, tools: Iterable[Mapping[str, Any]], ids: Callable[[], str] = new_id):
        self.schemas, self.ids = parameter_schemas(tools), ids
        self.index, self.open = -1, False

    def begin(self, name: str, id: str = "") -> CallStart:
        """Starts a call; without `id` it gets a new one. Raises NotACall beyond MAX_CALLS."""
        if self.index + 1 >= MAX_CALLS:
            raise NotACall
        self.index, self.open = self.index + 1, True
        return CallStart(self.index, id or self.ids(), self.resolve_name(name))

    def arguments(self, text: str) -> CallArguments:
        """Returns a fragment of the current call's arguments."""
        return CallArguments(self.index, text)

    def end(self) -> CallEnd:
        """Ends the current call."""
        self.open = False
        return CallEnd(self.index)

    def complete_call(self, name: str, arguments: str = "{}", id: str = "") -> Iterator[Event]:
        """Yields the events of a complete call."""
        yield self.begin(name, id)
        yield self.arguments(arguments)
        yield self.end()

    def resolve_name(self, name: str) -> str:
        """Returns the function's name as the request has it: models write functions.name for name, and vice versa."""
        if name in self.schemas:
            return name
        short_name = name.removeprefix(_PREFIX)
        return next((candidate for candidate in (short_name, _PREFIX + name) if candidate in self.schemas), short_name)


def extract_object(text: str) -> str:
    """Returns the JSON object that models mean by a complete JSON value as arguments: an object, one inside a string,
    or an empty one for null. Raises NotACall for any other value.
    """
    if text.startswith('"'):
        inner = json.loads(text).strip()
        text = "" if not inner else repair_json(inner) or "no object"  # which is refused below
    if text in ("", "null"):
        return "{}"
    if not text.startswith("{"):
        raise NotACall
    return text


def stream_object(source: TextReader, ends: Marks) -> Iterator[str | None]:
    """Yields the next JSON object in pieces, None where more text is needed; brackets that the model left open before
    `ends` or the stream's end are closed. Raises NotACall for anything else.
    """
    value = JsonValue(source)
    yield from value.pieces()
    if value.done:
        return
    mark = yield from source.peek_mark(ends)
    if not value.closable or not (mark or (yield from source.peek_char()) == ""):
        raise NotACall
    yield value.missing_brackets()


def read_arguments(source: TextReader, ends: Marks) -> Iterator[str | None]:
    """Yields a call's arguments as the text of one JSON object, None where more text is needed: an object in pieces,
    any other value at once after it was converted, an empty object where one of `ends` or the stream's end is next.
    """
    char = yield from source.peek_char()
    if char == "{":
        yield from stream_object(source, ends)
    elif char == "" or (yield from source.peek_mark(ends)):
        yield "{}"
    else:
        text = yield from read_value(source)
        if text is None:
            raise NotACall
        yield extract_object(text)


def stream_call(source: TextReader, calls: CallEvents, ends: Marks, name: str, id: str = "") -> Iterator[Event | None]:
    """Yields the events of a call whose name is known, from the reader at its arguments; None where more text is
    needed.

    CallStart is yielded only with the first piece of arguments, so that if the text turns out to be no call (NotACall)
    before that, no event has to be taken back.
    """
    started = False
    for piece in read_arguments(source, ends):
        if piece is None:
            yield None
            continue
        if not started:
            started = True
            yield calls.begin(name, id)
        yield calls.arguments(piece)
    yield calls.end()
