"""A server's memory stays as it is for weeks: what requests leave behind is found soon, and freed pages go back to the system."""

from __future__ import annotations

import ctypes
import gc
import threading
import time

EVERY = 60.0  # seconds between returns: what is taken anew then is cleared once a minute and not at each request
OLDEST = 3  # collections of the middle generation before one of all


def settle() -> None:
    """Called once the model is loaded. What exists now lives as long as the process: the garbage collector leaves it out.

    Otherwise it waits for garbage to be a quarter of all objects, of which torch and transformers make half a million; and a
    collection of what is left takes milliseconds, so it may come round more often.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, OLDEST)
    threading.Thread(target=_return_pages, name="ktx-memory", daemon=True).start()


def _return_pages() -> None:
    """glibc keeps what is freed (see keep_freed_memory): holes between small objects would become resident one after another."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # malloc_trim(3)
    while trim is not None:
        time.sleep(EVERY)
        trim(0)
