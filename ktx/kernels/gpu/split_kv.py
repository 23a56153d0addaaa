"""Split-KV scheduling: which program of a GPU attention kernel computes which rows and keys.

A row is one query head of one token. A tile is some rows of one sequence that share a key/value head: the heads of a
token, then those of the next token. A work unit is a tile and one block of keys. The work units of all tiles form a
sequence, of which every program computes an equal range, so that long and short sequences, prefill chunks and decode
steps keep all multiprocessors busy. Where several programs compute parts of one tile, reduce_splits.py merges the
parts in order.

`AttentionSchedule` is created for the number of tokens of each sequence and determines grids and memory. `plan`
computes on the device what depends on the sequences' lengths, without synchronization. A CUDA graph can capture the
plan and all calls that use it, and be replayed for other lengths and pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Tile:
    """A kind of tile, and the resources of a program that computes it; values were chosen for an H100.

    Attributes:
        rows: number of rows.
        keys: number of keys of a block.
        warps: number of warps of a program.
        stages: number of key blocks in flight.
        ctas_per_sm: number of programs that fit on a multiprocessor at once.
        min_blocks: smallest number of work units of a program, because its results have to be merged.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    ctas_per_sm: int = 1
    min_blocks: int = 2


# A multiprocessor of an H100 has 227 KB of shared memory, 64 K registers, and tensor cores that take 64 rows at a time
# (wgmma). Tiles with fewer rows use the older 16-row instruction, which is fast enough where memory bandwidth is the
# limit.
#
# Latents: a key has 576 columns, so a block of 32 keys takes 36 KB, a block of 64 keys 72 KB, and so do 64 queries. The
# sums of 64 rows by 512 columns in f32 take half of all registers: eight warps and one program. 64 rows, two blocks of
# 64 keys and the probabilities between the two products take 224 KB; the inner loop spills no registers. With 16 and 32
# rows a third block fits; as there are more keys than rows, the warps divide the columns of both products.
LATENT_TILES = (
    Tile(rows=16, keys=64, warps=8, stages=3),
    Tile(rows=32, keys=64, warps=8, stages=3),
    Tile(rows=64, keys=64, warps=8, stages=2),
)
# Keys and values of at most 128 columns: a block of 64 of both takes 32 KB. Programs of 16 rows take 70 KB, of 64 rows
# 80 KB; 128 rows need 128 registers a thread for the sums alone.
HEAD_TILES = (
    Tile(rows=16, keys=64, warps=4, stages=3, ctas_per_sm=3, min_blocks=4),
    Tile(rows=64, keys=64, warps=4, stages=2, ctas_per_sm=2, min_blocks=4),
    Tile(rows=128, keys=64, warps=8, stages=3, ctas_per_sm=1, min_blocks=8),
)
# Keys and values of more columns: twice that.
WIDE_HEAD_TILES = (
    Tile(rows=16, keys=32, warps=4, stages=3, ctas_per_sm=2, min_blocks=8),
    Tile(rows=64, keys=32, warps=8, stages=2, ctas_per_sm=1, min_blocks=8),
    Tile(rows=128, keys=32, warps=8, stages=2, ctas_per_sm=1, min_blocks=8),
)

# An f32 value takes twice the memory and no tensor core multiplies it. 16 rows and two blocks of 32 keys of a latent
# take 184 KB, 64 rows and two blocks of 64 keys and values of 128 columns 160 KB.
F32_LATENT_TILES = (Tile(rows=16, keys=32, warps=4, stages=2, min_blocks=16),)
F32_HEAD_TILES = (
    Tile(rows=16, keys=64, warps=4, stages=2, min_blocks=8),
    Tile(rows=64, keys=64, warps=8, stages=2, min_blocks=8),
)


MIN_UTILIZATION = 0.9  # fraction of the slots of all waves that is good enough, see `num_programs_per_range`


