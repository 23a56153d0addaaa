"""Decodes text of unknown encoding: from a pipe, a file, a command-line argument."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ktx.errors import BadFile

_BYTE_ORDER_MARKS = (  # byte order mark -> encoding; the longer marks first, because UTF-32's begin like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NUL_TEXT = "NUL characters, which text does not have (UTF-16 without a byte order mark?)"
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def encoding_of(begin: bytes, default: str = "utf-8") -> str:
    """Returns the encoding that a byte order mark at the beginning of a text names, else the default."""
    return next((name for mark, name in _BYTE_ORDER_MARKS if begin.startswith(mark)), default)


def read_text(path: str) -> str:
    """Returns a file's text, in UTF-8 or the encoding of its byte order mark. BadFile when it is not text."""
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadFile(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise BadFile(f"{path}: is not {name} text (byte {error.start})") from error
    if "\0" in text:
        raise BadFile(f"{path}: contains {NUL_TEXT}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(stream: Any, warn: Callable[[str], None]) -> Iterator[str]:
    """Yields the lines of a text stream as they arrive, with their line ends.

    A byte that is invalid in the stream's encoding is replaced, a line with NULs is skipped; both are reported to
    `warn`. A stream without an underlying byte stream (a StringIO) is read as it is.
    """
    raw = getattr(stream, "buffer", None)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if raw is not None:  # 4: the bytes of the longest byte order mark
        encoding = encoding_of(raw.peek(4), "utf-8" if codecs.lookup(encoding).name == "ascii" else encoding)
        multibyte = encoding in ("utf-16", "utf-32")
        stream = io.TextIOWrapper(raw, encoding, errors="replace" if multibyte else "surrogateescape")
    try:
        for number, line in enumerate(stream, 1):
            if "\0" in line:
                warn(f"! line {number} is skipped: it contains {NUL_TEXT}")
                continue
            text = replace_surrogates(line)
            if text != line:
                warn(f"! line {number}: bytes that are not {encoding.upper()} were replaced by {REPLACEMENT_CHARACTER}")
            yield text
    finally:
        if raw is not None:
            stream.detach()  # otherwise its end would close the byte stream, which it does not own


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which no tokenizer accepts and no file can store: Python decodes invalid bytes to
    them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
