"""A file into the readings topic, at the pace it was measured, N times that, or as fast as it goes.

Record timestamp = event time, key = sensor id, partition = Kafka's default rule, value = `{"ts": epoch ms, field: number or null}`.
Values are written by column, not by reading: one JSON text for a whole column of numbers, cut at its commas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from pipeline.kafka.sink import Partitioner, RecordSink
from pipeline.service.files import FileBatch, FileError
from pipeline.stream.columns import Int32, Int64, OutgoingRecords

READINGS_AT_ONCE = 50_000
"""How many are encoded and sent before Ctrl-C is looked at again: a tenth of a second."""
LONGEST_SLEEP_SECONDS = 0.25
FLUSH_EVERY_READINGS = 500_000
FLUSH_EVERY_SECONDS = 5.0
"""Whichever comes first: how soon a broker that refuses is noticed, at full speed and at the original pace."""
NO_TIME: Final = -(2**62)
"""As an event time: before all others, and due at once."""


class Timed(Sized, Protocol):
    """n things with a time each: what can be paced."""

    @property
    def event_time_ms(self) -> Int64: ...


T = TypeVar("T", bound=Timed)


@dataclass(slots=True)
class ReplayReport:
    """What has been sent so far."""

    records: int = 0
    sensors: set[str] = field(default_factory=set)
    first_ms: int | None = None
    last_ms: int | None = None
    share_read: float = 0.0

    def add(self, batch: FileBatch) -> None:
        self.sensors.update(batch.sensors[code] for code in np.unique(batch.codes).tolist())
        self.count(len(batch), batch.event_time_ms, batch.share_read)

    def count(self, records: int, event_time_ms: Int64, share_read: float) -> None:
        """So many more records; event_time_ms: of those that have one."""
        self.records += records
        self.share_read = share_read
        if not len(event_time_ms):
            return
        first, last = int(event_time_ms.min()), int(event_time_ms.max())
        self.first_ms = first if self.first_ms is None else min(self.first_ms, first)
        self.last_ms = last if self.last_ms is None else max(self.last_ms, last)


@dataclass(frozen=True, slots=True)
class ReadingEncoder:
    """File batches to records of one topic, as the settings describe readings."""

    topic: str
    partitioner: Partitioner
    event_time: str = "ts"
    """Name of the field; empty: the record's timestamp alone tells."""
    sensor: str = ""
    """Name of the field that holds the sensor id too; empty: the key alone tells."""

    def encode(self, batch: FileBatch) -> list[OutgoingRecords]:
        """One OutgoingRecords for each partition; within each, the batch's order.

        Raises FileError for an event time before 1970, which no Kafka record can bear."""
        if int(batch.event_time_ms.min(initial=0)) < 0:
            moment = np.datetime64(int(batch.event_time_ms.min()), "ms")
            raise FileError(
                f"event time {moment}: a Kafka record's timestamp cannot be before 1970; leave it out with --from 1970-01-01"
            )
        keys = [name.encode() for name in batch.sensors]
        partition_of: Int32 = self.partitioner(keys)
        partitions = partition_of[batch.codes]
        return [
            self._records(batch, keys, int(partition), np.flatnonzero(partitions == partition))
            for partition in np.unique(partitions)
        ]

    def _records(self, batch: FileBatch, keys: list[bytes], partition: int, rows: NDArray[np.int64]) -> OutgoingRecords:
        chosen = FileBatch(
            batch.sensors, batch.codes[rows], batch.event_time_ms[rows], batch.values[rows], batch.field_names
        )
        return OutgoingRecords(
            self.topic,
            partition,
            [keys[code] for code in chosen.codes.tolist()],
            encode_values(chosen, self.event_time, self.sensor),
            timestamps_ms=chosen.event_time_ms,
        )


def encode_values(batch: FileBatch, event_time: str = "ts", sensor: str = "") -> list[bytes]:
    """(n) JSON objects; a missing value is null.

    >>> batch = FileBatch(["a"], np.zeros(2, np.int32), np.array([0, 5]), np.array([[1.5], [np.nan]]), ("value",))
    >>> encode_values(batch)
    [b'{"ts":0,"value":1.5}', b'{"ts":5,"value":null}']
    """
    names: list[str] = []
    columns: list[list[bytes]] = []
    if event_time:
        names.append(event_time)
        columns.append(_numbers(batch.event_time_ms))
    if sensor:
        quoted = [orjson.dumps(name) for name in batch.sensors]
        names.append(sensor)
        columns.append([quoted[code] for code in batch.codes.tolist()])
    names += batch.field_names
    columns += [_numbers(column) for column in batch.values.T]
    template = b"{" + b",".join(orjson.dumps(name).replace(b"%", b"%%") + b":%b" for name in names) + b"}"
    return [template % row for row in zip(*columns)]


def _numbers(column: NDArray[np.int64] | NDArray[np.float64]) -> list[bytes]:
    """(n) JSON numbers, null for NaN."""
    if not len(column):
        return []
    text = orjson.dumps(np.ascontiguousarray(column), option=orjson.OPT_SERIALIZE_NUMPY)
    return text[1:-1].split(b",")


