"""Parses GGUF headers without trusting any number in them.

Every count, length and offset is checked against the remaining bytes of the file before it is used to allocate or skip
anything. Arrays are decoded lazily, so a vocabulary of 130,000 strings costs one scan and no objects. Format: ggml's
docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ktx.errors import BadFile
from ktx.quant.types import BY_CODE
from ktx.weights.base import TensorSpec
from ktx.weights.gguf_files import MAGIC

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 1 << 24  # per array, and tensors per file: far above any model, far below a harmful hostile count


@dataclass(frozen=True)
class LazyArray:
    """A metadata array that is decoded on each iteration. `kind` is the GGUF type code of its items."""

    data: mmap.mmap | bytes
    offset: int
    kind: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        """Decodes the items from the mapped file, one after another: numbers, or strings with their lengths.

        A string is stored after its length in eight bytes.
        """
        at = self.offset
        if self.kind in SCALARS:
            yield from (value for (value,) in struct.iter_unpack("<" + SCALARS[self.kind], self._bytes()))
            return
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", self.data, at)
            yield bytes(self.data[at + 8 : at + 8 + length]).decode("utf-8", errors="replace")
            at += 8 + length

    def _bytes(self) -> bytes:
        size = struct.calcsize("<" + SCALARS[self.kind]) * self.count
        return bytes(self.data[self.offset : self.offset + size])


@dataclass
class Header:
    """Metadata and tensors of one GGUF file; tensor offsets are in bytes from the start of the file."""

    file: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorSpec]


class _Reader:
    """A cursor over a GGUF image: `at` is the current byte, `end` the size."""

    def __init__(self, data: mmap.mmap | bytes, file: str):
        self.data, self.file, self.at, self.end = data, file, 0, len(data)

    def fail(self, what: str) -> BadFile:
        """A BadFile at the current position, to be raised by the caller."""
        return BadFile(f"{self.file}: {what} (at byte {self.at}); the file is damaged or incomplete: download it again")

    def need(self, size: int, what: str) -> None:
        """Raises BadFile when fewer than `size` bytes remain."""
        if size > self.end - self.at:
            raise self.fail(f"{what} needs {size} bytes, but only {self.end - self.at} remain")

    def scalar(self, letter: str, what: str) -> Any:
        """Reads a number; `letter` is its format in `struct`."""
        size = struct.calcsize("<" + letter)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += size
        return value

    def string(self, what: str, max_bytes: int = 1 << 30) -> str:
        """Reads a string: a 64-bit length and UTF-8. `what` names it in errors; more than `max_bytes` are rejected."""
        length = self.scalar("Q", what)
        if length > max_bytes:
            raise self.fail(f"{what} claims {length} bytes")
        self.need(length, what)
        raw = bytes(self.data[self.at : self.at + length])
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            # Some tools store latin-1 descriptions; that does not justify rejecting a model.
            if what.startswith("the value"):
                return raw.decode("utf-8", errors="replace")
            raise self.fail(f"{what} is not UTF-8 text") from None

    def value(self, kind: int, key: str) -> Any:
        """Reads a metadata value of GGUF's type number `kind`; `key` names it in errors."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], f"the value of {key}")
        if kind == STRING:
            return self.string(f"the value of {key}")
        if kind == ARRAY:
            return self.array(key)
        raise self.fail(f"metadata {key} has unknown type {kind}")

    def array(self, key: str) -> LazyArray:
        """Skips over an array and returns it as a LazyArray, because most of a tokenizer's arrays are never read."""
        kind, count = self.scalar("I", f"array {key}"), self.scalar("Q", f"array {key}")
        if count > MAX_ITEMS:
            raise self.fail(f"array {key} claims {count} items")
        start = self.at
        if kind in SCALARS:
            size = struct.calcsize("<" + SCALARS[kind]) * count
            self.need(size, f"array {key} of {count} items")
            self.at += size
        elif kind == STRING:
            self.need(8 * count, f"array {key} of {count} strings")
            self.skip_strings(count, key)
        else:
            raise self.fail(f"array {key} has items of unknown type {kind}")
        return LazyArray(self.data, start, kind, count)

    def skip_strings(self, count: int, key: str) -> None:
        """Skips `count` strings of an array, because only their lengths tell where the next entry begins.

        Works on local variables, for speed: vocabularies have hundreds of thousands of strings.
        """
        at, end, data, unpack = self.at, self.end, self.data, struct.Struct("<Q").unpack_from
        for i in range(count):
            if end - at < 8:
                self.at = at
                raise self.fail(f"array {key} ends after {i} of {count} strings")
            at += 8 + unpack(data, at)[0]
            if at > end:
                self.at = end
                raise self.fail(f"string {i} of array {key} extends past the end of the file")
        self.at = at


