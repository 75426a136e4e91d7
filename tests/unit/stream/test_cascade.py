"""The profile `lean` through a whole task: what real sensors do to it, and how soon it has got over it.

Each error is compared with that of the same fleet to which nothing happened (`calm`), from the event's end on; a label that is
itself absurd is no label."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pipeline.stream.columns import BASELINE, OK
from pipeline.stream.state import Snapshot
from pipeline.stream.task import ForecastTask
from tests.helpers.lean import DAY, Said, daily_fleet, lean_settings, readings, said_of, unfit

STEPS, SENSORS, EVENT = 46 * DAY, 4, 700
EARLY, SHORT = 16 * DAY, 28 * DAY
"""Of runs in which nothing happens at a time of its own: from when on they are judged, and how long they are."""
SETTINGS = lean_settings(12)
FLEET = daily_fleet(STEPS, SENSORS, seed=2)
UNIT = FLEET.std(axis=0)
OTHERS = slice(1, None)


@functools.cache
def calm() -> Said:
    return said_of(FLEET, SETTINGS)


@functools.cache
def naive() -> Said:
    return said_of(FLEET, lean_settings(12, profile="base"))


@functools.cache
def until_the_event() -> Snapshot:
    task = ForecastTask(SETTINGS)
    task.take("t", 0, readings(FLEET[:EVENT]))
    return task.table.snapshot()


def begun() -> ForecastTask:
    """A task that has seen the fleet until the event."""
    task = ForecastTask(SETTINGS)
    task.table.restore(until_the_event())
    return task


def checked(values: np.ndarray, settings=SETTINGS, task: ForecastTask | None = None) -> Said:
    """What is said of it: finite, in order, and nothing undefined left behind. Where it begins as the fleet does, from the event on.
    task: to be run, one that has begun or a new one."""
    begins_alike = settings is SETTINGS and np.array_equal(values[:EVENT], FLEET[:EVENT])
    task = task or (begun() if begins_alike else ForecastTask(settings))
    start = EVENT if begins_alike else 0
    said = said_of(values[start:], task=task, start=start)
    spoken = said.status >= 0
    assert np.isfinite(said.mean[spoken]).all()
    assert np.isfinite(said.quantiles[spoken]).all()
    assert (np.diff(said.quantiles[spoken], axis=-1) >= 0).all()
    assert unfit(task) == []
    return said


def sane(values: np.ndarray, unit=UNIT) -> np.ndarray:
    """Absurd values are no labels."""
    return np.where(np.abs(values - np.nanmedian(values, axis=0)) < 100 * unit, values, np.nan)


def forgotten(task: ForecastTask) -> list[int]:
    """Sensors that began anew after the event."""
    return np.flatnonzero(task.table["volatility.count"][:, 0] < EVENT).tolist()


def times_calm(said: Said, values: np.ndarray, first: int, last: int = STEPS, sensors=slice(0, 1), unit=UNIT) -> float:
    """Mean squared error in units of each sensor, relative to that of the calm fleet over the same steps."""
    own = said.squared_error(sane(values, np.maximum(unit, UNIT[: len(unit)])), unit)[first:last, sensors]
    return float(np.nanmean(own) / np.nanmean(calm().squared_error(FLEET, UNIT)[first:last, sensors]))


def covered(said: Said, values: np.ndarray, first: int, last: int = STEPS, sensors=slice(None)) -> float:
    return float(np.nanmean(said.coverage(values)[first:last, sensors]))


def with_event(first: int, last: int, change) -> np.ndarray:
    """The fleet, sensor 0 changed for a while."""
    values = FLEET.copy()
    values[first:last, 0] = change(values[first:last, 0])
    return values


# -- nothing happens


def test_it_beats_its_baseline_and_keeps_what_its_quantiles_promise():
    ours, theirs = (np.nanmean(said.squared_error(FLEET, UNIT)[EVENT:]) for said in (calm(), naive()))
    assert ours < 0.6 * theirs
    assert covered(calm(), FLEET, EVENT) == pytest.approx(0.8, abs=0.05)


def test_until_anything_was_learned_the_baseline_answers_and_says_so():
    said = calm()
    spoken = np.flatnonzero((said.status == OK).all(axis=1))
    first = int(spoken[0])
    assert DAY < first < 4 * DAY
    assert (said.status[:first] == BASELINE).all()
    assert (said.status[first:] == OK).all()
    np.testing.assert_array_equal(said.mean[:first], naive().mean[:first])


def test_one_step_ahead_too_the_quantiles_keep_what_they_promise_within_weeks():
    said = checked(FLEET[:SHORT], lean_settings(1))
    assert covered(said, FLEET[:SHORT], 12 * DAY) == pytest.approx(0.8, abs=0.08)


# -- values that are missing


def test_a_fifth_of_the_values_missing_at_random_costs_little():
    values = FLEET[:SHORT].copy()
    values[np.random.default_rng(9).random(values.shape) < 0.2] = np.nan
    said = checked(values)
    assert times_calm(said, values, EARLY, SHORT, slice(None)) < 1.25
    assert covered(said, values, EARLY) == pytest.approx(0.8, abs=0.05)


def test_an_hour_of_each_day_missing_costs_little():
    values = FLEET[:SHORT].copy()
    values[np.arange(SHORT) % DAY == 5] = np.nan
    said = checked(values)
    assert times_calm(said, values, EARLY, SHORT, slice(None)) < 1.1
    assert covered(said, values, EARLY) == pytest.approx(0.8, abs=0.05)


def test_a_third_of_each_day_missing_without_a_reset_is_got_along_with():
    values = FLEET[:SHORT].copy()
    values[np.arange(SHORT) % DAY < 8, 0] = np.nan
    settings = lean_settings(12, max_gap_steps=24)
    said, plain = checked(values, settings), said_of(values, lean_settings(12, profile="base", max_gap_steps=24))
    ours, theirs = (np.nanmean(one.squared_error(values, UNIT)[EARLY:, 0]) for one in (said, plain))
    assert ours < theirs
    assert times_calm(said, values, EARLY, SHORT, OTHERS) < 1.1


def test_a_gap_that_is_short_is_got_over_within_two_days():
    values = with_event(EVENT, EVENT + 6, lambda own: np.nan * own)
    said = checked(values)
    assert times_calm(said, values, EVENT + 6, EVENT + 54) < 1.5
    assert times_calm(said, values, EVENT + 54) < 1.1


def test_a_reset_is_got_over_within_days():
    values = with_event(EVENT, EVENT + 30, lambda own: np.nan * own)
    said = checked(values)
    assert times_calm(said, values, EVENT + 30 + 2 * DAY, EVENT + 30 + 7 * DAY) < 1.3
    assert times_calm(said, values, EVENT + 30 + 7 * DAY) < 1.15
    assert times_calm(said, values, EVENT + 30, sensors=OTHERS) < 1.05


def test_after_a_reset_the_quantiles_are_not_absurdly_narrow():
    """Over many resets, the first steps after each; the baseline, whose spread survives, covers about 0.7."""
    values = daily_fleet(EARLY + 50, 20, seed=4)
    values[EARLY : EARLY + 30] = np.nan
    values[EARLY : EARLY + 30, 0] = daily_fleet(30, 1)[:, 0]  # somebody has to move stream time
    said = checked(values)
    assert covered(said, values, EARLY + 30, EARLY + 36, OTHERS) > 0.2


# -- constant and stuck sensors


def test_constant_sensors_are_forecast_as_constant_and_leave_the_others_alone():
    values = FLEET[:SHORT].copy()
    values[:, 0], values[:, 1] = 21.5, 0.0
    said = checked(values)
    np.testing.assert_allclose(said.mean[1:, 0], 21.5, rtol=1e-6)
    np.testing.assert_allclose(said.mean[1:, 1], 0.0, atol=1e-6)
    assert times_calm(said, values, EARLY, SHORT, slice(2, None)) < 1.15


@pytest.mark.parametrize(("sensors", "constant"), [(4, 1), (3, 3)])
def test_a_sensor_or_a_whole_partition_that_was_constant_and_wakes_up_is_soon_forecast_like_others(sensors, constant):
    values = FLEET[:SHORT, :sensors].copy()
    values[:200, :constant] = values[200, :constant]
    said = checked(values)
    awake, unit = slice(0, constant), UNIT[:sensors]
    assert covered(said, values, 21 * DAY, sensors=awake) > 0.6
    assert times_calm(said, values, EARLY, SHORT, awake, unit) < 2.2


def test_a_fleet_that_begins_at_night_keeps_its_promises_by_day():
    random = np.random.default_rng(0)
    hour = np.arange(SHORT) % DAY
    sun = np.maximum(0, np.sin(2 * np.pi * (hour - 6) / DAY))[:, None] * (1 + 0.2 * random.standard_normal((SHORT, 4)))
    said = checked(sun, lean_settings(1))
    noon = np.flatnonzero((hour == 11) & (np.arange(SHORT) > EARLY))[:-1]
    assert np.nanmean(said.coverage(sun)[noon]) > 0.3


def test_a_sensor_that_is_stuck_for_days_is_got_over_and_touches_nobody():
    values = with_event(EVENT, EVENT + 5 * DAY, lambda own: own[0])
    said = checked(values)
    end = EVENT + 5 * DAY
    assert times_calm(said, values, end + 2 * DAY, end + 7 * DAY) < 1.7
    assert times_calm(said, values, end + 7 * DAY) < 1.35
    assert times_calm(said, values, EVENT, sensors=OTHERS) < 1.05


# -- spikes


@pytest.mark.parametrize("size", [1e3, 1e20, 1e300])
def test_a_spike_is_over_after_two_days_and_touches_nobody(size):
    """The day after too: it does not come back a season later."""
    values = with_event(EVENT, EVENT + 1, lambda own: own + size * UNIT[0])
    said = checked(values)
    assert times_calm(said, values, EVENT + DAY + 1, EVENT + 3 * DAY) < 1.3
    assert times_calm(said, values, EVENT + 1, EVENT + 1 + 2 * DAY) < 3
    assert times_calm(said, values, EVENT + 2 * DAY + 1) < 1.15
    assert times_calm(said, values, EVENT, sensors=OTHERS) < 1.03
    assert covered(said, FLEET, EVENT, sensors=OTHERS) == pytest.approx(
        covered(calm(), FLEET, EVENT, sensors=OTHERS), abs=0.02
    )


@pytest.mark.parametrize(
    ("steps", "within_days", "after_two_weeks"), [(3, 2, 1.2), (6, 2, 1.2), (24, 30, 5), (48, 3, 3)]
)
def test_a_sentinel_that_lasts_is_got_over(steps, within_days, after_two_weeks):
    """Measured: 1.0 for up to 6 steps after two weeks; a whole day is the worst, 4.2: what the season says is for a day what the
    sentinel said, and who believed it is not believed for weeks."""
    values = with_event(EVENT, EVENT + steps, lambda own: np.full_like(own, -9999 * 10))
    said = checked(values)
    assert times_calm(said, values, EVENT + steps + 2 * DAY, EVENT + steps + 7 * DAY) < within_days
    assert times_calm(said, values, EVENT + steps + 14 * DAY) < after_two_weeks
    assert times_calm(said, values, EVENT, sensors=OTHERS) < 1.1


def test_a_sentinel_on_the_first_day_is_forgotten_within_weeks():
    values = with_event(10, 13, lambda own: np.full_like(own, -99990))[:SHORT]
    said = checked(values)
    assert times_calm(said, values, EARLY, SHORT) < 1.3


def test_a_sensor_that_flaps_for_days_leaves_the_others_quantiles_as_they_were():
    flapping = np.random.default_rng(9).random(100) < 0.3
    values = with_event(EVENT, EVENT + 100, lambda own: np.where(flapping, -99990, own))
    said = checked(values)
    assert covered(said, values, EVENT, sensors=OTHERS) < covered(calm(), FLEET, EVENT, sensors=OTHERS) + 0.05
    assert times_calm(said, values, EVENT, sensors=OTHERS) < 1.1


# -- another unit, another level


def in_another_unit(factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Sensor 0 from the event on, and the units of all."""
    return with_event(EVENT, STEPS, lambda own: factor * own), UNIT * np.where(np.arange(SENSORS) == 0, factor, 1)


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_a_sensor_in_another_unit_begins_anew_and_is_forecast_as_well_within_days(factor):
    """Measured: 1.2 and 1.4 times the errors of calm from the second day on, 1.1 from the seventh."""
    values, unit = in_another_unit(factor)
    task = begun()
    said = checked(values, task=task)
    after = [EVENT + days * DAY for days in (2, 7, 14)]
    for first, last, most in zip(after, [*after[1:], STEPS], (2.2, 1.35, 1.3)):
        assert times_calm(said, values, first, last, unit=unit) < most
        assert covered(said, values, first, last, slice(0, 1)) == pytest.approx(0.82, abs=0.1)
    assert times_calm(said, values, EVENT, sensors=OTHERS, unit=unit) < 1.05
    assert forgotten(task) == [0]


