"""The closing rule: readings in log order -> closed windows.

Event-time windows on a grid of hops, each `[start ---- end)`:

    event time   0      60_000     120_000    180_000
    tumbling     [--- 0 ---)[--- 1 ---)[--- 2 ---)            hop_ms = size_ms = 60_000
    hopping      [--- 0 -------------)                        size_ms = 120_000, hop_ms = 60_000
                            [--- 1 ------------)

Rules (Kafka Streams' TimeWindows; KIP-328 for grace):
1. Stream time is the greatest event time seen so far in the partition, in log order.
2. A window closes when stream time reaches its end + grace_ms.
3. A reading counts in each of its windows that is open. It is late if all of them are closed.
4. A sensor is active from its first closed window on. When a window closes in which an active sensor had no reading, that sensor
   makes a gap step; after `max_gap_steps` of them in a row it falls silent.
5. The first window with readings after a silence carries `reset`: what was remembered no longer fits.

Whatever batches the log is cut into, the same steps leave in the same order, bit for bit: sums are carried in float64 and added in
log order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column
from pipeline.stream.columns import Bool, Int64, Readings, Steps
from pipeline.stream.state import SensorTable, Slots

NEVER: Final = -(2**62)
"""No window and no time: exact in float64, far below any epoch millisecond."""

STREAM_TIME: Final = "window.stream_time_ms"

_Accumulators = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class WindowRule:
    """How readings are gathered. size_ms is a multiple of hop_ms; fields and aggregates in the order of a step's channels."""

    size_ms: int
    hop_ms: int
    grace_ms: int
    fields: tuple[str, ...]
    aggregates: tuple[str, ...] = ("mean",)
    max_gap_steps: int = 24

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(f"{field}.{aggregate}" for field in self.fields for aggregate in self.aggregates)

    @property
    def overlap(self) -> int:
        """Windows that one reading belongs to."""
        return self.size_ms // self.hop_ms

    @property
    def open_windows(self) -> int:
        """Most windows that can be open at a time."""
        return -(-(self.size_ms + self.grace_ms) // self.hop_ms)

    def end_ms(self, window: Int64) -> Int64:
        return window * self.hop_ms + self.size_ms

    def closed_through(self, stream_time_ms: NDArray[Any] | int) -> Any:
        """Index of the newest window that is closed at this stream time."""
        return (stream_time_ms - self.size_ms - self.grace_ms) // self.hop_ms

    def closes_at_ms(self, window: Int64) -> Int64:
        """Stream time at which the window closes."""
        return self.end_ms(window) + self.grace_ms


class WindowOperator:
    """Keeps the open windows of every sensor in the table's columns `window.*`; owns no memory itself."""

    def __init__(self, rule: WindowRule) -> None:
        self.rule = rule
        self._cells = _cells(rule)

    def columns(self) -> tuple[Column, ...]:
        """Per sensor: a ring of `open_windows` accumulators, addressed by window index modulo its length."""
        ring = self.rule.open_windows
        int64 = np.dtype(np.int64)
        return (
            Column("window.index", (ring,), int64, fill=NEVER, survives_reset=True),
            Column("window.newest", (), int64, fill=NEVER, survives_reset=True),
            Column("window.emitted", (), int64, fill=NEVER, survives_reset=True),
            *(
                Column(f"window.{cell.name}", (ring, *cell.shape), cell.dtype, fill=cell.fill, survives_reset=True)
                for cell in self._cells
            ),
        )

    def partition_columns(self) -> tuple[Column, ...]:
        return (Column(STREAM_TIME, (), np.dtype(np.int64), fill=NEVER),)

    def advance(self, slots: Slots, readings: Readings, table: SensorTable) -> tuple[Steps, Int64]:
        """Take in n readings of one partition, in log order.

        slots: (n) the reading's row in the table. Returns the steps that closed, ordered by (window, slot), and the rows of `readings`
        that were late. Updates the table.
        """
        rule = self.rule
        if len(readings) == 0:
            return self._no_steps(), np.empty(0, np.int64)
        before = int(table.partition[STREAM_TIME])
        stream_time = np.maximum.accumulate(np.maximum(readings.event_time_ms, before))
        after = int(stream_time[-1])
        table.partition[STREAM_TIME][...] = after

        row, window, late = self._assign(readings, stream_time)
        groups = self._accumulate(slots[row], window, row, readings, table)
        closed = int(rule.closed_through(after))
        if before != NEVER and closed == int(rule.closed_through(before)):
            self._keep_open(groups, np.ones(len(groups.slot), np.bool_), table)
            return self._no_steps(), late
        closing = groups.window <= closed
        data = _concatenate(groups.take(closing), self._take_closed(table, closed))
        self._keep_open(groups, ~closing, table)
        steps = self._steps(data, closed, table)
        cause = np.searchsorted(stream_time, rule.closes_at_ms(steps.window), side="left")
        steps.offset[:] = readings.offsets[cause]
        return steps, late

    def newest_open(self, table: SensorTable) -> int:
        """Index of the newest window that holds readings and is still open; NEVER where there is none."""
        index = table["window.index"]
        return int(index.max()) if index.size else NEVER

    def close_at(self, stream_time_ms: int, table: SensorTable) -> Steps:
        """The steps that would close if stream time moved on without a reading. Updates the table; `offset` is 0."""
        table.partition[STREAM_TIME][...] = stream_time_ms
        closed = int(self.rule.closed_through(stream_time_ms))
        return self._steps(self._take_closed(table, closed), closed, table)

    def _assign(self, readings: Readings, stream_time: Int64) -> tuple[Int64, Int64, Int64]:
        """(row, window) pairs for every open window of every reading, in log order; rows late for all of theirs."""
        newest = readings.event_time_ms // self.rule.hop_ms
        closed = self.rule.closed_through(stream_time)
        if self.rule.overlap == 1:
            is_open = newest > closed
            return np.flatnonzero(is_open), newest[is_open], np.flatnonzero(~is_open)
        window = newest[:, None] - np.arange(self.rule.overlap)
        open_pairs = window > closed[:, None]
        row = np.nonzero(open_pairs)[0]
        return row, window[open_pairs], np.flatnonzero(~open_pairs.any(axis=1))

    def _accumulate(self, slot: Slots, window: Int64, row: Int64, readings: Readings, table: SensorTable) -> _Groups:
        """One accumulator for each (slot, window) of the batch, continued from the table where the window was open already."""
        unique_slot, unique_window, group = _group(slot, window, len(table))
        position = unique_window % self.rule.open_windows
        carried = table["window.index"][unique_slot, position] == unique_window
        cells: _Accumulators = {}
        for cell in self._cells:
            start = np.full((len(unique_slot), *cell.shape), cell.fill, cell.dtype)
            start[carried] = table[f"window.{cell.name}"][unique_slot[carried], position[carried]]
            cells[cell.name] = start
        self._clear(table, unique_slot[carried], position[carried])
        _add(cells, group, readings.values[row], readings.event_time_ms[row])
        return _Groups(unique_slot, unique_window, cells)

    def _keep_open(self, groups: _Groups, keep: Bool, table: SensorTable) -> None:
        slot, position = groups.slot[keep], groups.window[keep] % self.rule.open_windows
        table["window.index"][slot, position] = groups.window[keep]
        for name, values in groups.cells.items():
            table[f"window.{name}"][slot, position] = values[keep]

    def _take_closed(self, table: SensorTable, closed: int) -> _Groups:
        """Windows that no reading of this batch touched and that stream time has closed; they leave the table."""
        index = table["window.index"]
        slot, position = np.nonzero((index != NEVER) & (index <= closed))
        window = index[slot, position]
        cells = {cell.name: table[f"window.{cell.name}"][slot, position] for cell in self._cells}
        self._clear(table, slot, position)
        return _Groups(slot.astype(np.int32), window, cells)

    def _clear(self, table: SensorTable, slot: Slots | Int64, position: Int64) -> None:
        """Empty these places of the ring: what a row holds is a function of the log, down to its last byte."""
        table["window.index"][slot, position] = NEVER
        for cell in self._cells:
            table[f"window.{cell.name}"][slot, position] = cell.fill

    def _steps(self, data: _Groups, closed: int, table: SensorTable) -> Steps:
        """Closed windows with readings, plus the gap steps around them, in order."""
        limit = self.rule.max_gap_steps
        data = data.take(np.lexsort((data.window, data.slot)))
        first = np.r_[True, data.slot[1:] != data.slot[:-1]] if len(data.slot) else np.empty(0, np.bool_)
        newest = table["window.newest"]
        previous = np.where(first, newest[data.slot], np.r_[NEVER, data.window[:-1]][: len(data.window)])
        known = previous != NEVER
        reset = known & (data.window - previous - 1 > limit)

        last = np.r_[~first[1:], False] if len(first) else first
        last = ~last
        emitted = table["window.emitted"]
        # Gaps before each window with readings, then the gap that is still running behind each sensor's newest one.
        before_start = np.maximum(previous, emitted[data.slot]) + 1
        before_stop = np.minimum(data.window - 1, previous + limit)
        newest[data.slot[last]] = data.window[last]
        running = np.flatnonzero((newest != NEVER) & (newest < closed))
        after_start = np.maximum(newest[running], emitted[running]) + 1
        after_stop = np.minimum(closed, newest[running] + limit)
        gap_slot, gap_window = _ranges(
            np.concatenate([data.slot[known], running.astype(np.int32)]),
            np.concatenate([before_start[known], after_start]),
            np.concatenate([before_stop[known], after_stop]),
        )
        emitted[:] = np.maximum(emitted, newest)
        emitted[running] = np.maximum(emitted[running], after_stop)
        return self._ordered(data, reset, gap_slot, gap_window)

    def _ordered(self, data: _Groups, reset: Bool, gap_slot: Slots, gap_window: Int64) -> Steps:
        gaps = len(gap_slot)
        slot = np.concatenate([data.slot, gap_slot])
        window = np.concatenate([data.window, gap_window])
        values = np.concatenate([self._values(data.cells), self._gap_values(gaps)])
        count = np.concatenate([data.cells["count"], np.zeros(gaps, np.int32)])
        order = np.lexsort((slot, window))
        return Steps(
            slot=slot[order],
            window=window[order],
            end_ms=self.rule.end_ms(window[order]),
            values=values[order],
            count=count[order],
            reset=np.concatenate([reset, np.zeros(gaps, np.bool_)])[order],
            offset=np.zeros(len(order), np.int64),
        )

    def _values(self, cells: _Accumulators) -> NDArray[np.float64]:
        """(m, C) channels from accumulators."""
        seen = cells["seen"]
        out = np.empty((len(seen), len(self.rule.fields), len(self.rule.aggregates)))
        for a, aggregate in enumerate(self.rule.aggregates):
            if aggregate == "count":
                out[:, :, a] = seen
            elif aggregate == "mean":
                with np.errstate(invalid="ignore"):
                    out[:, :, a] = cells["sum"] / np.where(seen > 0, seen, np.nan)
            else:
                out[:, :, a] = np.where(seen > 0, cells[aggregate], np.nan)
        return out.reshape(len(seen), len(self.rule.channels))

    def _gap_values(self, gaps: int) -> NDArray[np.float64]:
        row = [0.0 if aggregate == "count" else np.nan for _ in self.rule.fields for aggregate in self.rule.aggregates]
        return np.tile(np.array(row), (gaps, 1))

    def _no_steps(self) -> Steps:
        none = np.empty(0, np.int64)
        nothing = np.empty(0, np.int32)
        values = np.empty((0, len(self.rule.channels)))
        return Steps(nothing, none, none, values, nothing, np.empty(0, np.bool_), none)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One accumulator of an open window."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float


@dataclass(frozen=True, slots=True)
class _Groups:
    """g windows with readings: (g) slot, (g) window, accumulators (g, ...)."""

    slot: Slots
    window: Int64
    cells: _Accumulators

    def take(self, rows: NDArray[Any]) -> _Groups:
        return _Groups(self.slot[rows], self.window[rows], {name: cell[rows] for name, cell in self.cells.items()})


def _cells(rule: WindowRule) -> tuple[_Cell, ...]:
    """The accumulators that the aggregates need; a window without values in a field has seen 0."""
    per_field = (len(rule.fields),)
    float64, int32, int64 = np.dtype(np.float64), np.dtype(np.int32), np.dtype(np.int64)
    cells = [_Cell("count", (), int32, 0), _Cell("seen", per_field, int32, 0)]
    if {"mean", "sum"} & set(rule.aggregates):
        cells.append(_Cell("sum", per_field, float64, 0.0))
    if "min" in rule.aggregates:
        cells.append(_Cell("min", per_field, float64, np.inf))
    if "max" in rule.aggregates:
        cells.append(_Cell("max", per_field, float64, -np.inf))
    if "last" in rule.aggregates:
        cells += [_Cell("last", per_field, float64, np.nan), _Cell("last_ms", per_field, int64, NEVER)]
    return tuple(cells)


def _add(cells: _Accumulators, group: Int64, values: NDArray[np.float64], event_time_ms: Int64) -> None:
    """Add (n, F) readings to their groups, one after the other in log order (`ufunc.at` is sequential)."""
    np.add.at(cells["count"], group, np.int32(1))
    for f in range(values.shape[1]):
        present = np.flatnonzero(~np.isnan(values[:, f]))
        everything = len(present) == len(values)
        into = group if everything else group[present]
        value = values[:, f] if everything else values[present, f]
        np.add.at(cells["seen"][:, f], into, np.int32(1))
        for name, add in (("sum", np.add), ("min", np.minimum), ("max", np.maximum)):
            if name in cells:
                with np.errstate(over="ignore", invalid="ignore"):  # a sum beyond float64 counts as missing later on
                    add.at(cells[name][:, f], into, value)
        if "last" in cells:
            # Last by event time; among equal times, the later in the log.
            time = event_time_ms if everything else event_time_ms[present]
            np.maximum.at(cells["last_ms"][:, f], into, time)
            newest = time == cells["last_ms"][into, f]
            cells["last"][into[newest], f] = value[newest]


def _group(slot: Slots, window: Int64, table_size: int) -> tuple[Slots, Int64, Int64]:
    """Distinct (slot, window) pairs, ascending, and (n) the pair of each element."""
    if len(slot) == 0:
        return slot, window, np.empty(0, np.int64)
    lowest = int(window.min())
    span = int(window.max()) - lowest + 1
    key = slot.astype(np.int64) * span + (window - lowest)
    if table_size * span > np.iinfo(np.int64).max:
        # Windows of 1 ms, 100,000 sensors and centuries in between: no number is large enough for a pair.
        pairs, group = np.unique(np.stack([slot.astype(np.int64), window]), axis=1, return_inverse=True)
        return pairs[0].astype(np.int32), pairs[1], group.reshape(-1)
    if table_size * span <= 16 * len(slot) + 1024:
        # A table of flags beats a sort while it is not much longer than the batch.
        flags = np.zeros(table_size * span, np.bool_)
        flags[key] = True
        distinct = np.flatnonzero(flags)
        place = np.empty(table_size * span, np.int32)
        place[distinct] = np.arange(len(distinct), dtype=np.int32)
        group = place[key].astype(np.int64)
    else:
        distinct, group = np.unique(key, return_inverse=True)
    return (distinct // span).astype(np.int32), lowest + distinct % span, group


def _concatenate(one: _Groups, other: _Groups) -> _Groups:
    return _Groups(
        np.concatenate([one.slot, other.slot]),
        np.concatenate([one.window, other.window]),
        {name: np.concatenate([one.cells[name], other.cells[name]]) for name in one.cells},
    )


def _ranges(slot: Slots, start: Int64, stop: Int64) -> tuple[Slots, Int64]:
    """Each inclusive range start..stop written out, with its slot.

    >>> slots, windows = _ranges(np.array([7, 8], np.int32), np.array([3, 5]), np.array([4, 4]))
    >>> slots.tolist(), windows.tolist()
    ([7, 7], [3, 4])
    """
    length = np.maximum(stop - start + 1, 0)
    ends = np.cumsum(length)
    total = int(ends[-1]) if len(ends) else 0
    within = np.arange(total) - np.repeat(ends - length, length)
    return np.repeat(slot, length), np.repeat(start, length) + within
