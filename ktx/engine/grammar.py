"""Answers that follow a grammar: a JSON schema, a regular expression or Lark rules, through llguidance.

A grammar is checked and compiled before its request is admitted, and by whoever submits it: never on the engine's thread. What
cannot be followed is refused; no request runs without the rules it asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.utils.fork_handlers import Lock

LIMITS = {"bytes": 256 << 10, "depth": 64, "members": 2000}  # of a schema; a regex or Lark text has the first
ROW = (
    10_000  # items of the parser in one state: an object of the most members has some 8000, and a step then takes 30 ms
)
WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes


def rules_of_schema(schema: Any) -> str:
    """Lark rules of one JSON value that a schema (or True: any object) describes. UsageError for what is too large or reaches elsewhere."""
    if schema is True:
        schema = {"type": "object"}
    if not isinstance(schema, Mapping):
        raise UsageError(f"a JSON schema is an object, found {type(schema).__name__}")
    check_schema(schema)
    text = json.dumps({**schema, "x-guidance": WHITESPACE})
    return f"%llguidance {{}}\nstart: %json {text}\n"


def check_schema(schema: Any) -> None:
    """UsageError for a schema that is too large, too deep, or reaches elsewhere."""
    members = 0
    for depth, key, value in _walk(schema):
        members += 1
        if depth > LIMITS["depth"]:
            raise UsageError(f"the JSON schema is nested deeper than {LIMITS['depth']} levels")
        if members > LIMITS["members"]:
            raise UsageError(f"the JSON schema has more than {LIMITS['members']} members")
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise UsageError(f"the JSON schema refers to {value!r}; only references within itself (#/...) are followed")
    _check_size(json.dumps(schema), "the JSON schema")


def rules_of_regex(pattern: str) -> str:
    """Lark rules of a text that a regular expression matches as a whole."""
    _check_size(pattern, "the regular expression")
    escaped = pattern.replace("/", r"\/").replace("\n", r"\n")
    return f"%llguidance {{}}\nstart: /{escaped}/\n"


def rules_of_choice(texts: Sequence[str]) -> str:
    """Lark rules of one of several texts."""
    return f"%llguidance {{}}\nstart: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}\n"


def _check_size(text: str, what: str) -> None:
    if len(text.encode("utf-8", "surrogatepass")) > LIMITS["bytes"]:
        raise UsageError(f"{what} has {len(text)} characters, at most {LIMITS['bytes']} bytes are read")


def _walk(value: Any, depth: int = 1) -> Iterator[tuple[int, Any, Any]]:
    """Depth, key and value of all members; deeper than the limit only once."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield depth, key, inner
        if depth <= LIMITS["depth"]:
            yield from _walk(inner, depth + 1)


class GrammarCompiler:
    """Makes constraints for one tokenizer. Building it takes a second, so it is built for the first one."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Sequence[int]):
        self.tokenizer, self.vocabulary, self.stop_ids = tokenizer, vocabulary, sorted(stop_ids)
        self.lock = Lock()
        self.made: Any = None

    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self.lock:
            if self.made is None:
                if not self.stop_ids:
                    raise UsageError("this model names no end token, so no grammar can end an answer")
                try:
                    self.made = from_tokenizer(self.tokenizer, self.vocabulary, eos_token=list(self.stop_ids))
                except ValueError as error:
                    raise UsageError(f"this model's tokenizer cannot follow a grammar: {error}") from error
            return self.made

    def constraint(self, rules: str, after: str = "") -> GrammarMatcher:
        """The state of one answer that follows Lark rules, from behind the text `after` on. UsageError when they cannot be followed."""
        from llguidance import LLMatcher, LLParserLimits

        _check_size(rules, "the grammar")
        tokens = self._tokens()
        matcher = LLMatcher(
            tokens, rules, log_level=0, limits=LLParserLimits(max_items_in_row=ROW, verbose_errors=False)
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # some trouble shows only with the first token
        if matcher.is_error():
            raise beyond(matcher, "")
        return GrammarMatcher(matcher, tokens, self.vocabulary, after)


class GrammarMatcher:
    """Where an answer is in its grammar."""

    def __init__(self, matcher: Any, tokens: Any, vocabulary: int, after: str = ""):
        self.matcher, self.tokens, self.vocabulary, self.after, self.tail = matcher, tokens, vocabulary, after, ""
        self.ended = False

    def mask(self) -> torch.Tensor | None:
        """bool [vocabulary]: what may come next; None before the grammar begins."""
        if self.after:
            return None
        words = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        if self.matcher.is_error():
            raise beyond(self.matcher, " any further")
        bits = words[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(-1).bool()
        mask = torch.zeros(self.vocabulary, dtype=torch.bool)
        count = min(len(bits), self.vocabulary)
        mask[:count] = bits[:count]
        return mask

    def accept(self, token: int) -> None:
        """The answer has gone on by a token."""
        if self.after:
            self.tail = (self.tail + self.tokens.decode_str([token]))[-len(self.after) - 64 :]
            if self.after in self.tail:
                self.after = ""
            return
        if not self.matcher.consume_token(token):
            if "doesn't satisfy the grammar" in self.matcher.get_error():
                raise ValueError(f"the grammar does not allow the token {token}")
            raise beyond(self.matcher, " any further")
        self.ended = self.matcher.is_stopped()


def beyond(matcher: Any, how: str) -> UsageError:
    """What to say of a grammar that the parser gave up: it is wrong, or more than its limits let it keep in mind."""
    return UsageError(f"the grammar cannot be followed{how}: {matcher.get_error().strip().splitlines()[0][:500]}")
