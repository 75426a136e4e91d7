"""A simulated fleet of machines: what the demo and the benchmarks stream.

Each sensor has a level, a daily and a weekly rhythm with its own phase, a slow drift and autocorrelated noise; some fall
silent for hours, some readings are delayed or late, and now and then a message is broken in one of the ways of `FAULTS`.

    event time   ----|----|----|----|----|---->     readings are taken every interval_ms
    sent         ----|----|-------||-|----|--->     and sent at once, or up to hours later, out of order

Pure: what is sent at a time depends on the seed and that time alone, so `generate` may be cut anywhere:

>>> fleet = Fleet(sensors=3, seed=1)
>>> whole = fleet.generate(0, 2 * DAY_MS)
>>> parts = [fleet.generate(0, 5_000_000), fleet.generate(5_000_000, 2 * DAY_MS)]
>>> whole.values == parts[0].values + parts[1].values
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
WEEK_MS: Final = 7 * DAY_MS

FIELDS: Final = ("temperature", "pressure")
UNITS: Final = {"temperature": "°C", "pressure": "bar"}
KINDS: Final = ("pump", "fan", "oven", "chiller", "mill")

_NOISE_MEMORY_PER_HOUR: Final = 0.85
"""Correlation of the noise with itself an hour later: one hour ahead it says much, a day ahead nothing."""

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
_Message = tuple[bytes | None, bytes | None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way for a message to be broken, and the dead letter's reason that it must lead to."""

    name: str
    reason: str
    make: Callable[[bytes, int], _Message]
    """(sensor id, epoch ms) -> the key and the value that are sent."""


FAULTS: Final = (
    Fault("cut off in the middle", "not-json", lambda key, ts: (key, b'{"ts": %d, "temperature": 21.' % ts)),
    Fault("an array", "not-an-object", lambda key, ts: (key, b"[%d, 21.5]" % ts)),
    Fault("no timestamp", "no-event-time", lambda key, ts: (key, b'{"temperature": 21.5}')),
    Fault("text in a number field", "bad-field", lambda key, ts: (key, b'{"ts": %d, "temperature": "warm"}' % ts)),
    Fault("an infinite number", "bad-field", lambda key, ts: (key, b'{"ts": %d, "temperature": 1e999}' % ts)),
    Fault("no sensor id", "no-sensor", lambda key, ts: (None, b'{"ts": %d, "temperature": 21.5}' % ts)),
    Fault("a sensor id too long", "bad-sensor", lambda key, ts: (key * 64, b'{"ts": %d, "temperature": 21.5}' % ts)),
    Fault("over-long", "over-long", lambda key, ts: (key, b'{"ts": %d, "note": "%s"}' % (ts, b"x" * 70_000))),
    Fault(
        "nested too deep", "too-deep", lambda key, ts: (key, b'{"ts": %d, "note": %s1%s}' % (ts, b"[" * 40, b"]" * 40))
    ),
    Fault(
        "three days ahead of its clock",
        "event-time-out-of-bounds",
        lambda key, ts: (key, b'{"ts": %d, "temperature": 21.5}' % (ts + 3 * DAY_MS)),
    ),
    Fault(
        "microseconds taken for milliseconds",
        "event-time-out-of-bounds",
        lambda key, ts: (key, b'{"ts": %d, "temperature": 21.5}' % (ts * 1000)),
    ),
    Fault("a word for a time", "bad-event-time", lambda key, ts: (key, b'{"ts": "yesterday", "temperature": 21.5}')),
    Fault("no value at all", "null-value", lambda key, ts: (key, None)),
)
SOUND: Final = -1
"""The fault of a message that has none."""


