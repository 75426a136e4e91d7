"""Bytes to readings, forecasts and dead letters to bytes. A bad record costs itself and nothing else.

A value is a JSON object (RFC 8259), decoded by a type built from the settings, so that unknown fields are skipped and never built.
Event time is a number, epoch seconds or milliseconds, or an ISO 8601 / RFC 3339 text; a text without an offset is UTC.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import orjson

from pipeline.stream.columns import (
    STATUSES,
    DeadLetter,
    Float64,
    Forecasts,
    Headers,
    Int64,
    OutgoingRecords,
    Readings,
    RecordColumns,
    Rejected,
)

REASONS: Final = {
    "null-value": "the record has no value",
    "over-long": "the value is longer than readings.max_bytes",
    "too-deep": f"nested deeper than {(MAX_DEPTH := 32)} levels",
    "not-json": "the value is not JSON",
    "not-an-object": "the value is JSON, but no object",
    "bad-field": "a configured field is not a number, or not a finite one",
    "no-sensor": "no sensor id",
    "bad-sensor": "the sensor id is not text, or longer than readings.max_sensor_bytes",
    "no-event-time": "no event time",
    "bad-event-time": "the event time cannot be read",
    "event-time-out-of-bounds": "the event time is absurd, or too far from the record's own timestamp",
    "late": "all its windows had closed",
}
"""Every reason for a dead letter: stable names, fit for a metric's label."""

CONVERTER, TRANSFORMATION = "VALUE_CONVERTER", "TRANSFORMATION"

_SECONDS_BELOW: Final = 1e11
"""A number below is epoch seconds (up to the year 5138), one above is milliseconds (from March 1973 on)."""
_MILLISECONDS_BELOW: Final = 1e14
"""Anything above would be later than the year 5138: microseconds or nanoseconds by mistake."""

_UNDECODABLE: Final = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""All that the decoder raises; the last is for text that is not UTF-8."""


@dataclass(frozen=True, slots=True)
class ReadingFormat:
    """What a reading looks like. Empty `event_time` = the record's timestamp; empty `sensor` = the record's key."""

    fields: tuple[str, ...]
    event_time: str = "ts"
    sensor: str = ""
    max_ahead_ms: int | None = 3_600_000
    """How far event time may be ahead of the record's timestamp; None = any."""
    max_behind_ms: int | None = None
    max_bytes: int = 65_536
    max_sensor_bytes: int = 256


