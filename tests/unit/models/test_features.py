import numpy as np
import pytest

from models.features import SeriesMemory, input_size, lead_knots, rnn_inputs
from models.forecaster import SeriesSpec
from models.sequences import empty_rows, refill
from tests.helpers.series import SPEC, STEP_MS, block, noisy


def drive(spec, values, cuts=(), ring_steps=None):
    """The Contexts of one or several consecutive blocks, and the rows afterwards."""
    memory = SeriesMemory(spec, ring_steps)
    rows = empty_rows(memory.columns(), len(values))
    contexts, first = [], 0
    for part in np.split(values, list(cuts), axis=1):
        contexts.append(memory.advance(rows, block(part, first=first)))
        first += part.shape[1]
    return contexts, rows


def season_by_hand(spec, series, t, lead):
    """series: (T, C) -> what the docstring of season_values promises, target by target."""
    season = spec.seasons[0]
    at = t + lead - season * -(-lead // season)
    out = []
    for target in spec.targets:
        past = series[: t + 1, target]
        known = past[np.isfinite(past)]
        last = known[-1] if len(known) else np.nan
        out.append(series[at, target] if at >= 0 and np.isfinite(series[at, target]) else last)
    return out


def test_the_season_says_for_each_lead_what_stood_there_one_season_ago():
    values = noisy(SPEC, 3, 30, missing=0.3)
    (context,), _ = drive(SPEC, values)
    found = context.season_values()
    for sensor in range(3):
        for t in range(30):
            expected = [season_by_hand(SPEC, values[sensor], t, lead) for lead in range(1, SPEC.horizon + 1)]
            assert found[sensor, t] == pytest.approx(np.array(expected), rel=1e-5, nan_ok=True)
    assert context.season_known[0].tolist() == [False] * 3 + [True] * 27


def test_a_horizon_beyond_the_season_repeats_it():
    spec = SeriesSpec(("a.mean",), (0,), STEP_MS, 7, (0.5,), (3,))
    (context,), _ = drive(spec, np.arange(1.0, 10.0).reshape(1, 9, 1))
    assert context.season_values()[0, -1, :, 0].tolist() == [7, 8, 9, 7, 8, 9, 7]


def test_last_is_carried_over_missing_values():
    values = np.array([np.nan, 1.0, np.nan, 3.0, np.nan]).reshape(1, 5, 1)
    spec = SeriesSpec(("a.mean",), (0,), STEP_MS, 2, (0.5,))
    (context,), rows = drive(spec, values)
    assert context.last[0, :, 0].tolist() == pytest.approx([np.nan, 1, 1, 3, 3], nan_ok=True)
    assert rows["memory.last"].tolist() == [[3]]
    assert context.steps[0].tolist() == [1, 2, 3, 4, 5]


def test_everything_is_the_same_however_the_steps_are_cut():
    values = noisy(SPEC, 4, 40)
    (whole,), rows = drive(SPEC, values)
    parts, cut_rows = drive(SPEC, values, cuts=(1, 2, 9, 30))
    joined = np.concatenate([rnn_inputs(part) for part in parts], axis=1)
    assert np.array_equal(joined, rnn_inputs(whole))
    assert all(np.array_equal(rows[name], cut_rows[name], equal_nan=True) for name in rows)


def test_nothing_depends_on_later_values():
    values = noisy(SPEC, 2, 40)
    changed = values.copy()
    changed[:, 25:] = 1e6
    (before,), _ = drive(SPEC, values)
    (after,), _ = drive(SPEC, changed)
    assert np.array_equal(rnn_inputs(before)[:, :25], rnn_inputs(after)[:, :25])
    assert not np.array_equal(rnn_inputs(before)[:, 25:], rnn_inputs(after)[:, 25:])


def test_padding_leaves_the_rows_untouched():
    values = noisy(SPEC, 3, 12)
    memory = SeriesMemory(SPEC)
    rows = empty_rows(memory.columns(), 3)
    memory.advance(rows, block(values))
    before = {name: column.copy() for name, column in rows.items()}
    memory.advance(rows, block(np.full((3, 5, 3), 7.0), first=12, live=np.zeros((3, 5), bool)))
    assert all(np.array_equal(before[name], rows[name], equal_nan=True) for name in rows)


def test_rows_padded_to_different_lengths_end_as_each_alone():
    values = noisy(SPEC, 3, 20)
    lengths = np.array([20, 7, 1])
    live = np.arange(20) < lengths[:, None]
    memory = SeriesMemory(SPEC)
    rows = empty_rows(memory.columns(), 3)
    memory.advance(rows, block(values, live=live))
    for sensor, length in enumerate(lengths):
        _, alone = drive(SPEC, values[sensor : sensor + 1, :length])
        assert all(np.array_equal(rows[name][sensor], alone[name][0], equal_nan=True) for name in rows)


def test_a_small_movement_on_a_huge_offset_is_kept_in_the_ring():
    spec = SeriesSpec(("a.mean",), (0,), STEP_MS, 2, (0.5,), (4,))
    wave = np.tile([0.0, 1.0, 2.0, 1.0], 5)
    (context,), _ = drive(spec, (1e9 + wave).reshape(1, 20, 1))
    assert context.season_values()[0, -1, :, 0].tolist() == [1e9, 1e9 + 1]
    assert np.abs(context.local).max() < 3


@pytest.mark.parametrize("steps_at_once", [1, 7, 60])
def test_a_level_that_moved_is_forgotten_after_one_season(steps_at_once):
    spec = SeriesSpec(("a.mean",), (0,), STEP_MS, 2, (0.5,), (4,))
    wave = np.tile([0.0, 1.0, 2.0, 1.0], 15)
    moved = wave + np.where(np.arange(60) < 40, 0.0, 50.0)
    memory = SeriesMemory(spec)
    rows = empty_rows(memory.columns(), 1)
    found = np.concatenate(
        [
            memory.advance(rows, block(moved[None, first : first + steps_at_once, None], first=first)).local[0, :, 0]
            for first in range(0, 60, steps_at_once)
        ]
    )
    expected = [(wave[t] - np.mean(wave[t - 3 : t + 1])) / np.std(wave[: t + 1]) for t in range(3, 40)]
    np.testing.assert_allclose(found[3:40], expected, rtol=1e-4, atol=1e-6)
    assert np.abs(found[44:]).max() < 0.2 < 2 < np.abs(found[40])


def test_infinite_and_absurd_values_do_no_lasting_harm():
    values = noisy(SPEC, 1, 200, missing=0)
    values[0, 50] = [np.inf, -np.inf, 1e300]
    (context,), _ = drive(SPEC, values)
    inputs = rnn_inputs(context)
    assert np.isfinite(inputs).all()
    assert not context.observed[0, 50, :2].any()


def test_a_reset_forgets_the_ring_and_keeps_the_scale():
    memory = SeriesMemory(SPEC)
    rows = empty_rows(memory.columns(), 2)
    memory.advance(rows, block(noisy(SPEC, 2, 30)))
    mean = rows["memory.mean"].copy()
    refill(rows, memory.columns(), np.array([True, False]))
    assert np.isnan(rows["memory.ring"][0]).all()
    assert np.isnan(rows["memory.last"][0]).all()
    assert rows["memory.steps"].tolist() == [0, 30]
    assert np.array_equal(rows["memory.mean"], mean)


def test_the_window_holds_the_last_values_in_the_scale_of_now():
    values = noisy(SPEC, 2, 30, missing=0)
    (context,), _ = drive(SPEC, values, ring_steps=20)
    window = context.window(8)
    mean, scale = context.mean[1, 25], context.channel_scale[1, 25]
    expected = np.clip((values[1, 18:26] - mean) / scale, -8, 8)
    assert window[1, 25] == pytest.approx(expected, abs=1e-3)
    assert (window[:, 0, :-1] == 0).all()


def test_calendar_is_the_phase_of_the_window_end():
    (context,), _ = drive(SPEC, noisy(SPEC, 1, 24))
    calendar = context.calendar()
    assert calendar.shape == (1, 24, 4)
    assert calendar[0, 3] == pytest.approx([0, np.sin(2 * np.pi * 4 / 12), 1, np.cos(2 * np.pi * 4 / 12)], abs=1e-6)


def test_inputs_have_the_size_they_say_with_and_without_seasons():
    for spec in (SPEC, SeriesSpec(("a.mean",), (0,), STEP_MS, 1, (0.5,))):
        (context,), _ = drive(spec, noisy(spec, 2, 5))
        assert rnn_inputs(context).shape == (2, 5, input_size(spec))
        assert rnn_inputs(context).dtype == np.float32


def test_lead_knots_span_the_horizon():
    for horizon in (1, 2, 8, 24, 96):
        knots = lead_knots(horizon)
        assert (knots[0], knots[-1]) == (1, horizon)
        assert len(knots) == min(horizon, 8)
