"""Converts the engine's events of one request to deltas that all protocols share: text, reasoning, tool calls, finish.

A tool call is emitted when it is complete, because until then it may turn out to be ordinary text of the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ktx import chat_formats
from ktx.chat_formats import CallArguments, CallEnd, CallStart, Parser, Text, merge_events
from ktx.engine.request import Event, Finished, TokenEvent
from ktx.engine.sampler import SampledToken

MIN_LOGPROB = -9999.0  # JSON has no infinity
MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class TextDelta:
    """New text. `kind`: "answer" (content) or "think" (reasoning); `tokens`: those sampled since the last delta."""

    text: str
    kind: str
    tokens: list[SampledToken]


@dataclass(frozen=True)
class ToolCallDelta:
    """A complete tool call. `arguments` is a JSON object as text; `tokens`: those sampled since the last delta."""

    index: int
    id: str
    name: str
    arguments: str
    tokens: list[SampledToken]

    def parsed_arguments(self) -> dict[str, Any]:
        """Returns the arguments as a dict. A number that overflows becomes the largest float: JSON has no infinity."""
        return json.loads(self.arguments, parse_float=lambda text: min(max(float(text), -MAX_FLOAT), MAX_FLOAT))


@dataclass(frozen=True)
class Finish:
    """The end of a request. `reason`: stop, tool_calls, length, cancelled or error."""

    reason: str
    event: Finished
    reasoning_tokens: int
    tokens: list[SampledToken]


@dataclass
class OutputParser:
    """Parses the events of one request.

    It also accumulates texts, calls and tokens for a response that is not streamed.

    `tokens` are those sampled since the last delta: each delta carries them, so that their log probabilities are
    reported with the text that they belong to. `token_log` has the tokens of all deltas so far.
    """

    parser: Parser
    tokens: list[SampledToken] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=lambda: {"answer": "", "think": ""})
    token_log: list[SampledToken] = field(default_factory=list)
    reasoning_tokens: int = 0
    end: Finish | None = None
    # id, name and arguments of an incomplete call, which is emitted only when it is complete
    _open_call: list[str] | None = None

    def feed(self, event: Event) -> Iterator[TextDelta | ToolCallDelta | Finish]:
        """Yields the deltas that an event of the engine completes, none while the parser holds the text back.

        A TokenEvent adds its token to `tokens`. Finished flushes the parser and sets `end`; the reason stop becomes
        tool_calls if there was a call.
        """
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token)
            yield from self._read(self.parser.feed(event.text))
            self.reasoning_tokens += self.parser.output.kind == "think"
        elif isinstance(event, Finished):
            yield from self._read(self.parser.feed(event.text) + self.parser.finish(event.reason != "stop"))
            reason = "tool_calls" if event.reason == "stop" and self.calls else event.reason
            self.end = Finish(reason, event, self.reasoning_tokens, self._take_tokens())
            yield self.end

    def _read(self, events: list[chat_formats.Event]) -> Iterator[TextDelta | ToolCallDelta]:
        """Converts the parser's events to deltas and accumulates them; a call that is not complete yields nothing."""
        for event in merge_events(events):
            if isinstance(event, CallStart):
                self._open_call = [event.id, event.name, ""]  # id, name, arguments so far
            elif isinstance(event, CallArguments) and self._open_call:
                self._open_call[2] += event.text
            elif isinstance(event, CallEnd) and self._open_call:
                call = ToolCallDelta(
                    len(self.calls),
                    self._open_call[0],
                    self._open_call[1],
                    self._open_call[2] or "{}",
                    self._take_tokens(),
                )
                self._open_call = None
                self.calls.append(call)
                yield call
            elif isinstance(event, Text):
                self._open_call = None  # the incomplete call was ordinary text, which this event holds
                self.texts[event.kind] += event.text
                yield TextDelta(event.text, event.kind, self._take_tokens())

    def _take_tokens(self) -> list[SampledToken]:
        """Returns the tokens since the last delta and adds them to the token log."""
        tokens, self.tokens = self.tokens, []
        self.token_log += tokens
        return tokens


class LogprobFormatter:
    """Formats tokens and log probabilities as OpenAI's API does.

    Args:
        tokenizer: the model's tokenizer, one of transformers.
        as_ids: name tokens `token_id:N`, as vLLM does, because different tokens may have the same text.
    """

    def __init__(self, tokenizer: Any, as_ids: bool = False):
        from tokenizers.decoders import ByteLevel

        self.tokenizer, self.as_ids = tokenizer, as_ids
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.byte_of = _byte_level_alphabet() if isinstance(getattr(backend, "decoder", None), ByteLevel) else {}

    def text(self, token: int) -> str:
        """Returns the text of a single token."""
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def name(self, token: int) -> str:
        """Returns the token's text, or token_id:N."""
        return f"token_id:{token}" if self.as_ids else self.text(token)

    def bytes(self, token: int) -> list[int]:
        """Returns the bytes of a token, also of one that is part of a character and has no text."""
        name = self.tokenizer.convert_ids_to_tokens(token) or ""
        if self.byte_of and all(letter in self.byte_of for letter in name):
            return [self.byte_of[letter] for letter in name]
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return [int(name[3:5], 16)]
        return list(self.text(token).encode("utf-8", "replace"))

    def entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        """Returns the entry of a token in OpenAI's chat format."""
        return {"token": self.name(token), "logprob": clamp_logprob(logprob), "bytes": self.bytes(token)}

    def content(self, tokens: list[SampledToken]) -> dict[str, Any]:
        """Returns the `logprobs` of a chat response or of a chunk of it."""
        return {
            "content": [
                {**self.entry(token.token, token.logprob), "top_logprobs": [self.entry(*one) for one in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }


def clamp_logprob(logprob: float | None) -> float:
    """Returns a finite log probability; `MIN_LOGPROB` for -infinity and None."""
    return MIN_LOGPROB if logprob is None or logprob < MIN_LOGPROB else logprob


def _byte_level_alphabet() -> dict[str, int]:
    """Returns character -> byte of GPT-2's byte-level vocabularies.

    A printable byte is its own character; the others are mapped to characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
