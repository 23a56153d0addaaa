"""Packed weights on disk, so that a second start only maps them. What is mapped can be used at once, and moves to huge pages behind the model's back.

A folder holds one model as one machine packs it: `packed.bin`, every matrix at a multiple of a page, and `index.json`, written last, so that
a folder without it is one whose writer was stopped. What the folder's name is made of decides when it may be used: the weight files (path, size,
time of change), the plan, the instruction set, the memory nodes, and how a fixed sample of every type comes out of packing.
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

PAGE = 4096
PIECE = 256 << 20  # bytes written at once
MOVED = 8 << 20  # bytes moved to memory at once
QUIET, PATIENCE = (
    0.1,
    0.25,
)  # seconds without a kernel after which weights are moved, and after which one piece is moved all the same
_loading = threading.local()


def cached_pack(make: Callable[[], list[cpu.Packed]]) -> list[cpu.Packed]:
    """What an operator's `load` packs: made, or found on disk when the model is loaded with a folder for it; then `make` is not called."""
    if not getattr(_loading, "name", ""):
        return make()
    name, store, origin = f"{_loading.name}#{_loading.count}", _loading.store, _loading.origin
    _loading.count += 1
    made = make() if store is None else store.get_or_pack(name, make)
    return made if origin is None else origin.known(name, made)


@contextmanager
def loading(name: str, store: PackedCache | None, origin: Origin | None) -> Iterator[None]:
    """While an operator of this name loads: where its packed weights are stored, and who can load them again."""
    _loading.name, _loading.store, _loading.origin, _loading.count = name, store, origin, 0
    try:
        yield
    finally:
        _loading.name = ""


class Origin(Protocol):
    """Who can load packed weights again, for pickles."""

    def known(self, name: str, made: list[cpu.Packed]) -> list[cpu.Packed]:
        """The weights, which refer to their origin from now on."""


class PackedCache:
    """One model's folder: read when it is whole, else written while the model is loaded."""

    def __init__(self, folder: Path, need: int):
        self.folder, self.lock = folder, threading.Lock()
        self.entries: dict[str, list[dict[str, Any]]] = {}
        self.size, self.trouble = 0, ""
        index = _index(folder)
        self.found = index is not None
        self.file: Any = None
        self.data: torch.Tensor | None = None
        if index is not None:
            self.entries, self.size = index["matrices"], index["size"]
            self.data = cpu.ops.map_file(str(folder / "packed.bin"))
            return
        self._room(need)
        self.draft = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir()
        self.file = open(self.draft / "packed.bin", "wb", buffering=0)  # noqa: SIM115  # closed by finish

    def _room(self, need: int) -> None:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache_dir {self.folder.parent}: cannot be made: {error.strerror}") from error
        if not os.access(self.folder.parent, os.W_OK):
            raise UsageError(f"cache_dir {self.folder.parent}: cannot be written")
        free = shutil.disk_usage(self.folder.parent).free
        if need > free:
            raise DoesNotFit(
                f"cache_dir {self.folder.parent}: the packed weights need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on that disk"
            )

    def get_or_pack(self, name: str, make: Callable[[], list[cpu.Packed]]) -> list[cpu.Packed]:
        if self.found and name in self.entries:
            return [self._map(entry) for entry in self.entries[name]]
        made = make()
        if self.found:
            return made
        self.entries[name] = [self._write(packed) for packed in made]
        return made

    def _map(self, entry: dict[str, Any]) -> cpu.Packed:
        assert self.data is not None
        data = self.data[entry["at"] : entry["at"] + entry["nbytes"]]
        if entry["ends"] and cpu.ops.nodes() > 1:  # a file's pages lie on any node
            placed = cpu.ops.empty_packed(entry["nbytes"], entry["ends"])
            placed.copy_(data)
            data = placed
        else:
            cpu.ops.populate(data)
        return cpu.Packed(data, QTYPES[entry["type"]], entry["n"], entry["k"], entry["matrices"], tuple(entry["ends"]))

    def _write(self, packed: cpu.Packed) -> dict[str, Any]:
        with self.lock:
            at, self.size = self.size, -(-(self.size + packed.nbytes) // PAGE) * PAGE
        if not self.trouble:
            try:
                view, done = packed.data.numpy().data, 0
                while done < len(view):
                    done += os.pwrite(self.file.fileno(), view[done : done + PIECE], at + done)
            except OSError as error:
                self.trouble = error.strerror or str(error)
        return {
            "at": at,
            "nbytes": packed.nbytes,
            "type": packed.qtype.name,
            "n": packed.n,
            "k": packed.k,
            "matrices": packed.matrices,
            "ends": list(packed.ends),
        }

    def commit(self) -> str:
        """After loading: what a person should be told, "" when there is nothing. A folder is complete from here on, or not there."""
        if self.found:
            if cpu.ops.nodes() == 1:
                self._start_moving()
            return ""
        if not self.trouble:
            try:
                self.file.truncate(self.size)
                os.fsync(self.file.fileno())
                self.file.close()
                (self.draft / "index.json").write_text(json.dumps({"size": self.size, "matrices": self.entries}))
                shutil.rmtree(self.folder, ignore_errors=True)
                self.draft.rename(self.folder)
            except OSError as error:
                self.trouble = error.strerror or str(error)
        if self.trouble:
            self.abort()
            return f"cache_dir {self.folder.parent}: packed weights were not kept: {self.trouble}"
        return ""

    def _start_moving(self) -> None:
        stop = threading.Event()
        mover = threading.Thread(target=promote_to_huge_pages, args=(self.data, stop), name="ktx-weights", daemon=True)
        mover.start()

        def end() -> None:  # a thread inside a kernel may not be ended by Python's own end
            stop.set()
            mover.join()

        atexit.register(end)

    def abort(self) -> None:
        """Leaves nothing of a folder that was not finished."""
        if not self.found:
            self.file.close()
            shutil.rmtree(self.draft, ignore_errors=True)


def promote_to_huge_pages(data: torch.Tensor, stop: threading.Event) -> None:
    """Moves mapped weights to memory of their own: a file's pages are small, and a token's way through them is slow.

    Piece by piece, mostly while no kernel runs, because new memory costs the system more time than reading it.
    """
    for begin in range(0, data.numel(), MOVED):
        waited = 0.0
        while cpu.ops.idle_seconds() < QUIET and waited < PATIENCE:
            if stop.wait(QUIET / 2):
                return
            waited += QUIET / 2
        if stop.is_set() or not cpu.ops.to_memory(data, begin, min(MOVED, data.numel() - begin)):
            return


def open_store(folder: str | Path, name: str, key: Any, need: int) -> PackedCache:
    """The store of a model below `folder`; `key` is whatever decides how it is packed, `need` the bytes it will take."""
    parts = [key, *cpu.packing()]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return PackedCache(Path(folder).expanduser() / f"{name}-{digest}", need)


def _index(folder: Path) -> dict[str, Any] | None:
    """What a whole folder says of itself; None for one that is not there or was cut."""
    try:
        found = json.loads((folder / "index.json").read_text())
        size = (folder / "packed.bin").stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise KtxError(f"{folder}: cannot be read: {error}; remove it, it will be made again") from error
    return found if found["size"] == size else None