def replay(
    batches: Iterable[FileBatch],
    encoder: ReadingEncoder,
    sink: RecordSink,
    speed: float | None,
    clock: Callable[[], float],
    sleep: Callable[[float], bool],
    on_progress: Callable[[ReplayReport], None] = lambda report: None,
    report: ReplayReport | None = None,
) -> ReplayReport:
    """Sends all readings and returns when every one is acknowledged.

    speed: event time over wall time; None = as fast as it goes.
    clock: seconds, never going back. sleep: waits so many seconds, or less; True = stop now, what was sent stays sent.
    Raises FileError for what cannot be read or sent, DeploymentError for a broker that does not take it.
    """
    report = report or ReplayReport()

    def sent(batch: FileBatch) -> None:
        report.add(batch)
        on_progress(report)

    send_all(paced(batches, speed, clock, sleep), encoder.encode, sink, sent, clock)
    return report


def send_all(
    pieces: Iterable[T],
    encode: Callable[[T], Sequence[OutgoingRecords]],
    sink: RecordSink,
    on_sent: Callable[[T], None],
    clock: Callable[[], float],
) -> None:
    """Sends the pieces as they come, and returns when every record is acknowledged.

    on_sent: called after each piece. Raises DeploymentError for a broker that does not take a record."""
    unflushed, flushed_at = 0, clock()
    for piece in pieces:
        for records in encode(piece):
            sink.async_send(records)
        on_sent(piece)
        unflushed += len(piece)
        if unflushed >= FLUSH_EVERY_READINGS or clock() - flushed_at >= FLUSH_EVERY_SECONDS:
            sink.flush()
            unflushed, flushed_at = 0, clock()
    sink.flush()


def paced(
    batches: Iterable[FileBatch],
    speed: float | None,
    clock: Callable[[], float],
    sleep: Callable[[float], bool],
) -> Iterator[FileBatch]:
    """`at_pace` for the readings of a file."""
    return at_pace(batches, _slice, speed, clock, sleep)


def at_pace(
    batches: Iterable[T],
    cut: Callable[[T, int, int], T],
    speed: float | None,
    clock: Callable[[], float],
    sleep: Callable[[float], bool],
) -> Iterator[T]:
    """The batches cut into pieces, each when its time has come; ends early when `sleep` returns True.

    cut: (batch, start, stop) -> those rows of it. No batch may be empty.

    event time   t0 -------- t ------------>        a reading is due (t - t0) / speed seconds after the first;
    wall time    now ----- now + (t - t0)/speed     one that is out of order, or at NO_TIME, is due at once
    """
    start_seconds = clock()
    start_ms: int | None = None
    newest_ms = NO_TIME
    for batch in batches:
        if speed is None:
            for at in range(0, len(batch), READINGS_AT_ONCE):
                if sleep(0):
                    return
                yield cut(batch, at, min(at + READINGS_AT_ONCE, len(batch)))
            continue
        stream_time_ms = np.maximum(np.maximum.accumulate(batch.event_time_ms), newest_ms)
        newest_ms = int(stream_time_ms[-1])
        if start_ms is None and newest_ms > NO_TIME:
            start_seconds, start_ms = clock(), int(stream_time_ms[stream_time_ms > NO_TIME][0])
        first_ms = newest_ms if start_ms is None else start_ms
        due_seconds = start_seconds + (np.maximum(stream_time_ms, first_ms) - first_ms) / 1000 / speed
        at = 0
        while at < len(batch):
            now_seconds = clock()
            until = int(np.searchsorted(due_seconds, now_seconds, side="right"))
            until = min(until, at + READINGS_AT_ONCE)
            wait_seconds = max(0.0, float(due_seconds[at]) - now_seconds) if until <= at else 0.0
            if sleep(min(wait_seconds, LONGEST_SLEEP_SECONDS)):
                return
            if until > at:
                yield cut(batch, at, until)
                at = until


def _slice(batch: FileBatch, start: int, stop: int) -> FileBatch:
    """Rows start to stop. A small piece of a batch of many sensors names only its own: else each would cost as much as all."""
    rows = slice(start, stop)
    sensors, codes = batch.sensors, batch.codes[rows]
    if stop - start < len(sensors):
        own, relabelled = np.unique(codes, return_inverse=True)
        sensors, codes = [sensors[code] for code in own.tolist()], relabelled.astype(np.int32)
    return FileBatch(sensors, codes, batch.event_time_ms[rows], batch.values[rows], batch.field_names, batch.share_read)


def event_times(report: ReplayReport) -> tuple[str, str]:
    """First and last event time sent, as ISO 8601 in UTC."""

    def text(moment_ms: int | None) -> str:
        return "" if moment_ms is None else f"{np.datetime64(moment_ms, 'ms').astype('datetime64[s]')}Z"

    return text(report.first_ms), text(report.last_ms)


def check_speed(text: str) -> float | None:
    """ "max" -> None, "60" -> 60.0; ValueError for anything else."""
    if text == "max":
        return None
    speed = float(text)
    if not 0 < speed < float("inf"):
        raise ValueError(text)
    return speed