def tiles_for(columns: int, latent: bool, f32: bool = False) -> tuple[Tile, ...]:
    """Returns the kinds of tiles that suit keys of a number of columns, by rising number of rows.

    `AttentionSchedule` assigns each sequence one of them.

    Args:
        columns: columns of a key, without separately stored rotated columns.
        latent: whether a latent is both key and value.
        f32: whether queries are f32.
    """
    if f32:
        return F32_LATENT_TILES if latent or columns > 128 else F32_HEAD_TILES
    return LATENT_TILES if latent else HEAD_TILES if columns <= 128 else WIDE_HEAD_TILES


@dataclass(frozen=True)
class AttentionShape:
    """Heads and columns, which are equal for all sequences of a call.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key/value heads.
        key_columns: columns of a key.
        value_columns: columns of a value.
        latent: whether a latent is both key and value.

    Raises:
        ValueError: if the numbers do not fit together.
    """

    heads: int
    kv_heads: int
    key_columns: int
    value_columns: int
    latent: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads")
        if self.latent and (self.kv_heads != 1 or self.key_columns != self.value_columns):
            raise ValueError("a latent needs one key/value head whose keys are its values")

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class TileGroup:
    """The sequences that are computed with one kind of tile.

    The query heads of a key/value head are divided among `head_chunks` programs, of `heads_per_chunk` heads each.

    Attributes:
        tile: the kind of tile.
        tile_starts: int32 [tiles, 2], sequence and first row of each tile.
        head_chunks: number of chunks of query heads.
        heads_per_chunk: query heads of a chunk.
        programs: number of programs that divide the work units.
    """

    tile: Tile
    tile_starts: torch.Tensor
    head_chunks: int
    heads_per_chunk: int
    programs: int

    @property
    def max_merges(self) -> int:
        """The largest number of tiles that several programs can share."""
        return min(len(self.tile_starts), self.programs - 1)


@dataclass(frozen=True)
class WorkRange:
    """The work units of a group, divided among programs.

    Attributes:
        group: the tiles.
        starts: int32 [tiles + 1], the first work unit of each tile.
        programs: int32 [programs, 4], first work unit, end, first tile and last tile of each program.
        merges: int32 [merges, 3], a tile or -1, and the first and last program that share it.
    """

    group: TileGroup
    starts: torch.Tensor
    programs: torch.Tensor
    merges: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """The sequences of a kernel call; all layers with the same `shape` and `window` share it.

    Attributes:
        schedule: the schedule that created the plan.
        sequences: int32 [n, 3], first row, new tokens, and keys including those.
        pages: int32 [n, max pages], the pages of each sequence.
        window: size of the sliding window, 0 for none.
        ranges: the work of each group of tiles.
    """

    schedule: AttentionSchedule
    sequences: torch.Tensor
    pages: torch.Tensor
    window: int
    ranges: list[WorkRange]


