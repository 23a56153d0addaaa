"""Pages of a prefix cache on disk, so that a server that starts again need not compute what an earlier one has.

A page is a file named by its key, the hash of all tokens up to its end (ktx.cache.page_pool), in a folder named by all that decides its content. Files are safetensors:
reading one runs no code, and one that does not fit is not used. They hold what was said, in a form that can be turned back: the folder is its owner's alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ktx.cache.paged import PagedCache, PagedLayer
from ktx.errors import UsageError

log = logging.getLogger("ktx.cache")
WAITING = 256 << 20  # bytes of pages that may wait to be written; more are not kept
END, PART = ".safetensors", ".part"
OURS = re.compile(r"[0-9a-f]{32}\.safetensors")


class DiskPageStore:
    """`keep` and `fetch` are for the thread that computes; a thread of its own writes. `limit`: bytes, beyond which what was unused longest goes."""

    def __init__(self, folder: str | Path, name: str, identity: Any, cache: PagedCache, limit: int):
        self.cache, self.limit = cache, limit
        shapes = [[list(buffer.shape[1:]), str(buffer.dtype)] for buffer in self._buffers().values()]
        digest = hashlib.sha256(json.dumps([identity, shapes], sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = Path(folder).expanduser() / f"{name}-{digest}"
        self.sizes = self._found()
        self.total = sum(self.sizes.values())
        self.named: list[tuple[bytes, int]] = []  # pages that were filled in this step
        self.waiting = 0
        self.lock = threading.Lock()
        self.jobs: queue.SimpleQueue[tuple[bytes, dict[str, torch.Tensor]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._write_all, name="ktx-pages", daemon=True)
        self.thread.start()

    def _found(self) -> OrderedDict[bytes, int]:
        """Keys and sizes of what is there, longest unused first."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            files = [(entry.stat(), entry.name) for entry in os.scandir(self.folder) if entry.is_file()]
        except OSError as error:
            raise UsageError(f"prefix_cache_dir {self.folder.parent}: cannot be used: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise UsageError(f"prefix_cache_dir {self.folder.parent}: cannot be written")
        found: OrderedDict[bytes, int] = OrderedDict()
        for about, name in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
            if OURS.fullmatch(name):
                found[bytes.fromhex(name.removesuffix(END))] = about.st_size
            elif name.endswith(PART):  # of one that was killed
                (self.folder / name).unlink(missing_ok=True)
        return found

    def _buffers(self) -> dict[str, torch.Tensor]:
        layers = [layer for layer in self.cache.layers if isinstance(layer, PagedLayer)]
        return {f"{i}.{j}": buffer for i, layer in enumerate(layers) for j, buffer in enumerate(layer.buffers)}

    def _file(self, key: bytes) -> Path:
        return self.folder / (key.hex() + END)

    def __len__(self) -> int:
        return len(self.sizes)

    def has(self, key: bytes) -> bool:
        return key in self.sizes

    def put(self, key: bytes, page: int) -> None:
        """The page is full. It is copied by `flush`, when all that belongs to it has been written. One that was there already was of no use, or could not be reached."""
        self.named.append((key, page))

    def flush(self) -> None:
        """Hands copies of the pages that were named to the thread that writes them."""
        for key, page in self.named:
            if self.waiting < WAITING:
                tensors = {name: buffer[page].to("cpu", copy=True) for name, buffer in self._buffers().items()}
                with self.lock:
                    self.waiting += sum(tensor.nbytes for tensor in tensors.values())
                self.jobs.put((key, tensors))
        self.named.clear()

    @torch.inference_mode()
    def fetch(self, key: bytes, page: int) -> bool:
        """Reads a page's content; False, and it is forgotten, when there is none of use."""
        file, buffers = self._file(key), self._buffers()
        try:
            found = load_file(file)
            fits = found.keys() == buffers.keys() and all(
                found[name].shape == buffer.shape[1:] and found[name].dtype == buffer.dtype
                for name, buffer in buffers.items()
            )
            if fits:
                os.utime(file)
        except (OSError, SafetensorError) as error:
            log.warning("a kept page cannot be read: %s: %s", file, error)
            fits = False
        if not fits:
            self._drop(key)
            return False
        for name, buffer in buffers.items():
            buffer[page] = found[name]
        with self.lock:
            if key in self.sizes:
                self.sizes.move_to_end(key)
        return True

    def _drop(self, key: bytes) -> None:
        with self.lock:
            self.total -= self.sizes.pop(key, 0)
        self._file(key).unlink(missing_ok=True)

    def _write_all(self) -> None:
        while (job := self.jobs.get()) is not None:
            key, tensors = job
            try:
                self._write(key, tensors)
            except OSError as error:
                log.warning("a page was not kept: %s: %s", self.folder, error.strerror)
            finally:
                with self.lock:
                    self.waiting -= sum(tensor.nbytes for tensor in tensors.values())

    def _write(self, key: bytes, tensors: dict[str, torch.Tensor]) -> None:
        data, draft = save(tensors), self.folder / f"{key.hex()}.{os.getpid()}{PART}"
        try:
            draft.write_bytes(data)
            draft.rename(self._file(key))
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        with self.lock:
            self.total += len(data) - self.sizes.pop(key, 0)
            self.sizes[key] = len(data)
            oldest = next(iter(self.sizes))
        while self.total > self.limit and oldest != key:
            self._drop(oldest)
            oldest = next(iter(self.sizes))

    def close(self) -> None:
        """Waits until all is written."""
        self.jobs.put(None)
        self.thread.join(timeout=60)
