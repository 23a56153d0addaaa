"""Builds a grammar that allows only tool calls, in the model's own syntax: for tool_choice "required" or a function
name.

The language is llguidance's Lark. The parser can read everything that the grammar accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ktx.chat_formats.calls import parameter_schemas
from ktx.chat_formats.registry import CallFormat, ChatFormat
from ktx.chat_formats.schema import allowed_types, property_schema

# fixed separators, because free white space lets a model emit spaces without end
_JSON_FORMAT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Lark:
    """The rules of one grammar. `special`: text of single-token marks -> token id; the rules refer to
    such a mark by its id.
    """

    def __init__(self, special: Mapping[str, int]):
        self.special, self.rules, self.names = special, list[str](), dict[str, str]()
        marks = sorted(special, key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(map(re.escape, marks))})" if marks else r"((?!))")

    def literal(self, text: str) -> str:
        """Returns a Lark expression for fixed text; single-token marks become token ids."""
        parts = [part for part in self.split.split(text) if part]
        return " ".join(f"<[{self.special[part]}]>" if part in self.special else _quoted(part) for part in parts)

    def add_rule(self, body: str, prefix: str = "r", attributes: str = "") -> str:
        """Adds a rule and returns its name; a capital letter makes it a terminal."""
        if body not in self.names:
            self.names[body] = f"{prefix}{len(self.names)}"
            self.rules.append(f"{self.names[body]}{attributes}: {body}")
        return self.names[body]

    def add_json_rule(self, schema: Any, root: Mapping[str, Any]) -> str:
        """Adds a rule for a JSON value of a schema, with the definitions of `root`."""
        schema = dict(schema) if isinstance(schema, Mapping) else {}
        schema |= {key: root[key] for key in ("$defs", "definitions") if key in root}
        return self.add_rule(f"%json {json.dumps({**schema, 'x-guidance': _JSON_FORMAT}, ensure_ascii=False)}")

    def text_until(self, close: str, excluded: Iterable[str]) -> str:
        """Returns a Lark expression for free text (reasoning, or an argument that is a string) up to and including
        `close`. The text may not contain the marks `excluded`, which would start a tool call or another argument for
        the parser.

        A lexeme is greedy, so one that ends with fixed text must be lazy and include that text. 'T' names a terminal (a
        lexeme), 'r' a rule.
        """
        mark = close.strip()
        marks = "|".join(
            _regex(other_mark) for other_mark in dict.fromkeys(excluded) if other_mark and other_mark != mark
        )
        exclusion = f" & ~/(?s:.*)({marks})(?s:.*)/" if marks else ""
        if mark in self.special:  # a token of its own, which ends the text
            return f"{self.add_rule('/(?s:.*)/' + exclusion, 'T')} {self.literal(close)}"
        closing_text = close.rstrip()
        # text that ends with the mark and has it only there
        lexeme = f"/(?s:.*){_regex(closing_text)}/ & ~/(?s:.*){_regex(mark)}(?s:.+)/{exclusion}"
        return f"{self.add_rule(self.add_rule(lexeme, 'T'), 'r', '[lazy]')} {self.literal(close[len(closing_text) :])}"

    def text(self, start: str) -> str:
        """Returns the grammar's text."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules]) + "\n"


def forced_call_grammar(
    chat_format: ChatFormat,
    tools: Iterable[Mapping[str, Any]],
    names: Iterable[str] | None = None,
    parallel: bool = True,
    special: Mapping[str, int] | None = None,
    thinking: bool = False,
) -> str:
    """Returns a Lark grammar of one call, or of several, for a request whose tool choice forces calls.

    Args:
        chat_format: the model's chat format.
        tools: the request's tools.
        names: the functions that may be called; None: any.
        parallel: allows several calls.
        special: the marks that are single tokens, with their ids.
        thinking: the prompt has opened the reasoning block, which the model may write and must close first.

    Raises:
        ValueError: nothing can be called.
        KeyError: no tool has one of the names.
    """
    call_format, parameters = chat_format.call_format, parameter_schemas(tools)
    if call_format is None:
        raise ValueError(f"the chat format {chat_format.name} has no tool calls")
    selected = {name: parameters[name] for name in (parameters if names is None else names)}
    if not selected:
        raise ValueError("no functions to call")
    lark = Lark(special or {})
    before, call, between, after = _STYLES[call_format.style](lark, call_format)
    any_call = lark.add_rule(" | ".join(call(name, schema) for name, schema in selected.items()))
    further_calls = f" ({lark.literal(between)} {any_call})*" if parallel and between is not None else ""
    reasoning = _reasoning_rule(lark, chat_format) if thinking else ""
    return lark.text(f"{reasoning} {lark.literal(before)} {any_call}{further_calls} {lark.literal(after)}".strip())


