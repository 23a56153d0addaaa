"""Which program of a GPU attention kernel attends to what: rows to tiles, keys to units, units to programs.

A row is one query head of one token. A tile is some rows of one sequence that share a key/value head: heads of a token, then of the
next. A unit is a tile at one block of keys. The units of all tiles stand in a line of which every program takes an equal piece, so that
long and short sequences, chunks and decodes keep all multiprocessors busy; what several programs made of one tile is merged in order.

`Work` is made for the tokens of each sequence and fixes grids and memory; `plan` computes on the device what depends on their
lengths, without waiting for it. A CUDA graph may hold the plan and all calls that use it, and be replayed for other lengths and pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Tile:
    """How much a program holds: `rows` queries against `keys` keys, `stages` blocks of keys in flight.

    `resident` programs of `warps` warps fit a multiprocessor; one gets at least `least` units, because what it makes has to be merged.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    ctas_per_sm: int = 1
    min_blocks: int = 2


# A multiprocessor of an H100 has 227 KB of shared memory, 64 K registers, and matrix units that take 64 rows at a time (wgmma). Fewer rows
# go to the older 16-row instruction, which is fast enough where memory is the limit.
#
# Latents: a key has 576 columns, so a block of 32 keys is 36 KB, of 64 is 72 KB, and so are 64 queries. Sums of 64 rows by 512 columns in
# f32 are half of all registers: eight warps and one program. 64 rows, 64 keys twice and the shares between the two products are
# 224 KB; nothing is spilled in the inner loop. 16 and 32 rows have room for a third
# block; with more keys than rows, their warps share out the columns of both products.
LATENT = (
    Tile(rows=16, keys=64, warps=8, stages=3),
    Tile(rows=32, keys=64, warps=8, stages=3),
    Tile(rows=64, keys=64, warps=8, stages=2),
)
# Keys and values of at most 128 columns: a block of 64 of both is 32 KB. Programs of 16 rows take 70 KB, of 64 rows 80 KB; 128 rows
# have 128 registers a thread for sums alone.
HEADS = (
    Tile(rows=16, keys=64, warps=4, stages=3, ctas_per_sm=3, min_blocks=4),
    Tile(rows=64, keys=64, warps=4, stages=2, ctas_per_sm=2, min_blocks=4),
    Tile(rows=128, keys=64, warps=8, stages=3, ctas_per_sm=1, min_blocks=8),
)
# Of more columns: twice that.
WIDE_HEADS = (
    Tile(rows=16, keys=32, warps=4, stages=3, ctas_per_sm=2, min_blocks=8),
    Tile(rows=64, keys=32, warps=8, stages=2, ctas_per_sm=1, min_blocks=8),
    Tile(rows=128, keys=32, warps=8, stages=2, ctas_per_sm=1, min_blocks=8),
)

# In f32 a number takes twice the room and no tensor core multiplies it. 16 rows and two blocks of 32 keys of a latent are 184 KB, 64 rows and two
# blocks of 64 keys and values of 128 columns 160 KB.
EXACT = (Tile(rows=16, keys=32, warps=4, stages=2, min_blocks=16),)
EXACT_HEADS = (
    Tile(rows=16, keys=64, warps=4, stages=2, min_blocks=8),
    Tile(rows=64, keys=64, warps=8, stages=2, min_blocks=8),
)


def tiles_for(columns: int, latent: bool, exact: bool = False) -> tuple[Tile, ...]:
    """The tiles for keys of so many columns (the rotated ones that lie apart not counted), fewest rows first; `exact`: of f32."""
    if exact:
        return EXACT if latent or columns > 128 else EXACT_HEADS
    return LATENT if latent else HEADS if columns <= 128 else WIDE_HEADS


@dataclass(frozen=True)
class Shape:
    """What all sequences of a call have in common. A `latent` is key and value at once."""

    heads: int
    kv_heads: int
    key_columns: int
    value_columns: int
    latent: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads")
        if self.latent and (self.kv_heads != 1 or self.key_columns != self.value_columns):
            raise ValueError("a latent is one head whose keys are its values")

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Part:
    """The sequences that one kind of tile serves: `items` int32 [tiles, 2] are a tile's sequence and first row.

    A program is one of `programs` in the line, of `blocks` that share the query heads of a key/value head, `width` each, and of these.
    """

    tile: Tile
    items: torch.Tensor
    blocks: int
    width: int
    programs: int

    @property
    def merges(self) -> int:
        """How many tiles can be shared by several programs at most."""
        return min(len(self.items), self.programs - 1)