class ReadingDecoder:
    """Record columns to readings, a whole batch at a time.

    >>> decode = ReadingDecoder(ReadingFormat(("value",))).decode
    >>> records = RecordColumns.build("t", 0, [(7, -1, b"pump-1", b'{"ts": 1769700000, "value": 21.5}', ()), (8, -1, b"pump-1", b"?", ())])
    >>> readings, rejected = decode(records)
    >>> readings.sensors, readings.event_time_ms.tolist(), readings.values.tolist(), readings.offsets.tolist()
    ([b'pump-1'], [1769700000000], [[21.5]], [7])
    >>> rejected[0].reason
    'not-json'
    """

    def __init__(self, format: ReadingFormat) -> None:
        self.format = format
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_reading_type(format))
        self._decode: Callable[[Any], Any] = decoder.decode

    def decode(self, records: RecordColumns) -> tuple[Readings, list[Rejected]]:
        """The good records in log order, and one `Rejected` for each bad one, by row.

        Deterministic: what becomes of a record depends on its own bytes and timestamp alone."""
        rejected: dict[int, Rejected] = {}
        keep = np.ones(len(records), np.bool_)

        def reject(rows: Any, reason: str, message: str) -> None:
            for row in rows:
                rejected.setdefault(int(row), Rejected(int(row), reason, message))
                keep[row] = False

        self._check_sizes(records, reject)
        values = records.values()
        self._check_depth(records, values, keep, reject)
        rows, structs = self._decode_values(values, np.flatnonzero(keep), reject)
        times = self._event_times(records, rows, structs, reject)
        sensors = self._sensors(records, rows, structs, reject)
        fields = np.empty((len(rows), len(self.format.fields)))
        for f in range(len(self.format.fields)):
            name = f"f{f}"
            fields[:, f] = [getattr(struct, name) for struct in structs]
        good = keep[rows]
        if not good.all():
            rows, times, fields = rows[good], times[good], fields[good]
            sensors = [sensor for sensor, is_good in zip(sensors, good.tolist()) if is_good]
        readings = Readings(sensors, records.offsets[rows], times, fields, rows)
        return readings, [rejected[row] for row in sorted(rejected)]

    def _check_sizes(self, records: RecordColumns, reject: Any) -> None:
        format = self.format
        reject(np.flatnonzero(records.value_len < 0), "null-value", "the value is null: expected a JSON object")
        for row in np.flatnonzero(records.value_len > format.max_bytes):
            size = int(records.value_len[row])
            reject(
                [row],
                "over-long",
                f"{size} bytes: expected at most {format.max_bytes}; raise readings.max_bytes if this is meant",
            )
        if not format.sensor:
            reject(
                np.flatnonzero(records.key_len <= 0),
                "no-sensor",
                "no key: expected the sensor id there; or set readings.sensor to a field",
            )
            for row in np.flatnonzero(records.key_len > format.max_sensor_bytes):
                reject([row], "bad-sensor", _too_long(int(records.key_len[row]), format.max_sensor_bytes))

    def _check_depth(self, records: RecordColumns, values: list[bytes | None], keep: Any, reject: Any) -> None:
        # The decoder's own limit depends on how deep Python's stack is; this one depends on the bytes alone.
        body = records.body if isinstance(records.body, bytes) else bytes(records.body)
        candidates = keep & (records.value_len > 0)
        first = np.frombuffer(body, np.uint8)[records.value_at[candidates]]
        # Every object opens at least one bracket, and one that is too deep more than MAX_DEPTH.
        if body.count(b"[") + body.count(b"{") < np.count_nonzero(first == ord("{")) + MAX_DEPTH:
            return
        for row in np.flatnonzero(keep):
            value = values[row] or b""
            if value.count(b"[") + value.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
                reject([row], "too-deep", f"nested deeper than {MAX_DEPTH} levels: expected a flat object")

    def _decode_values(self, values: list[bytes | None], rows: Int64, reject: Any) -> tuple[Int64, list[Any]]:
        decode = self._decode
        chosen = values if len(rows) == len(values) else [values[row] for row in rows.tolist()]
        try:
            return rows, [decode(value) for value in chosen]
        except _UNDECODABLE:
            pass  # somewhere in the batch: find it one by one
        structs, good = [], []
        for row, value in zip(rows.tolist(), chosen):
            try:
                structs.append(decode(value))
                good.append(row)
            except _UNDECODABLE as error:
                reject([row], self._reason(error), str(error))
        return np.array(good, np.int64), structs

    def _reason(self, error: Exception) -> str:
        if isinstance(error, UnicodeDecodeError):
            return "bad-sensor"  # the only text that is built; what is skipped is not looked into
        if not isinstance(error, msgspec.ValidationError):
            return "not-json"
        message = str(error)
        if " - at `$" not in message:
            return "not-an-object"
        path = message.rsplit(" - at `$", 1)[1].rstrip("`")
        if path == f".{self.format.event_time}" and self.format.event_time:
            return "bad-event-time"
        return "bad-sensor" if path == f".{self.format.sensor}" and self.format.sensor else "bad-field"

    def _event_times(self, records: RecordColumns, rows: Int64, structs: list[Any], reject: Any) -> Int64:
        format = self.format
        recorded = records.timestamps_ms[rows]
        if format.event_time:
            times = _epoch_ms([struct.t for struct in structs])
            where = f"field {format.event_time!r}"
        else:
            times = np.where(recorded < 0, np.nan, recorded.astype(np.float64))
            where = "the record's timestamp"
        missing = np.isnan(times)
        reject(
            rows[missing],
            "no-event-time",
            f"no event time in {where}: expected epoch seconds, milliseconds or ISO 8601",
        )
        absurd = ~missing & ~((times >= 0) & (times < _MILLISECONDS_BELOW))
        for row, time in zip(rows[absurd], times[absurd]):
            message = (
                f"event time {time:.0f} ms: expected epoch seconds or milliseconds between 1970 and 5138 in {where}"
            )
            reject([row], "event-time-out-of-bounds", message)
        safe = np.where(missing | absurd, 0, times).astype(np.int64)
        self._check_bounds(rows, safe, recorded, ~(missing | absurd) & (recorded >= 0), reject)
        return safe

    def _check_bounds(self, rows: Int64, times: Int64, recorded: Int64, comparable: Any, reject: Any) -> None:
        ahead = times - recorded
        for limit, sign, word in ((self.format.max_ahead_ms, 1, "ahead"), (self.format.max_behind_ms, -1, "behind")):
            if limit is None:
                continue
            for i in np.flatnonzero(comparable & (sign * ahead > limit)):
                message = (
                    f"event time {times[i]} is {sign * ahead[i]} ms {word} of the record's timestamp {recorded[i]}: "
                    f"expected at most {limit} ms; set readings.max_{word} if this is meant"
                )
                reject([rows[i]], "event-time-out-of-bounds", message)

    def _sensors(self, records: RecordColumns, rows: Int64, structs: list[Any], reject: Any) -> list[bytes]:
        format = self.format
        if not format.sensor:
            keys = records.keys()
            chosen: list[bytes] = keys if len(rows) == len(keys) else [keys[row] for row in rows.tolist()]  # type: ignore[assignment]
            if not _is_utf8(b"\n".join(chosen)):
                reject(
                    [row for row, key in zip(rows, chosen) if not _is_utf8(key)],
                    "bad-sensor",
                    "the key is not UTF-8 text",
                )
            return chosen
        ids = [struct.s for struct in structs]
        sensors = [b"" if sensor is None else str(sensor).encode("utf-8", "replace") for sensor in ids]
        where = f"field {format.sensor!r}"
        reject([row for row, sensor in zip(rows, sensors) if not sensor], "no-sensor", f"no sensor id in {where}")
        for row, sensor in zip(rows, sensors):
            if len(sensor) > format.max_sensor_bytes:
                reject([row], "bad-sensor", _too_long(len(sensor), format.max_sensor_bytes))
        return sensors


