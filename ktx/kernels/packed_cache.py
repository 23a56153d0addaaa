"""A disk cache of packed weights, so that a second start maps them instead of packing again.

Mapped weights can be used at once; a background thread moves them to huge pages.

A folder holds one model as one machine packs it: `packed.bin`, with every matrix at a multiple of a page, and
`index.json`, which is written last, so that a folder without it is incomplete. The folder's name is a digest of
everything that must be equal for it to be used: the weight files (path, size, modification time), the plan, the
instruction set, the NUMA nodes, and the packed bytes of a fixed sample of every type.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from ktx.errors import DoesNotFit, KtxError, UsageError
from ktx.kernels import cpu
from ktx.quant.types import QTYPES

PAGE_BYTES = 4096
WRITE_CHUNK_BYTES = 256 << 20  # bytes of one write to disk
PROMOTE_CHUNK_BYTES = 8 << 20  # bytes that are moved to huge pages at once
# A chunk is moved when no kernel has run for IDLE_S seconds, or after MAX_WAIT_S seconds in any case.
IDLE_S, MAX_WAIT_S = 0.1, 0.25
_context = threading.local()  # arguments of `cache_context`, per thread


def cached_pack(pack: Callable[[], list[cpu.Packed]]) -> list[cpu.Packed]:
    """Returns packed weights from the cache, or packs them.

    Inside `cache_context` with a complete cache folder the weights are mapped from disk and `pack` is not called. With
    a new folder they are packed and written to it. An entry is named after the operator and the number of its call,
    because an operator may pack several times.

    Args:
        pack: packs the weights.
    """
    if not getattr(_context, "name", ""):
        return pack()
    name, store, origin = f"{_context.name}#{_context.count}", _context.store, _context.origin
    _context.count += 1
    packed = pack() if store is None else store.get_or_pack(name, pack)
    return packed if origin is None else origin.register(name, packed)


@contextmanager
def cache_context(name: str, store: PackedCache | None, origin: Origin | None) -> Iterator[None]:
    """Sets the cache for the operator that this thread loads.

    `cached_pack` finds it in a thread-local variable, so that the `load` methods of operators, which users can write,
    need no parameter for it. The packed weights of an operator are numbered in the order of its calls.

    Args:
        name: the operator's name.
        store: the cache of packed weights; None for no cache.
        origin: registers packed weights for pickling; None for no pickling.
    """
    _context.name, _context.store, _context.origin, _context.count = name, store, origin, 0
    try:
        yield
    finally:
        _context.name = ""


class Origin(Protocol):
    """The weight files that packed weights were loaded from, for pickles of a model."""

    def register(self, name: str, packed: list[cpu.Packed]) -> list[cpu.Packed]:
        """Sets `origin` of the packed weights of the operator `name` and returns them."""


class PackedCache:
    """The cache folder of one model.

    A complete folder is read; otherwise a new one is written while the model is loaded, under a temporary name until
    `commit`.

    Attributes:
        is_complete: whether a complete folder was found.

    Raises:
        UsageError: if the folder cannot be created or written.
        DoesNotFit: if the disk has not enough free space.
    """

    def __init__(self, folder: Path, required_bytes: int):
        """Maps a complete folder, or creates a temporary one to be written.

        Args:
            folder: the folder of this model below the cache directory.
            required_bytes: bytes of the packed weights.
        """
        self.folder, self.lock = folder, threading.Lock()
        self.entries: dict[str, list[dict[str, Any]]] = {}
        self.size, self.error = 0, ""
        index = _read_index(folder)
        self.is_complete = index is not None
        self.file: Any = None
        self.data: torch.Tensor | None = None
        if index is not None:
            self.entries, self.size = index["matrices"], index["size"]
            self.data = cpu.ops.map_file(str(folder / "packed.bin"))
            return
        self._check_space(required_bytes)
        self.partial_folder = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(self.partial_folder, ignore_errors=True)
        self.partial_folder.mkdir()
        # `commit` or `abort` closes it.
        self.file = open(self.partial_folder / "packed.bin", "wb", buffering=0)  # noqa: SIM115

    def _check_space(self, required_bytes: int) -> None:
        """Creates the parent folder and checks that it is writable and has enough free space.

        A cache that cannot be written is thus reported before any weight is packed.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"packed_cache_dir {self.folder.parent}: cannot be created: {error.strerror}") from error
        if not os.access(self.folder.parent, os.W_OK):
            raise UsageError(f"packed_cache_dir {self.folder.parent}: is not writable")
        free_bytes = shutil.disk_usage(self.folder.parent).free
        if required_bytes > free_bytes:
            raise DoesNotFit(
                f"packed_cache_dir {self.folder.parent}: the packed weights need {required_bytes / 1e9:.1f} GB,"
                f" {free_bytes / 1e9:.1f} GB are free on that disk"
            )

    def get_or_pack(self, name: str, pack: Callable[[], list[cpu.Packed]]) -> list[cpu.Packed]:
        """Returns the entry `name`, mapped from disk, or packs it and writes it to the folder."""
        if self.is_complete and name in self.entries:
            return [self._map(entry) for entry in self.entries[name]]
        packed = pack()
        if self.is_complete:
            return packed
        self.entries[name] = [self._write(matrix) for matrix in packed]
        return packed

    def _map(self, entry: dict[str, Any]) -> cpu.Packed:
        """Maps the matrix of an index entry. If several NUMA nodes hold its rows, they are copied to these nodes."""
        assert self.data is not None
        data = self.data[entry["at"] : entry["at"] + entry["nbytes"]]
        if entry["ends"] and cpu.ops.nodes() > 1:  # mapped pages of a file may be on any node
            placed = cpu.ops.empty_packed(entry["nbytes"], entry["ends"])
            placed.copy_(data)
            data = placed
        else:
            cpu.ops.populate(data)
        return cpu.Packed(data, QTYPES[entry["type"]], entry["n"], entry["k"], entry["matrices"], tuple(entry["ends"]))

    def _write(self, packed: cpu.Packed) -> dict[str, Any]:
        """Writes one matrix to `packed.bin` and returns its index entry.

        Several loading threads call it at once; the lock only assigns their offsets. An error is stored for `commit`,
        because loading succeeds without the cache.
        """
        with self.lock:
            offset, self.size = self.size, -(-(self.size + packed.nbytes) // PAGE_BYTES) * PAGE_BYTES
        if not self.error:
            try:
                view, written = packed.data.numpy().data, 0
                while written < len(view):
                    written += os.pwrite(
                        self.file.fileno(), view[written : written + WRITE_CHUNK_BYTES], offset + written
                    )
            except OSError as error:
                self.error = error.strerror or str(error)
        return {
            "at": offset,
            "nbytes": packed.nbytes,
            "type": packed.qtype.name,
            "n": packed.n,
            "k": packed.k,
            "matrices": packed.matrices,
            "ends": list(packed.numa_ends),
        }

    def commit(self) -> str:
        """Completes the folder after loading; renaming it makes it visible to other processes.

        Returns:
            A warning for the user if the weights were not cached, else "".
        """
        if self.is_complete:
            if cpu.ops.nodes() == 1:  # else `_map` has copied the weights to memory already
                self._start_promotion()
            return ""
        if not self.error:
            try:
                self.file.truncate(self.size)
                os.fsync(self.file.fileno())
                self.file.close()
                (self.partial_folder / "index.json").write_text(
                    json.dumps({"size": self.size, "matrices": self.entries})
                )
                shutil.rmtree(self.folder, ignore_errors=True)
                self.partial_folder.rename(self.folder)
            except OSError as error:
                self.error = error.strerror or str(error)
        if self.error:
            self.abort()
            return f"packed_cache_dir {self.folder.parent}: packed weights were not cached: {self.error}"
        return ""

    def _start_promotion(self) -> None:
        """Starts the thread that moves mapped weights to huge pages, while the model already runs."""
        stop = threading.Event()
        thread = threading.Thread(target=promote_to_huge_pages, args=(self.data, stop), name="ktx-weights", daemon=True)
        thread.start()

        # The thread is joined before Python exits because it must not be ended inside a kernel.
        def stop_thread() -> None:
            stop.set()
            thread.join()

        atexit.register(stop_thread)

    def abort(self) -> None:
        """Removes a folder that was not completed."""
        if not self.is_complete:
            self.file.close()
            shutil.rmtree(self.partial_folder, ignore_errors=True)


def promote_to_huge_pages(data: torch.Tensor, stop: threading.Event) -> None:
    """Moves mapped weights to anonymous memory with huge pages.

    The pages of a mapped file are small, which slows down decode. The weights are moved chunk by chunk, mostly while
    no kernel runs, because first writes to new memory take the system longer than reads.

    Args:
        data: uint8, the mapped file.
        stop: ends the promotion when it is set; it also ends when the system refuses to move a chunk.
    """
    for offset in range(0, data.numel(), PROMOTE_CHUNK_BYTES):
        waited_s = 0.0
        while cpu.ops.idle_seconds() < IDLE_S and waited_s < MAX_WAIT_S:
            if stop.wait(IDLE_S / 2):
                return
            waited_s += IDLE_S / 2
        if stop.is_set() or not cpu.ops.remap_huge_pages(data, offset, min(PROMOTE_CHUNK_BYTES, data.numel() - offset)):
            return


def open_cache(folder: str | Path, name: str, key: Any, required_bytes: int) -> PackedCache:
    """Opens the cache of a model below `folder`.

    Args:
        folder: the cache directory.
        name: the model's name, which becomes part of the folder's name.
        key: everything that determines how the model is packed, apart from `cpu.packing_key()`.
        required_bytes: bytes of the packed weights.
    """
    key_parts = [key, *cpu.packing_key()]
    digest = hashlib.sha256(json.dumps(key_parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return PackedCache(Path(folder).expanduser() / f"{name}-{digest}", required_bytes)


def _read_index(folder: Path) -> dict[str, Any] | None:
    """Returns the index of a complete folder; None if there is no folder or it is truncated.

    Raises:
        KtxError: if the index cannot be read.
    """
    try:
        index = json.loads((folder / "index.json").read_text())
        size = (folder / "packed.bin").stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise KtxError(f"{folder}: cannot be read: {error}; remove it, it will be created again") from error
    return index if index["size"] == size else None