@dataclass(frozen=True)
class WorkRange:
    """A part's units shared out. `starts` int32 [tiles + 1]: where each tile's units begin; `programs` int32 [programs, 4]: first unit, the
    one behind the last, first tile, last tile; `merges` int32 [merges, 3]: a tile or -1, and the first and last program that share it.
    """

    part: Part
    starts: torch.Tensor
    programs: torch.Tensor
    merges: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What a kernel call needs to know about its sequences; all layers with the same `shape` and `window` share it."""

    work: AttentionSchedule
    sequences: torch.Tensor
    pages: torch.Tensor
    window: int
    lines: list[WorkRange]


class AttentionSchedule:
    """The tiles of sequences with `counts` new tokens each. `slots` is how many multiprocessors there are (default: those of the device);
    `tiles` replaces the table's. `scratch` is f32 memory of at least `floats` numbers, made if not given; one call at a time uses it.
    """

    def __init__(
        self,
        counts: Sequence[int],
        shape: Shape,
        device: torch.device | str,
        slots: int = 0,
        tiles: Sequence[Tile] = (),
        scratch: torch.Tensor | None = None,
    ):
        if not counts or min(counts) < 0:
            raise ValueError(f"counts of new tokens are {list(counts)}: there must be some, and none negative")
        self.shape, self.device, self.tokens, self.sequences = shape, torch.device(device), sum(counts), len(counts)
        self.num_sms = slots or multiprocessors(self.device)
        self.parts = self._parts(counts, tiles or tiles_for(shape.key_columns, shape.latent))
        if scratch is None:
            scratch = torch.empty(self.floats, dtype=torch.float32, device=self.device)
        if scratch.dtype != torch.float32 or scratch.numel() < self.floats:
            raise ValueError(f"scratch of {scratch.numel()} {scratch.dtype} is too small: {self.floats} f32 are needed")
        self.scratch = scratch

    def _parts(self, counts: Sequence[int], tiles: Sequence[Tile]) -> list[Part]:
        chosen: dict[Tile, list[int]] = {}
        for sequence, count in enumerate(counts):
            rows = count * self.shape.group
            tile = next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
            if count:
                chosen.setdefault(tile, []).append(sequence)
        return [self._part(tile, chosen[tile], counts) for tile in tiles if tile in chosen]

    def _part(self, tile: Tile, sequences: list[int], counts: Sequence[int]) -> Part:
        blocks = math.ceil(self.shape.group / tile.rows)
        width = math.ceil(self.shape.group / blocks)
        items = [(s, row) for s in sequences for row in range(0, counts[s] * width, tile.rows)]
        programs = programs_in_line(blocks * self.shape.kv_heads, self.num_sms * tile.ctas_per_sm)
        return Part(tile, torch.tensor(items, dtype=torch.int32).to(self.device), blocks, width, programs)

    @cached_property
    def floats(self) -> int:
        """Numbers of scratch: a program leaves at most the end of one tile and the beginning of another to be merged."""
        each = [part.tile.rows * part.programs * part.blocks for part in self.parts]
        return 2 * max(each, default=0) * self.shape.kv_heads * (self.shape.value_columns + 1)

    def plan(self, sequences: torch.Tensor, pages: torch.Tensor, window: int = 0) -> Plan:
        """`sequences` [n, 3] (first row, new tokens, keys with these) and `pages` int32 [n, most], both on the device; a sliding
        `window` counts the token itself. New tokens must be those that this was made for: the device cannot be asked.
        """
        if sequences.shape != (self.sequences, 3) or len(pages) != self.sequences:
            raise ValueError(
                f"sequences of the shape {tuple(sequences.shape)} on pages of the shape {tuple(pages.shape)}: this was"
                f" made for {self.sequences} sequences, [{self.sequences}, 3] and [{self.sequences}, most pages]"
            )
        lines = [self._line(part, sequences.long(), window) for part in self.parts]
        return Plan(self, sequences.int().contiguous(), pages, window, lines)

    def _line(self, part: Part, sequences: torch.Tensor, window: int) -> WorkRange:
        units = self._units(part, sequences, window)
        starts = torch.cat([units.new_zeros(1), units.cumsum(0)])
        total = starts[-1]
        each = torch.clamp((total + part.programs - 1) // part.programs, min=part.tile.min_blocks)
        begin = torch.minimum(torch.arange(part.programs, device=self.device) * each, total)
        end = torch.minimum(begin + each, total)
        first = torch.searchsorted(starts, begin, right=True) - 1
        last = torch.where(begin < end, torch.searchsorted(starts, end - 1, right=True) - 1, first - 1)
        programs = torch.stack([begin, end, first, last], 1)
        if part.merges == len(units):
            merged = torch.arange(len(units), device=self.device)
            wanted = (starts[1:] - 1) // each > starts[:-1] // each
        else:  # more tiles than programs: those in which a program but the first begins, once each
            merged = torch.clamp(first[1:], max=len(units) - 1)
            wanted = (begin[:-1] <= starts[merged]) & (starts[merged] < begin[1:]) & (begin[1:] < total)
        shared = torch.stack([starts[merged] // each, (starts[merged + 1] - 1) // each], 1)
        merges = torch.cat([torch.where(wanted, merged, -1)[:, None], shared], 1)
        return WorkRange(part, starts.int(), programs.int(), merges.int())

    def _units(self, part: Part, sequences: torch.Tensor, window: int) -> torch.Tensor:
        """Blocks of keys that each tile looks at, at least one; int64 [tiles]."""
        sequence, row = part.items.long().unbind(1)
        _, count, keys = sequences[sequence].unbind(1)
        first = row // part.width
        last = torch.minimum((row + part.tile.rows - 1) // part.width, count - 1)
        past = keys - count
        begin = torch.clamp(past + first + 1 - window, min=0) if window else torch.zeros_like(past)
        size = part.tile.keys
        return torch.clamp((past + last + size) // size - begin // size, min=1)


def programs_in_line(beside: int, slots: int) -> int:
    """Programs that share the line of units when `beside` others do the same for other heads: as many as run at once, or a few
    times as many if that leaves fewer places empty in the last round.
    """
    least = max(1, slots // beside)
    share = {n: n * beside / (math.ceil(n * beside / slots) * slots) for n in range(least, 4 * least + 1)}
    return next((n for n, used in share.items() if used >= 0.9), max(share, key=lambda n: share[n]))


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 4 elsewhere, where only Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