def _reasoning_rule(lark: Lark, chat_format: ChatFormat) -> str:
    """Returns a Lark expression for the reasoning up to the end of its block. Without reasoning marks (gpt-oss) it is a
    message of the channel analysis.
    """
    call_format = chat_format.call_format
    assert call_format is not None
    close_mark = chat_format.reasoning_marks[1] or "<|end|>"
    before, after = (
        ("<|channel|>analysis<|message|>", "<|start|>assistant") if not chat_format.reasoning_marks[1] else ("", "\n\n")
    )
    body = lark.text_until(close_mark, (*call_format.starts, *call_format.sections))
    return f"{lark.literal(before)} {body} {lark.literal(after)}".strip()


Call = Callable[[str, Mapping[str, Any]], str]
# How a family writes calls: text before the calls, a function for the Lark expression of one call, text between two
# calls (None: only one call), text after them. The functions below return the style of each syntax, see
# CallFormat.style.
Style = tuple[str, Call, str | None, str]


def _arguments_rule(lark: Lark, schema: Mapping[str, Any]) -> str:
    """Returns a Lark expression for a JSON object of arguments."""
    return lark.add_json_rule({"type": "object", **schema}, schema)


def _json_calls(lark: Lark, prefix: str, suffix: str) -> Call:
    """Returns a function for calls whose arguments are JSON between fixed texts, in which {} stands for the name."""

    def call(name: str, schema: Mapping[str, Any]) -> str:
        """Returns the Lark expression of a call of the function `name`, whose arguments match `schema`."""
        return f"{lark.literal(prefix.replace('{}', name))} {_arguments_rule(lark, schema)} {lark.literal(suffix)}"

    return call


def _object_head(key: str) -> str:
    """Returns the beginning of a call object, in which {} stands for the name."""
    return '{"name": "{}", "' + key + '": '


def _hermes_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls as JSON objects between <tool_call> tags."""
    return "", _json_calls(lark, "<tool_call>\n" + _object_head("arguments"), "}\n</tool_call>"), "\n", ""


def _list_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls as a JSON list after a mark."""
    return call_format.starts[0] + "[", _json_calls(lark, _object_head("arguments"), "}"), ", ", "]"


def _bare_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls as JSON objects without marks."""
    return "", _json_calls(lark, _object_head("parameters"), "}"), "; ", ""


def _named_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls as a name and JSON arguments between marks; with `named_ids` the name is an id that
    ends in a number.
    """
    start, separator = call_format.starts[0], call_format.separators[0]
    end = call_format.ends[0] if call_format.ends else ""
    section_end = call_format.ends[1] if call_format.sections else ""
    if not call_format.named_ids:
        call = _json_calls(lark, start + "{}" + separator, end)
    else:
        number_rule = "/[0-9]{1,3}/"

        def call(name: str, schema: Mapping[str, Any]) -> str:
            """Returns the Lark expression of a call with an id of the form functions.name:0."""
            head, tail = lark.literal(f"{start}functions.{name}:"), lark.literal(separator)
            return f"{head} {number_rule} {tail} {_arguments_rule(lark, schema)} {lark.literal(end)}"

    return "".join(call_format.sections), call, "", section_end


def _fenced_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls as a name and JSON arguments in a Markdown code block (DeepSeek V3)."""
    call = _json_calls(
        lark,
        call_format.starts[0] + "function" + call_format.separators[0] + "{}\n```json\n",
        "\n```" + call_format.ends[0],
    )
    return call_format.sections[0], call, "\n", call_format.ends[1]


def _harmony_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of gpt-oss's call. The arguments end the turn, so there is only one call."""
    head = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>"
    return "", _json_calls(lark, head, ""), None, ""


def _tags_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls in tags: <function=name><parameter=key> with values on lines of their own
    (Qwen3-Coder), or <invoke name="name"><parameter name="key"> with values in place (MiniMax, DeepSeek V3.2).
    """
    # the texts of `parameter` and `head` are those that `_tagged_calls` takes
    line_break, quote = ("\n", "") if call_format.values_on_lines else ("", '"')
    name_is = "=" if call_format.values_on_lines else ' name="'
    key_end = quote + (' string="{}"' if call_format.typed_parameters else "")
    parameter = (
        call_format.tag_parameter[0] + name_is,
        key_end + ">" + line_break,
        line_break + call_format.tag_parameter[1] + "\n",
    )
    head = call_format.tag_call[0] + name_is, quote + ">\n", call_format.tag_call[1]
    if call_format.values_on_lines:
        call = _tagged_calls(
            lark, call_format, ("<tool_call>\n" + head[0], head[1], head[2] + "\n</tool_call>"), parameter
        )
        return "", call, "\n", ""
    # A lexeme is greedy, so the line break belongs to the call: "\n" alone would never win against "\n</...".
    call = _tagged_calls(lark, call_format, (head[0], head[1], head[2] + "\n"), parameter)
    return call_format.sections[0] + "\n", call, "", call_format.ends[0]


def _pairs_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls with arguments as tagged keys and tagged values."""
    key, value = call_format.pair_key, call_format.pair_value
    parameter = key[0], key[1] + "\n" + value[0], value[1] + "\n"
    return "", _tagged_calls(lark, call_format, (call_format.starts[0], "\n", call_format.ends[0]), parameter), "\n", ""


