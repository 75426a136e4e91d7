"""However the log is cut, the same steps come out, and they are the textbook's."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.columns import Readings, Steps
from pipeline.stream.state import SensorTable
from pipeline.stream.windows import WindowOperator, WindowRule
from tests.helpers.textbook_windows import TextbookWindows

rules = st.builds(
    lambda hop, overlap, grace, aggregates, gap: WindowRule(
        hop * overlap, hop, grace, ("a", "b"), tuple(aggregates), gap
    ),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 4]),
    st.sampled_from([0, 0, 1, 2, 9]),  # short beside the steps below: most readings meet a window's border
    st.lists(st.sampled_from(["mean", "sum", "min", "max", "last", "count"]), min_size=1, max_size=6, unique=True),
    st.integers(0, 4),
)
number = st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6))
log = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.one_of(st.integers(0, 4), st.integers(0, 4), st.integers(0, 100)),
        st.booleans(),
        number,
        number,
    ),
    min_size=1,
    max_size=60,
)


def make_readings(rows: list) -> Readings:
    """Times go forward by small steps, or jump; every other may step back."""
    times, now = [], 0
    for _, delta, back, _, _ in rows:
        times.append(max(0, now - delta) if back else now + delta)
        now = max(now, times[-1])
    return Readings(
        [b"s%d" % row[0] for row in rows],
        np.arange(100, 100 + 2 * len(rows), 2),
        np.array(times, np.int64),
        np.array([row[3:] for row in rows], np.float64),
        np.arange(len(rows)),
    )


def run(rule: WindowRule, readings: Readings, cuts: list[int]) -> tuple[list[tuple], list[int]]:
    operator = WindowOperator(rule)
    table = SensorTable(operator.columns(), operator.partition_columns(), capacity=1)
    out: list[tuple] = []
    late: list[int] = []
    edges = [0, *sorted(cuts), len(readings)]
    for start, stop in itertools.pairwise(edges):
        part = Readings(
            readings.sensors[start:stop],
            readings.offsets[start:stop],
            readings.event_time_ms[start:stop],
            readings.values[start:stop],
            np.arange(stop - start),
        )
        steps, late_rows = operator.advance(table.slots(part.sensors), part, table)
        out += rows_of(steps)
        late += part.offsets[late_rows].tolist()
    return out, late


def rows_of(steps: Steps) -> list[tuple]:
    return [
        (
            int(steps.slot[i]),
            int(steps.window[i]),
            tuple(map(repr, steps.values[i].tolist())),
            int(steps.count[i]),
            bool(steps.reset[i]),
            int(steps.offset[i]),
        )
        for i in range(len(steps))
    ]


@settings(max_examples=300, deadline=None)
@given(rules, log, st.data())
def test_any_cutting_of_the_log_gives_the_textbooks_steps(rule: WindowRule, rows: list, data: st.DataObject) -> None:
    readings = make_readings(rows)
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=5))
    textbook = TextbookWindows(rule)
    slots: dict[bytes, int] = {}
    textbook.feed(
        (slots.setdefault(sensor, len(slots)), int(offset), int(time), values)
        for sensor, offset, time, values in zip(
            readings.sensors, readings.offsets, readings.event_time_ms, readings.values.tolist()
        )
    )
    expected = [(s, w, tuple(map(repr, v)), n, r, o) for s, w, v, n, r, o in textbook.steps]

    steps, late = run(rule, readings, cuts)

    assert steps == expected
    assert late == textbook.late


@settings(max_examples=50, deadline=None)
@given(rules, log, st.integers(0, 60))
def test_a_restored_table_goes_on_as_if_nothing_had_happened(rule: WindowRule, rows: list, cut: int) -> None:
    readings = make_readings(rows)
    operator = WindowOperator(rule)
    table = SensorTable(operator.columns(), operator.partition_columns())
    slots = table.slots(readings.sensors)
    head, tail = (_part(readings, slice(None, cut)), _part(readings, slice(cut, None)))
    operator.advance(slots[:cut], head, table)
    other = SensorTable(operator.columns(), operator.partition_columns())
    other.restore(table.snapshot())

    went_on, _ = operator.advance(slots[cut:], tail, table)
    restored, _ = operator.advance(slots[cut:], tail, other)

    assert rows_of(went_on) == rows_of(restored)
    for name, column in table.snapshot().rows.items():
        np.testing.assert_array_equal(column, other.snapshot().rows[name])


def _part(readings: Readings, rows: slice) -> Readings:
    return Readings(
        readings.sensors[rows],
        readings.offsets[rows],
        readings.event_time_ms[rows],
        readings.values[rows],
        readings.record[rows],
    )


def test_a_hundred_thousand_sensors_and_a_jump_of_centuries_in_windows_of_one_millisecond() -> None:
    rule = WindowRule(1, 1, 0, ("a", "b"), max_gap_steps=0)
    sensors = 100_000
    readings = Readings(
        [b"s%d" % sensor for sensor in range(sensors)] + [b"s99999", b"s99998"],
        np.arange(sensors + 2),
        np.r_[np.zeros(sensors, np.int64), 99_999_999_999_998, 99_999_999_999_999],
        np.ones((sensors + 2, 2)),
        np.arange(sensors + 2),
    )
    whole, late = run(rule, readings, [])
    assert late == []
    assert [row[:2] for row in whole] == [(sensor, 0) for sensor in range(sensors)] + [(99_999, 99_999_999_999_998)]
    assert whole == run(rule, readings, [sensors, sensors + 1])[0]


def test_a_sum_beyond_what_a_float_holds_disturbs_no_other_window() -> None:
    rule = WindowRule(10, 10, 0, ("a", "b"), ("sum",), max_gap_steps=0)
    values = np.array([[1e308, 1.0], [1e308, 1.0], [-1e308, 1.0], [5.0, 1.0], [0.0, 1.0]])
    readings = Readings([b"s"] * 5, np.arange(5), np.array([0, 1, 2, 10, 20]), values, np.arange(5))
    steps, _ = run(rule, readings, [])
    assert [row[2] for row in steps] == [("inf", "3.0"), ("5.0", "1.0")]
