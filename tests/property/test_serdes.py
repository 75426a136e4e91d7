"""The batch decoder against `json.loads`, one record at a time: a bad record costs itself and nothing else."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.columns import RecordColumns
from pipeline.stream.serdes import MAX_DEPTH, REASONS, ReadingDecoder, ReadingFormat

NOW = 1_769_700_000_000
FORMATS = [
    ReadingFormat(("value",)),
    ReadingFormat(("value", "pressure"), event_time="", max_bytes=200),
    ReadingFormat(
        ("value",), event_time="time", sensor="id", max_ahead_ms=None, max_behind_ms=1000, max_sensor_bytes=8
    ),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    # NaN and infinity are no JSON (`broken` has them); the decoder may meet another fault of the record before them.
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6),
    st.integers(NOW - 5000, NOW + 5000),
)
times = st.one_of(
    st.integers(NOW - 5000, NOW + 5000),
    st.integers(NOW // 1000 - 5, NOW // 1000 + 5),
    st.datetimes(datetime.datetime(2026, 1, 29), datetime.datetime(2026, 1, 30)).map(lambda time: time.isoformat()),
    scalars,
)
objects = st.fixed_dictionaries(
    {},
    optional={
        "ts": times,
        "time": times,
        "id": st.one_of(st.just("pump-1"), scalars),
        "value": st.one_of(st.floats(-1e9, 1e9), scalars, st.lists(scalars, max_size=2)),
        "pressure": scalars,
        "unknown": st.recursive(scalars, lambda inner: st.lists(inner, max_size=2), max_leaves=3),
    },
)
good = st.fixed_dictionaries(
    {
        "ts": st.integers(NOW - 5000, NOW),
        "time": st.integers(NOW - 5000, NOW),
        "id": st.just("p"),
        "value": st.floats(-9, 9),
    }
)
broken = st.sampled_from(
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"ts": 1}{}',
        b'{"value": NaN, "ts": 1769700000}',
        b'{"value": 1e999, "ts": 1769700000, "id": "a"}',
        b"\xef\xbb\xbf{}",
        b'{"x":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"x": "' + b"[" * 40 + b'", "ts": 1769700000, "time": 1769700000, "id": "a", "value": 1}',
    ]
)
values = st.one_of(
    good.map(lambda o: json.dumps(o).encode()), objects.map(lambda o: json.dumps(o).encode()), broken, st.none()
)
keys = st.one_of(st.just(b"pump-1"), st.just("höhe".encode()), st.just(b"\xff"), st.none(), st.just(b"k" * 300))
records = st.lists(st.tuples(st.one_of(st.just(NOW), st.just(-1)), keys, values), max_size=12)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FORMATS), records)
def test_every_record_is_judged_as_json_loads_would_judge_it_alone(format: ReadingFormat, rows: list) -> None:
    columns = RecordColumns.build("t", 0, [(i, time, key, value, ()) for i, (time, key, value) in enumerate(rows)])
    expected = [judge(format, *row) for row in rows]

    readings, rejected = ReadingDecoder(format).decode(columns)

    assert [(refused.record, refused.reason) for refused in rejected] == [
        (i, outcome) for i, outcome in enumerate(expected) if isinstance(outcome, str)
    ]
    found = list(zip(readings.sensors, readings.event_time_ms.tolist(), map(tuple, readings.values.tolist())))
    wanted = [outcome for outcome in expected if not isinstance(outcome, str)]
    assert repr(found) == repr(wanted)
    assert readings.record.tolist() == [i for i, outcome in enumerate(expected) if not isinstance(outcome, str)]
    assert all(refused.reason in REASONS and refused.message for refused in rejected)


def judge(format: ReadingFormat, timestamp: int, key: bytes | None, value: bytes | None) -> str | tuple:
    """A reading, or the reason why not; the checks in the decoder's documented order."""
    if value is None:
        return "null-value"
    if len(value) > format.max_bytes:
        return "over-long"
    if not format.sensor and not key:
        return "no-sensor"
    if not format.sensor and len(key) > format.max_sensor_bytes:
        return "bad-sensor"
    try:
        content = json.loads(value.decode(), parse_constant=_refuse)  # as text: bytes would let a byte order mark pass
    except (ValueError, RecursionError):
        return "too-deep" if value.count(b"[") > MAX_DEPTH else "not-json"
    if nesting(content) > MAX_DEPTH:
        return "too-deep"
    if not isinstance(content, dict):
        return "not-an-object"
    return judge_object(format, timestamp, key, content)