@dataclass(frozen=True, slots=True)
class SimulatedBatch:
    """n messages in the order they are sent, and the truth about them."""

    keys: list[bytes | None]
    values: list[bytes | None]
    timestamps_ms: Int64
    """(n) when each was sent: the record's timestamp. Ascending."""
    event_time_ms: Int64
    """(n) when each was measured; for a broken message, when it was sent."""
    sensor: Int64
    """(n) index into `Fleet.names`."""
    temperature: Float64
    """(n) as written in the message, °C; NaN in a broken one."""
    fault: Int64
    """(n) index into FAULTS; SOUND (-1) = a good reading."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def sound(self) -> NDArray[np.bool_]:
        """(n) True = a good reading."""
        return np.equal(self.fault, SOUND)

    def broken(self) -> dict[str, int]:
        """How many broken messages there are of each dead letter's reason."""
        counts: dict[str, int] = {}
        for fault in self.fault[~self.sound].tolist():
            reason = FAULTS[fault].reason
            counts[reason] = counts.get(reason, 0) + 1
        return counts


@dataclass(frozen=True, slots=True)
class Habits:
    """How the fleet behaves, beside its physics. Shares are between 0 and 1."""

    dropouts: float = 0.04
    """Share of sensor-days with a silence of 2 to 8 hours."""
    delayed: float = 0.01
    """Share of readings that come out of order, at most `delay_ms` after they were taken."""
    delay_ms: int = 10 * 60_000
    late: float = 0.001
    """Share of readings that come `late_ms` after they were taken: after their window has closed."""
    late_ms: tuple[int, int] = (3 * HOUR_MS, 8 * HOUR_MS)
    broken: float = 0.0005
    """Broken messages for each reading; they come in addition, kind after kind."""
    nulls: float = 0.02
    """Share of readings whose pressure is null."""


