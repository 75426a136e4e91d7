"""Ragged per-sensor histories, and the one way through them: the same blocks, memory and forecasters as in service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.blocks import Block, iter_blocks
from models.cascade import END_MS, EPOCH, Cascade
from models.epochs import epochs
from models.features import Context, SeriesMemory
from models.forecaster import Column, Forecaster, Prediction, Rows, SeriesSpec
from models.scaling import RunningScale
from models.steps import regular

Int64 = NDArray[np.int64]
SERIES_LOOKED_AT = 12
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sequences:
    """m steps of many sensors; each sensor's own steps are in time order, windows without readings present as all-NaN
    steps."""

    sensor: NDArray[np.int32]
    """(m,) 0 .. sensors - 1"""
    end_ms: Int64
    """(m,)"""
    values: Float64
    """(m, C) NaN = missing."""
    reset: Bool
    """(m,) True = what was remembered of the sensor is forgotten before this step."""
    begin: Rows | None = None
    """Columns of `RunningScale` (sensors, C) before the first of these steps: what came earlier and is not here. None: nothing did."""

    def __len__(self) -> int:
        return len(self.sensor)

    @property
    def sensors(self) -> int:
        return int(self.sensor.max()) + 1 if len(self) else 0

    def split_ms(self, newest_share: float) -> int:
        """The end_ms up to which (inclusive) all but the newest share of the steps lie."""
        at = min(len(self) - 1, max(0, round(len(self) * (1.0 - newest_share)) - 1))
        return int(np.partition(self.end_ms, at)[at])

    def until(self, end_ms: int) -> Sequences:
        """The steps that end at `end_ms` or earlier."""
        return self.take(self.end_ms <= end_ms)

    def by_sensor(self) -> Sequences:
        """The same steps, sensor after sensor."""
        return self.take(np.argsort(self.sensor, kind="stable"))

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Sequences:
        """The chosen steps, in the order given; a mask or positions."""
        return Sequences(self.sensor[rows], self.end_ms[rows], self.values[rows], self.reset[rows], self.begin)

    def grid(self, step_ms: int, channels: Sequence[int], most_steps: int) -> Float64:
        """(T, S) some sensors' series side by side on the grid of steps, NaN = missing: what `estimate_seasons` looks at."""
        chosen = np.unique(np.linspace(0, max(self.sensors - 1, 0), min(self.sensors, SERIES_LOOKED_AT)).astype(int))
        rows = [np.flatnonzero(self.sensor == sensor) for sensor in chosen.tolist()]
        wanted = list(channels)[: max(1, SERIES_LOOKED_AT // max(len(rows), 1))]
        times = [self.end_ms[at] - 1 for at in rows for _ in wanted]
        return regular(times, [self.values[at, channel] for at in rows for channel in wanted], step_ms, most_steps)

    def after(self, end_ms: int) -> Sequences:
        """The steps that end later; the running scale begins where the others have brought it, as it does in service."""
        late = self.end_ms > end_ms
        if late.all():
            return self
        begin = scale_after(self.take(~late), self.sensors)
        return replace(self.take(late), begin=begin)


def scale_after(sequences: Sequences, sensors: int) -> Rows:
    """Columns of `RunningScale` (sensors, C) after these steps."""
    scaling = RunningScale(sequences.values.shape[1])
    table = begin_rows(scaling.columns(), sensors, sequences.begin)
    for block in iter_blocks(sequences.sensor, sequences.reset):
        rows = {name: column[block.sensors] for name, column in table.items()}
        values = block.pick(sequences.values)
        scaling.advance(rows, values, np.isfinite(values) & block.live[..., None])
        for name, column in table.items():
            column[block.sensors] = rows[name]
    return table


def begin_rows(columns: Sequence[Column], sensors: int, begin: Rows | None) -> Rows:
    """Rows of `sensors` sensors: as `begin` has them, as far as it goes, else as those of sensors never seen."""
    table = empty_rows(columns, sensors)
    for name, known in (begin or {}).items():
        if name in table:
            at = slice(0, min(len(known), sensors))
            table[name][at] = known[at]
    return table


def joined(parts: Sequence[Sequences], channels: int) -> Sequences:
    """One after the other."""
    if not parts:
        nothing = np.empty(0, np.int64)
        return Sequences(nothing.astype(np.int32), nothing, np.empty((0, channels)), np.empty(0, np.bool_))
    return Sequences(
        np.concatenate([part.sensor for part in parts]),
        np.concatenate([part.end_ms for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.reset for part in parts]),
    )


class Futures:
    """What followed each step: the labels. For sequences that stand sensor after sensor."""

    def __init__(self, sequences: Sequences, spec: SeriesSpec) -> None:
        self.sequences = sequences
        self.spec = spec
        starts = np.append(True, np.diff(sequences.sensor) != 0) | sequences.reset
        edges = np.append(np.flatnonzero(starts), len(sequences))
        self.run_start: Int64 = edges[:-1]
        """(runs,) where each run of steps without a reset begins ..."""
        self.run_end: Int64 = edges[1:]
        """... and ends (exclusive)."""
        self._end_of = np.repeat(edges[1:], np.diff(edges))
        self._targets = np.ascontiguousarray(sequences.values[:, list(spec.targets)])

    def after(self, position: Int64, until_ms: int) -> Float64:
        """(*position.shape, H, K) the targets 1..H steps later; NaN where missing, beyond a reset, or later than
        `until_ms`.

        No other function hands out labels: none can reach past the end of training.
        """
        at = position[..., None] + np.arange(1, self.spec.horizon + 1)
        inside = at < self._end_of[position][..., None]
        at = np.minimum(at, len(self.sequences) - 1)
        inside &= self.sequences.end_ms[at] <= until_ms
        return np.where(inside[..., None], self._targets[at], np.nan)


class Walk:
    """The way of many sensors through their history: the rows of memory and forecasters, and what each forecaster keeps of the partition.

    Every state begins empty, but for the running scale (`Sequences.begin`). Each forecaster has columns of its own, so that several may be
    of one kind; those that learn while they run see all sensors as one partition."""

    def __init__(
        self, memory: SeriesMemory, forecasters: Sequence[Forecaster], sensors: int, begin: Rows | None = None
    ) -> None:
        self.memory = memory
        self.forecasters = forecasters
        self._remembered = _Rows(memory.columns(), sensors, begin)
        self._own = [_Rows(forecaster.columns(), sensors) for forecaster in forecasters]
        self._partitions = [_partition(forecaster) for forecaster in forecasters]

    def through(self, sequences: Sequences) -> Iterator[tuple[Block, Context, list[Prediction]]]:
        """As the service goes through them: gather, advance, scatter."""
        for block in self._blocks(sequences):
            steps = block.step_block(sequences.values, sequences.end_ms)
            predictions = []
            with self._remembered.of(block) as rows:
                context = self.memory.advance(rows, steps)
                for forecaster, kept, partition in zip(self.forecasters, self._own, self._partitions, strict=True):
                    with kept.of(block) as own:
                        both = rows | own
                        predictions.append(forecaster.advance(both, steps, replace(context, shared=partition)))
                        own.update((name, both[name]) for name in own)
            yield block, context, predictions

    def prior(self) -> Rows:
        """What a cascade among the forecasters has learned of the partition; empty without one."""
        found = [at for forecaster, at in zip(self.forecasters, self._partitions) if isinstance(forecaster, Cascade)]
        return {name: value for name, value in found[0].items() if name != EPOCH} if found else {}

    def taken_up_by(self, forecasters: Sequence[Forecaster], sensors: int) -> Walk:
        """From here on others, as a model takes over in service: what a forecaster of the same name has gathered goes on, a network's
        hidden state is rebuilt from what is remembered. sensors: at least as many as there were."""
        other = Walk(self.memory, forecasters, 0)
        other._remembered = self._remembered.copy(self.memory.columns(), sensors)
        before = {forecaster.name: number for number, forecaster in enumerate(self.forecasters)}
        for number, forecaster in enumerate(forecasters):
            at = before[forecaster.name]
            other._partitions[number] = {name: value.copy() for name, value in self._partitions[at].items()}
            other._own[number] = own = self._own[at].copy(forecaster.columns(), sensors)
            if isinstance(forecaster, Cascade):
                rows = other._remembered.table | own.table
                recalled = self.memory.recall(rows, rows[END_MS], self.memory.ring_steps, other._partitions[number])
                forecaster.rebuild(rows, *recalled)
        return other

    def _blocks(self, sequences: Sequences) -> Iterator[Block]:
        """Sensor after sensor or, where somebody learns at the borders of epochs, epoch after epoch."""
        cascades = [
            (forecaster, own, partition)
            for forecaster, own, partition in zip(self.forecasters, self._own, self._partitions)
            if isinstance(forecaster, Cascade)
        ]
        if not cascades:
            yield from iter_blocks(sequences.sensor, sequences.reset)
            return
        spec, epoch_steps = cascades[0][0].spec, cascades[0][0].epoch_steps
        order = np.argsort(sequences.end_ms, kind="stable")
        for number, span in epochs(sequences.end_ms[order], spec.step_ms, epoch_steps):
            for cascade, own, partition in cascades:
                cascade.teach(number, self._remembered.table | own.table, partition)
            at = order[span]
            for block in iter_blocks(sequences.sensor[at], sequences.reset[at]):
                yield replace(block, index=at[block.index])


def walk(
    sequences: Sequences, memory: SeriesMemory, forecasters: Sequence[Forecaster] = ()
) -> Iterator[tuple[Block, Context, list[Prediction]]]:
    """Through all steps from the beginning."""
    return Walk(memory, forecasters, sequences.sensors, sequences.begin).through(sequences)


def _partition(forecaster: Forecaster) -> Rows:
    columns = forecaster.partition_columns() if isinstance(forecaster, Cascade) else ()
    return {column.name: np.full(column.shape, column.fill, column.dtype) for column in columns}


class _Rows:
    """Columns of all sensors."""

    def __init__(self, columns: Sequence[Column], sensors: int, begin: Rows | None = None) -> None:
        self._columns = columns
        self.table = begin_rows(columns, sensors, begin)

    def copy(self, columns: Sequence[Column], sensors: int) -> _Rows:
        """Columns that are here as they are, others as those of sensors never seen."""
        return _Rows(columns, sensors, self.table)

    @contextmanager
    def of(self, block: Block) -> Iterator[Rows]:
        """The block's rows, to be stored back."""
        rows = {name: column[block.sensors] for name, column in self.table.items()}
        refill(rows, self._columns, block.reset)
        yield rows
        for name, column in self.table.items():
            column[block.sensors] = rows[name]


def empty_rows(columns: Sequence[Column], batch: int) -> Rows:
    """Rows of `batch` sensors never seen."""
    return {column.name: np.full((batch, *column.shape), column.fill, column.dtype) for column in columns}


def refill(rows: Rows, columns: Sequence[Column], reset: Bool) -> None:
    """Forget, for the rows where `reset` (B,), all that does not survive a reset."""
    if not reset.any():
        return
    for column in columns:
        if not column.survives_reset:
            rows[column.name][reset] = column.fill
