"""What the linear stages see: held against a loop that adds up one lag after the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.cascade import Cascade
from models.features import look_back
from models.forecaster import SeriesSpec
from models.lags import (
    ANCHOR_STEPS,
    CLIP_VOLATILITIES,
    CONSTANT,
    EXCESS,
    EXCESS_LIMIT,
    RANGES,
    LagPlan,
    Stretch,
    damping,
    full_plan,
    ground_size,
    lag_features,
    small_plan,
)
from models.volatility import Volatility

HOUR = 3_600_000


def spec(horizon: int, *seasons: int) -> SeriesSpec:
    return SeriesSpec(("a.mean",), (0,), HOUR, horizon, (0.1, 0.5, 0.9), seasons, profile="lean")


SPECS = [spec(24, 24), spec(1, 24), spec(24), spec(1), spec(24, 24, 168), spec(5, 4, 12), spec(1, 2), spec(30, 8)]
PLANS = [plan(one) for one in SPECS for plan in (full_plan, small_plan)]
PLAN = LagPlan(((2, 2), (3, 6), (7, 15)), ((1, 3), (10, 12)), harmonics=2, seasons=1)


def stretch(series=3, past=30, steps=7, *, after=0, missing=0.2, seed=0) -> Stretch:
    """Random walks with holes; the last origin stands `after` steps before the end."""
    random = np.random.default_rng(seed)
    size = past + steps + after
    history = np.cumsum(random.standard_normal((series, size)), axis=1)
    history[random.random(history.shape) < missing] = np.nan
    average = random.standard_normal((series, size + 4))
    average[:, :8] = np.nan
    anchor = np.full((series, steps), np.nan)
    for n in range(series):
        for t in range(steps):
            known = history[n, : past + t + 1]
            known = known[np.isfinite(known)]
            anchor[n, t] = known[-1] if len(known) else np.nan
    limit = random.uniform(0.3, 2.0, anchor.shape)
    unit = random.uniform(0.3, 2.0, anchor.shape)
    phase = random.uniform(0, 2 * np.pi, (series, steps, 1))
    return Stretch(history, average, steps + after, anchor, limit, unit, phase)


def features(plan: LagPlan, given: Stretch) -> np.ndarray:
    (found,) = lag_features([plan], given)
    return found


def one_by_one(plan: LagPlan, given: Stretch) -> np.ndarray:
    """(N, T, p) all but the excess."""
    series, steps = given.anchor.shape
    out = np.zeros((series, steps, plan.size))
    out[..., CONSTANT] = 1.0
    for n in range(series):
        for t in range(steps):
            if np.isnan(given.anchor[n, t]):
                continue
            found = []
            for source, ranges in ((given.history, plan.ranges), (given.average, plan.averages)):
                origin = source.shape[1] - given.first + t
                for first, last in ranges:
                    places = [origin + 1 - lag for lag in range(first, last + 1)]
                    known = [source[n, at] for at in places if at >= 0 and np.isfinite(source[n, at])]
                    distance = np.mean(known) - given.anchor[n, t] if known else 0.0
                    bound = CLIP_VOLATILITIES * given.limit[n, t]
                    found.append(np.clip(distance, -bound, bound) / given.unit[n, t])
            out[n, t, RANGES : RANGES + len(found)] = found
            waves = [w(h * given.phase[n, t]) for h in range(1, plan.harmonics + 1) for w in (np.sin, np.cos)]
            out[n, t, RANGES + len(found) :] = np.concatenate(waves) if waves else []
    return out


@pytest.mark.parametrize("missing", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("after", [0, 5])
def test_means_over_ranges_are_those_of_a_plain_loop(missing, after):
    given = stretch(missing=missing, after=after)
    found = features(PLAN, given)
    assert found.dtype == np.float32
    columns = [CONSTANT, *range(RANGES, PLAN.size)]
    np.testing.assert_allclose(found[..., columns], one_by_one(PLAN, given)[..., columns], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_gives_what_the_plain_loop_gives(plan):
    given = stretch(2, plan.reach + 5, 3)
    given = replace(given, phase=np.random.default_rng(1).uniform(0, 6, (2, 3, plan.seasons)))
    columns = [CONSTANT, *range(RANGES, plan.size)]
    expected = one_by_one(plan, given)[..., columns]
    np.testing.assert_allclose(features(plan, given)[..., columns], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_plans_that_are_asked_together_are_given_what_each_is_given_alone(missing):
    one = spec(24, 24)
    plans = full_plan(one), small_plan(one), full_plan(one)
    given = stretch(2, plans[0].reach + 5, 3, missing=missing)
    found = lag_features(plans, given)
    assert [one.shape for one in found] == [(2, 3, plan.size) for plan in plans]
    for plan, together in zip(plans, found):
        np.testing.assert_array_equal(together, features(plan, given))
    assert lag_features([], given) == []


def test_nothing_of_later_steps_is_seen():
    given = stretch(after=6, missing=0.1)
    later = given.history.shape[1] - 6
    changed = given.history.copy()
    changed[:, later:] = 1e6
    average = given.average.copy()
    average[:, -6:] = np.nan
    other = replace(given, history=changed, average=average)
    np.testing.assert_allclose(features(PLAN, other), features(PLAN, given), rtol=1e-6, atol=1e-6)


def test_a_step_sees_no_later_step_of_its_own_stretch():
    given = stretch(steps=7, missing=0.0)
    history = given.history.copy()
    history[:, -3:] += 50
    changed = features(PLAN, replace(given, history=history))
    np.testing.assert_allclose(changed[:, :4], features(PLAN, given)[:, :4], atol=1e-5)


def test_features_of_a_longer_history_are_the_same():
    """A memory that reaches further back changes nothing."""
    given = stretch(past=40)
    short = replace(given, history=given.history[:, 40 - PLAN.reach - ANCHOR_STEPS :])
    np.testing.assert_allclose(features(PLAN, short), features(PLAN, given), atol=1e-5)


def test_an_anchor_far_from_its_past_tells_how_far_from_the_median_it_is():
    history = np.zeros((1, 20))
    history[0, 12:19] = [1, -1, 1, -1, 1, -1, 1]
    history[0, 19] = 500.0
    given = Stretch(
        history, history, 1, np.array([[500.0]]), np.ones((1, 1)), np.full((1, 1), 2.0), np.zeros((1, 1, 0))
    )
    plan = LagPlan(((2, 3),), (), 0, 0)
    # Nine values, anchor included: 0, +-1 seven times, 500. The median is 1.
    assert features(plan, given)[0, 0, EXCESS] == pytest.approx((500 - 1) / 2)
    assert damping(features(plan, given), given)[0, 0] == pytest.approx(CLIP_VOLATILITIES / 2 / 249.5)


@pytest.mark.parametrize("jump", [0.0, 3.0, -CLIP_VOLATILITIES * 0.99])
def test_an_ordinary_anchor_has_no_excess_and_full_weight(jump):
    history = np.zeros((1, 20))
    history[0, 19] = jump
    given = Stretch(history, history, 1, history[:, -1:], np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1, 0)))
    found = features(LagPlan(((2, 3),), (), 0, 0), given)
    assert found[0, 0, EXCESS] == 0
    assert damping(found, given)[0, 0] == 1


def test_a_level_that_lasts_five_steps_is_no_outlier_any_more():
    history = np.zeros((1, 20))
    history[0, 15:] = 1000.0
    given = Stretch(history, history, 5, history[:, 15:], np.ones((1, 5)), np.ones((1, 5)), np.zeros((1, 5, 0)))
    found = features(LagPlan(((2, 3),), (), 0, 0), given)[0, :, EXCESS]
    assert found.tolist() == [EXCESS_LIMIT] * 4 + [0.0]


def test_features_are_held_within_the_limit():
    given = stretch(missing=0.3)
    wild = replace(given, history=given.history * 1e6)
    found = features(PLAN, wild)
    bound = CLIP_VOLATILITIES * given.limit / given.unit
    assert np.isfinite(found).all()
    assert (np.abs(found[..., RANGES : RANGES + 5]) <= bound[..., None] * (1 + 1e-6)).all()
    assert (np.abs(found[..., EXCESS]) <= EXCESS_LIMIT).all()


def test_a_series_of_which_nothing_is_known_shows_the_constant_alone():
    given = stretch(missing=1.0)
    found = features(PLAN, given)
    assert (found[..., CONSTANT] == 1).all()
    assert (found[..., 1:] == 0).all()


def test_a_range_in_which_nothing_is_known_is_where_the_anchor_is():
    given = stretch(1, missing=0.0, steps=1)
    history = given.history.copy()
    history[:, -6:-2] = np.nan
    assert features(PLAN, replace(given, history=history))[0, 0, RANGES + 1] == 0.0


@pytest.mark.parametrize(("size", "offset"), [(1000.0, 12345.0), (1e-3, 0.0), (-1.0, 5.0)])
def test_another_unit_or_level_of_the_series_gives_the_same_features(size, offset):
    given, magnitude = stretch(), abs(size)
    other = Stretch(
        given.history * size + offset,
        given.average * size + offset,
        given.first,
        given.anchor * size + offset,
        given.limit * magnitude,
        given.unit * magnitude,
        given.phase,
    )
    found, expected = features(PLAN, other), features(PLAN, given)
    places = slice(EXCESS, RANGES + 5)
    np.testing.assert_allclose(found[..., places], np.sign(size) * expected[..., places], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [1e20, 1e37])
def test_ranges_after_an_absurd_value_are_as_exact_as_ever(value):
    given = stretch(1, 30, 3, missing=0.0)
    history = given.history.copy()
    history[:, 5] = value
    np.testing.assert_allclose(
        features(PLAN, replace(given, history=history))[..., RANGES : RANGES + 3],
        features(PLAN, given)[..., RANGES : RANGES + 3],
        atol=1e-4,
    )


@pytest.mark.parametrize("one", SPECS, ids=str)
def test_a_plan_looks_at_no_lag_before_the_first_and_twice_at_none(one):
    for plan in (full_plan(one), small_plan(one)):
        for ranges in (plan.ranges, plan.averages):
            assert all(1 <= first <= last for first, last in ranges)
            assert len(set(plan.averages)) == len(plan.averages)
        assert plan.reach == max(last for _, last in (*plan.ranges, *plan.averages))
        assert plan.size == RANGES + len(plan.ranges) + len(plan.averages) + 2 * plan.harmonics * len(one.seasons)


@pytest.mark.parametrize("one", SPECS, ids=str)
def test_what_is_remembered_reaches_to_the_furthest_lag_of_the_oldest_pair(one):
    cascade = Cascade(one)
    oldest = cascade.epoch_steps + one.horizon - 1
    for plan in (full_plan(one), small_plan(one)):
        assert cascade.ring_steps >= oldest + plan.reach
    assert cascade.ring_steps >= oldest + ANCHOR_STEPS
    assert cascade.average.steps == 0 or cascade.average.steps >= oldest + full_plan(one).reach
    assert Volatility(one).lag <= look_back(one)


@pytest.mark.parametrize("one", SPECS, ids=str)
def test_the_whole_band_of_a_season_is_looked_at(one):
    """For each lead the same phase one season ago, t + h - S, lies in a range: lag S - h + 1."""
    lags = {lag for first, last in full_plan(one).ranges for lag in range(first, last + 1)}
    for season in one.seasons:
        for lead in range(1, min(one.horizon, season) + 1):
            assert season - lead + 1 in lags | {1}


def test_one_season_at_a_day_ahead_costs_about_fifty_features():
    assert full_plan(spec(24, 24)).size < 60
    assert small_plan(spec(24, 24)).size < 20
    assert full_plan(spec(24, 24, 168)).size < 70


def test_without_a_season_there_are_no_averages_and_no_calendar():
    plan = full_plan(spec(24))
    assert plan.averages == ()
    assert plan.size == RANGES + len(plan.ranges)
    given = stretch(2, plan.reach, 3)
    assert features(plan, replace(given, phase=np.empty((2, 3, 0)))).shape == (2, 3, plan.size)


def test_a_network_is_shown_no_constant_no_calendar_and_nothing_in_profile_base():
    plan = full_plan(spec(24, 24))
    assert ground_size(spec(24, 24)) == plan.size - 1 - 4 + 8 + 1
    assert ground_size(replace(spec(24, 24), profile="base")) == 0
