"""Ragged per-sensor sequences cut into dense (B, T) blocks; never across a reset.

steps   a0 b0 a1 c0 a2 b1        sensors a, b, c interleaved, each in its own time order
block   a0 a1 a2                 sensors of similar length side by side, padded on the right
        b0 b1 --
block   c0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.forecaster import StepBlock

STEP_BUCKETS = (1, 8, 24, 64)
"""Sensors whose numbers of steps fall into one bucket share a block; compiled forecasters pad to the same sizes."""


@dataclass(frozen=True, slots=True)
class Block:
    """Up to T consecutive steps of each of B sensors; a sensor is in a block once."""

    sensors: NDArray[np.int32]
    """(B,)"""
    index: NDArray[np.int64]
    """(B, T) position in the m steps that the block was cut from; 0 in padding."""
    live: NDArray[np.bool_]
    """(B, T) False = padding, always on the right."""
    reset: NDArray[np.bool_]
    """(B,) True = refill the sensor's row before its first step."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.shape[0], self.index.shape[1]

    def pick(self, column: NDArray[Any]) -> NDArray[Any]:
        """(m, ...) -> (B, T, ...); padding holds whatever step 0 holds."""
        return column[self.index]

    def shifted(self, places: int) -> Block:
        """Of steps that are a stretch of others, and begin so many places later there."""
        return replace(self, index=self.index + places) if places else self

    def positions(self) -> NDArray[np.int64]:
        """Positions of the live steps, in the order in which `output[block.live]` lists them."""
        return self.index[self.live]

    def step_block(self, values: NDArray[np.float64], end_ms: NDArray[np.int64]) -> StepBlock:
        """What a forecaster is handed. values: (m, C) float64; end_ms: (m,) int64."""
        return StepBlock(self.pick(values), self.pick(end_ms), self.live)


def iter_blocks(
    sensor: NDArray[np.int32],
    reset: NDArray[np.bool_],
    *,
    max_steps: int = 64,
    max_rows: int = 4096,
    max_cells: int = 32768,
    buckets: Sequence[int] = STEP_BUCKETS,
) -> Iterator[Block]:
    """Cut m steps into blocks of at most `max_steps` steps, `max_rows` sensors and `max_cells` steps in all.

    sensor: (m,) slot of each step; a sensor's own steps are in time order, sensors may interleave. reset: (m,).
    Guarantees: every step is in exactly one block; the blocks of one sensor come in time order; a reset is only ever at
    a block's first step. No Python runs per sensor, only per block.
    """
    if not len(sensor):
        return
    if _all_distinct(sensor):
        room = min(max_rows, max_cells)
        for first in range(0, len(sensor), room):
            rows = np.arange(first, min(first + room, len(sensor)))
            yield Block(sensor[rows], rows[:, None], np.ones((len(rows), 1), np.bool_), reset[rows])
        return
    order = np.argsort(sensor, kind="stable")
    start, length, rank = _pieces(sensor[order], reset[order], max_steps)
    sizes = np.unique(np.minimum([*buckets, max_steps], max_steps))
    bucket = np.searchsorted(sizes, length)
    pieces = np.lexsort((length, bucket, rank))
    group = rank[pieces] * len(sizes) + bucket[pieces]
    edges = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        room = min(max_rows, max(1, max_cells // int(sizes[bucket[pieces[begin]]])))
        for at in range(begin, end, room):
            chosen = pieces[at : min(at + room, end)]
            yield _block(sensor, reset, order, start[chosen], length[chosen])


def _all_distinct(sensor: NDArray[np.int32]) -> bool:
    ordered = np.sort(sensor)
    return not bool((ordered[1:] == ordered[:-1]).any())


def _pieces(
    sensor: NDArray[np.int32], reset: NDArray[np.bool_], max_steps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of steps sorted by sensor: where each piece starts, its length, and how many pieces of its sensor come before
    it."""
    position = np.arange(len(sensor))
    new_sensor = np.append(True, sensor[1:] != sensor[:-1])
    since = position - np.maximum.accumulate(np.where(new_sensor | reset, position, 0))
    start = np.flatnonzero(since % max_steps == 0)
    ordinal = np.arange(len(start))
    rank = ordinal - np.maximum.accumulate(np.where(new_sensor[start], ordinal, 0))
    return start, np.diff(start, append=len(sensor)), rank


def _block(
    sensor: NDArray[np.int32],
    reset: NDArray[np.bool_],
    order: NDArray[np.int64],
    start: NDArray[np.int64],
    length: NDArray[np.int64],
) -> Block:
    step = np.arange(int(length.max()))
    live = step < length[:, None]
    index = order[np.where(live, start[:, None] + step, start[:, None])]
    first = index[:, 0].copy()
    index[~live] = 0
    return Block(sensor[first], index, live, reset[first])
