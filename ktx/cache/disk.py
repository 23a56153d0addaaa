"""Stores pages of the prefix cache on disk, so that a restarted server need not recompute them.

A page is a file named by its hash, which covers all tokens up to its end (ktx.cache.page_pool), in a folder named by
everything that determines its content. Files are safetensors: reading one runs no code, and a file that does not fit is
not used. They contain conversations in a form that can be decoded, so only the owner may read the folder.
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
MAX_PENDING_BYTES = 256 << 20  # bytes of pages that may wait to be written; further pages are not stored
FILE_SUFFIX, PART_SUFFIX = ".safetensors", ".part"
PAGE_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")


class DiskPageStore:
    """A page store on disk: the second level of the prefix cache, which outlives the process.

    The engine's thread calls `put`, `flush` and `fetch`; a thread of the store's own writes the files, so that no step
    waits for the disk.

    Args:
        folder: the folder for page files of all models.
        name: prefix of the model's own folder in it.
        identity: everything that determines a page's content, as JSON.
        cache: the paged cache to copy from and to.
        max_bytes: maximum bytes of the files; beyond it the least recently used page is evicted.
    """

    def __init__(self, folder: str | Path, name: str, identity: Any, cache: PagedCache, max_bytes: int):
        """Opens the model's folder, and starts the thread that writes the files."""
        self.cache, self.max_bytes = cache, max_bytes
        # The folder's name covers what a page's content depends on and the pools' format, so a file in it fits.
        shapes = [[list(buffer.shape[1:]), str(buffer.dtype)] for buffer in self._named_buffers().values()]
        digest = hashlib.sha256(json.dumps([identity, shapes], sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = Path(folder).expanduser() / f"{name}-{digest}"
        self.sizes = self._scan()  # page hash -> bytes of its file, least recently used first
        self.total_bytes = sum(self.sizes.values())
        self._marked: list[tuple[bytes, int]] = []  # pages that this step filled
        self._pending_bytes = 0
        self.lock = threading.Lock()
        self.jobs: queue.SimpleQueue[tuple[bytes, dict[str, torch.Tensor]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._write_all, name="ktx-pages", daemon=True)
        self.thread.start()

    def _scan(self) -> OrderedDict[bytes, int]:
        """Returns hash -> bytes of the pages that earlier processes stored, least recently used first. Creates the
        folder if there is none, and deletes incomplete files. UsageError for a folder that cannot be used.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            files = [(entry.stat(), entry.name) for entry in os.scandir(self.folder) if entry.is_file()]
        except OSError as error:
            raise UsageError(f"prefix_cache_dir {self.folder.parent}: cannot be used: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise UsageError(f"prefix_cache_dir {self.folder.parent}: cannot be written")
        sizes: OrderedDict[bytes, int] = OrderedDict()
        for stat, name in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
            if PAGE_FILE.fullmatch(name):
                sizes[bytes.fromhex(name.removesuffix(FILE_SUFFIX))] = stat.st_size
            elif name.endswith(PART_SUFFIX):  # from a process that was killed
                (self.folder / name).unlink(missing_ok=True)
        return sizes

    def _named_buffers(self) -> dict[str, torch.Tensor]:
        """Returns name -> pool for all attention layers; the names are the keys of a page's file."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, PagedLayer)]
        return {f"{i}.{j}": buffer for i, layer in enumerate(layers) for j, buffer in enumerate(layer.buffers)}

    def _page_path(self, key: bytes) -> Path:
        """Returns the path of a page's file."""
        return self.folder / (key.hex() + FILE_SUFFIX)

    def __len__(self) -> int:
        return len(self.sizes)

    def has(self, key: bytes) -> bool:
        """Whether a page with this hash is stored."""
        return key in self.sizes

    def put(self, key: bytes, page: int) -> None:
        """Marks a full page for `flush`, which copies it after the step has written all of it. An existing file is
        replaced, because it was unusable or could not be loaded.
        """
        self._marked.append((key, page))

    def flush(self) -> None:
        """Passes copies of the marked pages to the thread that writes them."""
        for key, page in self._marked:
            if self._pending_bytes < MAX_PENDING_BYTES:
                tensors = {name: buffer[page].to("cpu", copy=True) for name, buffer in self._named_buffers().items()}
                with self.lock:
                    self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
                self.jobs.put((key, tensors))
        self._marked.clear()

    @torch.inference_mode()
    def fetch(self, key: bytes, page: int) -> bool:
        """Reads a page's content into the pool; False, and the file is removed, when there is no usable one. The caller
        then computes the page.
        """
        file, buffers = self._page_path(key), self._named_buffers()
        try:
            loaded = load_file(file)
            fits = loaded.keys() == buffers.keys() and all(
                loaded[name].shape == buffer.shape[1:] and loaded[name].dtype == buffer.dtype
                for name, buffer in buffers.items()
            )
            if fits:
                os.utime(file)
        except (OSError, SafetensorError) as error:
            log.warning("a stored page cannot be read: %s: %s", file, error)
            fits = False
        if not fits:
            self._drop(key)
            return False
        for name, buffer in buffers.items():
            buffer[page] = loaded[name]
        with self.lock:
            if key in self.sizes:
                self.sizes.move_to_end(key)
        return True

    def _drop(self, key: bytes) -> None:
        """Removes a page's file."""
        with self.lock:
            self.total_bytes -= self.sizes.pop(key, 0)
        self._page_path(key).unlink(missing_ok=True)

    def _write_all(self) -> None:
        """Runs on the writing thread until `close`. A page that cannot be written is logged and skipped."""
        while (job := self.jobs.get()) is not None:
            key, tensors = job
            try:
                self._write(key, tensors)
            except OSError as error:
                log.warning("a page could not be stored: %s: %s", self.folder, error.strerror)
            finally:
                with self.lock:
                    self._pending_bytes -= sum(tensor.nbytes for tensor in tensors.values())

    def _write(self, key: bytes, tensors: dict[str, torch.Tensor]) -> None:
        """Writes a page's file and evicts the least recently used ones beyond the limit. The file gets its name only
        when it is complete, so that no process reads a part of it.
        """
        data, part_file = save(tensors), self.folder / f"{key.hex()}.{os.getpid()}{PART_SUFFIX}"
        try:
            part_file.write_bytes(data)
            part_file.rename(self._page_path(key))
        except OSError:
            part_file.unlink(missing_ok=True)
            raise
        with self.lock:
            self.total_bytes += len(data) - self.sizes.pop(key, 0)
            self.sizes[key] = len(data)
            oldest = next(iter(self.sizes))
        while self.total_bytes > self.max_bytes and oldest != key:
            self._drop(oldest)
            oldest = next(iter(self.sizes))

    def close(self) -> None:
        """Waits until all pages are written."""
        self.jobs.put(None)
        self.thread.join(timeout=60)