@pytest.mark.parametrize(
    ("factor", "after_four_days", "after_two_weeks"), [(30.0, 2, 1.5), (0.1, 12, 4), (1 / 30, 100, 20)]
)
def test_a_unit_of_no_other_order_is_followed_as_fast_as_the_scale_follows(factor, after_four_days, after_two_weeks):
    """Up within days, with quantiles that are too wide; down in a thousand steps: thirty times smaller is the worst there is."""
    values, unit = in_another_unit(factor)
    task = begun()
    said = checked(values, task=task)
    assert times_calm(said, values, EVENT + 4 * DAY, EVENT + 14 * DAY, unit=unit) < after_four_days
    assert times_calm(said, values, EVENT + 14 * DAY, unit=unit) < after_two_weeks
    assert covered(said, values, EVENT + 4 * DAY, sensors=slice(0, 1)) > 0.8
    assert times_calm(said, values, EVENT, sensors=OTHERS, unit=unit) < 1.1
    assert forgotten(task) == []


def rain(noise: float) -> np.ndarray:
    random = np.random.default_rng(3)
    values = noise * random.standard_normal(STEPS)
    for begin in np.flatnonzero(random.random(STEPS) < 0.01):
        values[begin : begin + 6] += 100 * random.exponential(1, len(values[begin : begin + 6]))
    return values


