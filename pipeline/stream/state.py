"""Sensor states as a struct of arrays: one row a sensor, one array a column. Gather rows, step, scatter rows.

What belongs to the partition rather than to a sensor (its stream time) lies beside the rows, so that a snapshot of the table is the
whole memory of a task.

The columns fall into two families, because they change at different paces: `windows` with every reading, `steps` only when a window
closes. The table remembers which rows of which family changed, so that a checkpoint writes no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column, Rows

Slots = NDArray[np.int32]

WINDOWS, STEPS = "windows", "steps"
FAMILIES: Final = (WINDOWS, STEPS)


def family_of(column: str) -> str:
    """Which family a column belongs to, by its name.

    >>> family_of("window.sum"), family_of("rnn.hidden")
    ('windows', 'steps')
    """
    return WINDOWS if column.startswith("window.") else STEPS


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole state of a table by value: `SensorTable.restore(table.snapshot())` makes an equal table."""

    sensors: tuple[bytes, ...]
    rows: dict[str, NDArray[Any]]
    """Column name -> (sensors, *shape)."""
    partition: dict[str, NDArray[Any]]

    def without(self, columns: Iterable[str], table: SensorTable) -> Snapshot:
        """Other columns than these; in their place what a new sensor of this table has."""
        kept = {name: values for name, values in self.rows.items() if name not in set(columns)}
        new = {name: _filled(table.columns[name], len(self.sensors)) for name in table.columns.keys() - kept.keys()}
        return Snapshot(self.sensors, kept | new, self.partition)