def _tagged_calls(
    lark: Lark, call_format: CallFormat, head: tuple[str, str, str], parameter: tuple[str, str, str]
) -> Call:
    """Returns a function for calls in tags: the schema's arguments in its order, those not required optional.

    Args:
        lark: the grammar that rules are added to.
        call_format: the family's marks, none of which may occur in a free value.
        head: a call's text before its name, after it, and after its parameters.
        parameter: a parameter's text before its key, between key and value ({}: whether it is a string), and after it.
    """
    marks = (
        *call_format.starts,
        *call_format.ends,
        *call_format.sections,
        *call_format.tag_call,
        *call_format.tag_parameter,
    )
    free = (*marks, *call_format.pair_key, *call_format.pair_value)

    def call(name: str, schema: Mapping[str, Any]) -> str:
        """Returns the Lark expression of a call of one function: its opening tag, its parameters, its closing tag."""
        parts = [lark.literal(head[0] + name + head[1])]
        for key in schema.get("properties") or {}:
            argument_schema = property_schema(schema, key)
            opening = parameter[1].replace("{}", "true" if "string" in allowed_types(argument_schema) else "false")
            value = _value_rule(lark, argument_schema, schema, parameter[2], free)
            parameter_rule = f"{lark.literal(parameter[0] + key + opening)} {value}"
            parts.append(parameter_rule if key in (schema.get("required") or ()) else f"({parameter_rule})?")
        return " ".join([*parts, lark.literal(head[2])])

    return call


def _value_rule(lark: Lark, schema: Any, root: Mapping[str, Any], close: str, marks: Iterable[str]) -> str:
    """Returns a Lark expression for a value and its closing tag: JSON unless the value may be a string, which is free
    text or one of the schema's texts.
    """
    allowed = allowed_types(schema)
    if "string" not in allowed:
        return f"{lark.add_json_rule(schema, root)} {lark.literal(close)}"
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    if values and all(isinstance(value, str) and value for value in values):
        return f"({' | '.join(map(_quoted, values))}) {lark.literal(close)}"
    return lark.text_until(close, marks)


def _pythonic_style(lark: Lark, call_format: CallFormat) -> Style:
    """Returns the style of calls in Python's syntax, in a list.

    Arguments are separated by commas, so which one comes first matters: the rule has one alternative for each optional
    argument that may be the first.
    """

    def call(name: str, schema: Mapping[str, Any]) -> str:
        """Returns the Lark expression of a call of one function. Required arguments come first: a comma separates two
        arguments, so their order is fixed.
        """
        required = [key for key in schema.get("properties") or {} if key in (schema.get("required") or ())]
        optional = [key for key in schema.get("properties") or {} if key not in required]

        def argument(key: str) -> str:
            """Returns the Lark expression of key=value; booleans are Python's, other values JSON."""
            value_schema = property_schema(schema, key)
            value_rule = (
                '("True" | "False")'
                if allowed_types(value_schema) == {"boolean"}
                else lark.add_json_rule(value_schema, schema)
            )
            return f"{_quoted(key + '=')} {value_rule}"

        comma = _quoted(", ")
        first = f" {comma} ".join(map(argument, required))
        if first:
            inner = first + "".join(f" ({comma} {argument(key)})?" for key in optional)
        else:
            alternatives = [  # by the argument that comes first
                argument(key) + "".join(f" ({comma} {argument(later)})?" for later in optional[n + 1 :])
                for n, key in enumerate(optional)
            ]
            inner = f"({' | '.join(alternatives)})?" if alternatives else ""
        return f"{_quoted(name + '(')} {inner} {_quoted(')')}"

    return "[", call, ", ", "]"


def _quoted(text: str) -> str:
    """Returns a Lark string literal."""
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    """Returns a Lark regular expression for fixed text."""
    return re.escape(text).replace("/", r"\/").replace('"', r"\"").replace(r"\ ", " ").replace("\\\n", r"\n")


_STYLES: dict[str, Callable[[Lark, CallFormat], Style]] = {
    "object": _hermes_style,
    "list": _list_style,
    "bare": _bare_style,
    "named": _named_style,
    "fenced": _fenced_style,
    "harmony": _harmony_style,
    "tags": _tags_style,
    "pairs": _pairs_style,
    "pythonic": _pythonic_style,
}