def test_what_is_no_other_unit_makes_no_sensor_begin_anew():
    values, task = FLEET.copy(), begun()
    values[EVENT + 7, 0] += 1e6 * UNIT[0]
    values[EVENT + 5 * DAY : EVENT + 5 * DAY + 3, 0] = -99990
    values[EVENT : EVENT + 48, 1] = -99990
    values[EVENT : EVENT + 5 * DAY, 2] = values[EVENT, 2]
    values[EVENT : EVENT + 6, 3] = np.nan
    checked(values, task=task)
    assert forgotten(task) == []


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_rain_is_no_other_unit(noise):
    values = FLEET.copy()
    values[:, 0] = rain(noise)
    task = ForecastTask(SETTINGS)
    said = said_of(values, task=task)
    assert task.table["volatility.count"][0, 0] > STEPS - 2 * DAY
    ours, theirs = (
        np.nanmean(one.squared_error(values)[EVENT:, 0])
        for one in (said, said_of(values, lean_settings(12, profile="base")))
    )
    assert ours < theirs


def test_a_sentinel_of_half_a_day_disturbs_no_other_sensor():
    values = with_event(EVENT, EVENT + 12, lambda own: np.full_like(own, -99990))
    said = checked(values)
    assert times_calm(said, values, EVENT, sensors=OTHERS) < 1.1
    assert times_calm(said, values, EVENT + 9 * DAY) < 2


