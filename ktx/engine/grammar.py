"""Constrained decoding: outputs that follow a JSON schema, a regular expression or a Lark grammar, through llguidance.

The thread that submits a request checks and compiles its grammar before admission, never the engine's thread. A grammar
that cannot be followed is refused; no request runs without the constraint that it requested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ktx.errors import UsageError
from ktx.utils.fork_handlers import ForkSafeLock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

# of a schema; "bytes" also limits a regular expression or Lark text
SCHEMA_LIMITS = {"bytes": 256 << 10, "depth": 64, "members": 2000}
# Parser items in one state: an object with the maximum number of members has some 8000, and a step then takes 30 ms.
MAX_PARSER_ITEMS = 10_000
# the format of json.dumps
JSON_WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def schema_grammar(schema: Any) -> str:
    """Returns a Lark grammar of one JSON value that matches a schema (True: any object). UsageError for a schema that
    is too large or has external references.
    """
    if schema is True:
        schema = {"type": "object"}
    if not isinstance(schema, Mapping):
        raise UsageError(f"a JSON schema is an object, found {type(schema).__name__}")
    check_schema(schema)
    text = json.dumps({**schema, "x-guidance": JSON_WHITESPACE})
    return f"%llguidance {{}}\nstart: %json {text}\n"


def check_schema(schema: Any) -> None:
    """Raises UsageError for a schema that exceeds SCHEMA_LIMITS, or has external references, which are not followed."""
    for members, (depth, key, value) in enumerate(_walk_members(schema), 1):
        if depth > SCHEMA_LIMITS["depth"]:
            raise UsageError(f"the JSON schema is nested deeper than {SCHEMA_LIMITS['depth']} levels")
        if members > SCHEMA_LIMITS["members"]:
            raise UsageError(f"the JSON schema has more than {SCHEMA_LIMITS['members']} members")
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise UsageError(f"the JSON schema refers to {value!r}; only references within itself (#/...) are followed")
    _check_size(json.dumps(schema), "the JSON schema")


def regex_grammar(pattern: str) -> str:
    """Returns a Lark grammar of text that a regular expression matches in full."""
    _check_size(pattern, "the regular expression")
    escaped = pattern.replace("/", r"\/").replace("\n", r"\n")
    return f"%llguidance {{}}\nstart: /{escaped}/\n"


def choice_grammar(texts: Sequence[str]) -> str:
    """Returns a Lark grammar that allows one of several texts."""
    return f"%llguidance {{}}\nstart: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}\n"


def _check_size(text: str, what: str) -> None:
    """Raises UsageError for a text of more than SCHEMA_LIMITS["bytes"]; `what` names it in the message."""
    if len(text.encode("utf-8", "surrogatepass")) > SCHEMA_LIMITS["bytes"]:
        raise UsageError(f"{what} has {len(text)} characters, the limit is {SCHEMA_LIMITS['bytes']} bytes")


def _walk_members(value: Any, depth: int = 1) -> Iterator[tuple[int, Any, Any]]:
    """Yields depth, key and value of all members; it descends at most one level below the depth limit."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, member in items:
        yield depth, key, member
        if depth <= SCHEMA_LIMITS["depth"]:
            yield from _walk_members(member, depth + 1)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. The tokenizer's tables take a second to build, so the first grammar builds
    them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_ids: Sequence[int]):
        self.tokenizer, self.vocabulary, self.stop_ids = tokenizer, vocabulary, sorted(stop_ids)
        self.lock = ForkSafeLock()
        self._tokenizer_tables: Any = None

    def _get_tokenizer_tables(self) -> Any:
        """Returns llguidance's tables of the tokenizer, building them once. UsageError when no grammar can be used with
        this tokenizer.
        """
        from llguidance.hf import from_tokenizer

        with self.lock:
            if self._tokenizer_tables is None:
                if not self.stop_ids:
                    raise UsageError("this model has no end token, so no grammar can end an output")
                try:
                    self._tokenizer_tables = from_tokenizer(
                        cast("TokenizersBackend", self.tokenizer), self.vocabulary, eos_token=list(self.stop_ids)
                    )
                except ValueError as error:
                    raise UsageError(f"this model's tokenizer cannot follow a grammar: {error}") from error
            return self._tokenizer_tables

    def compile(self, rules: str, after: str = "") -> GrammarMatcher:
        """Compiles a grammar for one output.

        Args:
            rules: a Lark grammar.
            after: a text of the output after which the grammar begins; empty: it begins at once.

        Raises:
            UsageError: the grammar cannot be followed.
        """
        from llguidance import LLMatcher, LLParserLimits

        _check_size(rules, "the grammar")
        tokens = self._get_tokenizer_tables()
        matcher = LLMatcher(
            tokens, rules, log_level=0, limits=LLParserLimits(max_items_in_row=MAX_PARSER_ITEMS, verbose_errors=False)
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # some errors occur only with the first token
        if matcher.is_error():
            raise _make_grammar_error(matcher, "")
        return GrammarMatcher(matcher, tokens, self.vocabulary, after)


class GrammarMatcher:
    """The parser state of one output in its grammar; the sampler applies its `mask` before each token.

    While `after` is not empty, the grammar has not begun: `tail` is the end of the output so far, in which `after` is
    searched. `ended` is whether the output is complete.
    """

    def __init__(self, matcher: Any, tokens: Any, vocabulary: int, after: str = ""):
        self.matcher, self.tokens, self.vocabulary, self.after, self.tail = matcher, tokens, vocabulary, after, ""
        self.ended = False

    def mask(self) -> torch.Tensor | None:
        """Returns a mask bool [vocabulary] of the tokens that may follow; None before the grammar begins."""
        if self.after:
            return None
        # one bit per token, the lowest bit of a byte first
        packed_bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        if self.matcher.is_error():
            raise _make_grammar_error(self.matcher, " any further")
        bits = (
            packed_bits[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(-1).bool()
        )
        mask = torch.zeros(self.vocabulary, dtype=torch.bool)
        count = min(len(bits), self.vocabulary)
        mask[:count] = bits[:count]
        return mask

    def accept(self, token: int) -> None:
        """Advances the parser by a token of the output; before the grammar begins, only looks for the text `after`.

        Raises:
            ValueError: the grammar does not allow the token.
            UsageError: the parser's state exceeds its limits.
        """
        if self.after:
            # a token may have up to 64 characters behind the end of `after`
            self.tail = (self.tail + self.tokens.decode_str([token]))[-len(self.after) - 64 :]
            if self.after in self.tail:
                self.after = ""
            return
        if not self.matcher.consume_token(token):
            if "doesn't satisfy the grammar" in self.matcher.get_error():
                raise ValueError(f"the grammar does not allow the token {token}")
            raise _make_grammar_error(self.matcher, " any further")
        self.ended = self.matcher.is_stopped()


def _make_grammar_error(matcher: Any, suffix: str) -> UsageError:
    """Returns the error for a grammar that the parser rejects: it is invalid, or exceeds the parser's limits."""
    return UsageError(f"the grammar cannot be followed{suffix}: {matcher.get_error().strip().splitlines()[0][:500]}")
