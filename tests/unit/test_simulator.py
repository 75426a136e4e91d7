"""The simulated fleet: pure, so cut anywhere; honest, so that what it says it broke is broken."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.service.simulator import DAY_MS, FAULTS, FIELDS, HOUR_MS, SOUND, WEEK_MS, Fleet, Habits, SimulatedBatch
from pipeline.stream.columns import RecordColumns
from pipeline.stream.serdes import REASONS, ReadingDecoder, ReadingFormat

START = 1_769_700_000_000 // DAY_MS * DAY_MS


def as_records(batch: SimulatedBatch) -> RecordColumns:
    rows = zip(batch.timestamps_ms.tolist(), batch.keys, batch.values)
    return RecordColumns.build("t", 0, ((i, time, key, value, ()) for i, (time, key, value) in enumerate(rows)))


def test_equal_arguments_make_equal_messages():
    one, other = (Fleet(7, seed=3).generate(START, START + DAY_MS) for _ in range(2))
    assert one.values == other.values
    assert one.keys == other.keys
    assert Fleet(7, seed=4).generate(START, START + DAY_MS).values != one.values


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3 * DAY_MS), max_size=6))
def test_wherever_time_is_cut_the_same_messages_are_sent(cuts: list[int]):
    edges = [0, *sorted(cuts), 3 * DAY_MS]
    fleet = Fleet(5, seed=2, habits=Habits(broken=0.01, late=0.05, delayed=0.1))
    whole = fleet.generate(START, START + 3 * DAY_MS)
    parts = [fleet.generate(START + a, START + b) for a, b in pairwise(edges)]
    assert [value for part in parts for value in part.values] == whole.values
    assert [key for part in parts for key in part.keys] == whole.keys
    assert np.concatenate([part.fault for part in parts]).tolist() == whole.fault.tolist()


def test_messages_are_ordered_by_when_they_were_sent_and_some_arrive_out_of_order():
    batch = Fleet(10, seed=1).generate(START, START + 2 * DAY_MS)
    assert (np.diff(batch.timestamps_ms) >= 0).all()
    assert (batch.event_time_ms <= batch.timestamps_ms).all()
    assert (np.diff(batch.event_time_ms) < 0).any()


def test_the_decoder_refuses_exactly_what_was_broken_for_the_reason_foretold():
    fleet = Fleet(20, seed=5, habits=Habits(broken=0.02))
    batch = fleet.generate(START, START + DAY_MS)
    readings, rejected = ReadingDecoder(ReadingFormat(FIELDS)).decode(as_records(batch))
    assert {refused.record: refused.reason for refused in rejected} == {
        row: FAULTS[batch.fault[row]].reason for row in np.flatnonzero(batch.fault != SOUND).tolist()
    }
    assert len(set(batch.fault.tolist())) == len(FAULTS) + 1, "every kind of fault occurs"
    assert readings.record.tolist() == np.flatnonzero(batch.sound).tolist()
    assert readings.event_time_ms.tolist() == batch.event_time_ms[batch.sound].tolist()
    assert readings.values[:, 0].tolist() == batch.temperature[batch.sound].tolist()
    assert batch.broken() == {
        reason: sum(refused.reason == reason for refused in rejected) for reason in {r.reason for r in rejected}
    }


def test_every_reason_but_lateness_is_provoked():
    assert {fault.reason for fault in FAULTS} == set(REASONS) - {"late"}


def test_some_sensors_have_no_gauge_and_some_readings_a_null():
    readings, _ = ReadingDecoder(ReadingFormat(FIELDS)).decode(as_records(Fleet(20).generate(START, START + DAY_MS)))
    missing = np.isnan(readings.values[:, 1])
    gaugeless = np.array([sensor in (b"mill-010", b"mill-020") for sensor in readings.sensors])
    assert missing[gaugeless].all()
    assert 0 < missing[~gaugeless].mean() < 0.1
    assert not np.isnan(readings.values[:, 0]).any()


def test_dropouts_leave_hours_without_a_reading():
    silent = Fleet(1, habits=Habits(dropouts=1.0, late=0.0, delayed=0.0, broken=0.0)).generate(
        START, START + 7 * DAY_MS
    )
    gaps = np.diff(silent.event_time_ms)
    assert gaps.max() >= HOUR_MS
    assert gaps.max() <= 17 * HOUR_MS  # two silences may meet at midnight


def test_days_repeat_more_closely_than_hours_do():
    fleet = Fleet(30, habits=Habits(dropouts=0.0, late=0.0, delayed=0.0, broken=0.0))
    monday = START - (START - 4 * DAY_MS) % WEEK_MS
    batch = fleet.generate(monday, monday + 4 * DAY_MS)
    hourly = batch.temperature.reshape(4 * 24, -1, 30)[:, 0, :]
    day, half = np.abs(hourly[24:] - hourly[:-24]).mean(), np.abs(hourly[12:] - hourly[:-12]).mean()
    assert day < half / 2


def test_a_weekend_is_calmer_than_a_weekday():
    fleet = Fleet(30, habits=Habits(dropouts=0.0, late=0.0, delayed=0.0, broken=0.0))
    monday = START - (START - 4 * DAY_MS) % WEEK_MS
    week = fleet.generate(monday, monday + WEEK_MS).temperature.reshape(7, -1, 30)
    assert np.ptp(week[6], axis=0).mean() < np.ptp(week[2], axis=0).mean()


def test_an_interval_that_does_not_fill_a_day_is_refused():
    with pytest.raises(ValueError, match="whole part of a day"):
        Fleet(3, interval_ms=7 * HOUR_MS)