class Fleet:
    """`sensors` sensors that each take a reading every `interval_ms`. Equal arguments make equal messages.

    Raises:
        ValueError: no sensors, or an interval that a day is not a multiple of.
    """

    def __init__(
        self, sensors: int = 200, seed: int = 0, interval_ms: int = 15 * 60_000, habits: Habits | None = None
    ) -> None:
        if sensors < 1:
            raise ValueError(f"sensors={sensors}: expected at least 1")
        if interval_ms < 1 or DAY_MS % interval_ms:
            raise ValueError(f"interval_ms={interval_ms}: expected a whole part of a day, such as 900000 (15 minutes)")
        self.seed = seed
        self.interval_ms = interval_ms
        self.habits = habits or Habits()
        self.names = [f"{KINDS[i % len(KINDS)]}-{i + 1:03d}" for i in range(sensors)]
        self._profile = _Profile.draw(np.random.default_rng([seed, 1]), sensors, interval_ms)
        self._mixing = _noise_kernel(DAY_MS // interval_ms, interval_ms)
        self._days: dict[int, _Day] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def readings_per_day(self) -> int:
        """Readings taken a day when no sensor is silent."""
        return len(self) * (DAY_MS // self.interval_ms)

    def generate(self, from_ms: int, to_ms: int) -> SimulatedBatch:
        """All messages sent in [from_ms ---- to_ms), epoch ms, in the order they are sent."""
        # What is sent today was measured today or, late, yesterday.
        days = [self._day(day) for day in range(from_ms // DAY_MS - 1, -(-to_ms // DAY_MS))]
        sent, event, sensor, temperature, pressure, fault = (
            np.concatenate([getattr(day, name) for day in days] or [np.empty(0)]) for name in _Day.__slots__
        )
        chosen = np.flatnonzero((sent >= from_ms) & (sent < to_ms))
        # Equal times: by what was measured first, so that the order does not depend on where the time was cut.
        chosen = chosen[np.lexsort((fault[chosen], sensor[chosen], event[chosen], sent[chosen]))]
        keys, values = self._encode(event[chosen], sensor[chosen], temperature[chosen], pressure[chosen], fault[chosen])
        return SimulatedBatch(
            keys, values, sent[chosen], event[chosen], sensor[chosen], temperature[chosen], fault[chosen]
        )

    def _day(self, day: int) -> _Day:
        if day not in self._days:
            if len(self._days) >= 4:
                del self._days[min(self._days)]
            self._days[day] = self._simulate(day)
        return self._days[day]

    def _simulate(self, day: int) -> _Day:
        """All messages measured on one day, unordered."""
        if day < 0:
            empty = np.empty(0, np.int64)
            return _Day(empty, empty, empty, empty.astype(float), empty.astype(float), empty)
        slots, count = DAY_MS // self.interval_ms, len(self)
        event = day * DAY_MS + np.arange(slots)[:, None] * self.interval_ms + self._profile.offset_ms
        noise = self._mixing @ np.concatenate([self._innovations(day - 1), self._innovations(day)])
        temperature = self._profile.temperature(event, noise)
        rng = np.random.default_rng([self.seed, 3, day])
        pressure = self._profile.pressure(temperature, rng)
        pressure[rng.random((slots, count)) < self.habits.nulls] = np.nan
        heard = ~self._silences(rng, slots)
        delay = self._delays(rng, (slots, count))
        sensor = np.broadcast_to(np.arange(count), (slots, count))
        event = event[heard]
        good = _Day(
            event + delay[heard],
            event,
            sensor[heard],
            temperature[heard],
            pressure[heard],
            np.full(len(event), SOUND, np.int64),
        )
        return good.and_also(self._broken(rng, day))

    def _innovations(self, day: int) -> Float64:
        """(slots, sensors) fresh noise of one day, standard normal."""
        return np.random.default_rng([self.seed, 2, max(day, 0)]).standard_normal(
            (DAY_MS // self.interval_ms, len(self))
        )

    def _silences(self, rng: np.random.Generator, slots: int) -> NDArray[np.bool_]:
        """(slots, sensors) True = the sensor was silent."""
        count = len(self)
        happens = rng.random(count) < self.habits.dropouts
        start = rng.integers(0, slots, count)
        length = rng.integers(2 * HOUR_MS, 8 * HOUR_MS, count) // self.interval_ms
        slot = np.arange(slots)[:, None]
        return np.asarray(happens & (slot >= start) & (slot < start + length))

    def _delays(self, rng: np.random.Generator, shape: tuple[int, int]) -> Int64:
        habits = self.habits
        kind = rng.random(shape)
        delayed = rng.integers(1, habits.delay_ms + 1, shape)
        late = rng.integers(*habits.late_ms, shape)
        return np.where(kind < habits.late, late, np.where(kind < habits.late + habits.delayed, delayed, 0))

    def _broken(self, rng: np.random.Generator, day: int) -> _Day:
        count = round(self.habits.broken * self.readings_per_day)
        sent = np.sort(rng.integers(day * DAY_MS, (day + 1) * DAY_MS, count))
        nothing = np.full(count, np.nan)
        kinds = (day * count + np.arange(count)) % len(FAULTS)
        return _Day(sent, sent, rng.integers(0, len(self), count), nothing, nothing, kinds)

    def _encode(
        self, event: Int64, sensor: Int64, temperature: Float64, pressure: Float64, fault: Int64
    ) -> tuple[list[bytes | None], list[bytes | None]]:
        names = [name.encode() for name in self.names]
        keys: list[bytes | None] = [names[i] for i in sensor.tolist()]
        values: list[bytes | None] = [
            b'{"ts":%d,"temperature":%.2f%s}' % (ts, t, p)
            for ts, t, p in zip(event.tolist(), temperature.tolist(), self._pressure_texts(sensor, pressure))
        ]
        for row in np.flatnonzero(fault != SOUND).tolist():
            name, ts = names[int(sensor[row])], int(event[row])
            keys[row], values[row] = FAULTS[int(fault[row])].make(name, ts)
        return keys, values

    def _pressure_texts(self, sensor: Int64, pressure: Float64) -> list[bytes]:
        """Every tenth sensor has no gauge: its messages lack the field; elsewhere a failed reading is null."""
        gauge = self._profile.has_gauge[sensor]
        return [
            (b',"pressure":%.2f' % p if p == p else b',"pressure":null') if has else b""
            for p, has in zip(pressure.tolist(), gauge.tolist())
        ]


@dataclass(frozen=True, slots=True)
class _Day:
    """What was measured on one day, as columns of equal length."""

    sent_ms: Int64
    event_time_ms: Int64
    sensor: Int64
    temperature: Float64
    pressure: Float64
    fault: Int64

    def and_also(self, other: _Day) -> _Day:
        return _Day(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in _Day.__slots__))


@dataclass(frozen=True, slots=True)
class _Profile:
    """What makes each sensor itself: (sensors) arrays."""

    offset_ms: Int64
    level: Float64
    amplitude: Float64
    phase_hours: Float64
    weekend: Float64
    """How much of the daily swing is left at weekends, and how far the level falls."""
    year: Float64
    """Slow drift: how far the level moves within a year, and in a wave of some weeks."""
    wave: Float64
    wave_weeks: Float64
    noise: Float64
    has_gauge: NDArray[np.bool_]

    @staticmethod
    def draw(rng: np.random.Generator, sensors: int, interval_ms: int) -> _Profile:
        return _Profile(
            offset_ms=rng.integers(0, interval_ms, sensors),
            level=rng.uniform(20, 75, sensors),
            amplitude=rng.uniform(2, 8, sensors),
            phase_hours=rng.normal(0, 2.5, sensors),
            weekend=rng.uniform(0.1, 0.6, sensors),
            year=rng.normal(0, 3, sensors),
            wave=rng.uniform(0.5, 2.0, sensors),
            wave_weeks=rng.uniform(2, 6, sensors),
            noise=rng.uniform(0.3, 0.9, sensors),
            has_gauge=np.arange(sensors) % 10 != 9,
        )

    def temperature(self, time_ms: Int64, noise: Float64) -> Float64:
        """(slots, sensors) °C, two decimals: as a message carries it."""
        hours = (time_ms % DAY_MS) / HOUR_MS - self.phase_hours
        angle = 2 * np.pi * (hours - 9) / 24  # warmest in the afternoon
        swing = np.sin(angle) + 0.35 * np.sin(2 * angle + 0.6)
        rest = _at_rest(time_ms) * (1 - self.weekend)
        swing = (1 - rest) * swing - rest
        weeks = time_ms / WEEK_MS
        drift = self.year * np.sin(2 * np.pi * weeks / 52) + self.wave * np.sin(2 * np.pi * weeks / self.wave_weeks)
        return np.round(self.level + self.amplitude * swing + drift + self.noise * noise, 2)

    def pressure(self, temperature: Float64, rng: np.random.Generator) -> Float64:
        """(slots, sensors) bar: follows the temperature."""
        return 2.0 + 0.02 * (temperature - self.level) + rng.normal(0, 0.02, temperature.shape)


def _at_rest(time_ms: Int64) -> Float64:
    """0 on weekdays, 1 at weekends, six hours to wind down on Saturday and to start up on Monday (UTC)."""
    hours = (time_ms - 2 * DAY_MS) % WEEK_MS / HOUR_MS  # since Saturday 00:00; 1970-01-01 was a Thursday
    down, up = (np.clip((hours - start) / 6, 0, 1) for start in (0, 48))
    return np.asarray((3 - 2 * down) * down**2 - (3 - 2 * up) * up**2)


def _noise_kernel(slots: int, interval_ms: int) -> NDArray[Any]:
    """(slots, 2 * slots): yesterday's and today's fresh noise to today's autocorrelated noise of unit variance.

    A first-order autoregression whose memory is cut at one day, so that each day can be made from two."""
    memory = _NOISE_MEMORY_PER_HOUR ** (interval_ms / HOUR_MS)
    age = np.arange(slots)[:, None] + slots - np.arange(2 * slots)
    kernel = np.where((age >= 0) & (age < slots), memory ** np.maximum(age, 0), 0.0)
    return np.asarray(kernel * np.sqrt(1 - memory**2))
