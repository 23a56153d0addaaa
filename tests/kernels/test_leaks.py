"""What a call of ours takes it gives back: a server makes millions of them."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

import ktx
from ktx import demo
from ktx.kernels import cpu

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    """struct mallinfo2, see mallinfo(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


@pytest.fixture
def bytes_in_use():
    """What malloc has given out; Python's own small objects are not among it."""
    look = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if look is None:
        pytest.skip("mallinfo2 is glibc's, from 2.33 on")
    look.restype = Mallinfo

    def count():
        gc.collect()
        return look().uordblks

    return count


def left_behind(bytes_in_use, call, times):
    """Bytes a call, at best: other threads allocate too."""
    found = []
    for _ in range(4):
        before = bytes_in_use()
        for _ in range(times):
            call()
        found.append((bytes_in_use() - before) / times)
    return min(found)


def test_a_forward_leaves_nothing_behind(bytes_in_use):
    model, _ = ktx.load(demo.path(), demo.gguf(), progress=False)
    ids = torch.tensor([[20, 21, 22]])
    with torch.inference_mode():
        assert left_behind(bytes_in_use, lambda: model(input_ids=ids, use_cache=False), 100) < 40


@pytest.mark.parametrize("name", ["route", "gated", "tile_dot"])
def test_words_among_arguments_are_freed(bytes_in_use, name):
    tile = torch.zeros(16, 64, dtype=torch.uint8)
    calls = {
        "route": lambda: cpu.ops.route(torch.zeros(1, 8), 2, "softmax"),
        "gated": lambda: cpu.ops.gated(torch.zeros(1, 8), torch.zeros(1, 8), "silu"),
        "tile_dot": lambda: cpu.ops.tile_dot("ssd", tile, tile, tile, True),
    }
    assert left_behind(bytes_in_use, calls[name], 500) < 10
