"""What flows between the modules: a struct of NumPy arrays for each stage, no Python object per reading.

RecordColumns --serdes--> Readings --windows--> Steps --forecasting--> Forecasts --serdes--> OutgoingRecords
                    \\--> DeadLetters <--late--/
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Headers = tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True, slots=True)
class RecordColumns:
    """n records of one partition as positions into the bytes they came in: nothing is copied until somebody asks.

    `body` holds the records as Kafka's record format v2 lays them out (or any bytes, for records built by hand). Lengths are -1 for
    null. Offsets ascend strictly; gaps are normal (compaction, aborted transactions, control records).
    """

    topic: str
    partition: int
    body: bytes | memoryview
    offsets: Int64
    timestamps_ms: Int64
    """Record timestamps, epoch ms; -1 = none."""
    key_at: Int64
    key_len: Int64
    value_at: Int64
    value_len: Int64
    headers_at: Int64
    """Where the first header starts: key length, key, value length, value as zigzag varints and bytes, `headers_count` times."""
    headers_count: Int64

    def __len__(self) -> int:
        return len(self.offsets)

    def keys(self) -> list[bytes | None]:
        return _slices(self.body, self.key_at, self.key_len)

    def values(self) -> list[bytes | None]:
        return _slices(self.body, self.value_at, self.value_len)

    def key(self, row: int) -> bytes | None:
        return _slices(self.body, self.key_at[row : row + 1], self.key_len[row : row + 1])[0]

    def value(self, row: int) -> bytes | None:
        return _slices(self.body, self.value_at[row : row + 1], self.value_len[row : row + 1])[0]

    def headers(self, row: int) -> Headers:
        """The headers of one record, in order; a header's value may be None."""
        at = int(self.headers_at[row])
        out: list[tuple[str, bytes | None]] = []
        for _ in range(int(self.headers_count[row])):
            size, at = _varint(self.body, at)
            name = bytes(self.body[at : at + size]).decode("utf-8", "replace")
            at += size
            size, at = _varint(self.body, at)
            out.append((name, bytes(self.body[at : at + size]) if size >= 0 else None))
            at += max(size, 0)
        return tuple(out)

    def take(self, rows: NDArray[Any] | slice) -> RecordColumns:
        """The chosen records, in the order given; `rows` is an index array, a mask or a slice."""
        return RecordColumns(
            self.topic,
            self.partition,
            self.body,
            *(
                getattr(self, name)[rows]
                for name in (
                    "offsets",
                    "timestamps_ms",
                    "key_at",
                    "key_len",
                    "value_at",
                    "value_len",
                    "headers_at",
                    "headers_count",
                )
            ),
        )

    @staticmethod
    def build(
        topic: str,
        partition: int,
        records: Iterable[tuple[int, int, bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]],
    ) -> RecordColumns:
        """From (offset, timestamp_ms, key, value, headers) tuples: the slow way in, for clients that decode one by one and for tests."""
        body = bytearray()
        table: list[tuple[int, ...]] = []
        for offset, timestamp_ms, key, value, headers in records:
            row = [offset, timestamp_ms]
            for part in (key, value):
                row += [len(body), -1 if part is None else len(part)]
                body += part or b""
            row += [len(body), len(headers)]
            for name, content in headers:
                encoded = name.encode()
                body += zigzag_varint(len(encoded)) + encoded
                body += zigzag_varint(-1 if content is None else len(content)) + (content or b"")
            table.append(tuple(row))
        columns = np.array(table, np.int64).reshape(-1, 8).T
        return RecordColumns(topic, partition, bytes(body), *(np.ascontiguousarray(column) for column in columns))


@dataclass(frozen=True, slots=True)
class Readings:
    """n decoded readings of one partition, in log order."""

    sensors: list[bytes]
    """(n) sensor ids, UTF-8."""
    offsets: Int64
    event_time_ms: Int64
    values: Float64
    """(n, F) the configured fields; NaN = missing."""
    record: Int64
    """(n) the row in the RecordColumns that each came from."""

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, rows: slice) -> Readings:
        """A stretch of them."""
        return Readings(
            self.sensors[rows], self.offsets[rows], self.event_time_ms[rows], self.values[rows], self.record[rows]
        )

    @staticmethod
    def none(fields: int) -> Readings:
        nothing = np.empty(0, np.int64)
        return Readings([], nothing, nothing, np.empty((0, fields)), nothing)


