"""Writes grids.cpp: the code books of the IQ types, an entry in 16 bits, taken from gguf-py.

An entry holds the places of its weights in a short table of values: of eight weights in two bits each, of four in four bits each. They lie
so that shifting the doubled entry by a constant brings one of four to the bottom of each byte (`fields` in formats.inl).

Usage: python csrc/cpu/make_grids.py > csrc/cpu/grids.cpp
"""

from __future__ import annotations

import numpy as np
from gguf import quants

GRIDS = {
    "GRID_IQ2_XXS": quants.IQ2_XXS,
    "GRID_IQ2_XS": quants.IQ2_XS,
    "GRID_IQ2_S": quants.IQ2_S,
    "GRID_IQ3_XXS": quants.IQ3_XXS,
    "GRID_IQ3_S": quants.IQ3_S,
    "GRID_IQ1": quants.IQ1_S,
}


def entries(cls: type) -> tuple[list[int], np.ndarray]:
    """The values that occur, rising, and the entries."""
    cls.init_grid()
    grid = cls.grid.astype(np.int64)
    grid = grid.reshape(-1, grid.shape[-1])
    values = np.unique(grid)
    place = np.arange(grid.shape[-1])
    width = 2 if grid.shape[-1] == 8 else 4
    assert len(values) <= 1 << width
    at = (place >> 2) * 4 + (place >> 1 & 1) * width + (place & 1) * 8
    return values.tolist(), (np.searchsorted(values, grid) << at).sum(-1)


def main() -> None:
    print('// Made by make_grids.py from gguf-py\'s tables; do not edit.\n#include "grids.h"\n\nnamespace ktx {')
    for name, cls in GRIDS.items():
        values, codes = entries(cls)
        rows = (", ".join(f"0x{v:04x}" for v in codes[i : i + 20]) for i in range(0, len(codes), 20))
        print(f"// values: {' '.join(map(str, values))}")
        print(f"alignas(64) const uint16_t {name}[{len(codes)} + 32] = {{\n    " + ",\n    ".join(rows) + "};")
    print("}  // namespace ktx")


if __name__ == "__main__":
    main()
