"""Readings that never stop: a small fleet, its event time running faster than the clock, with everything a stream has.

[0 ---- 60 s)     a window: six readings of each sensor
late within grace some readings come up to 20 s of event time after their neighbours
too late          a few come after their window has closed: dead letters
broken            a few are no readings at all: dead letters
silent            sensors pause for some windows: gap steps, and resets where it is too long
new               sensors join while the stream runs
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

import numpy as np

from pipeline.errors import DeploymentError
from pipeline.kafka.partitioner import partition_for
from pipeline.kafka.sink import RecordSink
from pipeline.settings import Settings
from pipeline.stream.columns import OutgoingRecords

WINDOW_MS: Final = 60_000
TICK_MS: Final = 10_000
PER_WINDOW: Final = WINDOW_MS // TICK_MS
GRACE_TICKS: Final = 2
SEASON: Final = 12
START_MS: Final = 1_735_689_600_000
"""2025: Kafka refuses timestamps more than an hour ahead of its clock, and event time runs fast."""
IN_GRACE, TOO_LATE, BROKEN, MISSING = 0.03, 0.01, 0.01, 0.01
"""Shares of the readings."""
LONGEST_GAP: Final = 5
"""windows.max_gap: a third of the pauses is longer."""
BAD: Final = (None, b'{"ts": 17', b"[1, 2]", b'{"value": 1}', b'{"ts": "yesterday", "value": 1}')
HURRY: Final = 8
DELIVERY_TIMEOUT_MS: Final = 30_000
RETRY_SECONDS: Final = 0.5


class Fleet:
    """The readings, tick by tick: the same seed, the same stream."""

    def __init__(self, sensors: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._level = self._rng.normal(20, 8, sensors)
        self._amplitude = self._rng.uniform(1, 6, sensors)
        self._delayed: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self._tick = 0

    def tick(self) -> list[tuple[bytes, bytes | None]]:
        """(key, value) of the messages that the next ten seconds of event time bring."""
        tick, self._tick = self._tick, self._tick + 1
        due = self._delayed.pop(tick, [])
        for sensor in range(len(self._level)):
            if not is_heard(sensor, tick // PER_WINDOW):
                continue
            delay = self._delay()
            (self._delayed[tick + delay] if delay else due).append((sensor, tick))
        return [self._message(sensor, of_tick) for sensor, of_tick in due]

    @property
    def now_ms(self) -> int:
        """Event time at the end of the ticks so far."""
        return START_MS + self._tick * TICK_MS

    def _delay(self) -> int:
        """Ticks by which one reading is behind."""
        chance = self._rng.random()
        if chance < IN_GRACE:
            return int(self._rng.integers(1, GRACE_TICKS, endpoint=True))
        if chance < IN_GRACE + TOO_LATE:
            return int(self._rng.integers(2 * PER_WINDOW, 3 * PER_WINDOW))
        return 0

    def _message(self, sensor: int, tick: int) -> tuple[bytes, bytes | None]:
        chance = self._rng.random()
        if chance < BROKEN:
            return sensor_id(sensor), BAD[int(self._rng.integers(len(BAD)))]
        ts = START_MS + tick * TICK_MS + int(self._rng.integers(TICK_MS))
        value = None if chance < BROKEN + MISSING else round(float(self._value(sensor, tick)), 4)
        return sensor_id(sensor), json.dumps({"ts": ts, "value": value}).encode()

    def _value(self, sensor: int, tick: int) -> float:
        phase = 2 * np.pi * tick / (PER_WINDOW * SEASON)
        return self._level[sensor] + self._amplitude[sensor] * np.sin(phase + sensor) + self._rng.normal(0, 0.5)


def sensor_id(sensor: int) -> bytes:
    return b"sensor-%02d" % sensor


def is_heard(sensor: int, window: int) -> bool:
    """Every other sensor joins within the first 40 windows; every sensor pauses for 0, 3, 6 or 9 of 61 windows.

    >>> is_heard(1, 0), is_heard(1, 3), is_heard(1, 61 - 7)
    (False, True, False)
    """
    joined = window >= (3 * sensor % 40 if sensor % 2 else 0)
    pausing = (window + 7 * sensor) % 61 < 3 * (sensor % 4)
    return joined and not pausing


class Load:
    """Sends the fleet's readings from a thread of its own, about `per_second` of them, until it is told to stop.

    While no broker answers it tries again and again. A tick of which a part had arrived is sent twice then, which does not
    matter: what counts is the log.
    """

    def __init__(self, settings: Settings, sensors: int, seed: int, per_second: float) -> None:
        self._settings = settings
        self._fleet = Fleet(sensors, seed)
        self._per_second = per_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.sent = 0
        """Messages acknowledged; those that arrived twice count once."""
        self.retries = 0
        self.failure: BaseException | None = None
        """What ended it before its time."""

    def start(self) -> None:
        self._thread.start()

    def hurry(self) -> None:
        """All else is done: send the rest faster."""
        self._per_second *= HURRY

    def stop(self) -> None:
        """Returns when the tick under way is delivered."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * DELIVERY_TIMEOUT_MS / 1000)

    def _run(self) -> None:
        try:
            with RecordSink(self._settings, delivery_timeout_ms=DELIVERY_TIMEOUT_MS) as sink:
                due = time.monotonic()
                while not self._stop.is_set():
                    messages = self._fleet.tick()
                    self._deliver(sink, list(self._batches(messages)))
                    self.sent += len(messages)
                    # After an outage it goes on at its pace: what was missed is not made up for.
                    due = max(time.monotonic(), due + len(messages) / self._per_second)
                    self._stop.wait(due - time.monotonic())
        except BaseException as failure:
            self.failure = failure

    def _batches(self, messages: list[tuple[bytes, bytes | None]]) -> Iterator[OutgoingRecords]:
        topics = self._settings.topics
        by_partition: defaultdict[int, list[tuple[bytes, bytes | None]]] = defaultdict(list)
        for message in messages:
            by_partition[partition_for(message[0], topics.partitions)].append(message)
        for partition, own in by_partition.items():
            keys, values = zip(*own)
            stamps = np.full(len(own), self._fleet.now_ms, np.int64)
            yield OutgoingRecords(topics.readings_topic, partition, keys, values, timestamps_ms=stamps)

    def _deliver(self, sink: RecordSink, batches: list[OutgoingRecords]) -> None:
        while True:
            try:
                return sink.deliver(batches)
            except DeploymentError:
                if self._stop.is_set():
                    raise
                self.retries += 1
                self._stop.wait(RETRY_SECONDS)