def by_the_last_value(values: np.ndarray, said: Said) -> np.ndarray:
    last = np.repeat(values[:, :, None], said.mean.shape[2], axis=2)
    return Said(last, said.quantiles, said.status).squared_error(values, UNIT)


@pytest.mark.parametrize("jump", [20.0, 1000.0])
def test_after_a_jump_of_the_level_it_says_no_worse_than_the_last_value_from_the_second_day_on(jump):
    """Who was wrong at the jump is not believed for weeks: up to eight times the errors of calm, and twice to four times those of the
    seasonal naive forecast, for as long."""
    values = with_event(EVENT, STEPS, lambda own: own + jump * UNIT[0])
    said = checked(values)
    for first, last in ((2, 7), (7, 14), (14, 17)):
        part = slice(EVENT + first * DAY, EVENT + last * DAY)
        ours, theirs = (
            np.nanmean(one[part, 0]) for one in (said.squared_error(values, UNIT), by_the_last_value(values, said))
        )
        assert ours < 1.05 * theirs
    assert covered(said, values, EVENT + 2 * DAY, sensors=slice(0, 1)) > 0.8
    assert times_calm(said, values, EVENT, sensors=OTHERS) < 1.1


def test_a_jump_of_five_deviations_is_got_over_within_a_week():
    values = with_event(EVENT, STEPS, lambda own: own + 5 * UNIT[0])
    said = checked(values)
    assert times_calm(said, values, EVENT + 4 * DAY, EVENT + 7 * DAY) < 2
    assert times_calm(said, values, EVENT + 7 * DAY) < 1.4


