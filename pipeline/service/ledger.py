"""What a simulation sent, and so what must come out: counted from the truth, not by the service's own code.

The demo holds what the service wrote against it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.sequences import Sequences
from pipeline.service.simulator import SimulatedBatch
from pipeline.stream.columns import Int32
from pipeline.stream.windows import WindowRule

_NEVER = -(2**60)


@dataclass(frozen=True, slots=True)
class Account:
    """What must come of everything sent so far. S sensors, W windows from `first_window` on."""

    sent: int
    readings: int
    """Good ones, late ones included."""
    dead_letters: dict[str, int]
    """By reason, "late" among them."""
    first_window: int
    hop_ms: int
    size_ms: int
    truth: NDArray[np.float64]
    """(S, W) mean temperature of each window; NaN where no reading came in time."""
    steps: NDArray[np.bool_]
    """(S, W) True = a closed window or a gap step: a forecast is due."""
    resets: NDArray[np.bool_]
    """(S, W) True = the gap before was too long, the state begins anew."""

    @property
    def forecasts(self) -> int:
        """One for each step, since the temperature is never null."""
        return int(self.steps.sum())

    def window_of(self, end_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """Columns of windows by their ends."""
        return (end_ms - self.size_ms) // self.hop_ms - self.first_window

    def sequences(self) -> Sequences:
        """The steps as histories of one channel, sensor after sensor."""
        sensor, window = np.nonzero(self.steps)
        end_ms = (window + self.first_window) * self.hop_ms + self.size_ms
        return Sequences(
            sensor.astype(np.int32),
            end_ms,
            self.truth[sensor, window][:, None],
            self.resets[sensor, window],
        )


@dataclass(slots=True)
class Ledger:
    """Everything sent, in the order it was sent. Tumbling windows only."""

    rule: WindowRule
    sensors: int
    batches: list[tuple[SimulatedBatch, Int32]] = field(default_factory=list)

    def add(self, batch: SimulatedBatch, partition: Int32) -> None:
        """partition: (n) where each message went."""
        self.batches.append((batch, partition))

    @property
    def sent(self) -> int:
        return sum(len(batch) for batch, _ in self.batches)

    def settle(self) -> Account:
        """The account of all that was sent."""
        dead_letters: dict[str, int] = {}
        for batch, _ in self.batches:
            for reason, count in batch.broken().items():
                dead_letters[reason] = dead_letters.get(reason, 0) + count
        event, sensor, value, partition = self._readings()
        late, closed = self._lateness(event, partition)
        dead_letters["late"] = int(late.sum())
        window = event // self.rule.hop_ms
        first = int(window.min()) if len(window) else 0
        shape = (self.sensors, int(window.max()) - first + 1 if len(window) else 0)
        at = (sensor[~late], window[~late] - first)
        readings, total = np.zeros(shape), np.zeros(shape)
        np.add.at(readings, at, 1.0)
        np.add.at(total, at, value[~late])
        home = np.zeros(self.sensors, np.int64)
        home[sensor] = partition
        open_from = np.array([closed.get(int(p), _NEVER) for p in home]) - first
        steps, resets = self._steps(readings > 0, open_from)
        with np.errstate(invalid="ignore"):
            truth = total / np.where(readings > 0, readings, np.nan)
        return Account(
            sent=self.sent,
            readings=len(event),
            dead_letters=dead_letters,
            first_window=first,
            hop_ms=self.rule.hop_ms,
            size_ms=self.rule.size_ms,
            truth=truth,
            steps=steps,
            resets=resets,
        )

    def _readings(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Event time, sensor, temperature, partition of the good messages, as sent."""
        good = [(batch, partition, batch.sound) for batch, partition in self.batches]
        empty = np.empty(0, np.int64)
        return (
            np.concatenate([empty, *(batch.event_time_ms[sound] for batch, _, sound in good)]),
            np.concatenate([empty, *(batch.sensor[sound] for batch, _, sound in good)]),
            np.concatenate([np.empty(0), *(batch.temperature[sound] for batch, _, sound in good)]),
            np.concatenate([empty, *(partition[sound] for _, partition, sound in good)]),
        )

    def _lateness(
        self, event: NDArray[np.int64], partition: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], dict[int, int]]:
        """(n) True = its window had closed when it came; and the newest window each partition has closed."""
        late = np.zeros(len(event), np.bool_)
        newest_closed: dict[int, int] = {}
        for p in np.unique(partition).tolist():
            rows = np.flatnonzero(partition == p)
            stream_time = np.maximum.accumulate(event[rows])
            closed = (stream_time - self.rule.size_ms - self.rule.grace_ms) // self.rule.hop_ms
            late[rows] = event[rows] // self.rule.hop_ms <= closed
            newest_closed[p] = int(closed[-1])
        return late, newest_closed

    def _steps(
        self, has: NDArray[np.bool_], newest_closed: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(S, W) where a step is due, and where one begins anew."""
        window = np.arange(has.shape[1])
        newest = np.maximum.accumulate(np.where(has, window, _NEVER), axis=1)
        before = np.concatenate([np.full((len(has), 1), _NEVER), newest[:, :-1]], axis=1)
        due = (window - newest <= self.rule.max_gap_steps) & (window <= newest_closed[:, None])
        resets = has & (before > _NEVER) & (window - before - 1 > self.rule.max_gap_steps)
        return due, resets & due
