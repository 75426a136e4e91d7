import numpy as np
import pytest

from models import seasonality
from models.seasonality import MOST_STEPS, SeasonFound, estimate_seasons
from models.steps import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, WEEK_MS, estimate_step, regular

START_MS = 1_700_000_000_000


def every(step_ms, count, start_ms=START_MS):
    return start_ms + step_ms * np.arange(count)


def rng(seed=0):
    return np.random.default_rng(seed)


def wave(period, steps, sensors=1, *, noise=0.0, seed=0):
    """(T, S) of variance 1."""
    sine = np.sqrt(2) * np.sin(2 * np.pi * np.arange(steps)[:, None] / period)
    return sine + noise * rng(seed).standard_normal((steps, sensors))


def walk(steps, sensors=1, *, seed=0):
    return np.cumsum(rng(seed).standard_normal((steps, sensors)), axis=0)


def autoregressive(steps, sensors=1, *, seed=0, factor=0.95):
    values = rng(seed).standard_normal((steps, sensors))
    for t in range(1, steps):
        values[t] += factor * values[t - 1]
    return values


def days_and_weeks(hours, sensors=3, *, seed=0):
    """(T, S) days that are small at the end of the week."""
    weekend = np.arange(hours) // 24 % 7 >= 5
    return np.where(weekend, 0.3, 1.0)[:, None] * (2 + wave(24, hours)) + 0.2 * rng(seed).standard_normal(
        (hours, sensors)
    )


def lengths(values, step_ms=SECOND_MS, most=1):
    return [season.steps for season in estimate_seasons(values, step_ms, most)]


def test_an_irregular_stream_has_its_season_on_the_grid():
    times = [START_MS + np.cumsum(rng(seed).integers(200, 1900, 4000)) for seed in range(3)]
    values = [np.sin(2 * np.pi * column / 50_000) for column in times]
    step_ms = estimate_step(times)
    assert step_ms == SECOND_MS
    assert lengths(regular(times, values, step_ms, MOST_STEPS)) == [50]


# --- seasons that are there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_ms", "steps", "name"),
    [(SECOND_MS, 60, "minute"), (MINUTE_MS, 60, "hour"), (HOUR_MS, 24, "day"), (15 * MINUTE_MS, 96, "day"), (DAY_MS, 7, "week")],
)  # fmt: skip
def test_the_calendars_seasons_are_found_and_named(step_ms, steps, name):
    found = estimate_seasons(wave(steps, 12 * steps, 3, noise=0.7), step_ms)
    assert [(season.steps, season.name) for season in found] == [(steps, name)]


def test_a_year_of_days_and_of_weeks_is_found():
    days = 365.2425 * np.arange(1) + np.arange(6 * 366)
    season = np.sin(2 * np.pi * days / 365.2425)[:, None] + 0.4 * rng().standard_normal((len(days), 3))
    assert estimate_seasons(season, DAY_MS)[0].name == "year"
    assert [(found.steps, found.name) for found in estimate_seasons(season[::7], WEEK_MS)] == [(52, "year")]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("period", [2, 5, 16, 50, 117])
def test_cycles_that_no_calendar_knows_are_found(period, seed):
    steps = max(200, 25 * period)
    shape = rng(period).standard_normal(period)
    values = np.resize(shape / shape.std(), (steps, 1)) + 0.4 * rng(seed).standard_normal((steps, 2))
    assert lengths(values) == [period]


def test_a_period_of_no_whole_number_of_steps_is_the_nearest_one_or_a_multiple_that_nearly_is():
    assert lengths(wave(16.3, 400, 2, noise=0.7)) == [16]
    assert lengths(wave(16.3, 1000, 2, noise=0.1)) == [49]  # 48.9


def test_a_length_beside_the_calendars_is_told_from_it_once_there_are_enough_periods():
    assert lengths(wave(61, 5000, noise=0.3)) == [61]
    assert lengths(wave(60, 5000, noise=0.3)) == [60]


def test_three_and_a_half_clean_periods_are_enough_for_the_calendars():
    assert lengths(wave(24, 84, 2, noise=0.1), HOUR_MS) == [24]
    assert lengths(wave(24, 60, 2, noise=0.1), HOUR_MS) == []


@pytest.mark.parametrize("seed", range(5))
def test_missing_values_jumps_outliers_and_a_trend_are_borne(seed):
    values = wave(24, 1000, 4, noise=0.4, seed=seed) + 0.01 * np.arange(1000)[:, None]
    values[300:] += 15
    values[650:] -= 30
    random = rng(seed + 100).random(values.shape)
    values[random < 0.01] *= 100
    values[random > 0.8] = np.nan
    values[500:530] = np.nan
    values[20, 0] = np.inf
    assert lengths(values, HOUR_MS) == [24]


