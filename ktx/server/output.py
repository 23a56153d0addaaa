"""One answer, from the engine's events to what every protocol tells of it: text and reasoning while they come, whole calls, the end.

A call is told when it is whole: until then it may turn out to be none, and its text to be part of the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ktx.chat_formats import CallArguments, CallEnd, CallStart, Parser, Text, merged
from ktx.engine.request import Event, Finished, TokenEvent
from ktx.engine.sampler import SampledToken

MIN_LOGPROB = -9999.0  # JSON has no infinity
MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class TextDelta:
    """More of the answer ("answer") or of the reasoning ("think"); `choices` are the tokens since the last event."""

    text: str
    kind: str
    choices: list[SampledToken]


@dataclass(frozen=True)
class ToolCallDelta:
    """A whole call; `arguments` are the JSON text of an object."""

    number: int
    id: str
    name: str
    arguments: str
    choices: list[SampledToken]

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments read. JSON has no infinity, so a number beyond all floats becomes the largest of them."""
        return json.loads(self.arguments, parse_float=lambda text: min(max(float(text), -MAX_FLOAT), MAX_FLOAT))


@dataclass(frozen=True)
class Finish:
    """`reason`: stop, tool_calls, length, cancelled or error."""

    reason: str
    finished: Finished
    thought: int  # tokens of reasoning
    choices: list[SampledToken]


@dataclass
class OutputParser:
    """Hears one request's events. The pieces it has told are kept for those who want the whole."""

    parser: Parser
    choices: list[SampledToken] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=lambda: {"answer": "", "think": ""})
    token_log: list[SampledToken] = field(default_factory=list)
    reasoning_tokens: int = 0
    end: Finish | None = None
    _open: list[str] | None = None  # id, name and arguments of a call that is not whole

    def feed(self, event: Event) -> Iterator[TextDelta | ToolCallDelta | Finish]:
        """What an event makes sure."""
        if isinstance(event, TokenEvent):
            self.choices.append(event.choice)
            yield from self._read(self.parser.feed(event.text))
            self.reasoning_tokens += self.parser.output.kind == "think"
        elif isinstance(event, Finished):
            yield from self._read(self.parser.feed(event.text) + self.parser.finish(event.reason != "stop"))
            reason = "tool_calls" if event.reason == "stop" and self.calls else event.reason
            self.end = Finish(reason, event, self.reasoning_tokens, self._taken())
            yield self.end

    def _read(self, events: list[Any]) -> Iterator[TextDelta | ToolCallDelta]:
        for event in merged(events):
            if isinstance(event, CallStart):
                self._open = [event.id, event.name, ""]
            elif isinstance(event, CallArguments) and self._open:
                self._open[2] += event.text
            elif isinstance(event, CallEnd) and self._open:
                call = ToolCallDelta(
                    len(self.calls), self._open[0], self._open[1], self._open[2] or "{}", self._taken()
                )
                self._open = None
                self.calls.append(call)
                yield call
            elif isinstance(event, Text):
                self._open = None  # it was no call, and this is its text
                self.texts[event.kind] += event.text
                yield TextDelta(event.text, event.kind, self._taken())

    def _taken(self) -> list[SampledToken]:
        taken, self.choices = self.choices, []
        self.token_log += taken
        return taken


class LogprobFormatter:
    """Single tokens as text and bytes. `as_ids`: vLLM's token_id:N in place of the text, which need not tell tokens apart."""

    def __init__(self, tokenizer: Any, as_ids: bool = False):
        from tokenizers.decoders import ByteLevel

        self.tokenizer, self.as_ids = tokenizer, as_ids
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.bytes_of = _letters() if isinstance(getattr(backend, "decoder", None), ByteLevel) else {}

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def name(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.text(token)

    def bytes(self, token: int) -> list[int]:
        """A part of a character too, which has no text."""
        name = self.tokenizer.convert_ids_to_tokens(token) or ""
        if self.bytes_of and all(letter in self.bytes_of for letter in name):
            return [self.bytes_of[letter] for letter in name]
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return [int(name[3:5], 16)]
        return list(self.text(token).encode("utf-8", "replace"))

    def entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        """As OpenAI's chat answers tell of a token."""
        return {"token": self.name(token), "logprob": clamp_logprob(logprob), "bytes": self.bytes(token)}

    def content(self, choices: list[SampledToken]) -> dict[str, Any]:
        """`logprobs` of a chat answer or a piece of it."""
        return {
            "content": [
                {**self.entry(choice.token, choice.logprob), "top_logprobs": [self.entry(*one) for one in choice.top]}
                for choice in choices
            ],
            "refusal": None,
        }


def clamp_logprob(logprob: float | None) -> float:
    return MIN_LOGPROB if logprob is None or logprob < MIN_LOGPROB else logprob


def _letters() -> dict[str, int]:
    """The letters that GPT-2's byte-level vocabularies write bytes with: printable ones as they are, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