def test_a_jump_that_dwarfs_all_that_was_is_got_over_too():
    """A counter that is set back: its running scale is for weeks that of the jump."""
    values = with_event(EVENT, STEPS, lambda own: own + 1e5 * UNIT[0])
    said = checked(values)
    part = slice(EVENT + 7 * DAY, STEPS)
    assert np.nanmean(said.squared_error(values, UNIT)[part, 0]) < 1.2 * np.nanmean(
        by_the_last_value(values, said)[part, 0]
    )


@pytest.mark.parametrize(("size", "offset"), [(1000.0, 5e6), (1e4 / UNIT, 1e9)])
def test_a_fleet_in_another_unit_or_at_a_large_level_is_forecast_alike(size, offset):
    """Memory counts from float64 origins, stages in units of their own; forecasts are said in float32, which has steps of 64 at 1e9."""
    values = FLEET[:SHORT] * size + offset
    said = checked(values)
    ours = np.nanmean(said.squared_error(values, UNIT * size)[EARLY:])
    theirs = np.nanmean(calm().squared_error(FLEET, UNIT)[EARLY : SHORT - 12])
    assert ours == pytest.approx(theirs, rel=0.05)


# -- series of other kinds


def test_of_a_random_walk_it_says_what_the_last_value_says():
    walk = np.cumsum(np.random.default_rng(5).standard_normal((SHORT, 6)), axis=0)
    for seasons in ((), (DAY,)):
        said = checked(walk, lean_settings(12, seasons))
        last = np.repeat(walk[:, :, None], 12, axis=2)
        own = said.squared_error(walk)[EARLY:]
        theirs = Said(last, said.quantiles, said.status).squared_error(walk)[EARLY:]
        assert np.nanmean(own) < 1.03 * np.nanmean(theirs)


def test_two_seasons_are_both_used():
    hours = np.arange(49 * DAY)
    random = np.random.default_rng(6)
    weekend = (hours // DAY % 7 >= 5)[:, None]
    course = np.sin(2 * np.pi * hours / DAY)[:, None] * np.where(weekend, 0.2, 2.0)
    values = course + 0.3 * random.standard_normal((len(hours), 3)) + np.where(weekend, -1.0, 0.0)
    one, both = (checked(values, lean_settings(24, seasons)) for seasons in ((DAY,), (DAY, 7 * DAY)))
    errors = [np.nanmean(said.squared_error(values)[35 * DAY :]) for said in (one, both)]
    assert errors[1] < 0.7 * errors[0]


# -- sensors that are new


def test_a_new_sensor_of_a_learned_fleet_is_forecast_better_than_by_its_seasonal_naive_from_its_first_days():
    values = daily_fleet(SHORT, 16, seed=5)
    born = SHORT - 7 * DAY
    values[:born, 8:] = np.nan
    unit = np.nanstd(values, axis=0)
    said, plain = checked(values), said_of(values, lean_settings(12, profile="base"))
    for first, last in ((6, DAY), (DAY, 3 * DAY), (3 * DAY, 7 * DAY)):
        ours, theirs = (
            np.nanmean(one.squared_error(values, unit)[born + first : born + last, 8:]) for one in (said, plain)
        )
        assert ours < 0.9 * theirs
    assert (said.status[born:, 8:] == OK).all()
