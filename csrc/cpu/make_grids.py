"""Writes grids.cpp: the code books of the IQ types, as 32-bit words of four signed bytes, taken from gguf-py.

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


def words(cls: type) -> np.ndarray:
    cls.init_grid()
    return cls.grid.reshape(-1).astype(np.int8).view(np.uint32)


def main() -> None:
    print('// Made by make_grids.py from gguf-py\'s tables; do not edit.\n#include "grids.h"\n\nnamespace ktx {')
    for name, cls in GRIDS.items():
        values = words(cls)
        rows = (", ".join(f"0x{v:08x}" for v in values[i : i + 12]) for i in range(0, len(values), 12))
        print(f"const uint32_t {name}[{len(values)}] = {{\n    " + ",\n    ".join(rows) + "};")
    signs = [
        i | (bin(i).count("1") & 1) << 7 for i in range(128)
    ]  # the eighth sign makes the number of minus signs even
    print(f"const uint32_t SIGNS[128] = {{{', '.join(map(str, signs))}}};\n}}  // namespace ktx")


if __name__ == "__main__":
    main()
