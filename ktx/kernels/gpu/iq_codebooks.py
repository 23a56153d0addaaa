"""Code books of the IQ types as tensors, made of gguf-py's grids.

A book is int32 with an entry of 16 bits a word: eight weights in two bits each or four in four bits each, the first lowest, which name places
in the short list of values that occur.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

VALUES = {  # books that are plain lists of 16 values, f32
    "IQ4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "MXFP4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}


@lru_cache(maxsize=64)
def book(name: str, device: torch.device) -> torch.Tensor:
    """A code book on a device."""
    if name in VALUES:
        return torch.tensor(VALUES[name], dtype=torch.float32, device=device)
    from gguf import quants

    grid_of = getattr(quants, "IQ1_S" if name == "IQ1" else name)
    grid_of.init_grid()
    grid = grid_of.grid.reshape(grid_of.grid_shape)
    width = 16 // grid.shape[1]
    places = np.searchsorted(np.unique(grid), grid) << (width * np.arange(grid.shape[1]))
    return torch.from_numpy(places.sum(1).astype(np.int32)).to(device)
