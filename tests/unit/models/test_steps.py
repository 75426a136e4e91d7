import numpy as np
import pytest

from models.steps import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, WEEK_MS, estimate_step, regular

START_MS = 1_700_000_000_000
MANY = 1000


def every(step_ms, count, start_ms=START_MS):
    return start_ms + step_ms * np.arange(count)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_ms", [1, 40, 1000, 7000, 12_345, 15 * MINUTE_MS, 3 * HOUR_MS, DAY_MS, 10 * DAY_MS])
def test_a_regular_step_is_found_exactly(step_ms):
    assert estimate_step([every(step_ms, 50), every(step_ms, 20, START_MS + 3)]) == step_ms


def test_gaps_duplicates_and_disorder_do_not_matter():
    times = every(7000, 300)
    kept = times[rng().random(300) > 0.3]
    kept = np.concatenate([kept, kept[:40], kept[-40:] + 7000 * 100_000])
    assert estimate_step([rng(1).permutation(kept)]) == 7000


def test_days_without_weekends_are_days():
    assert estimate_step([every(DAY_MS, 100)[np.arange(100) % 7 < 5]]) == DAY_MS


@pytest.mark.parametrize(
    "step_ms", [10, 200, 1000, 5000, MINUTE_MS, 15 * MINUTE_MS, HOUR_MS, 6 * HOUR_MS, DAY_MS, WEEK_MS]
)
def test_jitter_is_rounded_to_a_usual_duration(step_ms):
    jitter = (step_ms * rng(step_ms).uniform(-0.2, 0.2, 400)).astype(np.int64)
    assert estimate_step([every(step_ms, 400) + jitter]) == step_ms


def test_irregular_times_have_the_usual_duration_nearest_to_their_median():
    gaps = rng().exponential(43_000, 5000).astype(np.int64)  # median 43 s * ln 2 = 30 s
    assert estimate_step([START_MS + np.cumsum(gaps)]) == 30 * SECOND_MS


def test_a_step_at_a_clock_in_whole_seconds_is_not_taken_for_the_second():
    gaps = rng().integers(52, 69, 1000) * SECOND_MS
    assert estimate_step([START_MS + np.cumsum(gaps)]) == MINUTE_MS


def test_beyond_a_week_steps_are_whole_days():
    years = [np.datetime64(f"{year}-01-01", "ms").astype(np.int64) for year in range(1990, 2025)]
    months = np.arange("1990-01", "2020-01", dtype="datetime64[M]").astype("datetime64[ms]").astype(np.int64)
    assert estimate_step([months]) == 31 * DAY_MS
    assert estimate_step([months[::3]]) in (91 * DAY_MS, 92 * DAY_MS)
    assert estimate_step([np.array(years)]) == 365 * DAY_MS


def test_most_sensors_decide_and_one_with_two_readings_hardly_counts():
    hourly, minutes = every(HOUR_MS, 500), every(MINUTE_MS, 10_000)
    assert estimate_step([hourly, hourly, minutes]) == HOUR_MS
    assert estimate_step([minutes, *[every(DAY_MS, 2)] * 20]) == MINUTE_MS


def test_sensors_without_two_readings_are_passed_over():
    nothing, one = np.array([], np.int64), np.array([START_MS])
    assert estimate_step([nothing, one, every(5000, 2)]) == 5000


@pytest.mark.parametrize("times", [[], [[]], [[5], [9]], [[7, 7, 7]]])
def test_without_two_distinct_times_there_is_no_step(times):
    with pytest.raises(ValueError, match="two distinct times: a step needs at least two readings of one sensor"):
        estimate_step([np.array(column, np.int64) for column in times])


# --- the grid --------------------------------------------------------------------------------------------------------


def test_readings_are_averaged_in_their_windows():
    # [0 ---- 10)  [10 ---- 20)  [20 ---- 30)
    grid = regular(
        [np.array([25, 3, 9]), np.array([12, 14])], [np.array([7.0, 1.0, 3.0]), np.array([5.0, np.nan])], 10, MANY
    )
    np.testing.assert_array_equal(grid, [[2.0, np.nan], [np.nan, 5.0], [7.0, np.nan]])


def test_the_grid_holds_the_newest_steps_only():
    grid = regular([np.array([0, 10**15, 10**15 + 10])], [np.array([1.0, 2.0, 3.0])], 10, most_steps=4)
    np.testing.assert_array_equal(grid[:, 0], [np.nan, np.nan, 2.0, 3.0])


def test_without_readings_the_grid_is_empty():
    assert regular([np.array([], np.int64)] * 2, [np.array([])] * 2, 1000, MANY).shape == (0, 2)
    assert regular([np.array([5])], [np.array([np.nan])], 1000, MANY).shape == (0, 1)


def test_times_and_values_must_match():
    with pytest.raises(ValueError, match="expected one value a time"):
        regular([np.array([1, 2])], [np.array([1.0])], 1000, MANY)
    with pytest.raises(ValueError, match="step_ms=0"):
        regular([np.array([1])], [np.array([1.0])], 0, MANY)