def test_a_season_on_a_wandering_level_is_found():
    assert lengths(3 * wave(24, 2000, 2) + walk(2000, 2), HOUR_MS) == [24]


def test_a_season_that_grows_with_the_level_is_found():
    growth = (1 + np.arange(1000) / 200)[:, None]
    assert lengths(growth * (3 + wave(24, 1000, 2, noise=0.3)), HOUR_MS) == [24]


def test_switches_and_rare_pulses_without_noise_are_seasons():
    steps = np.arange(600)[:, None]
    assert lengths((steps // 5 % 2).astype(float)) == [10]
    assert lengths((steps % 20 == 3).astype(float)) == [20]


def test_constant_and_silent_sensors_have_no_say():
    values = np.concatenate([np.full((500, 5), 3.0), np.full((500, 4), np.nan), wave(24, 500, 3, noise=0.3)], axis=1)
    assert lengths(values, HOUR_MS) == [24]


def test_a_sensor_that_began_late_does_no_harm():
    values = wave(24, 1000, 3, noise=0.3)
    values[:750, 0] = np.nan
    assert lengths(values, HOUR_MS) == [24]


def test_a_season_of_few_sensors_is_none():
    values = autoregressive(1000, 7)
    values[:, :2] += 10 * wave(24, 1000)
    assert lengths(values, HOUR_MS) == []


def test_neither_offset_nor_unit_matters():
    values = wave(24, 500, 2, noise=0.3)
    [plain], [moved] = estimate_seasons(values, HOUR_MS), estimate_seasons(1e6 - 1e-3 * values, HOUR_MS)
    assert moved.steps == plain.steps
    assert moved.strength == pytest.approx(plain.strength, abs=1e-4)


def test_strength_is_the_seasons_share_of_the_variance():
    for noise in (0.5, 1.0):
        [found] = estimate_seasons(wave(24, 24 * 400, 3, noise=noise), HOUR_MS)
        assert found.strength == pytest.approx(1 / (1 + noise**2), abs=0.05)
        assert 0.05 < found.gain < 1


# --- which of several ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_multiple_that_explains_no_more_is_not_taken(seed):
    assert lengths(wave(24, 2000, 2, noise=0.5, seed=seed), HOUR_MS, most=2) == [24]


@pytest.mark.parametrize("seed", range(5))
def test_a_multiple_that_explains_clearly_more_is_taken(seed):
    weekly = np.tile(rng(1).standard_normal(168), 20)[:, None] + 0.3 * wave(24, 20 * 168)
    assert lengths(weekly + 0.2 * rng(seed).standard_normal(weekly.shape), HOUR_MS) == [168]


@pytest.mark.parametrize("seed", range(5))
def test_days_and_weeks_come_out_both(seed):
    found = estimate_seasons(days_and_weeks(8 * 168, seed=seed), HOUR_MS, most=2)
    assert [(season.steps, season.name) for season in found] == [(24, "day"), (168, "week")]


def test_too_few_weeks_leave_the_day_alone():
    assert lengths(days_and_weeks(2 * 168 + 30), HOUR_MS, most=2) == [24]


def test_two_cycles_come_out_both():
    assert lengths(wave(16, 2000, 2, noise=0.3) + wave(50, 2000), most=2) == [16, 50]


def test_no_more_seasons_than_there_are():
    assert lengths(wave(16, 2000, 2, noise=0.3) + wave(50, 2000), most=5) == [16, 50]


def test_a_period_of_more_than_a_third_of_the_data_is_not_found():
    assert lengths(wave(110, 300, 2)) == []


# --- and where there are none ----------------------------------------------------------------------------------------


def trend(steps, sensors=1, *, seed=0):
    return np.arange(steps)[:, None] * 0.05 + rng(seed).standard_normal((steps, sensors))


def noise(steps, sensors=1, *, seed=0):
    return rng(seed).standard_normal((steps, sensors))


def smooth(steps, sensors=1, *, seed=0):
    return np.cumsum(walk(steps, sensors, seed=seed), axis=0)


STEPS_MS = (SECOND_MS, MINUTE_MS, 15 * MINUTE_MS, HOUR_MS, DAY_MS)


@pytest.mark.parametrize("steps", [300, 1000])
@pytest.mark.parametrize("series", [walk, autoregressive, noise, trend, smooth])
def test_one_sensor_without_a_season_hardly_ever_has_one(series, steps):
    false = [seed for seed in range(100) if estimate_seasons(series(steps, seed=seed), STEPS_MS[seed % 5], 2)]
    assert len(false) <= 2, f"{series.__name__}: seeds {false}"


def events(steps, sensors=1, *, seed=0):
    random = rng(seed)
    return (random.random((steps, sensors)) < 0.1) * random.random((steps, sensors))


def pauses(steps, sensors=1, *, seed=0):
    return np.repeat(rng(seed).random((steps // 5, sensors)) < 0.3, 5, axis=0) + 0.01 * noise(steps, sensors, seed=seed)


@pytest.mark.parametrize("series", [events, pauses])
def test_rare_events_are_no_outliers_around_a_season(series):
    false = [seed for seed in range(60) if estimate_seasons(series(1000, seed=seed), STEPS_MS[seed % 5], 2)]
    assert len(false) <= 2, f"{series.__name__}: seeds {false}"


@pytest.mark.parametrize(("steps", "seeds"), [(200, 40), (1000, 40), (6000, 5)])
@pytest.mark.parametrize("series", [walk, autoregressive, noise, trend, smooth])
def test_several_sensors_without_a_season_have_none(series, steps, seeds):
    assert not [seed for seed in range(seeds) if estimate_seasons(series(steps, 4, seed=seed), STEPS_MS[seed % 5], 2)]


@pytest.mark.parametrize(
    "curve",
    [
        np.zeros(500),
        np.full(500, 0.1),
        np.arange(500.0),
        np.arange(500.0) ** 2,
        np.exp(np.arange(500) / 100),
        np.where(np.arange(500) < 250, 0.0, 7.0),
        np.where(np.arange(500) == 250, 1e9, 0.0),
        np.full(500, np.nan),
    ],
    ids=["zero", "constant", "line", "parabola", "exponential", "jump", "spike", "nothing"],
)
def test_curves_have_no_season(curve):
    assert lengths(curve[:, None], HOUR_MS, most=2) == []


def test_weekends_without_readings_make_no_season_of_a_trend():
    values = 0.5 * np.arange(500)[:, None] + 0.05 * rng().standard_normal((500, 2))
    values[np.arange(500) % 7 >= 5] = np.nan
    assert lengths(values, DAY_MS) == []


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (5, 0), (1, 1), (5, 2), (9, 1)])
def test_hardly_any_data_has_no_season(shape):
    assert lengths(rng().standard_normal(shape), HOUR_MS) == []


# --- how -------------------------------------------------------------------------------------------------------------


def test_the_newest_steps_are_looked_at(monkeypatch):
    monkeypatch.setattr(seasonality, "MOST_STEPS", 1000)
    assert lengths(np.concatenate([wave(50, 5000), wave(16, 1000)])) == [16]


def test_many_sensors_are_looked_at_evenly():
    values = np.concatenate([wave(24, 500, 300, noise=0.3), noise(500, 100)], axis=1)
    assert lengths(values, HOUR_MS) == [24]


def test_the_same_data_gives_the_same_answer_and_is_left_as_it_is():
    values = wave(24, 3000, 2, noise=0.5)
    values[5] = np.inf
    before = values.copy()
    assert estimate_seasons(values, HOUR_MS) == estimate_seasons(values, HOUR_MS)
    np.testing.assert_array_equal(values, before)


def test_the_level_is_the_centred_moving_average_of_the_textbook():
    values = rng().standard_normal((40, 2))
    for window in (1, 2, 5, 8):
        half = window // 2
        weights = np.ones(window) if window % 2 else np.array([0.5, *np.ones(window - 1), 0.5])
        for t in range(half, 40 - half):
            expected = np.average(values[t - half : t + half + 1], axis=0, weights=weights)
            np.testing.assert_allclose(seasonality._level(values, window)[t], expected)


@pytest.mark.parametrize(("shape", "step_ms", "most"), [((5,), 1000, 1), ((5, 1), 0, 1), ((5, 1), 1000, 0)])
def test_what_is_no_grid_is_refused(shape, step_ms, most):
    with pytest.raises(ValueError, match=r"expected values \(steps, sensors\) and positive numbers"):
        estimate_seasons(np.zeros(shape), step_ms, most)


def test_a_season_found_is_a_value():
    assert SeasonFound(24, 0.5, 0.2, "day") == SeasonFound(24, 0.5, 0.2, "day")
