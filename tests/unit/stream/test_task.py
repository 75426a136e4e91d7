"""One partition's whole path with the baseline: no broker, no TensorFlow."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.stream.columns import BASELINE, STATUSES, RecordColumns
from pipeline.stream.serdes import encode_dead_letters, encode_forecasts
from pipeline.stream.task import ForecastTask, TaskOutput
from tests.helpers.streams import HOUR, START, cut, fleet, reading, records, task_settings


def run_all(task: ForecastTask, pairs: list, edges: list[int] = ()) -> list[TaskOutput]:
    return [task.run(records(part, first)) for first, part in cut(pairs, edges)]


def rows(outputs: list[TaskOutput]) -> list[tuple]:
    return [
        (f.sensors[i], int(f.issued_at_ms[i]), int(f.offset[i]), int(f.status[i]), int(f.state_steps[i]))
        for f in (output.forecasts for output in outputs)
        for i in range(len(f))
    ]


def test_every_closed_window_becomes_exactly_one_forecast() -> None:
    outputs = run_all(ForecastTask(task_settings()), fleet(sensors=5, hours=10))
    assert rows(outputs) == [
        (f"pump-{s}", START + (hour + 1) * HOUR, (hour + 1) * 10, BASELINE, hour + 1)
        for hour in range(9)
        for s in range(5)
    ]
    assert outputs[0].counts.steps == outputs[0].counts.forecasts == 45
    assert outputs[0].next_offset == 100


@pytest.mark.parametrize("edges", [[1], [10, 11, 12], list(range(1, 100)), [50]])
def test_forecasts_do_not_depend_on_how_polls_cut_the_log(edges: list[int]) -> None:
    pairs = fleet(sensors=5, hours=10)
    whole = run_all(ForecastTask(task_settings()), pairs)
    parts = run_all(ForecastTask(task_settings()), pairs, edges)
    assert rows(parts) == rows(whole)
    mean = np.concatenate([output.forecasts.mean for output in parts])
    np.testing.assert_allclose(mean, whole[0].forecasts.mean, rtol=1e-6)


@pytest.mark.parametrize("emit_from", range(51))
def test_records_before_emit_from_rebuild_state_in_silence(emit_from: int) -> None:
    pairs = [*fleet(sensors=3, hours=8), (b"pump-0", b"broken")]
    pairs.insert(5, (b"pump-0", b"broken too"))
    undisturbed = run_all(ForecastTask(task_settings()), pairs, [emit_from])
    after = [output for output in undisturbed if output.next_offset > emit_from]
    (rebuilt,) = run_all(ForecastTask(task_settings(), emit_from=emit_from), pairs)
    assert rows([rebuilt]) == rows(after)
    assert [letter.offset for letter in rebuilt.dead_letters] == [n for n in (5, 49) if n >= emit_from]
    if after:
        np.testing.assert_array_equal(rebuilt.forecasts.quantiles, after[0].forecasts.quantiles)
        assert rebuilt.counts == after[0].counts


def test_a_bad_record_becomes_one_dead_letter_and_its_neighbours_never_notice() -> None:
    good = fleet(sensors=3, hours=6)
    bad = [
        (b"pump-1", b"{"),
        (None, b"{}"),
        (b"pump-2", b'{"ts": 1, "value": "a"}'),
        (b"\xff", good[0][1]),
        (b"pump-0", None),
    ]
    mixed = list(good)
    for place, pair in zip((3, 9, 17, 26, 30), bad):
        mixed.insert(place, pair)
    (clean,), (dirty,) = run_all(ForecastTask(task_settings()), good), run_all(ForecastTask(task_settings()), mixed)
    np.testing.assert_array_equal(dirty.forecasts.mean, clean.forecasts.mean)
    np.testing.assert_array_equal(dirty.forecasts.issued_at_ms, clean.forecasts.issued_at_ms)
    assert [letter.reason for letter in dirty.dead_letters] == [
        "not-json",
        "no-sensor",
        "bad-field",
        "bad-sensor",
        "null-value",
    ]
    assert [(letter.key, letter.value) for letter in dirty.dead_letters] == bad
    assert dirty.counts.rejected == {"not-json": 1, "no-sensor": 1, "bad-field": 1, "bad-sensor": 1, "null-value": 1}


def test_a_late_reading_does_not_reopen_its_window() -> None:
    pairs = [
        reading("pump-1", START, value=1.0),
        reading("pump-1", START + HOUR, value=2.0),  # closes the first hour
        reading("pump-1", START + 5, value=99.0),  # late
        reading("pump-1", START + 2 * HOUR, value=3.0),  # closes the second
    ]
    (output,) = run_all(ForecastTask(task_settings()), pairs)
    assert output.forecasts.mean[:, 0, 0].tolist() == [1.0, 2.0]
    (letter,) = output.dead_letters
    assert (letter.reason, letter.offset, letter.stage) == ("late", 2, "TRANSFORMATION")
    assert "raise windows.grace" in letter.message
    assert output.counts.late == 1


def test_a_silent_sensor_makes_gap_steps_up_to_the_limit_and_then_starts_anew() -> None:
    clock = [reading("clock", START + hour * HOUR, value=0.0) for hour in range(12)]
    pump = {0: 1.0, 1: 2.0, 9: 5.0, 10: 6.0}
    pairs = []
    for hour, tick in enumerate(clock):
        pairs.append(tick)
        if hour in pump:
            pairs.append(reading("pump", START + hour * HOUR + 1, value=pump[hour]))
    outputs = run_all(ForecastTask(task_settings()), pairs)
    of_pump = [
        ((issued - START) // HOUR - 1, steps) for sensor, issued, _, _, steps in rows(outputs) if sensor == "pump"
    ]
    # hours 0, 1: readings; 2..4: the three gap steps of the limit; then silence; from 9 on the state is new
    assert of_pump == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (9, 1), (10, 2)]
    assert outputs[0].counts.gap_steps == 3
    assert outputs[0].counts.resets == 1


def test_a_sensor_without_any_value_yet_has_no_forecast() -> None:
    pairs = [reading("pump", START + hour * HOUR, value=None if hour < 2 else 4.0) for hour in range(5)]
    outputs = run_all(ForecastTask(task_settings()), pairs)
    assert [(row[1] - START) // HOUR for row in rows(outputs)] == [3, 4]
    assert np.isfinite(outputs[0].forecasts.quantiles).all()


def test_a_forecast_record_says_what_the_design_promises() -> None:
    (output,) = run_all(
        ForecastTask(task_settings(fields=("a%", "b é"))),
        [
            reading("pümp", START + hour * HOUR, **{"a%": float(hour), "b é": None if hour < 2 else 7.5})
            for hour in range(4)
        ],
    )
    sent = encode_forecasts(output.forecasts, ("a%", "b é"), (0.1, 0.5, 0.9), HOUR, "plant.forecasts.v1")
    assert sent.keys == ["pümp".encode()] * 3
    first, _, last = map(json.loads, sent.values)
    assert set(first) == {
        "sensor",
        "issued_at",
        "step_ms",
        "horizon",
        "targets",
        "model",
        "status",
        "state_steps",
        "source",
    }
    assert first["sensor"] == "pümp"
    assert first["issued_at"] == START + HOUR
    assert (first["step_ms"], first["horizon"], first["status"], first["state_steps"]) == (
        HOUR,
        3,
        STATUSES[BASELINE],
        1,
    )
    assert first["source"] == {"partition": 0, "offset": 1}
    assert first["targets"]["a%"] == {"mean": [0.0] * 3, "q0.1": [0.0] * 3, "q0.5": [0.0] * 3, "q0.9": [0.0] * 3}
    assert first["targets"]["b é"]["mean"] == [None] * 3
    assert last["targets"]["b é"]["mean"] == [7.5] * 3
    np.testing.assert_allclose(last["targets"]["a%"]["q0.9"], output.forecasts.quantiles[2, :, 0, 2], rtol=1e-6)


def test_a_dead_letter_carries_the_original_bytes_and_connects_headers() -> None:
    columns = RecordColumns.build(
        "plant.readings.v1", 3, [(41, 5, b"k", b"\x00\xff", (("trace", b"1"), ("empty", None)))]
    )
    output = ForecastTask(task_settings()).run(columns)
    sent = encode_dead_letters(output.dead_letters, "plant.dead-letters.v1", 3)
    assert (sent.keys, sent.values) == ([b"k"], [b"\x00\xff"])
    headers = sent.headers[0]
    assert headers[:2] == (("trace", b"1"), ("empty", None))
    found = dict(headers[2:])
    assert found["__connect.errors.topic"] == b"plant.readings.v1"
    assert found["__connect.errors.partition"] == b"3"
    assert found["__connect.errors.offset"] == b"41"
    assert found["__connect.errors.stage"] == b"VALUE_CONVERTER"
    assert found["millrace.reason"] == b"not-json"
    assert b"malformed" in found["__connect.errors.exception.message"]


def test_a_silent_partition_says_provisionally_what_its_open_windows_hold() -> None:
    task = ForecastTask(task_settings(grace_ms=HOUR // 2))
    run_all(task, [reading("a", START + 10, value=1.0), reading("b", START + HOUR + 10, value=2.0)])
    # [START ---- +1 h) closes at +1.5 h, [+1 h ---- +2 h) at +2.5 h; stream time stands at +1 h 10 ms.
    assert task.provisional("t", 0, HOUR, 1) == []
    (forecasts,) = task.provisional("t", 0, 3 * HOUR // 2, 1)
    assert [STATUSES[status] for status in forecasts.status] == ["provisional"] * 3
    assert list(zip(forecasts.sensors, (forecasts.issued_at_ms - START).tolist())) == [
        ("a", HOUR),
        ("a", 2 * HOUR),  # its gap step: it was silent in the window that b spoke in
        ("b", 2 * HOUR),
    ]
    assert forecasts.offset.tolist() == [1, 1, 1]
    assert forecasts.model == "SeasonalNaive"


def test_provisional_forecasts_are_those_that_the_next_reading_would_have_caused() -> None:
    pairs = fleet(sensors=4, hours=9)
    task = ForecastTask(task_settings())
    task.run(records(pairs))
    (early,) = task.provisional("plant.readings.v1", 0, HOUR, len(pairs) - 1)
    later = task.run(records([reading("pump-0", START + 9 * HOUR, value=1.0)], len(pairs))).forecasts
    assert early.sensors == later.sensors
    np.testing.assert_array_equal(early.mean, later.mean)
    np.testing.assert_array_equal(early.quantiles, later.quantiles)
    np.testing.assert_array_equal(early.state_steps, later.state_steps)


def test_a_partition_in_which_nothing_is_open_has_nothing_to_say() -> None:
    assert ForecastTask(task_settings()).provisional("t", 0, 10**12, 0) == []
