"""Garbage collection and malloc settings that keep a server's memory constant for weeks."""

from __future__ import annotations

import ctypes
import gc
import threading
import time

# The kernel clears memory that is allocated again after a trim, so that happens once a minute and not per request.
GC_INTERVAL_S = 60.0


def freeze_gc() -> None:
    """Excludes all existing objects from garbage collection and collects the rest once a minute; call it after loading.

    The existing objects live as long as the process. With them, a full collection would run only when new objects make
    up a quarter of all objects, of which torch and transformers create half a million.
    """
    gc.collect()
    gc.freeze()
    threading.Thread(target=_gc_loop, name="ktx-memory", daemon=True).start()


def _gc_loop() -> None:
    """Collects garbage and returns freed memory to the system, once a minute.

    Cancelled streams leave reference cycles of frames, and glibc does not return freed memory (see `tune_malloc`), so
    that fragmentation would increase the resident memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)  # malloc_trim(3) exists only in glibc
    while True:
        time.sleep(GC_INTERVAL_S)
        gc.collect()  # objects created after `freeze_gc`: takes milliseconds
        trim(0)
