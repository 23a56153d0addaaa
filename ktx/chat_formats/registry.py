"""The chat format of each model family, one row each: reasoning marks, and the marks of tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from ktx.families import CHAT_FORMAT_NAMES


@dataclass(frozen=True)
class CallFormat:
    """The marks around a tool call; those that a family does not use are empty."""

    style: str  # syntax of a call: object, list, named, fenced, tags, pairs, bare, pythonic or harmony
    starts: tuple[str, ...]  # each begins a call
    ends: tuple[str, ...] = ()  # each ends a call, a section, or a part of one: layout after a call
    sections: tuple[str, ...] = ()  # each begins a section of calls: layout when a call follows
    separators: tuple[str, ...] = ()  # between a call's name and its arguments
    id_mark: str = ""  # between a call's name and its id
    tag_call: tuple[str, str] = ("", "")  # <function=name> ... </function>: open, close
    tag_parameter: tuple[str, str] = ("", "")  # <parameter=key>value</parameter>
    typed_parameters: bool = False  # a parameter's tag marks strings: string="true"
    values_on_lines: bool = False  # a parameter's value is on lines of its own: one line break at each side is layout
    pair_key: tuple[str, str] = ("", "")  # <arg_key>key</arg_key><arg_value>value</arg_value>
    pair_value: tuple[str, str] = ("", "")
    named_ids: bool = False  # a call's name is its id: functions.name:0


@dataclass(frozen=True)
class ChatFormat:
    """The chat format of one model family."""

    name: str
    call_format: CallFormat | None = None
    reasoning_marks: tuple[str, str] = ("<think>", "</think>")
    # calls may begin without closing the reasoning block, if their marks are control tokens
    calls_in_reasoning: bool = False
    prompt_opens_reasoning: bool = False  # the generation prompt ends inside the reasoning block by default
    marks: tuple[str, ...] = field(default=(), compare=False)  # the family's chat template contains all of them
    # the form of messages that its chat template expects
    arguments_as_text: bool = (
        False  # arguments are JSON text instead of an object, and empty content with calls is None
    )
    developer: bool = False  # supports the role "developer"
    reasoning_key: str = ""  # a key for reasoning in addition to reasoning_content
    id_style: str = ""  # "named": functions.name:0; "short": nine letters and digits
    single_call: bool = False  # does not support several calls in one message

    @property
    def all_marks(self) -> tuple[str, ...]:
        """All marks around reasoning and calls, which the detokenizer must emit, because the parser reads them."""
        call_format = self.call_format
        if call_format is None:
            return tuple(mark for mark in self.reasoning_marks if mark)
        calls = (
            *call_format.starts,
            *call_format.ends,
            *call_format.sections,
            *call_format.separators,
            call_format.id_mark,
        )
        tags = (*call_format.tag_call, *call_format.tag_parameter, *call_format.pair_key, *call_format.pair_value)
        return tuple(mark for mark in (*self.reasoning_marks, *calls, *tags) if mark)


_TOOL_CALL = "<tool_call>", "</tool_call>"
_FUNCTION, _PARAMETER = ("<function", "</function>"), ("<parameter", "</parameter>")
_KEY, _VALUE = ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")
_TURN = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

# Models that share <tool_call> sometimes write another one's syntax, so all three also read JSON, and the first two
# read tags.
HERMES = CallFormat("object", _TOOL_CALL[:1], _TOOL_CALL[1:], tag_call=_FUNCTION, tag_parameter=_PARAMETER)
TAGS = CallFormat(
    "tags",
    ("<tool_call>", "<function="),
    ("</tool_call>", "</function>"),
    values_on_lines=True,
    tag_call=_FUNCTION,
    tag_parameter=_PARAMETER,
)
PAIRS = CallFormat("pairs", _TOOL_CALL[:1], _TOOL_CALL[1:], pair_key=_KEY, pair_value=_VALUE)
MINIMAX = CallFormat(
    "tags",
    ("<invoke name=",),
    ("</minimax:tool_call>", "</invoke>"),
    ("<minimax:tool_call>",),
    tag_call=("<invoke", "</invoke>"),
    tag_parameter=_PARAMETER,
)
DSML = CallFormat(
    "tags",
    ("<｜DSML｜invoke name=",),
    ("</｜DSML｜function_calls>", "</｜DSML｜invoke>"),
    ("<｜DSML｜function_calls>",),
    tag_call=("<｜DSML｜invoke", "</｜DSML｜invoke>"),
    tag_parameter=("<｜DSML｜parameter", "</｜DSML｜parameter>"),
    typed_parameters=True,
)
DEEPSEEK_V3 = CallFormat(
    "fenced", _TURN[:1], (_TURN[2], "<｜tool▁calls▁end｜>"), ("<｜tool▁calls▁begin｜>",), separators=(_TURN[1],)
)
DEEPSEEK_V31 = CallFormat(
    "named", _TURN[:1], (_TURN[2], "<｜tool▁calls▁end｜>"), ("<｜tool▁calls▁begin｜>",), separators=(_TURN[1],)
)
KIMI = CallFormat(
    "named",
    ("<|tool_call_begin|>",),
    ("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    ("<|tool_calls_section_begin|>",),
    separators=("<|tool_call_argument_begin|>",),
    named_ids=True,
)
MISTRAL_LIST = CallFormat("list", ("[TOOL_CALLS]",), separators=("[ARGS]",), id_mark="[CALL_ID]")
MISTRAL_NAMED = CallFormat("named", ("[TOOL_CALLS]",), separators=("[ARGS]",), id_mark="[CALL_ID]")
LLAMA_3 = CallFormat(
    "bare",
    ("<function=",),
    ("<|python_end|>", "</function>"),
    ("<|python_tag|>", "<|python_start|>"),
    tag_call=_FUNCTION,
)
LLAMA_4 = CallFormat("pythonic", (), ("<|python_end|>",), ("<|python_start|>", "<|python_tag|>"))
HARMONY = CallFormat("harmony", ("<|channel|>", "<|start|>"), ("<|call|>", "<|end|>", "<|return|>"))

_ROWS = (
    ChatFormat(
        "gpt-oss",
        HARMONY,
        ("", ""),
        marks=("<|channel|>",),
        developer=True,
        reasoning_key="thinking",
        single_call=True,
    ),
    ChatFormat(
        "kimi-k2",
        KIMI,
        calls_in_reasoning=True,
        marks=("<|tool_call_argument_begin|>",),
        id_style="named",
    ),
    ChatFormat("minimax-m2", MINIMAX, prompt_opens_reasoning=True, marks=("minimax:tool_call",)),
    ChatFormat("glm-4.5", PAIRS, marks=("<arg_key>",)),
    ChatFormat("qwen3-coder", TAGS, marks=("<function=", "<parameter=")),
    ChatFormat("deepseek-v3.2", DSML, marks=("｜DSML｜",)),
    ChatFormat(
        "deepseek-r1",
        DEEPSEEK_V3,
        prompt_opens_reasoning=True,
        marks=("<｜tool▁calls▁begin｜>", "```json", "<｜Assistant｜><think>"),
        arguments_as_text=True,
    ),
    ChatFormat(
        "deepseek-v3",
        DEEPSEEK_V3,
        marks=("<｜tool▁calls▁begin｜>", "```json"),
        arguments_as_text=True,
    ),
    ChatFormat(
        "deepseek-v3.1",
        DEEPSEEK_V31,
        marks=("<｜tool▁call▁begin｜>",),
        arguments_as_text=True,
    ),
    ChatFormat(
        "mistral-named", MISTRAL_NAMED, ("[THINK]", "[/THINK]"), marks=("[TOOL_CALLS]", "[ARGS]"), id_style="short"
    ),
    ChatFormat(
        "mistral",
        MISTRAL_LIST,
        ("[THINK]", "[/THINK]"),
        marks=("[TOOL_CALLS]",),
        id_style="short",
    ),
    ChatFormat("llama-4", LLAMA_4, marks=("<|python_start|>",)),
    ChatFormat("llama-3", LLAMA_3, marks=("<|python_tag|>",), single_call=True),
    ChatFormat("llama-3", LLAMA_3, marks=("<|start_header_id|>", '"parameters"'), single_call=True),
    ChatFormat("qwen3", HERMES, marks=_TOOL_CALL[:1]),
    ChatFormat("plain"),
)
CHAT_FORMATS: dict[str, ChatFormat] = {row.name: row for row in reversed(_ROWS)}


def chat_format_for(chat_template: str | None, model_type: str | None = None) -> ChatFormat:
    """Returns the format whose marks the template contains, else the model type's, else "plain", which has reasoning
    only.
    """
    if chat_template:
        for row in _ROWS:
            if row.marks and all(mark in chat_template for mark in row.marks):
                return row
    return CHAT_FORMATS[CHAT_FORMAT_NAMES.get(model_type or "", "plain")]


def ends_in_reasoning(prompt: str, chat_format: ChatFormat) -> bool:
    """Whether a rendered prompt ends inside the reasoning block."""
    open_mark = chat_format.reasoning_marks[0]
    return bool(open_mark) and prompt.rstrip().endswith(open_mark)
