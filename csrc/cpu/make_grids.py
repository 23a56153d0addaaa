"""Writes grids.cpp: the code books of the IQ types, an entry in 16 bits, taken from gguf-py.

An entry holds the places of its weights in a short table of values: of eight weights in two bits each, of four in four bits each. They lie
so that shifting the doubled entry by a constant brings one of four to the bottom of each byte (`fields` in formats.inl). Machines that permute bytes take the same entries as two bytes (`halves`), and so does
packing, which spells IQ1's out.

Usage: python csrc/cpu/make_grids.py > csrc/cpu/grids.cpp
"""

from __future__ import annotations

import numpy as np
from gguf import quants

GRIDS = {
    "IQ2_XXS": quants.IQ2_XXS,
    "IQ2_XS": quants.IQ2_XS,
    "IQ2_S": quants.IQ2_S,
    "IQ3_XXS": quants.IQ3_XXS,
    "IQ3_S": quants.IQ3_S,
    "IQ1": quants.IQ1_S,
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


def table(kind: str, name: str, room: int, values: list[int], digits: int) -> str:
    rows = (
        ", ".join(f"0x{v:0{digits}x}" for v in values[i : i + 100 // (digits + 4)])
        for i in range(0, len(values), 100 // (digits + 4))
    )
    return f"alignas(64) const {kind} {name}[{len(values) + room}] = {{\n    " + ",\n    ".join(rows) + "};"


def halves(codes: np.ndarray, eight: bool) -> tuple[list[int], list[int]]:
    """The same entries as two bytes: the first and the second four of eight weights, or the first and the second two of four."""
    places = [codes >> at & (3 if eight else 15) for at in ([0, 8, 2, 10, 4, 12, 6, 14] if eight else [0, 8, 4, 12])]
    half, width = len(places) // 2, 2 if eight else 4
    first, second = (sum(p << (width * i) for i, p in enumerate(part)) for part in (places[:half], places[half:]))
    return first.tolist(), second.tolist()


def main() -> None:
    print('// Made by make_grids.py from gguf-py\'s tables; do not edit.\n#include "grids.h"\n\nnamespace ktx {')
    for name, cls in GRIDS.items():
        values, codes = entries(cls)
        first, second = halves(codes, cls.grid.shape[-1] == 8)
        print(f"// values: {' '.join(map(str, values))}")
        if name != "IQ1":  # packing spells these out
            print(table("uint16_t", f"GRID_{name}", 32, codes.tolist(), 4))
        print(table("uint8_t", f"FIRST_{name}", 0, first, 2))
        print(table("uint8_t", f"SECOND_{name}", 0, second, 2))
    print("}  // namespace ktx")


if __name__ == "__main__":
    main()