def read_header(path: Path) -> Header:
    """Maps a GGUF file and parses its header; the mapping stays open as long as a LazyArray refers to it.

    Raises BadFile when the file cannot be read or its header is invalid.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            data: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
    return parse_header(data, str(path))


def parse_header(data: mmap.mmap | bytes, file: str) -> Header:
    """Parses the header of a GGUF image; `file` is its name in messages. Raises BadFile on the first invalid entry."""
    r = _Reader(data, file)
    magic = bytes(data[:4])
    if magic != MAGIC:
        raise BadFile(f"{file}: is not a GGUF file (it starts with {magic!r})")
    r.at = 4
    version = r.scalar("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reason = "is big-endian" if swapped in (2, 3) else f"has GGUF version {version}"
        raise BadFile(
            f"{file}: {reason}; ktx reads little-endian versions 2 and 3: convert it with a current llama.cpp"
        )
    n_tensors, n_keys = r.scalar("Q", "the tensor count"), r.scalar("Q", "the metadata count")
    # A tensor's entry takes at least 32 bytes, a metadata key with its value 13.
    if n_tensors > min(MAX_ITEMS, r.end // 32) or n_keys > min(MAX_ITEMS, r.end // 13):
        raise r.fail(f"the header claims {n_tensors} tensors and {n_keys} metadata keys")
    metadata = _read_metadata(r, n_keys)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise BadFile(f"{file}: general.alignment is {alignment}, expected a power of two of at least 8")
    raw = [_read_tensor(r) for _ in range(n_tensors)]
    data_start = (r.at + alignment - 1) // alignment * alignment
    tensors: dict[str, TensorSpec] = {}
    for name, dims, code, offset in raw:
        if name in tensors:
            raise BadFile(f"{file}: tensor {name} appears twice")
        tensors[name] = _check_tensor(file, name, dims, code, data_start + offset, alignment, offset, r.end)
    return Header(file, metadata, tensors)


def _read_metadata(r: _Reader, count: int) -> dict[str, Any]:
    """Reads `count` keys with their values. Raises BadFile for an empty or repeated key."""
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = r.string(f"metadata key {i}", 1 << 16)
        if not key or key in metadata:
            raise r.fail(f"metadata key {key!r} is empty or appears twice")
        metadata[key] = r.value(r.scalar("I", f"the type of {key}"), key)
    return metadata


def _read_tensor(r: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Reads the next tensor entry: (name, dimensions, type code, offset in the data section)."""
    name = r.string("a tensor name", 1 << 10)
    if not name:
        raise r.fail("a tensor has no name")
    n_dims = r.scalar("I", f"tensor {name}")
    if not 1 <= n_dims <= 4:
        raise r.fail(f"tensor {name} has {n_dims} dimensions")
    dims = tuple(r.scalar("Q", f"tensor {name}") for _ in range(n_dims))
    return name, dims, r.scalar("I", f"tensor {name}"), r.scalar("Q", f"tensor {name}")


def _check_tensor(
    file: str, name: str, dims: tuple[int, ...], code: int, at: int, alignment: int, offset: int, size: int
) -> TensorSpec:
    """Checks one tensor of the header and returns its spec.

    Raises BadFile when its type, shape or position cannot be right.

    Args:
        dims: dimensions in GGUF's order, the row's length first.
        code: ggml's number of the type.
        at: byte position in the file.
        offset: byte position in the data section, which must be aligned.
        size: the file's size in bytes.
    """
    qtype = BY_CODE.get(code)
    if qtype is None or code >= 1000:  # types of ktx, which files do not have
        raise BadFile(f"{file}: tensor {name} has unsupported ggml type {code}; supported: {_supported_types()}")
    if 0 in dims:
        raise BadFile(f"{file}: tensor {name} is empty: its shape is {dims}")
    if dims[0] % qtype.block:
        raise BadFile(f"{file}: tensor {name} has rows of {dims[0]} weights, {qtype} needs a multiple of {qtype.block}")
    if offset % alignment:
        raise BadFile(f"{file}: tensor {name} starts at {offset}, which is not a multiple of {alignment}")
    nbytes = qtype.row_bytes(dims[0]) * prod(dims[1:])
    if at + nbytes > size:
        raise BadFile(
            f"{file}: tensor {name} ends at byte {at + nbytes}, the file at {size}; it is truncated: download it again"
        )
    return TensorSpec(name, tuple(reversed(dims)), qtype, nbytes, file, at)


def _supported_types() -> str:
    return " ".join(qtype.name for code, qtype in BY_CODE.items() if code < 1000)


def architecture(metadata: Mapping[str, Any], file: str) -> str:
    """The value of general.architecture. Raises BadFile when it is missing."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise BadFile(f"{file}: the metadata key general.architecture is missing; the kind of model is unknown")
    return arch