class SensorTable:
    """States of the sensors of one partition.

    >>> table = SensorTable([Column("last", (), np.dtype(np.float64), fill=np.nan)])
    >>> slots = table.slots([b"pump-1", b"pump-2", b"pump-1"])
    >>> slots.tolist()
    [0, 1, 0]
    >>> rows = table.gather(slots[:2])
    >>> rows["last"][:] = [20.5, 3.0]
    >>> table.scatter(slots[:2], rows)
    >>> table["last"].tolist()
    [20.5, 3.0]
    """

    def __init__(
        self, columns: Iterable[Column], partition_columns: Iterable[Column] = (), capacity: int = 256
    ) -> None:
        self.columns = {column.name: column for column in columns}
        self._slot_of: dict[bytes, int] = {}
        self._texts: list[str] = []
        self.sensors: list[bytes] = []
        """Sensor id of each slot, UTF-8. Slots are given in order of first appearance in the log and never move."""
        self._arrays = {name: _filled(column, capacity) for name, column in self.columns.items()}
        self._capacity = capacity
        self._changed = {family: np.zeros(capacity, np.bool_) for family in FAMILIES}
        self.partition: dict[str, NDArray[Any]] = {column.name: _filled_one(column) for column in partition_columns}
        """State of the partition as a whole; each value an array of the column's shape."""

    def __len__(self) -> int:
        return len(self.sensors)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The column's live rows, (sensors, *shape): a view, valid until the table grows."""
        return self._arrays[name][: len(self.sensors)]

    @property
    def bytes_per_sensor(self) -> int:
        return sum(column.bytes_per_sensor for column in self.columns.values())

    def slots(self, sensors: Sequence[bytes]) -> Slots:
        """(n) slot of each sensor; sensors not seen before get the next ones, in the order given."""
        found = list(map(self._slot_of.get, sensors))
        if None in found:
            before = len(self.sensors)
            for sensor in dict.fromkeys(sensor for sensor, slot in zip(sensors, found) if slot is None):
                self._slot_of[sensor] = len(self.sensors)
                self.sensors.append(sensor)
            self._grow(len(self.sensors))
            for flags in self._changed.values():
                flags[before : len(self.sensors)] = True
            found = list(map(self._slot_of.__getitem__, sensors))
        return np.array(found, np.int32)

    def names(self, slots: Slots) -> list[str]:
        """(n) the sensors' ids as texts."""
        self._texts += [sensor.decode() for sensor in self.sensors[len(self._texts) :]]
        return list(map(self._texts.__getitem__, slots.tolist()))

    def gather(self, slots: Slots, names: Iterable[str] | None = None) -> Rows:
        """Copies of the chosen rows; all columns unless named."""
        return {name: np.take(self._arrays[name], slots, axis=0) for name in (self.columns if names is None else names)}

    def scatter(self, slots: Slots, rows: Rows) -> None:
        """Store rows back. No slot may appear twice."""
        for name, values in rows.items():
            self._arrays[name][slots] = values

    def refill(self, slots: Slots, names: Iterable[str]) -> None:
        """Forget: set the chosen columns of these sensors to what a new sensor starts with, except those that survive a reset."""
        for name in names:
            if not self.columns[name].survives_reset:
                self._arrays[name][slots] = self.columns[name].fill

    def replace_columns(self, gone: Iterable[str], new: Iterable[Column]) -> None:
        """Other columns in the place of some; the new ones begin filled. Every row counts as changed."""
        for name in gone:
            del self.columns[name], self._arrays[name]
        for column in new:
            self.columns[column.name] = column
            self._arrays[column.name] = _filled(column, self._capacity)
        for flags in self._changed.values():
            flags[: len(self.sensors)] = True

    def replace_partition_columns(self, gone: Iterable[str], new: Iterable[Column]) -> None:
        """The same for the state of the partition as a whole."""
        for name in gone:
            del self.partition[name]
        self.partition |= {column.name: _filled_one(column) for column in new}

    def touch(self, slots: Slots, *families: str) -> None:
        """Note that these rows have changed in these families; a slot may appear more than once."""
        for family in families:
            self._changed[family][slots] = True

    def changed(self, family: str) -> NDArray[np.bool_]:
        """(sensors) which rows are new or changed in this family since `all_saved`: a view, valid until the table grows."""
        return self._changed[family][: len(self.sensors)]

    def all_saved(self) -> None:
        """What changed so far is kept elsewhere: begin to note anew."""
        for flags in self._changed.values():
            flags[:] = False

    def snapshot(self) -> Snapshot:
        rows = {name: self[name].copy() for name in self.columns}
        return Snapshot(tuple(self.sensors), rows, {name: value.copy() for name, value in self.partition.items()})

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the whole content; the columns must be those of the snapshot. Every row counts as changed."""
        if set(snapshot.rows) != set(self.columns) or set(snapshot.partition) != set(self.partition):
            raise ValueError(f"snapshot holds columns {sorted(snapshot.rows)}, the table has {sorted(self.columns)}")
        for name, values in snapshot.rows.items():
            if values.shape[1:] != self.columns[name].shape:
                raise ValueError(f"column {name} of the snapshot is {values.shape}, the table's {self.columns[name]}")
        self.sensors = list(snapshot.sensors)
        self._texts = []
        self._slot_of = {sensor: slot for slot, sensor in enumerate(self.sensors)}
        self._grow(len(self.sensors))
        for name, values in snapshot.rows.items():
            self._arrays[name][: len(self.sensors)] = values
            self._arrays[name][len(self.sensors) :] = self.columns[name].fill
        self.partition = {name: value.copy() for name, value in snapshot.partition.items()}
        for flags in self._changed.values():
            flags[: len(self.sensors)] = True

    def _grow(self, needed: int) -> None:
        if needed <= self._capacity:
            return
        # Half as much again: at a million sensors a doubled table would be mostly air.
        self._capacity = max(needed, self._capacity + self._capacity // 2)
        for name, column in self.columns.items():
            grown = _filled(column, self._capacity)
            old = self._arrays[name]
            grown[: len(old)] = old
            self._arrays[name] = grown
        for family, flags in self._changed.items():
            self._changed[family] = np.zeros(self._capacity, np.bool_)
            self._changed[family][: len(flags)] = flags


def _filled(column: Column, rows: int) -> NDArray[Any]:
    return np.full((rows, *column.shape), column.fill, column.dtype)


def _filled_one(column: Column) -> NDArray[Any]:
    return np.full(column.shape, column.fill, column.dtype)