def judge_object(format: ReadingFormat, timestamp: int, key: bytes | None, content: dict[str, Any]) -> str | tuple:
    for name in content:  # the decoder meets the fields in the order of the text
        item = content[name]
        if name in format.fields and not (item is None or (is_number(item) and math.isfinite(as_float(item)))):
            return "bad-field"
        if format.event_time == name and not (item is None or readable_time(item)):
            return "bad-event-time"
        if format.sensor == name and not (item is None or isinstance(item, str) or is_integer(item)):
            return "bad-sensor"
    time = epoch_ms(content.get(format.event_time)) if format.event_time else (None if timestamp < 0 else timestamp)
    if time is None:
        return "no-event-time"
    if not 0 <= time < 1e14:
        return "event-time-out-of-bounds"
    ahead = time - timestamp
    if timestamp >= 0 and format.max_ahead_ms is not None and ahead > format.max_ahead_ms:
        return "event-time-out-of-bounds"
    if timestamp >= 0 and format.max_behind_ms is not None and -ahead > format.max_behind_ms:
        return "event-time-out-of-bounds"
    sensor = key
    if format.sensor:
        item = content.get(format.sensor)
        sensor = b"" if item is None else str(item).encode("utf-8", "replace")
        if not sensor:
            return "no-sensor"
        if len(sensor) > format.max_sensor_bytes:
            return "bad-sensor"
    try:
        sensor.decode()
    except UnicodeDecodeError:
        return "bad-sensor"
    return (
        sensor,
        int(time),
        tuple(math.nan if content.get(name) is None else float(content[name]) for name in format.fields),
    )


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def nesting(content: Any) -> int:
    if isinstance(content, dict):
        return 1 + max(map(nesting, content.values()), default=0)
    if isinstance(content, list):
        return 1 + max(map(nesting, content), default=0)
    return 0


def is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)


def is_integer(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def as_float(item: float) -> float:
    try:
        return float(item)
    except OverflowError:
        return math.inf


def readable_time(item: Any) -> bool:
    if is_number(item):
        return math.isfinite(as_float(item))
    return isinstance(item, str) and len(item) >= 19 and epoch_ms(item) is not None


def epoch_ms(item: Any) -> float | None:
    if isinstance(item, str):
        try:
            time = datetime.datetime.fromisoformat(item)
        except ValueError:
            return None
        return float(round(time.replace(tzinfo=time.tzinfo or datetime.UTC).timestamp() * 1000))
    if item is None:
        return None
    return float(np.rint(float(item) * 1000)) if float(item) < 1e11 else math.floor(as_float(item))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"1769700000", 1_769_700_000_000),
        (b"1769700000.25", 1_769_700_000_250),
        (b"1769700000123", 1_769_700_000_123),
        (b'"2026-01-29T15:20:00Z"', 1_769_700_000_000),
        (b'"2026-01-29 15:20:00"', 1_769_700_000_000),
        (b'"2026-01-29T16:20:00.5+01:00"', 1_769_700_000_500),
    ],
)
def test_event_time_is_read_as_seconds_milliseconds_or_iso_8601(text: bytes, expected: int) -> None:
    columns = RecordColumns.build("t", 0, [(0, -1, b"s", b'{"ts": %s, "value": 1}' % text, ())])
    readings, rejected = ReadingDecoder(ReadingFormat(("value",))).decode(columns)
    assert rejected == []
    assert readings.event_time_ms.tolist() == [expected]


def test_a_time_in_microseconds_is_refused_and_the_message_says_what_was_expected() -> None:
    columns = RecordColumns.build("t", 0, [(0, -1, b"s", b'{"ts": 1769700000000000, "value": 1}', ())])
    _, (refused,) = ReadingDecoder(ReadingFormat(("value",))).decode(columns)
    assert refused.reason == "event-time-out-of-bounds"
    assert "expected epoch seconds or milliseconds" in refused.message


@pytest.mark.parametrize("sensor", [b"\xff", b"\xed\xa0\x80"], ids=["no UTF-8", "a lone surrogate"])
def test_a_sensor_id_that_is_not_utf_8_costs_itself_and_nothing_else(sensor: bytes) -> None:
    values = [b'{"ts": 1769700000, "value": 1, "id": "%s"}' % text for text in (b"a", sensor, b"b")]
    columns = RecordColumns.build("t", 0, [(i, -1, None, value, ()) for i, value in enumerate(values)])
    readings, (refused,) = ReadingDecoder(ReadingFormat(("value",), sensor="id")).decode(columns)
    assert readings.sensors == [b"a", b"b"]
    assert (refused.record, refused.reason) == (1, "bad-sensor")


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
@pytest.mark.parametrize("neighbour", [None, b"1", b'{"ts": 1769700000, "value": 2}', b'{"a": [{}]}'])
def test_whether_a_record_is_too_deep_does_not_depend_on_its_neighbours(depth: int, neighbour: bytes | None) -> None:
    deep = b'{"ts": 1769700000, "value": 1, "x": %s}' % (b"[" * (depth - 1) + b"]" * (depth - 1))
    for neighbours in (0, 1, 50):
        rows = [(i, -1, b"s", value, ()) for i, value in enumerate([deep, *[neighbour] * neighbours])]
        _, rejected = ReadingDecoder(ReadingFormat(("value",))).decode(RecordColumns.build("t", 0, rows))
        reasons = {refused.record: refused.reason for refused in rejected}
        assert reasons.get(0) == ("too-deep" if depth > MAX_DEPTH else None)


@pytest.mark.parametrize("time", [b"1e307", b"-1e308", b"-1e12"])
def test_an_absurd_event_time_is_refused_without_a_word_from_numpy(time: bytes) -> None:
    columns = RecordColumns.build("t", 0, [(0, -1, b"s", b'{"ts": %s, "value": 1}' % time, ())])
    _, (refused,) = ReadingDecoder(ReadingFormat(("value",))).decode(columns)
    assert refused.reason == "event-time-out-of-bounds"
