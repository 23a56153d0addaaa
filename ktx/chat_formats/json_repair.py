"""JSON as models write it, turned into JSON as it should be, while it comes.

What is valid passes as it is. Mended on the way: Python's literals and quotes, bare keys, line breaks and stray
backslashes in strings, commas too many, brackets left open. Not mended is what could mean two things, such as a quote
inside a string: the value is then `stuck` and its reader decides.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from ktx.chat_formats.reader import TextReader, Wait

DEPTH = 128  # brackets inside brackets: no arguments are deeper, and a client's own JSON reader must survive them
WORD = 1000  # characters of a number or bare word

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(
    rf'(?P<space>[ \t\r\n]+)|(?P<string>"[^"\\\x00-\x1f]*")|(?P<word>(?:{_NUMBER}|true|false|null)(?=[ \t\r\n,\]}}]))'
    r"|(?P<mark>[{}\[\],:])"
)
_ESCAPES = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_PLAIN = {  # but for control characters; possessive: no character is tried twice
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

# what may come next
ITEM, ITEM_OR_END, KEY, KEY_OR_END, COLON, NEXT = "item", "item or ]", "key", "key or }", ":", ", or end"


class Value:
    """One value, read from `source` piece by piece; `done` when it is whole."""

    def __init__(self, source: TextReader):
        self.source = source
        self.closers: list[str] = []  # what would close the open brackets, the outermost first
        self.want, self.quote, self.word = ITEM, "", ""
        self.held = ""  # a comma and the space behind it: shown only when something follows
        self.out: list[str] = []
        self.done = self.stuck = False

    def pieces(self) -> Iterator[str | None]:
        """The value's text in pieces, None where more of the stream is needed; ends at the value's end or a problem."""
        while True:
            self._take()
            if self.out:
                yield "".join(self.out)
                self.out.clear()
            if self.done or self.stuck or self.source.ended:
                return
            yield None

    @property
    def closable(self) -> bool:
        """Whether only closing brackets are missing."""
        return not (self.quote or self.word) and (self.want in (NEXT, KEY_OR_END, ITEM_OR_END) or bool(self.held))

    def closing(self) -> str:
        return "".join(reversed(self.closers))

    def _take(self) -> None:
        source = self.source
        while not (self.done or self.stuck):
            before = source.at
            if before >= len(source.text):
                break
            if self.quote:
                self._string()
            elif self.word:
                self._bare()
            else:
                self._token()
            if source.at == before and not source.ended and (self.quote or self.word):
                return  # an escape or a word that is not whole yet
        if source.ended and self.word and not self.stuck:
            self._finish_word()

    def _token(self) -> None:
        match = _TOKEN.match(self.source.text, self.source.at)
        if match is None:
            self._odd()
            return
        text = match.group()
        kind = match.lastgroup
        if kind == "word" and len(text) > WORD:
            self.source.at += WORD + 1  # as far as `_bare` goes
            self.stuck = True
            return
        if kind == "mark":
            self._bracket(text)
            return
        if kind == "space":
            if self.held:
                self.held += text
            else:
                self.out.append(text)
        elif kind == "string" and self.want in (KEY, KEY_OR_END):
            self._put(text)
            self.want = COLON
        elif self.want in (ITEM, ITEM_OR_END):
            self._put(text)
            self._after()
        elif kind == "word" and self.want in (KEY, KEY_OR_END):
            self._put(f'"{text}"')
            self.want = COLON
        else:
            self.stuck = True
            return
        self.source.at = match.end()

    def _odd(self) -> None:
        """Not a whole token of JSON: the start of a string, a word that is cut or is none, or a problem."""
        char = self.source.text[self.source.at]
        if self.want in (COLON, NEXT):
            self.stuck = True
        elif char in "\"'":
            self._put('"')
            self.quote = char
            self.source.at += 1
        else:
            self._bare()

    def _string(self) -> None:
        source, at = self.source, self.source.at
        match = _PLAIN[self.quote].match(source.text, at)
        if match:
            self.out.append(_CONTROLS.sub(_escaped, match.group()))
            source.at = match.end()
            return
        char = source.text[at]
        if char == "\\":
            self._escape()
            return
        if char != self.quote:
            many = _QUOTES.match(source.text, at)
            assert many is not None
            self.out.append(_escaped(many))
            source.at = many.end()
        else:
            source.at += 1
            self.out.append('"')
            self.quote = ""
            if self.want in (KEY, KEY_OR_END):
                self.want = COLON
            else:
                self._after()

    def _escape(self) -> None:
        source = self.source
        text = source.text[source.at : source.at + 6]
        if re.fullmatch(r"\\(u[0-9a-fA-F]{0,3})?", text) and len(text) < 6 and source.at + 6 > len(source.text):
            if not source.ended:
                return
            self.stuck = True
        elif re.match(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})', text):
            length = 6 if text[1] == "u" else 2
            self.out.append(text[:length])
            source.at += length
        elif text[1] == "'":
            self.out.append("'")
            source.at += 2
        else:  # \d, \(, a backslash before a line break: the model meant the backslash itself
            self.out.append("\\\\")
            source.at += 1

    def _bare(self) -> None:
        """A number or word, up to what cannot belong to it."""
        source = self.source
        match = _WORD.match(source.text, source.at, source.at + WORD + 1 - len(self.word))
        if match:
            self.word += match.group()
            source.at = match.end()
        if len(self.word) > WORD or not self.word:
            self.stuck = True
        elif source.at < len(source.text):
            self._finish_word()

    def _finish_word(self) -> None:
        word, self.word = self.word, ""
        key = self.want in (KEY, KEY_OR_END)
        text = (json.dumps(word) if _NAME.fullmatch(word) else None) if key else _scalar(word)
        if text is None:
            self.stuck = True
            return
        self._put(text)
        if key:
            self.want = COLON
        else:
            self._after()

    def _bracket(self, char: str) -> None:
        if char in "{[" and self.want in (ITEM, ITEM_OR_END) and len(self.closers) < DEPTH:
            self._put(char)
            self.closers.append(_CLOSE[char])
            self.want = KEY_OR_END if char == "{" else ITEM_OR_END
        elif char in "}]" and char in self.closers and self.closable:
            while self.closers[-1] != char:  # an inner bracket was forgotten
                self.out.append(self.closers.pop())
            self.out.append(self.closers.pop())
            self.held = ""
            self._after()
        elif char == "," and self.want == NEXT and self.closers:
            self.held = ","
            self.want = KEY if self.closers[-1] == "}" else ITEM
        elif char == ":" and self.want == COLON:
            self.out.append(char)
            self.want = ITEM
        else:
            self.stuck = True
            return
        self.source.at += 1

    def _put(self, text: str) -> None:
        self.out.append(self.held + text)
        self.held = ""

    def _after(self) -> None:
        self.want, self.done = NEXT, not self.closers


def _escaped(found: re.Match[str]) -> str:
    """Characters as they are written inside a string of JSON."""
    return json.dumps(found.group())[1:-1]


def _scalar(word: str) -> str | None:
    """A bare word as JSON, None when it is nothing."""
    if re.fullmatch(_NUMBER, word) or word in ("true", "false", "null"):
        return word
    if word in _WORDS:
        return _WORDS[word]
    try:
        number = float(word) if re.search(r"[.eE]", word) else int(word)
    except ValueError:
        return None
    return json.dumps(number) if math.isfinite(number) else None


def strict(text: str) -> str | None:
    """The one JSON value that `text` is, mended; None when it is none."""
    source = TextReader()
    source.feed(text.strip())
    source.ended = True
    value = Value(source)
    out = "".join(piece for piece in value.pieces() if piece)
    if value.done:
        return out if source.at == len(source.text) else None
    return out + value.closing() if value.closable and value.closers and source.at == len(source.text) else None


def collect(source: TextReader) -> Wait[str | None]:
    """One value in one piece; None when it is none."""
    value, out = Value(source), list[str]()
    for piece in value.pieces():
        if piece is None:
            yield
        else:
            out.append(piece)
    return "".join(out) if value.done else None
