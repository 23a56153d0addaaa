"""Repairs JSON as models write it, while it arrives.

Valid JSON passes unchanged. Repaired are Python's literals and quotes, bare keys, line breaks and stray backslashes in
strings, extra commas, and brackets left open. Ambiguous text is not repaired, such as a quote inside a string: then the
value is `unrepairable`, and the caller emits its text as text or raises NotACall.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from ktx.chat_formats.reader import Step, TextReader

MAX_DEPTH = 128  # maximum nesting: arguments are not deeper, and a client's JSON reader must be able to parse them
MAX_WORD_CHARS = 1000  # maximum characters of a number or bare word

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(
    rf'(?P<space>[ \t\r\n]+)|(?P<string>"[^"\\\x00-\x1f]*")|(?P<word>(?:{_NUMBER}|true|false|null)(?=[ \t\r\n,\]}}]))'
    r"|(?P<mark>[{}\[\],:])"
)
_ESCAPES = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_PLAIN = {  # string content without control characters; possessive: no character is tried twice
    '"': re.compile(rf'(?:[^"\\]++|{_ESCAPES})++'),
    "'": re.compile(rf"(?:[^'\"\\]++|{_ESCAPES})++"),
}
_CONTROLS = re.compile(r"[\x00-\x1f]+")
_QUOTES = re.compile('"+')
_WORD = re.compile(r"[^\s,:;{}\[\]()<>\"'`|=]+")
_NAME = re.compile(rf"[A-Za-z_$][\w$.-]*|{_NUMBER}")
_WORDS = {
    "True": "true",
    "TRUE": "true",
    "False": "false",
    "FALSE": "false",
    "None": "null",
    "NULL": "null",
    "Null": "null",
    "undefined": "null",
    "NaN": "null",
}
_CLOSE = {"{": "}", "[": "]"}

# the token that may follow
ITEM, ITEM_OR_END, KEY, KEY_OR_END, COLON, NEXT = "item", "item or ]", "key", "key or }", ":", ", or end"


class JsonValue:
    """One value, read from `source` in pieces and emitted as valid JSON.

    `done` is set when the value is complete, `unrepairable` when its text is not JSON.

    `_expected` is what the grammar allows next; `_quote` is the quote of the string that is being read, `_word` the
    incomplete number or bare word. `closers` grows with each opening bracket.
    """

    def __init__(self, source: TextReader):
        self.source = source
        self.closers: list[str] = []  # the closing brackets of the open ones, the outermost first
        self._expected, self._quote, self._word = ITEM, "", ""
        self._pending_comma = ""  # a comma and the space after it: emitted only if something follows
        self.out: list[str] = []
        self.done = self.unrepairable = False

    def pieces(self) -> Iterator[str | None]:
        """Yields the value's text in pieces, None where more text is needed; ends at the value's end or an error."""
        while True:
            self._read()
            if self.out:
                yield "".join(self.out)
                self.out.clear()
            if self.done or self.unrepairable or self.source.finished:
                return
            yield None

    @property
    def closable(self) -> bool:
        """Whether only closing brackets are missing."""
        return not (self._quote or self._word) and (
            self._expected in (NEXT, KEY_OR_END, ITEM_OR_END) or bool(self._pending_comma)
        )

    def missing_brackets(self) -> str:
        """Returns the missing closing brackets."""
        return "".join(reversed(self.closers))

    def _read(self) -> None:
        """Reads as much as the buffer holds: a string or word that is being read first, otherwise the next token."""
        source = self.source
        while not (self.done or self.unrepairable):
            position = source.pos
            if position >= len(source.text):
                break
            if self._quote:
                self._read_string()
            elif self._word:
                self._read_literal()
            else:
                self._read_token()
            if source.pos == position and not source.finished and (self._quote or self._word):
                return  # an incomplete escape or word
        if source.finished and self._word and not self.unrepairable:
            self._finish_word()

    def _read_token(self) -> None:
        """Reads one token of valid JSON, the fast path; anything else is for `_read_irregular_token`."""
        match = _TOKEN.match(self.source.text, self.source.pos)
        if match is None:
            self._read_irregular_token()
            return
        text = match.group()
        kind = match.lastgroup
        if kind == "word" and len(text) > MAX_WORD_CHARS:
            self.source.pos += MAX_WORD_CHARS + 1  # the position that `_read_literal` reaches
            self.unrepairable = True
            return
        if kind == "mark":
            self._read_punctuation(text)
            return
        if kind == "space":
            if self._pending_comma:
                self._pending_comma += text
            else:
                self.out.append(text)
        elif kind == "string" and self._expected in (KEY, KEY_OR_END):
            self._emit(text)
            self._expected = COLON
        elif self._expected in (ITEM, ITEM_OR_END):
            self._emit(text)
            self._end_value()
        elif kind == "word" and self._expected in (KEY, KEY_OR_END):
            self._emit(f'"{text}"')
            self._expected = COLON
        else:
            self.unrepairable = True
            return
        self.source.pos = match.end()

    def _read_irregular_token(self) -> None:
        """Handles text that is not a complete JSON token: the start of a string, an incomplete or bare word, or an
        error.
        """
        char = self.source.text[self.source.pos]
        if self._expected in (COLON, NEXT):
            self.unrepairable = True
        elif char in "\"'":
            self._emit('"')
            self._quote = char
            self.source.pos += 1
        else:
            self._read_literal()

    def _read_string(self) -> None:
        """Reads the next part of a string: plain text, an escape, or a quote. Line breaks and quotes of the other kind
        are escaped.
        """
        source, position = self.source, self.source.pos
        match = _PLAIN[self._quote].match(source.text, position)
        if match:
            self.out.append(_CONTROLS.sub(_escape_for_json, match.group()))
            source.pos = match.end()
            return
        char = source.text[position]
        if char == "\\":
            self._read_escape()
            return
        if char != self._quote:
            controls_or_quotes = _QUOTES.match(source.text, position)
            assert controls_or_quotes is not None
            self.out.append(_escape_for_json(controls_or_quotes))
            source.pos = controls_or_quotes.end()
        else:
            source.pos += 1
            self.out.append('"')
            self._quote = ""
            if self._expected in (KEY, KEY_OR_END):
                self._expected = COLON
            else:
                self._end_value()

    def _read_escape(self) -> None:
        """Reads an escape sequence; waits while it is incomplete. In an invalid one the backslash itself is meant, so
        a second one is added.
        """
        source = self.source
        text = source.text[source.pos : source.pos + 6]  # the longest escape is \uXXXX
        if re.fullmatch(r"\\(u[0-9a-fA-F]{0,3})?", text) and len(text) < 6 and source.pos + 6 > len(source.text):
            if not source.finished:
                return
            self.unrepairable = True
        elif re.match(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})', text):
            length = 6 if text[1] == "u" else 2
            self.out.append(text[:length])
            source.pos += length
        elif text[1] == "'":
            self.out.append("'")
            source.pos += 2
        else:  # \d, \(, a backslash before a line break: the backslash itself is meant
            self.out.append("\\\\")
            source.pos += 1

    def _read_literal(self) -> None:
        """Reads a number or word without quotes, up to a character that cannot belong to it; waits if the text ends."""
        source = self.source
        match = _WORD.match(source.text, source.pos, source.pos + MAX_WORD_CHARS + 1 - len(self._word))
        if match:
            self._word += match.group()
            source.pos = match.end()
        if len(self._word) > MAX_WORD_CHARS or not self._word:
            self.unrepairable = True
        elif source.pos < len(source.text):
            self._finish_word()

    def _finish_word(self) -> None:
        """Emits a complete number or word as JSON: a key gets quotes, a value must be a number or a literal."""
        word, self._word = self._word, ""
        key = self._expected in (KEY, KEY_OR_END)
        text = (json.dumps(word) if _NAME.fullmatch(word) else None) if key else _literal_to_json(word)
        if text is None:
            self.unrepairable = True
            return
        self._emit(text)
        if key:
            self._expected = COLON
        else:
            self._end_value()

    def _read_punctuation(self, char: str) -> None:
        """Reads a bracket, comma or colon, if it may come here.

        A comma is emitted later, only if something follows; a closing bracket also closes inner brackets that the model
        left open.
        """
        if char in "{[" and self._expected in (ITEM, ITEM_OR_END) and len(self.closers) < MAX_DEPTH:
            self._emit(char)
            self.closers.append(_CLOSE[char])
            self._expected = KEY_OR_END if char == "{" else ITEM_OR_END
        elif char in "}]" and char in self.closers and self.closable:
            while self.closers[-1] != char:  # an inner closing bracket is missing
                self.out.append(self.closers.pop())
            self.out.append(self.closers.pop())
            self._pending_comma = ""
            self._end_value()
        elif char == "," and self._expected == NEXT and self.closers:
            self._pending_comma = ","
            self._expected = KEY if self.closers[-1] == "}" else ITEM
        elif char == ":" and self._expected == COLON:
            self.out.append(char)
            self._expected = ITEM
        else:
            self.unrepairable = True
            return
        self.source.pos += 1

    def _emit(self, text: str) -> None:
        """Emits text after a pending comma."""
        self.out.append(self._pending_comma + text)
        self._pending_comma = ""

    def _end_value(self) -> None:
        """Records that a value is complete."""
        self._expected, self.done = NEXT, not self.closers


def _escape_for_json(match: re.Match[str]) -> str:
    """Returns characters as they are escaped inside a JSON string."""
    return json.dumps(match.group())[1:-1]


def _literal_to_json(word: str) -> str | None:
    """Returns a bare word as JSON: a literal of JSON, Python or JavaScript, or a number; None if it is no value."""
    if re.fullmatch(_NUMBER, word) or word in ("true", "false", "null"):
        return word
    if word in _WORDS:
        return _WORDS[word]
    try:
        number = float(word) if re.search(r"[.eE]", word) else int(word)
    except ValueError:
        return None
    return json.dumps(number) if math.isfinite(number) else None


def repair_json(text: str) -> str | None:
    """Returns the single JSON value of `text`, which is complete, repaired; None if `text` is not one value."""
    source = TextReader()
    source.feed(text.strip())
    source.finished = True
    value = JsonValue(source)
    out = "".join(piece for piece in value.pieces() if piece)
    if value.done:
        return out if source.pos == len(source.text) else None
    return (
        out + value.missing_brackets() if value.closable and value.closers and source.pos == len(source.text) else None
    )


def read_value(source: TextReader) -> Step[str | None]:
    """Reads one value and returns its text; None if it is not one."""
    value, out = JsonValue(source), list[str]()
    for piece in value.pieces():
        if piece is None:
            yield
        else:
            out.append(piece)
    return "".join(out) if value.done else None
