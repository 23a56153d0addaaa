"""Codebooks of the IQ types as tensors, from gguf-py's grids.

A codebook is int32, one entry of 16 bits per element: the indices of eight weights of two bits each, or of four
weights of four bits each, the first in the lowest bits. An index selects one of the few values that occur in the grid.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

VALUES = {  # codebooks that are plain lists of 16 values, f32
    "IQ4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "MXFP4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}


@lru_cache(maxsize=64)
def make_codebook(name: str, device: torch.device) -> torch.Tensor:
    """Returns a codebook on a device: one of VALUES, f32 [16], or of an IQ type by its name, int32 [entries].

    IQ1_S and IQ1_M share a grid and so the codebook "IQ1".
    """
    if name in VALUES:
        return torch.tensor(VALUES[name], dtype=torch.float32, device=device)
    from gguf import quants

    quant_class = getattr(quants, "IQ1_S" if name == "IQ1" else name)
    quant_class.init_grid()
    grid = quant_class.grid.reshape(quant_class.grid_shape)
    bits = 16 // grid.shape[1]  # of a weight in an entry, which holds its value's index among the grid's few values
    entries = np.searchsorted(np.unique(grid), grid) << (bits * np.arange(grid.shape[1]))
    return torch.from_numpy(entries.sum(1).astype(np.int32)).to(device)
