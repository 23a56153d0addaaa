"""Text from bytes of unknown making: a pipe, a file, a flag of the command line."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ktx.errors import BadFile

_MARKS = (  # what begins a file in an encoding; the longer ones first, for UTF-32's begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NUL = "NUL characters, which no text has (UTF-16 without a byte order mark?)"
REPLACED = "\N{REPLACEMENT CHARACTER}"


def encoding_of(begin: bytes, usual: str = "utf-8") -> str:
    """The encoding that a text's first bytes name by a byte order mark, else the usual one."""
    return next((name for mark, name in _MARKS if begin.startswith(mark)), usual)


def read_text(path: str) -> str:
    """A file's text, in UTF-8 or what its byte order mark says. BadFile where it is no text."""
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadFile(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise BadFile(f"{path}: is no {name} text (byte {error.start})") from error
    if "\0" in text:
        raise BadFile(f"{path}: holds {NUL}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(stream: Any, warn: Callable[[str], None]) -> Iterator[str]:
    """The lines of a text stream as they come, with their ends.

    A byte that is no text of the stream's encoding is replaced, a line with NULs is left out; `warn` hears of both.
    A stream that has no bytes below it (a StringIO) is read as it is.
    """
    raw = getattr(stream, "buffer", None)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if raw is not None:
        encoding = encoding_of(raw.peek(4), "utf-8" if codecs.lookup(encoding).name == "ascii" else encoding)
        wide = encoding in ("utf-16", "utf-32")
        stream = io.TextIOWrapper(raw, encoding, errors="replace" if wide else "surrogateescape")
    try:
        for number, line in enumerate(stream, 1):
            if "\0" in line:
                warn(f"! line {number} is left out: it holds {NUL}")
                continue
            text = clean(line)
            if text != line:
                warn(f"! line {number}: bytes that are no {encoding.upper()} were replaced by {REPLACED}")
            yield text
    finally:
        if raw is not None:
            stream.detach()  # else its end would close the bytes below, which are not its own


def clean(text: str) -> str:
    """Text without lone surrogates, which no tokenizer takes and no file holds: Python reads bytes that are no text as such."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