@dataclass(frozen=True, slots=True)
class Rejected:
    """One record that could not become a reading, or came too late."""

    record: int
    """Row in the RecordColumns."""
    reason: str
    """One of `pipeline.stream.serdes.REASONS`: short, stable, fit for a metric's label."""
    message: str
    """What came, what was expected, how to mend it."""


@dataclass(frozen=True, slots=True)
class Steps:
    """m closed windows, ordered by (window, slot): the order in which stream time closes them, however the log was cut."""

    slot: Int32
    window: Int64
    """(m) index on the hop grid: the window is [window * hop_ms, window * hop_ms + size_ms)."""
    end_ms: Int64
    values: Float64
    """(m, C) one column per field and aggregate; NaN where the window held no value."""
    count: Int32
    """(m) readings in the window; 0 = a gap step."""
    reset: Bool
    """(m) True = the gap before this step was longer than the limit: what was remembered of the sensor is forgotten first."""
    offset: Int64
    """(m) offset of the reading whose event time closed the window."""

    def __len__(self) -> int:
        return len(self.slot)


STATUSES = ("ok", "warming", "baseline", "provisional", "stale")
OK, WARMING, BASELINE, PROVISIONAL, STALE = range(5)


@dataclass(frozen=True, slots=True)
class Forecasts:
    """m forecasts of one partition, in the order of the steps that caused them."""

    topic: str
    partition: int
    sensors: list[str]
    issued_at_ms: Int64
    """(m) end of the step consumed last."""
    mean: Float32
    """(m, H, K)"""
    quantiles: Float32
    """(m, H, K, Q)"""
    status: NDArray[np.uint8]
    """(m) index into STATUSES."""
    state_steps: Int32
    """(m) steps consumed since the sensor's state began or was last reset."""
    offset: Int64
    """(m) the input offset that closed the step."""
    model: str
    """Version that answered where the status is ok, stale or provisional."""
    baseline: str
    """Name of the baseline that answered elsewhere."""

    def __len__(self) -> int:
        return len(self.sensors)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The original record, byte for byte, and why it was refused."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str
    message: str
    stage: str
    """"VALUE_CONVERTER" or "TRANSFORMATION": Kafka Connect's names for where it failed."""


@dataclass(frozen=True, slots=True)
class OutgoingRecords:
    """Records for one partition of one topic, ready to be sent."""

    topic: str
    partition: int
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[Headers] | None = None
    timestamps_ms: Int64 | None = None
    """None: the time of sending."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(slots=True)
class Counts:
    """What one call of the task did: the figures metrics and summaries are made of."""

    records: int = 0
    readings: int = 0
    late: int = 0
    steps: int = 0
    gap_steps: int = 0
    resets: int = 0
    forecasts: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        for name in ("records", "readings", "late", "steps", "gap_steps", "resets", "forecasts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count


def zigzag_varint(number: int) -> bytes:
    """A signed integer as Kafka's record format writes it (Protocol Buffers' zigzag varint).

    >>> [zigzag_varint(n).hex() for n in (0, -1, 1, 64, 300)]
    ['00', '01', '02', '8001', 'd804']
    """
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _varint(body: bytes | memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = body[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (result >> 1) ^ -(result & 1), at
        shift += 7


def _slices(body: bytes | memoryview, at: Int64, length: Int64) -> list[bytes | None]:
    if len(length) and length.min() < 0:
        pairs = zip(at.tolist(), length.tolist())
        return [bytes(body[start : start + size]) if size >= 0 else None for start, size in pairs]
    whole = bytes(body) if not isinstance(body, bytes) else body
    return [whole[start:stop] for start, stop in zip(at.tolist(), (at + length).tolist())]
