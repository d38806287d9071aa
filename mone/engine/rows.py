"""Where the tokens of all sequences lie as rows of one matrix: a contiguous run of rows for each expert.

Runs begin at multiples of ALIGNMENT, so that a tile of a matrix product never holds rows of two experts, and may be
stored whole. What lies between runs is never read.

Shapes: S sequences, N tokens, R rows, G groups that attend within themselves, M slots of a group, J tiles.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mone.blocks import Neighbours
from mone.nested import Segments

ALIGNMENT = 128


class Run(NamedTuple):
    """Rows [start, stop) of one expert; `count` of each sequence, from its token `token` on."""

    start: int
    stop: int
    width: int
    count: int
    token: int


@functools.lru_cache(maxsize=1024)
def runs_of(segments: Segments, num_sequences: int) -> tuple[Run, ...]:
    """The runs of a batch."""
    runs, start = [], 0
    for segment in segments:
        count = segment.stop - segment.start
        runs.append(Run(start, start + num_sequences * count, segment.width, count, segment.start))
        start = _aligned(runs[-1].stop)
    return tuple(runs)


def num_rows(runs: tuple[Run, ...]) -> int:
    """R, with the gaps."""
    return _aligned(runs[-1].stop)


@functools.lru_cache(maxsize=256)
def table_of(runs: tuple[Run, ...], device: torch.device) -> Tensor:
    """First row, end and width of each run, int32 [E, 3]."""
    with torch.inference_mode(False):
        return torch.tensor([run[:3] for run in runs], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def width_of_token(runs: tuple[Run, ...], device: torch.device) -> Tensor:
    """The width of each token of a sequence, int32 [N]."""
    widths = [run.width for run in runs for _ in range(run.count)]
    with torch.inference_mode(False):
        return torch.tensor(widths, dtype=torch.int32, device=device)


def in_eights(runs: tuple[Run, ...]) -> bool:
    """Whether all widths are multiples of 8: a kernel that knows it moves 16 bytes at a time, else value by value."""
    return all(run.width % 8 == 0 for run in runs)


def row_of_token(runs: tuple[Run, ...], num_sequences: int, device: torch.device) -> Tensor:
    """The row of each token, int64 [S, N]."""
    rows = [torch.arange(run.start, run.stop, device=device).view(num_sequences, run.count) for run in runs]
    return torch.cat(rows, dim=1)


class Places(NamedTuple):
    """Rows that attention reads and writes.

    Attributes:
        read_GM: int64. The row of each slot.
        write_GM: int64. The row that takes the slot's result; negative: none does.
    """

    read_GM: Tensor
    write_GM: Tensor


def places_of(row_SN: Tensor, neighbours: Neighbours | None) -> Places:
    """Rows of the groups: the sequences themselves, or their frames."""
    if neighbours is None:
        return Places(row_SN, row_SN)
    num_slots = neighbours.slot_SFM.shape[-1]
    read_SX = row_SN.gather(1, neighbours.slot_SFM.flatten(1))
    write_SX = torch.full_like(read_SX, -1).scatter(1, neighbours.home_SN, row_SN)
    return Places(read_SX.view(-1, num_slots), write_SX.view(-1, num_slots))


def tiles_of(
    runs: tuple[Run, ...], columns: list[tuple[int, int]], inner: list[int], block_rows: int, block_columns: int
) -> list[tuple[int, int, int]]:
    """Tiles of a grouped product, long ones first, so that processors finish together: (row, column, inner size).

    Tiles that follow each other share rows of the one factor or of the other.

    Args:
        runs: Rows of each expert.
        columns: For each expert the columns [start, stop) that it computes.
        inner: For each expert the features that it sums over.
        block_rows: Rows of a tile, at most ALIGNMENT.
        block_columns: Columns of a tile.
    """
    tiles = []
    by_size = sorted(zip(runs, columns, inner, strict=True), key=lambda group: -group[2])
    for run, (first, last), size in by_size:
        starts = range(run.start, run.stop, block_rows)
        for group in range(0, len(starts), 16):
            for column in range(first, last, block_columns):
                tiles += [(row, column, size) for row in starts[group : group + 16]]
    return tiles


def _aligned(row: int) -> int:
    return -(-row // ALIGNMENT) * ALIGNMENT
