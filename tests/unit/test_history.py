"""History within bounds: fewer sensors, less time, and the running scale as if nothing had been left out."""

from __future__ import annotations

import numpy as np

from models.features import SeriesMemory
from models.sequences import walk
from pipeline.service.history import FEWEST_SENSORS, History
from pipeline.stream.task import StepTask
from tests.helpers.streams import HOUR, START, fleet, records, task_settings

SETTINGS = task_settings()


def history(sensors: int, hours: int, most_steps: int | None = None) -> History:
    found, task = History(SETTINGS, most_steps), StepTask(SETTINGS)
    stream = fleet(sensors, hours)
    for first in range(0, len(stream), 500):
        found.add(task, task.process(records(stream[first : first + 500], first))[0])
    return found


def test_of_a_fleet_too_large_every_second_or_fourth_sensor_is_kept_whole_and_always_the_same_ones():
    sensors, hours = 8 * FEWEST_SENSORS, 20
    whole = history(sensors, hours).sequences()
    thinned = history(sensors, hours, most_steps=len(whole) // 3)
    found = thinned.sequences()
    assert thinned.one_in == 4
    assert 0.1 * len(whole) < len(found) <= len(whole) // 3
    kept = np.unique(found.sensor)
    assert {int((found.sensor == sensor).sum()) for sensor in kept} == {hours - 1}
    names = {thinned.sensors[sensor] for sensor in kept}
    again = history(sensors, hours, most_steps=len(whole) // 3)
    assert names == {again.sensors[sensor] for sensor in np.unique(again.sequences().sensor)}


def test_of_a_few_sensors_with_a_long_past_the_newer_half_is_kept():
    found = history(4, 300, most_steps=400).sequences()
    assert len(found) <= 400
    assert np.unique(found.sensor).size == 4
    assert found.end_ms.max() == START + 299 * HOUR


def contexts(sequences):
    """Running mean and scale at every step, by (sensor, end)."""
    out = {}
    for block, context, _ in walk(sequences, SeriesMemory(SETTINGS.spec)):
        for row, step in zip(*np.nonzero(block.live)):
            at = block.index[row, step]
            key = int(sequences.sensor[at]), int(sequences.end_ms[at])
            out[key] = float(context.mean[row, step, 0]), float(context.channel_scale[row, step, 0])
    return out


def test_a_shorter_history_is_scaled_as_the_service_scales_it():
    past = history(3, 200)
    whole = contexts(past.sequences())
    newest = contexts(past.sequences(newest_ms=50 * HOUR))
    assert len(newest) == 3 * 50
    assert all(whole[key] == found for key, found in newest.items())
    past.forget_before(START + 100 * HOUR)
    forgotten = contexts(past.sequences(newest_ms=50 * HOUR))
    assert forgotten == newest


def test_steps_that_come_after_something_was_forgotten_go_on_from_the_same_scale():
    stream, task, past = fleet(3, 120), StepTask(SETTINGS), History(SETTINGS)
    whole = contexts(history(3, 120).sequences())
    for first in range(0, len(stream), 90):
        past.add(task, task.process(records(stream[first : first + 90], first))[0])
        past.forget_before(START + (first // 6 - 20) * HOUR)
    found = contexts(past.sequences())
    assert 0 < len(found) < len(whole)
    assert all(whole[key] == values for key, values in found.items())


def test_nothing_later_than_the_end_asked_for_is_learned_from():
    past = history(3, 60)
    cut = START + 30 * HOUR
    assert past.sequences(to_ms=cut).end_ms.max() == cut
