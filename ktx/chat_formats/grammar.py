"""A grammar that lets a model write nothing but calls, in its own way of writing: for tool_choice "required" or a name.

The language is llguidance's Lark. What the grammar accepts, the parser reads back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ktx.chat_formats.calls import schemas
from ktx.chat_formats.registry import CallFormat, ChatFormat
from ktx.chat_formats.schema import kinds, property_schema

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # no model gets lost in spaces


class Lark:
    """The rules of one grammar."""

    def __init__(self, special: Mapping[str, int]):
        self.special, self.rules, self.names = special, list[str](), dict[str, str]()
        marks = sorted(special, key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(map(re.escape, marks))})" if marks else r"((?!))")

    def words(self, text: str) -> str:
        """Fixed text; marks that are tokens of the vocabulary as those tokens."""
        parts = [part for part in self.split.split(text) if part]
        return " ".join(f"<[{self.special[part]}]>" if part in self.special else _quoted(part) for part in parts)

    def rule(self, body: str, letter: str = "r", how: str = "") -> str:
        """The rule's name, a terminal's with a capital."""
        if body not in self.names:
            self.names[body] = f"{letter}{len(self.names)}"
            self.rules.append(f"{self.names[body]}{how}: {body}")
        return self.names[body]

    def json(self, schema: Any, root: Mapping[str, Any]) -> str:
        schema = dict(schema) if isinstance(schema, Mapping) else {}
        schema |= {key: root[key] for key in ("$defs", "definitions") if key in root}
        return self.rule(f"%json {json.dumps({**schema, 'x-guidance': _JSON}, ensure_ascii=False)}")

    def free(self, close: str, without: Iterable[str]) -> str:
        """Any text up to and with `close`, that none of the other marks stands in.

        A lexeme takes all it can, so one that ends with words must be lazy and take those words itself.
        """
        mark = close.strip()
        marks = "|".join(_regex(other) for other in dict.fromkeys(without) if other and other != mark)
        others = f" & ~/(?s:.*)({marks})(?s:.*)/" if marks else ""
        if mark in self.special:
            return f"{self.rule('/(?s:.*)/' + others, 'T')} {self.words(close)}"
        words = close.rstrip()
        once = f"/(?s:.*){_regex(words)}/ & ~/(?s:.*){_regex(mark)}(?s:.+)/{others}"
        return f"{self.rule(self.rule(once, 'T'), 'r', '[lazy]')} {self.words(close[len(words) :])}"

    def text(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules]) + "\n"


def forced_call_grammar(
    dialect: ChatFormat,
    tools: Iterable[Mapping[str, Any]],
    names: Iterable[str] | None = None,
    parallel: bool = True,
    special: Mapping[str, int] | None = None,
    thinking: bool = False,
) -> str:
    """One call, or several if `parallel`, of the named functions or any. `special`: the marks that are single tokens.

    `thinking`: the prompt has opened the reasoning block, which the model may write and must close first. ValueError
    where nothing can be called, KeyError for a name that no tool has.
    """
    format, known = dialect.format, schemas(tools)
    if format is None:
        raise ValueError(f"the dialect {dialect.name} has no calls")
    chosen = {name: known[name] for name in (known if names is None else names)}
    if not chosen:
        raise ValueError("no functions to call")
    lark = Lark(special or {})
    before, call, between, after = _STYLES[format.style](lark, format)
    one = lark.rule(" | ".join(call(name, schema) for name, schema in chosen.items()))
    more = f" ({lark.words(between)} {one})*" if parallel and between is not None else ""
    thought = _thought(lark, dialect) if thinking else ""
    return lark.text(f"{thought} {lark.words(before)} {one}{more} {lark.words(after)}".strip())


def _thought(lark: Lark, dialect: ChatFormat) -> str:
    format = dialect.format
    assert format is not None
    closing = dialect.think[1] or "<|end|>"
    before, behind = ("<|channel|>analysis<|message|>", "<|start|>assistant") if not dialect.think[1] else ("", "\n\n")
    body = lark.free(closing, (*format.starts, *format.sections))
    return f"{lark.words(before)} {body} {lark.words(behind)}".strip()


Call = Callable[[str, Mapping[str, Any]], str]
Style = tuple[str, Call, str | None, str]  # before a run of calls, a call, between two (None: never two), after them


def _arguments(lark: Lark, schema: Mapping[str, Any]) -> str:
    return lark.json({"type": "object", **schema}, schema)


def _around(lark: Lark, before: str, after: str) -> Call:
    """A call whose arguments are JSON between fixed words, in which {} stands for the name."""

    def call(name: str, schema: Mapping[str, Any]) -> str:
        return f"{lark.words(before.replace('{}', name))} {_arguments(lark, schema)} {lark.words(after)}"

    return call


def _object(key: str) -> str:
    return '{"name": "{}", "' + key + '": '


def _hermes(lark: Lark, format: CallFormat) -> Style:
    return "", _around(lark, "<tool_call>\n" + _object("arguments"), "}\n</tool_call>"), "\n", ""


def _list(lark: Lark, format: CallFormat) -> Style:
    return format.starts[0] + "[", _around(lark, _object("arguments"), "}"), ", ", "]"


def _bare(lark: Lark, format: CallFormat) -> Style:
    return "", _around(lark, _object("parameters"), "}"), "; ", ""


def _named(lark: Lark, format: CallFormat) -> Style:
    start, separator = format.starts[0], format.separators[0]
    end = format.ends[0] if format.ends else ""
    section_end = format.ends[1] if format.sections else ""
    if not format.named_ids:
        call = _around(lark, start + "{}" + separator, end)
    else:
        number = "/[0-9]{1,3}/"

        def call(name: str, schema: Mapping[str, Any]) -> str:
            head, tail = lark.words(f"{start}functions.{name}:"), lark.words(separator)
            return f"{head} {number} {tail} {_arguments(lark, schema)} {lark.words(end)}"

    return "".join(format.sections), call, "", section_end


def _fenced(lark: Lark, format: CallFormat) -> Style:
    call = _around(
        lark, format.starts[0] + "function" + format.separators[0] + "{}\n```json\n", "\n```" + format.ends[0]
    )
    return format.sections[0], call, "\n", format.ends[1]


def _harmony(lark: Lark, format: CallFormat) -> Style:
    """The arguments end the turn, so there is one call."""
    head = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>"
    return "", _around(lark, head, ""), None, ""


def _tags(lark: Lark, format: CallFormat) -> Style:
    line, quote = ("\n", "") if format.lines else ("", '"')
    name_is = "=" if format.lines else ' name="'
    quote_string = quote + (' string="{}"' if format.typed else "")
    parameter = format.tag_parameter[0] + name_is, quote_string + ">" + line, line + format.tag_parameter[1] + "\n"
    head = format.tag_call[0] + name_is, quote + ">\n", format.tag_call[1]
    if format.lines:
        call = _worded(lark, format, ("<tool_call>\n" + head[0], head[1], head[2] + "\n</tool_call>"), parameter)
        return "", call, "\n", ""
    # a lexeme takes all it can, so the line break belongs to the call: "\n" alone would never win against "\n</..."
    call = _worded(lark, format, (head[0], head[1], head[2] + "\n"), parameter)
    return format.sections[0] + "\n", call, "", format.ends[0]


def _pairs(lark: Lark, format: CallFormat) -> Style:
    key, value = format.pair_key, format.pair_value
    parameter = key[0], key[1] + "\n" + value[0], value[1] + "\n"
    return "", _worded(lark, format, (format.starts[0], "\n", format.ends[0]), parameter), "\n", ""


def _worded(lark: Lark, format: CallFormat, head: tuple[str, str, str], parameter: tuple[str, str, str]) -> Call:
    """A call in tags: every argument the schema names, in its order, those not required left out or not."""
    marks = (*format.starts, *format.ends, *format.sections, *format.tag_call, *format.tag_parameter)
    free = (*marks, *format.pair_key, *format.pair_value)

    def call(name: str, schema: Mapping[str, Any]) -> str:
        parts = [lark.words(head[0] + name + head[1])]
        for key in schema.get("properties") or {}:
            kind = property_schema(schema, key)
            opening = parameter[1].replace("{}", "true" if "string" in kinds(kind) else "false")
            value = _value(lark, kind, schema, parameter[2], free)
            one = f"{lark.words(parameter[0] + key + opening)} {value}"
            parts.append(one if key in (schema.get("required") or ()) else f"({one})?")
        return " ".join([*parts, lark.words(head[2])])

    return call


def _value(lark: Lark, schema: Any, root: Mapping[str, Any], close: str, marks: Iterable[str]) -> str:
    """A value and what closes it."""
    allowed = kinds(schema)
    if "string" not in allowed:
        return f"{lark.json(schema, root)} {lark.words(close)}"
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    if values and all(isinstance(value, str) and value for value in values):
        return f"({' | '.join(map(_quoted, values))}) {lark.words(close)}"
    return lark.free(close, marks)


def _pythonic(lark: Lark, format: CallFormat) -> Style:
    def call(name: str, schema: Mapping[str, Any]) -> str:
        """Arguments that are required first: a comma stands between two, so their order is fixed."""
        required = [key for key in schema.get("properties") or {} if key in (schema.get("required") or ())]
        optional = [key for key in schema.get("properties") or {} if key not in required]

        def one(key: str) -> str:
            value = property_schema(schema, key)
            words = '("True" | "False")' if kinds(value) == {"boolean"} else lark.json(value, schema)
            return f"{_quoted(key + '=')} {words}"

        comma = _quoted(", ")
        first = f" {comma} ".join(map(one, required))
        if first:
            inner = first + "".join(f" ({comma} {one(key)})?" for key in optional)
        else:
            starts = [
                one(key) + "".join(f" ({comma} {one(k)})?" for k in optional[n + 1 :]) for n, key in enumerate(optional)
            ]
            inner = f"({' | '.join(starts)})?" if starts else ""
        return f"{_quoted(name + '(')} {inner} {_quoted(')')}"

    return "[", call, ", ", "]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace('"', r"\"").replace(r"\ ", " ").replace("\\\n", r"\n")


_STYLES: dict[str, Callable[[Lark, CallFormat], Style]] = {
    "object": _hermes,
    "list": _list,
    "bare": _bare,
    "named": _named,
    "fenced": _fenced,
    "harmony": _harmony,
    "tags": _tags,
    "pairs": _pairs,
    "pythonic": _pythonic,
}
