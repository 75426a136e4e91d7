"""Measures of forecasts: utilsforecast is the slow judge, and a label counts for all forecasters or for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from utilsforecast import losses

from models.measures import MEASURES, ErrorSums, InSample, Said

LEVELS = (0.1, 0.5, 0.9)
HORIZON = 3
UNKNOWN = np.array([np.nan])


def spread(mean: Any, width: Any = 1.0, levels: tuple[float, ...] = LEVELS) -> Said:
    """A mean with quantiles around it. mean, width: (n, H)."""
    mean = np.asarray(mean, np.float64)
    width = np.broadcast_to(np.asarray(width, np.float64), mean.shape)
    return Said(mean, mean[..., None] + width[..., None] * (np.array(levels) - 0.5))


class Story:
    """Random forecasts of two forecasters and one without quantiles, label by label; some of it is missing."""

    names = ("Ours", "Theirs", "Bare")

    def __init__(self, seed: int = 0, n: int = 300, series: int = 5) -> None:
        random = np.random.default_rng(seed)
        self.series = random.integers(0, series, n)
        self.truth = random.normal(3, 2, (n, HORIZON))
        self.truth[random.random((n, HORIZON)) < 0.1] = np.nan
        self.said = [spread(self._guess(random), random.uniform(0, 4, (n, HORIZON))) for _ in self.names[:2]]
        self.said.append(Said(self._guess(random), None))
        self.sums = ErrorSums(self.names, HORIZON, LEVELS)

    def _guess(self, random: np.random.Generator) -> Any:
        guess = self.truth + random.normal(0, 1, self.truth.shape)
        guess[np.isnan(guess)] = 0.0
        guess[random.random(guess.shape) < 0.05] = np.nan
        return guess

    def told(self, cuts: Any = ()) -> ErrorSums:
        for rows in np.split(np.arange(len(self.series)), sorted(cuts)):
            said = [Said(s.mean[rows], None if s.quantiles is None else s.quantiles[rows]) for s in self.said]
            self.sums.add(self.series[rows], self.truth[rows], said, LEVELS)
        return self.sums

    def frame(self) -> pd.DataFrame:
        """The labels that count, as utilsforecast wants them."""
        n = len(self.series)
        columns = {"unique_id": np.repeat(self.series, HORIZON), "lead": np.tile(np.arange(1, HORIZON + 1), n)}
        columns["y"] = self.truth.reshape(-1)
        for name, said in zip(self.names, self.said):
            columns[name] = said.mean.reshape(-1)
            if said.quantiles is not None:
                for q, level in enumerate(LEVELS):
                    columns[f"{name}-q{level}"] = said.quantiles[..., q].reshape(-1)
                columns[f"{name}-lo-80"], columns[f"{name}-hi-80"] = columns[f"{name}-q0.1"], columns[f"{name}-q0.9"]
        return pd.DataFrame(columns).dropna()


def judged(frame: pd.DataFrame, loss: Callable[..., Any], group: str, names: Any, **options: Any) -> Any:
    """(groups, names) by utilsforecast."""
    models = names if isinstance(names, dict) else list(names)
    found = loss(frame.assign(unique_id=frame[group]), models=models, **options).sort_values("unique_id")
    return found[list(models)].to_numpy()


def figures(sums: ErrorSums, units: Any = UNKNOWN) -> Any:
    known = np.broadcast_to(units, len(sums.sums)) if len(units) == 1 else units
    return sums.figures(known, known)


# -- against the judge


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "loss"), [("MAE", losses.mae), ("MSE", losses.mse), ("RMSE", losses.rmse), ("sMAPE", losses.smape)]
)
def test_errors_of_the_mean_are_those_of_utilsforecast(name: str, loss: Any, seed: int) -> None:
    story = Story(seed)
    found, frame = figures(story.told()), story.frame()
    np.testing.assert_allclose(found.by_series()[name], judged(frame, loss, "unique_id", story.names), rtol=1e-12)
    np.testing.assert_allclose(found.by_lead()[name], judged(frame, loss, "lead", story.names), rtol=1e-12)
    whole = frame.assign(all=0)
    np.testing.assert_allclose(found.over_all()[name], judged(whole, loss, "all", story.names)[0], rtol=1e-12)
    assert found.over_all()["labels"].tolist() == [len(frame)] * 3


def test_pinball_loss_is_the_mean_of_the_quantile_losses_of_utilsforecast() -> None:
    story = Story(1)
    found, frame = figures(story.told()), story.frame()
    losses_of_levels = []
    for level in LEVELS:
        columns = {f"{name}-q{level}": f"{name}-q{level}" for name in story.names[:2]}
        losses_of_levels.append(judged(frame, losses.quantile_loss, "lead", columns, q=level))
    np.testing.assert_allclose(found.by_lead()["pinball"][:, :2], np.mean(losses_of_levels, axis=0), rtol=1e-12)


def test_coverage_is_that_of_utilsforecast_and_width_is_the_mean_distance() -> None:
    story = Story(2)
    found, frame = figures(story.told()), story.frame()
    theirs = judged(frame, losses.coverage, "lead", story.names[:2], level=80)
    np.testing.assert_allclose(found.by_lead()["coverage"][:, :2], theirs)
    assert 0 < theirs.min() < theirs.max() < 1
    width = (frame["Ours-hi-80"] - frame["Ours-lo-80"]).groupby(frame["lead"]).mean()
    np.testing.assert_allclose(found.by_lead()["width"][:, 0], width, rtol=1e-12)


def test_reliability_counts_truths_at_or_below_each_quantile() -> None:
    story = Story(3)
    shares, frame = story.told().reliability, story.frame()
    for name in story.names[:2]:
        wanted = [(frame["y"] <= frame[f"{name}-q{level}"]).mean() for level in LEVELS]
        np.testing.assert_allclose(shares[name], wanted)
    assert np.isnan(shares["Bare"]).all()
    exact = ErrorSums(("Ours",), 1, LEVELS)
    exact.add(np.zeros(1, np.int64), np.ones((1, 1)), [spread(np.ones((1, 1)), 0.0)], LEVELS)
    assert exact.reliability["Ours"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("season", [1, 4])
def test_mase_is_that_of_utilsforecast_on_the_same_past(season: int) -> None:
    random = np.random.default_rng(4)
    story, in_sample, past = Story(4), InSample(), []
    for number in range(5):
        values = random.normal(3, 1 + number, 40)
        lagged = np.concatenate([np.full(season, np.nan), values[:-season]])
        in_sample.add(np.full(40, number), values, lagged, np.ones(40, np.bool_))
        past.append(pd.DataFrame({"unique_id": number, "ds": np.arange(40), "y": values}))
    found, frame = story.told().figures(*in_sample.units()), story.frame()
    theirs = judged(frame, losses.mase, "unique_id", story.names, seasonality=season, train_df=pd.concat(past))
    np.testing.assert_allclose(found.by_series()["MASE"][:5], theirs, rtol=1e-12)
    labels = found.by_series()["labels"][:5]
    np.testing.assert_allclose(found.over_all()["MASE"], (theirs * labels).sum(axis=0) / labels.sum(axis=0))


def test_scaled_errors_are_in_standard_deviations_of_each_series() -> None:
    story, frame = Story(5), Story(5).frame()
    deviation = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
    found = story.told().figures(np.full(5, np.nan), deviation)
    error = (frame["y"] - frame["Ours"]) / deviation[frame["unique_id"]]
    assert found.over_all()["scaled_MAE"][0] == pytest.approx(error.abs().mean())
    assert found.over_all()["scaled_MSE"][0] == pytest.approx((error**2).mean())
    np.testing.assert_allclose(found.by_lead()["scaled_MSE"][:, 0], (error**2).groupby(frame["lead"]).mean())
    assert np.isnan(found.over_all()["MASE"]).all()


# -- what counts


def test_a_perfect_forecaster_scores_0_at_every_lead() -> None:
    truth = np.random.default_rng(6).normal(0, 5, (50, HORIZON))
    sums = ErrorSums(("Ours", "Off"), HORIZON, LEVELS)
    sums.add(np.arange(50) % 4, truth, [spread(truth, 0.0), spread(np.roll(truth, 1, axis=1), 0.0)], LEVELS)
    by_lead = figures(sums, np.array([2.0])).by_lead()
    for name in MEASURES:
        wanted = 1.0 if name == "coverage" else 0.0
        assert by_lead[name][:, 0].tolist() == [wanted] * HORIZON, name
    assert (by_lead["MAE"][:, 1] > 1).all()  # one that is a lead off does not


@pytest.mark.parametrize("silent", [0, 1])
@pytest.mark.parametrize("nothing", [np.nan, np.inf])
def test_a_label_that_one_forecaster_is_silent_about_counts_for_none(silent: int, nothing: float) -> None:
    truth = np.array([[1.0, 2.0, 3.0]])
    said = [spread(truth + 1), spread(truth + 2)]
    said[silent].mean[0, 1] = nothing
    sums = ErrorSums(("a", "b"), HORIZON, LEVELS)
    sums.add(np.zeros(1, np.int64), truth, said, LEVELS)
    found = figures(sums).by_lead()
    assert found["labels"].tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert found["MAE"][[0, 2]].tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert np.isnan(found["MAE"][1]).all()
    assert sums.of_level.tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize("nothing", [np.nan, np.inf])
def test_a_forecaster_without_finite_quantiles_has_not_said_what_a_label_asks(nothing: float) -> None:
    truth = np.array([[1.0, 2.0, 3.0]])
    said = [spread(truth + 1), spread(truth)]
    assert said[1].quantiles is not None
    said[1].quantiles[0, 2, 2] = nothing
    sums = ErrorSums(("a", "b"), HORIZON, LEVELS)
    sums.add(np.zeros(1, np.int64), truth, said, LEVELS)
    found = figures(sums).over_all()
    assert found["labels"].tolist() == [2.0, 2.0]
    assert np.isfinite(found["pinball"]).all()
    assert np.isfinite(found["width"]).all()


def test_a_truth_that_is_not_known_counts_for_none() -> None:
    truth = np.array([[np.nan, 2.0, np.inf]])
    sums = ErrorSums(("a",), HORIZON, LEVELS)
    sums.add(np.zeros(1, np.int64), truth, [spread(np.ones((1, 3)))], LEVELS)
    assert figures(sums).by_lead()["labels"].tolist() == [[0.0], [1.0], [0.0]]
    assert figures(sums).over_all()["MAE"].tolist() == [1.0]


def test_a_forecaster_without_quantiles_has_no_pinball_loss_and_takes_nobody_elses() -> None:
    truth = np.zeros((4, HORIZON))
    sums = ErrorSums(("a", "bare"), HORIZON, LEVELS)
    sums.add(np.zeros(4, np.int64), truth, [spread(truth + 1, 4.0), Said(truth + 2, None)], LEVELS)
    found = figures(sums).over_all()
    assert found["MAE"].tolist() == [1.0, 2.0]
    for name in ("pinball", "coverage", "width"):
        assert np.isfinite(found[name][0])
        assert np.isnan(found[name][1])


def test_with_a_single_quantile_nothing_but_the_quantile_itself_is_covered() -> None:
    truth = np.array([[1.0], [2.0], [3.0]])
    sums = ErrorSums(("a",), 1, (0.9,))
    sums.add(np.zeros(3, np.int64), truth, [spread(np.full((3, 1), 2.0), 0.0, (0.9,))], (0.9,))
    found = figures(sums).over_all()
    assert found["coverage"].tolist() == pytest.approx([1 / 3])
    assert found["width"].tolist() == [0.0]
    assert found["pinball"].tolist() == pytest.approx([(0.1 * 1 + 0 + 0.9 * 1) / 3])
    assert sums.reliability["a"].tolist() == pytest.approx([2 / 3])


def test_what_float32_cannot_tell_apart_is_covered() -> None:
    # A forecast is float32: 20.1 said of 20.1 is 20.100000381..., and is no miss. 20.3 said of 20.3 is 20.299999237...
    for value in (20.1, 20.3):
        said = np.full((5, 1), value, np.float32)
        sums = ErrorSums(("a",), 1, LEVELS)
        sums.add(np.zeros(5, np.int64), np.full((5, 1), value), [Said(said, np.repeat(said[..., None], 3, 2))], LEVELS)
        assert figures(sums).over_all()["coverage"].tolist() == [1.0]
        assert sums.reliability["a"].tolist() == [1.0, 1.0, 1.0]


def test_models_with_other_levels_and_shorter_horizons_share_one_table() -> None:
    truth, one = np.zeros((1, HORIZON)), np.zeros(1, np.int64)
    sums = ErrorSums(("a",), HORIZON, (0.1, 0.25, 0.5, 0.9))
    sums.add(one, truth, [spread(truth + 1, 2.0, (0.1, 0.9))], (0.1, 0.9))
    sums.add(one, truth[:, :1], [spread(truth[:, :1] + 3, 2.0, (0.25,))], (0.25,))
    assert sums.of_level.tolist() == [[3.0, 1.0, 0.0, 3.0]]
    found = figures(sums).by_lead()
    assert found["labels"][:, 0].tolist() == [2.0, 1.0, 1.0]
    assert found["MAE"][:, 0].tolist() == [2.0, 1.0, 1.0]
    assert np.isnan(sums.reliability["a"][2])


def test_both_zero_is_no_symmetric_error_and_opposite_signs_are_all_of_it() -> None:
    sums = ErrorSums(("a",), 3, LEVELS)
    sums.add(np.zeros(1, np.int64), np.array([[0.0, 1.0, 0.0]]), [spread(np.array([[0.0, -1.0, 5.0]]))], LEVELS)
    assert figures(sums).by_lead()["sMAPE"].tolist() == [[0.0], [1.0], [1.0]]


# -- gathering


@given(cuts=st.sets(st.integers(1, 299)), seed=st.integers(0, 5))
def test_any_cutting_gives_the_same_sums(cuts: set[int], seed: int) -> None:
    whole, pieces = Story(seed).told(), Story(seed).told(cuts)
    known = min(len(whole.sums), len(pieces.sums))
    np.testing.assert_allclose(whole.sums[:known], pieces.sums[:known], rtol=1e-9)
    assert not whole.sums[known:].any()
    assert not pieces.sums[known:].any()
    np.testing.assert_array_equal(whole.below, pieces.below)
    np.testing.assert_array_equal(whole.of_level, pieces.of_level)


def test_nothing_to_add_changes_nothing() -> None:
    sums = ErrorSums(("a",), HORIZON, LEVELS)
    sums.add(np.empty(0, np.int64), np.empty((0, HORIZON)), [spread(np.empty((0, HORIZON)))], LEVELS)
    assert sums.sums.shape == (0, HORIZON, 1, 8)
    found = sums.figures(np.empty(0), np.empty(0)).over_all()
    assert found["labels"].tolist() == [0.0]
    assert all(np.isnan(found[name]).all() for name in MEASURES)


def test_series_that_come_later_leave_the_earlier_ones_as_they_were() -> None:
    sums = ErrorSums(("a",), 1, LEVELS)
    for number in range(9):
        truth = np.zeros((number + 1, 1))
        sums.add(np.full(number + 1, number), truth, [spread(truth + number)], LEVELS)
    found = figures(sums).by_series()
    assert found["labels"][:9, 0].tolist() == list(range(1, 10))
    assert found["MAE"][:9, 0].tolist() == list(range(9))


def test_a_series_without_a_label_is_a_row_of_nothing() -> None:
    sums = ErrorSums(("a",), 1, LEVELS)
    sums.add(np.zeros(1, np.int64), np.zeros((1, 1)), [spread(np.ones((1, 1)))], LEVELS)
    found = sums.figures(np.ones(4), np.ones(4))
    assert found.by_series()["labels"].tolist() == [[1.0], [0.0], [0.0], [0.0]]
    assert found.over_all()["MAE"].tolist() == [1.0]


def test_series_without_a_unit_are_left_out_of_what_is_scaled_only() -> None:
    truth = np.zeros((3, 1))
    sums = ErrorSums(("a",), 1, LEVELS)
    sums.add(np.arange(3), truth, [spread(truth + np.array([[1.0], [2.0], [30.0]]))], LEVELS)
    found = sums.figures(np.array([0.5, np.nan, 0.0]), np.array([np.nan, 4.0, np.inf]))
    assert found.over_all()["MAE"].tolist() == [11.0]
    assert found.over_all()["MASE"].tolist() == [2.0]
    assert found.over_all()["scaled_MAE"].tolist() == [0.5]
    np.testing.assert_array_equal(found.by_series()["MASE"], [[2.0], [np.nan], [np.nan]])


# -- what MASE and the scaled errors divide by


def added(*columns: Any, before: Any = True) -> tuple[float, float]:
    """Units of one series. columns: truth and, unless told, the value before it."""
    truth = np.array(columns[0], np.float64)
    naive = np.concatenate([[np.nan], truth[:-1]]) if len(columns) == 1 else np.array(columns[1], np.float64)
    found = InSample()
    found.add(np.zeros(len(truth), np.int64), truth, naive, np.broadcast_to(before, len(truth)))
    naive_error, deviation = found.units()
    return float(naive_error[0]), float(deviation[0])


def test_units_are_mean_naive_error_and_standard_deviation() -> None:
    values = np.random.default_rng(7).normal(10, 3, 100)
    assert added(values) == pytest.approx((np.abs(np.diff(values)).mean(), values.std()))


def test_missing_values_are_no_errors_and_no_values() -> None:
    assert added([1, np.nan, 3, 5], [np.nan, 1, 2, np.nan]) == pytest.approx((1.0, np.std([1, 3, 5])))


def test_only_what_came_before_counts_where_something_did() -> None:
    values, before = [1.0, 2.0, 4.0, 100.0, -100.0], np.arange(5) < 3
    assert added(values, before=before) == pytest.approx((1.5, np.std([1.0, 2.0, 4.0])))


def test_where_nothing_came_before_all_of_it_counts() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    whole = added(values)
    assert added(values, before=False) == pytest.approx(whole)
    # One value before: no error and no deviation of it; both fall back, each for itself.
    assert added(values, before=np.arange(4) < 1) == pytest.approx(whole)


def test_a_constant_series_has_no_units() -> None:
    naive, deviation = added([20.1] * 50)
    assert not naive > 0
    assert np.isnan(deviation)


def test_the_rounding_of_a_forecast_is_no_error_of_a_constant_series() -> None:
    # What the naive forecast says is float32, and 4e-7 off: as a unit, that would make MASE of everything else a million.
    for value in (20.1, 1e9 + 0.3, -0.1):
        naive, deviation = added([value] * 50, np.full(50, value, np.float32))
        assert not naive > 0, value
        assert np.isnan(deviation)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9, 1e9])
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_small_noise_on_a_huge_offset_keeps_its_digits(offset: float, size: float) -> None:
    noise = size * np.random.default_rng(8).normal(0, 1, 1_000)
    _, deviation = added(offset + noise)
    assert deviation == pytest.approx(noise.std(), rel=1e-4)


def test_an_error_much_larger_than_rounding_is_a_unit_however_large_the_offset() -> None:
    values = 1e9 + 1e4 * np.random.default_rng(9).normal(0, 1, 1_000)
    naive, _ = added(values, np.concatenate([[np.nan], values[:-1]]).astype(np.float32))
    assert naive == pytest.approx(np.abs(np.diff(values)).mean(), rel=0.01)


@given(cuts=st.sets(st.integers(1, 59)), at=st.integers(0, 60))
def test_units_do_not_depend_on_how_the_steps_were_cut_nor_on_a_stop_between(cuts: set[int], at: int) -> None:
    random = np.random.default_rng(10)
    series, truth, naive = random.integers(0, 7, 60), random.normal(1e6, 1, 60), random.normal(1e6, 1, 60)
    truth[random.random(60) < 0.2] = np.nan
    before = random.random(60) < 0.5
    whole, pieces = InSample(), InSample()
    whole.add(series, truth, naive, before)
    for rows in np.split(np.arange(60), sorted(cuts | {at})):
        pieces.add(series[rows], truth[rows], naive[rows], before[rows])
        if len(rows) and rows[-1] + 1 == at:
            stored = {name: column.copy() for name, column in pieces.state().items()}
            pieces = InSample()
            pieces.restore(stored)
    for one, other in zip(whole.units(), pieces.units()):
        np.testing.assert_allclose(one[:7], other[:7], rtol=1e-9)
        assert np.isfinite(one[:7]).all()


def test_the_origin_of_a_series_is_its_first_value_even_where_it_comes_twice_in_a_batch() -> None:
    found = InSample()
    found.add(np.array([1, 1, 0, 1]), np.array([np.nan, 5.0, 3.0, 9.0]), np.full(4, np.nan), np.zeros(4, np.bool_))
    assert found.state()["origin"].tolist() == [3.0, 5.0]
