"""How each family writes, for the outputs that all of them can write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Arguments = dict[str, Any]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def word(value: Any) -> str:
    """A value between tags."""
    return value if isinstance(value, str) else dumps(value)


@dataclass(frozen=True)
class Writing:
    call: Callable[[int, str, Arguments], str]
    before: str = ""  # a run of calls
    between: str = ""
    after: str = ""
    think: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    json: bool = True  # arguments are JSON, so that anything can stand in a string
    marks: tuple[str, ...] = ()  # what the family's marks look like
    ids: bool = False  # the model gives the ids
    answer: str = ""  # the header of an answer
    end: str = ""  # the end of an answer

    def calls(self, *calls: tuple[str, Arguments]) -> str:
        return (
            self.before
            + self.between.join(self.call(n, name, args) for n, (name, args) in enumerate(calls))
            + self.after
        )

    def say(self, text: str) -> str:
        return self.answer + text + self.end

    def thought(self, text: str) -> str:
        return self.think[0] + text + self.think[1]


def _coder(n: int, name: str, arguments: Arguments) -> str:
    inner = "".join(f"<parameter={key}>\n{word(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def _glm(n: int, name: str, arguments: Arguments) -> str:
    inner = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{word(value)}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{inner}</tool_call>"


def _minimax(n: int, name: str, arguments: Arguments) -> str:
    inner = "".join(f'<parameter name="{key}">{word(value)}</parameter>\n' for key, value in arguments.items())
    return f'<invoke name="{name}">\n{inner}</invoke>\n'


def _dsml(n: int, name: str, arguments: Arguments) -> str:
    inner = "".join(
        f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">{word(value)}'
        "</｜DSML｜parameter>\n"
        for key, value in arguments.items()
    )
    return f'<｜DSML｜invoke name="{name}">\n{inner}</｜DSML｜invoke>\n'


def _python(value: Any) -> str:
    """Python's literal; json's escapes are Python's too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dumps(k)}: {_python(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python, value)) + "]"
    return dumps(value) if isinstance(value, str) else repr(value)


def _pythonic(n: int, name: str, arguments: Arguments) -> str:
    return f"{name}({', '.join(f'{key}={_python(value)}' for key, value in arguments.items())})"


_FUNCTION = '{"name": "%s", "arguments": %s}'

WRITINGS: dict[str, Writing] = {
    "qwen3": Writing(
        lambda n, name, a: "<tool_call>\n" + _FUNCTION % (name, dumps(a)) + "\n</tool_call>",
        between="\n",
        marks=("<tool_call>", "</tool_call>"),
    ),
    "qwen3-coder": Writing(_coder, between="\n", json=False),
    "glm-4.5": Writing(_glm, between="\n", json=False, think=("\n<think>", "</think>\n")),
    "minimax-m2": Writing(_minimax, "<minimax:tool_call>\n", after="</minimax:tool_call>", json=False),
    "deepseek-v3.2": Writing(
        _dsml,
        "<｜DSML｜function_calls>\n",
        after="</｜DSML｜function_calls>",
        json=False,
        think=("<think>", "</think>"),
    ),
    "deepseek-r1": Writing(
        lambda n, name, a: (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(a)}\n```<｜tool▁call▁end｜>"
        ),
        "<｜tool▁calls▁begin｜>",
        "\n",
        "<｜tool▁calls▁end｜>",
        marks=("<｜tool▁call▁end｜>", "<｜tool▁calls▁begin｜>", "```"),
    ),
    "deepseek-v3.1": Writing(
        lambda n, name, a: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(a)}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
        think=("<think>", "</think>"),
        marks=("<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
    "kimi-k2": Writing(
        lambda n, name, a: (
            f"<|tool_call_begin|>functions.{name}:{n}<|tool_call_argument_begin|>{dumps(a)}<|tool_call_end|>"
        ),
        "<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
        marks=("<|tool_call_end|>", "<|tool_call_begin|>"),
        think=("<think>", "</think>"),
        ids=True,
    ),
    "gpt-oss": Writing(
        lambda n, name, a: (
            f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(a)}<|call|>"  # noqa: E501
        ),
        marks=("<|call|>", "<|end|>", "<|channel|>"),
        think=("<|channel|>analysis<|message|>", "<|end|>"),
        answer="<|start|>assistant<|channel|>final<|message|>",
        end="<|end|>",
    ),
    "llama-3": Writing(
        lambda n, name, a: _FUNCTION.replace("arguments", "parameters") % (name, dumps(a)),
        between="; ",
        marks=("<|python_tag|>",),
    ),
    "llama-4": Writing(_pythonic, "[", ", ", "]", marks=("<|python_start|>", "<|python_end|>")),
    "mistral": Writing(
        lambda n, name, a: _FUNCTION % (name, dumps(a)),
        "[TOOL_CALLS][",
        ", ",
        "]",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        think=("[THINK]", "[/THINK]"),
    ),
    "mistral-named": Writing(
        lambda n, name, a: f"[TOOL_CALLS]{name}[ARGS]{dumps(a)}",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        think=("[THINK]", "[/THINK]"),
    ),
}
WRITINGS["deepseek-v3"] = WRITINGS["deepseek-r1"]
