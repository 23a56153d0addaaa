"""A server's memory stays as it is for weeks: what requests leave behind is found soon, and freed pages go back to the system."""

from __future__ import annotations

import ctypes
import gc
import threading
import time

GC_INTERVAL_S = (
    60.0  # seconds between returns: what is taken anew then is cleared once a minute and not at each request
)


def freeze_gc() -> None:
    """Called once the model is loaded. What exists now lives as long as the process: the garbage collector leaves it out.

    Otherwise it waits for garbage to be a quarter of all objects, of which torch and transformers make half a million.
    """
    gc.collect()
    gc.freeze()
    threading.Thread(target=_tidy, name="ktx-memory", daemon=True).start()


def _tidy() -> None:
    """Cancelled streams leave rings of frames, and glibc keeps what is freed (see keep_freed_memory): hole after hole would become resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: 0)  # malloc_trim(3), glibc's alone
    while True:
        time.sleep(GC_INTERVAL_S)
        gc.collect()  # of what came after `settle`: milliseconds
        trim(0)