class AttentionSchedule:
    """Tiles, grids and scratch memory for sequences with given numbers of new tokens.

    It holds all that does not depend on the lengths of sequences, so that one schedule serves every step with the same
    numbers of new tokens, and a CUDA graph can capture it.

    Args:
        counts: number of new tokens of each sequence.
        shape: heads and columns.
        device: the GPU.
        num_sms: number of multiprocessors; 0 for those of the device.
        tiles: kinds of tiles, in place of those of `tiles_for`.
        scratch: f32 memory of at least `scratch_floats` elements, which one call at a time uses; allocated by default.

    Raises:
        ValueError: if there are no sequences, a count is negative, or the scratch memory is too small.
    """

    def __init__(
        self,
        counts: Sequence[int],
        shape: AttentionShape,
        device: torch.device | str,
        num_sms: int = 0,
        tiles: Sequence[Tile] = (),
        scratch: torch.Tensor | None = None,
    ):
        """Divides the sequences into tiles and allocates the scratch memory; see the class for the arguments."""
        if not counts or min(counts) < 0:
            raise ValueError(f"counts of new tokens are {list(counts)}: there must be at least one, and none negative")
        self.shape, self.device = shape, torch.device(device)
        self.num_tokens, self.num_sequences = sum(counts), len(counts)
        self.num_sms = num_sms or num_multiprocessors(self.device)
        self.groups = self._plan_groups(counts, tiles or tiles_for(shape.key_columns, shape.latent))
        if scratch is None:
            scratch = torch.empty(self.scratch_floats, dtype=torch.float32, device=self.device)
        if scratch.dtype != torch.float32 or scratch.numel() < self.scratch_floats:
            raise ValueError(
                f"scratch of {scratch.numel()} {scratch.dtype} is too small: {self.scratch_floats} float32 are needed"
            )
        self.scratch = scratch

    def _plan_groups(self, counts: Sequence[int], tiles: Sequence[Tile]) -> list[TileGroup]:
        """Assigns each sequence the smallest kind of tile that holds its rows, or the largest kind.

        Small tiles waste no tensor-core rows on decode steps, large tiles load a key block once for many rows.
        """
        sequences_by_tile: dict[Tile, list[int]] = {}
        for sequence, count in enumerate(counts):
            rows = count * self.shape.heads_per_kv_head
            tile = next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
            if count:
                sequences_by_tile.setdefault(tile, []).append(sequence)
        return [self._plan_tiles(tile, sequences_by_tile[tile], counts) for tile in tiles if tile in sequences_by_tile]

    def _plan_tiles(self, tile: Tile, sequences: list[int], counts: Sequence[int]) -> TileGroup:
        """Divides the rows of sequences into tiles of one kind, and chooses the number of programs.

        The query heads of a key/value head form one chunk if they fit in a tile, otherwise several of equal size. The
        rows of a sequence are its tokens times the heads of a chunk.
        """
        head_chunks = math.ceil(self.shape.heads_per_kv_head / tile.rows)
        heads_per_chunk = math.ceil(self.shape.heads_per_kv_head / head_chunks)
        tile_starts = [
            (sequence, row) for sequence in sequences for row in range(0, counts[sequence] * heads_per_chunk, tile.rows)
        ]
        programs = num_programs_per_range(head_chunks * self.shape.kv_heads, self.num_sms * tile.ctas_per_sm)
        return TileGroup(
            tile, torch.tensor(tile_starts, dtype=torch.int32).to(self.device), head_chunks, heads_per_chunk, programs
        )

    @cached_property
    def scratch_floats(self) -> int:
        """Number of f32 elements of scratch memory.

        A program leaves at most the end of one tile and the beginning of another to be merged. For each row of these
        two it stores the values and one logarithm.
        """
        rows_per_group = [group.tile.rows * group.programs * group.head_chunks for group in self.groups]
        return 2 * max(rows_per_group, default=0) * self.shape.kv_heads * (self.shape.value_columns + 1)

    def plan(self, sequences: torch.Tensor, pages: torch.Tensor, window: int = 0) -> Plan:
        """Divides the keys of an attention call among the programs of the kernel, on the device.

        The plan serves all layers of a forward with this shape and window. It needs no synchronization, so that a CUDA
        graph can capture it.

        Args:
            sequences: int [n, 3] on the device: first row, new tokens, and keys including those. The numbers of new
                tokens must be those of the schedule; they are not checked because that would synchronize.
            pages: int32 [n, max pages] on the device.
            window: size of a sliding window, which includes the token itself; 0 for none.

        Raises:
            ValueError: if there are other numbers of sequences than in the schedule.
        """
        if sequences.shape != (self.num_sequences, 3) or len(pages) != self.num_sequences:
            raise ValueError(
                f"sequences of shape {tuple(sequences.shape)} on pages of shape {tuple(pages.shape)}: the schedule was"
                f" made for {self.num_sequences} sequences, [{self.num_sequences}, 3] and"
                f" [{self.num_sequences}, max pages]"
            )
        ranges = [self._work_range(group, sequences.long(), window) for group in self.groups]
        return Plan(self, sequences.int().contiguous(), pages, window, ranges)

    def _work_range(self, group: TileGroup, sequences: torch.Tensor, window: int) -> WorkRange:
        """Divides the work units of a group (a tile and a block of keys each) among its programs.

        It also lists the tiles that several programs compute a part of, because reduce_splits.py has to merge these.

        All tensors keep their shapes when lengths change, so that a CUDA graph can capture this. Therefore `merges`
        has one entry for every tile that could be shared, with tile -1 where it is not.
        """
        num_key_blocks = self._num_key_blocks(group, sequences, window)
        starts = torch.cat([num_key_blocks.new_zeros(1), num_key_blocks.cumsum(0)])
        total = starts[-1]
        units_per_program = torch.clamp((total + group.programs - 1) // group.programs, min=group.tile.min_blocks)
        # Of each program: first work unit, end, and first and last tile. Programs without work have last < first.
        start = torch.minimum(torch.arange(group.programs, device=self.device) * units_per_program, total)
        end = torch.minimum(start + units_per_program, total)
        first = torch.searchsorted(starts, start, right=True) - 1
        last = torch.where(start < end, torch.searchsorted(starts, end - 1, right=True) - 1, first - 1)
        programs = torch.stack([start, end, first, last], 1)
        # A tile has to be merged if its first and its last work unit belong to different programs.
        if group.max_merges == len(num_key_blocks):
            tiles = torch.arange(len(num_key_blocks), device=self.device)
            is_shared = (starts[1:] - 1) // units_per_program > starts[:-1] // units_per_program
        else:  # more tiles than programs: the tiles in which a program other than the first starts, once each
            tiles = torch.clamp(first[1:], max=len(num_key_blocks) - 1)
            is_shared = (start[:-1] <= starts[tiles]) & (starts[tiles] < start[1:]) & (start[1:] < total)
        program_range = torch.stack(
            [starts[tiles] // units_per_program, (starts[tiles + 1] - 1) // units_per_program], 1
        )
        merges = torch.cat([torch.where(is_shared, tiles, -1)[:, None], program_range], 1)
        return WorkRange(group, starts.int(), programs.int(), merges.int())

    def _num_key_blocks(self, group: TileGroup, sequences: torch.Tensor, window: int) -> torch.Tensor:
        """Returns the number of key blocks of each tile, at least one; int64 [tiles].

        A tile has the blocks from the first key that its first token sees (0 without a window) to the last key that
        its last token sees. A tile without keys has one block too, because a program has to write its rows. Rows are
        ordered by token, `heads_per_chunk` rows each. The counts are the work units that `plan` divides evenly among
        programs.
        """
        sequence, row = group.tile_starts.long().unbind(1)
        _, count, keys = sequences[sequence].unbind(1)
        first_token = row // group.heads_per_chunk
        last_token = torch.minimum((row + group.tile.rows - 1) // group.heads_per_chunk, count - 1)
        past = keys - count
        first_key = torch.clamp(past + first_token + 1 - window, min=0) if window else torch.zeros_like(past)
        block_size = group.tile.keys
        return torch.clamp((past + last_token + block_size) // block_size - first_key // block_size, min=1)


def num_programs_per_range(num_ranges: int, num_slots: int) -> int:
    """Returns the number of programs that divide the work units, if `num_ranges` such divisions run at once.

    There is one division per key/value head and chunk of query heads. The `num_slots` programs that the GPU runs at
    once form a wave. The number is as many programs as fit in one wave, or up to four times as many if the last wave
    is fuller then: the smallest number that uses MIN_UTILIZATION of the slots, else the one that uses most.
    """
    min_programs = max(1, num_slots // num_ranges)
    utilization = {
        programs: programs * num_ranges / (math.ceil(programs * num_ranges / num_slots) * num_slots)
        for programs in range(min_programs, 4 * min_programs + 1)
    }
    return next(
        (programs for programs, ratio in utilization.items() if ratio >= MIN_UTILIZATION),
        max(utilization, key=lambda programs: utilization[programs]),
    )


def num_multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; 4 for other devices, where only Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