def encode_forecasts(
    forecasts: Forecasts, target_names: Sequence[str], quantiles: Sequence[float], step_ms: int, topic: str
) -> OutgoingRecords:
    """One JSON record a forecast, keyed by sensor, for the partition its readings came from; a value never observed is null."""
    m, horizon, targets = forecasts.mean.shape
    levels = len(quantiles)
    # (m, K, 1 + Q, H): rows in the order they are written, so that one dumps serves all and the text is only cut.
    table = np.empty((m, targets, 1 + levels, horizon), np.float32)
    table[:, :, 0] = forecasts.mean.transpose(0, 2, 1)
    table[:, :, 1:] = forecasts.quantiles.transpose(0, 2, 3, 1)
    text = orjson.dumps(table.reshape(-1, horizon), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    rows = text.replace(b"],[", b"]\n[").split(b"\n") if m else []
    names = [b"mean", *(f"q{level:g}".encode() for level in quantiles)]
    target = b"{%s}" % b",".join(b'"%s":%%s' % name for name in names)
    targets_text = b",".join(b"%s:%s" % (orjson.dumps(name).replace(b"%", b"%%"), target) for name in target_names)
    template = (
        b'{"sensor":%%s,"issued_at":%%d,"step_ms":%d,"horizon":%d,"targets":{%s},"model":%%s,"status":"%%s",'
        b'"state_steps":%%d,"source":{"partition":%d,"offset":%%d}}'
        % (step_ms, horizon, targets_text, forecasts.partition)
    )
    status = [name.encode() for name in STATUSES]
    answered_by = [
        orjson.dumps(forecasts.baseline if name in ("warming", "baseline") else forecasts.model) for name in STATUSES
    ]
    per = targets * (1 + levels)
    values = [
        template % (orjson.dumps(sensor), issued, *rows[at : at + per], answered_by[code], status[code], steps, offset)
        for sensor, issued, at, code, steps, offset in zip(
            forecasts.sensors,
            forecasts.issued_at_ms.tolist(),
            range(0, m * per, per),
            forecasts.status.tolist(),
            forecasts.state_steps.tolist(),
            forecasts.offset.tolist(),
        )
    ]
    return OutgoingRecords(topic, forecasts.partition, [sensor.encode() for sensor in forecasts.sensors], values)


def encode_dead_letters(
    letters: Sequence[DeadLetter], topic: str, partition: int, connector: str = "millrace"
) -> OutgoingRecords:
    """The original records with Kafka Connect's error headers (KIP-298), and `millrace.reason` beside them."""
    return OutgoingRecords(
        topic,
        partition,
        [letter.key for letter in letters],
        [letter.value for letter in letters],
        [letter.headers + _error_headers(letter, connector) for letter in letters],
    )


def _error_headers(letter: DeadLetter, connector: str) -> Headers:
    texts = (
        ("__connect.errors.topic", letter.topic),
        ("__connect.errors.partition", str(letter.partition)),
        ("__connect.errors.offset", str(letter.offset)),
        ("__connect.errors.connector.name", connector),
        ("__connect.errors.task.id", str(letter.partition)),
        ("__connect.errors.stage", letter.stage),
        ("__connect.errors.class.name", "pipeline.stream.serdes.ReadingDecoder"),
        ("__connect.errors.exception.class.name", f"millrace.{letter.reason}"),
        ("__connect.errors.exception.message", letter.message),
        ("millrace.reason", letter.reason),
    )
    return tuple((name, text.encode()) for name, text in texts)


def _reading_type(format: ReadingFormat) -> type:
    fields: list[tuple[str, Any, Any]] = []
    if format.event_time:
        number_or_text = int | float | datetime.datetime | None
        fields.append(("t", number_or_text, msgspec.field(name=format.event_time, default=None)))
    if format.sensor:
        fields.append(("s", str | int | None, msgspec.field(name=format.sensor, default=None)))
    fields += [(f"f{f}", float | None, msgspec.field(name=name, default=None)) for f, name in enumerate(format.fields)]
    # gc=False: the structs hold no cycles, and the collector would walk a batch of them again and again.
    return msgspec.defstruct("Reading", fields, gc=False)


def _epoch_ms(times: list[Any]) -> Float64:
    """Epoch ms as float64 (exact up to the year 287396); NaN where there is none, infinity where it cannot be held."""
    try:
        raw = np.array(times, np.float64)
        is_text = np.zeros(len(times), np.bool_)
    except (TypeError, OverflowError):
        raw = np.array([_one_epoch(time) for time in times], np.float64)
        is_text = np.array([isinstance(time, datetime.datetime) for time in times], np.bool_)
    seconds = (np.abs(raw) < _SECONDS_BELOW) & ~is_text
    return np.where(seconds, np.rint(np.where(seconds, raw, 0.0) * 1000), np.floor(raw))


def _one_epoch(time: Any) -> float:
    """A number as it stands, a date as epoch ms."""
    if isinstance(time, datetime.datetime):
        aware = time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
        return float(round(aware.timestamp() * 1000))
    try:
        return float("nan") if time is None else float(time)
    except OverflowError:
        return float("inf")


def _depth(value: bytes) -> int:
    """Deepest nesting of a JSON text; brackets inside strings do not count."""
    deepest = depth = 0
    in_string = escaped = False
    for byte in value:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _too_long(size: int, limit: int) -> str:
    return f"sensor id of {size} bytes: expected at most {limit}; raise readings.max_sensor_bytes if this is meant"
