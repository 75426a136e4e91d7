"""statsforecast's models beside the service: what they are shown, what they say, and when they say nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from models.measures import Said
from pipeline.errors import DeploymentError, SettingsError
from pipeline.service.statistical import FEWEST_STEPS, Statistical

SEASON = 12
HORIZON = 6
LEVELS = (0.05, 0.1, 0.5, 0.9, 0.95)


def asked(
    names: Sequence[str] = ("AutoETS",),
    season: int = SEASON,
    horizon: int = HORIZON,
    levels: Sequence[float] = LEVELS,
    history_steps: int = 100,
) -> Statistical:
    return Statistical(names, season, horizon, levels, history_steps)


def wave(first: int = 0, steps: int = 6 * SEASON, noise: float = 0.1, seed: int = 0, level: float = 10.0) -> Any:
    at = np.arange(first, first + steps)
    return level + 3 * np.sin(2 * np.pi * at / SEASON) + noise * np.random.default_rng(seed).normal(0, 1, steps)


@pytest.fixture(scope="module")
def ets() -> Statistical:
    return asked()


def test_on_a_clean_season_the_errors_are_those_of_the_noise(ets: Statistical) -> None:
    (said,) = ets.forecast([wave(seed=seed) for seed in range(4)])
    truth = wave(6 * SEASON, HORIZON, noise=0.0)
    assert said.mean.shape == (4, HORIZON)
    assert np.abs(said.mean - truth).max() < 0.4
    assert np.abs(said.mean - truth).mean() < 0.1
    assert np.abs(said.mean - np.roll(truth, 1)).mean() > 0.5  # a lead off would be seen


def test_quantiles_ascend_and_each_is_where_it_belongs(ets: Statistical) -> None:
    (said,) = ets.forecast([wave(), wave(seed=1)])
    assert said.quantiles is not None
    assert said.quantiles.shape == (2, HORIZON, len(LEVELS))
    assert (np.diff(said.quantiles, axis=-1) > 0).all()
    np.testing.assert_array_equal(said.quantiles[..., 2], said.mean)
    above = said.quantiles - said.mean[..., None]
    np.testing.assert_allclose(above, -above[..., ::-1], rtol=1e-6)  # ETS is Gaussian here: as far below as above
    np.testing.assert_allclose(above[..., 4] / above[..., 3], 1.6449 / 1.2816, rtol=1e-3)


def test_about_as_many_truths_lie_below_a_quantile_as_it_says() -> None:
    many = asked(("HistoricAverage",), horizon=1, levels=(0.1, 0.8))
    histories = [np.random.default_rng(seed).normal(0, 1, 41) for seed in range(400)]
    (said,) = many.forecast([history[:-1] for history in histories])
    assert said.quantiles is not None
    below = np.array([history[-1] for history in histories])[:, None] <= said.quantiles[:, 0]
    np.testing.assert_allclose(below.mean(axis=0), (0.1, 0.8), atol=0.05)


@pytest.mark.parametrize("levels", [(0.5,), (0.9,), (0.025, 0.975), (1 / 3, 0.667, 0.999)])
def test_any_levels_may_be_asked_for(levels: tuple[float, ...]) -> None:
    (said,) = asked(("Naive", "HistoricAverage"), levels=levels).forecast([wave()])[:1]
    assert said.quantiles is not None
    assert said.quantiles.shape == (1, HORIZON, len(levels))
    assert np.isfinite(said.quantiles).all()
    for q, level in enumerate(levels):
        assert (np.sign(said.quantiles[..., q] - said.mean) == np.sign(round(level - 0.5, 6))).all()


def same(one: Said, other: Said, row: int, place: int) -> None:
    np.testing.assert_allclose(one.mean[row], other.mean[place])
    assert one.quantiles is not None
    assert other.quantiles is not None
    np.testing.assert_allclose(one.quantiles[row], other.quantiles[place])


def test_what_is_said_of_a_history_does_not_depend_on_those_beside_it(ets: Statistical) -> None:
    # Twelve, so that "10" would come before "2" where somebody sorts texts; of all lengths, some too short.
    histories = [wave(steps=7 + 6 * n, seed=n, level=100.0 * n) for n in range(12)]
    (together,) = ets.forecast(histories)
    for n in (0, 1, 2, 10, 11):
        (alone,) = ets.forecast([histories[n]])
        same(together, alone, n, 0)
    assert np.isnan(together.mean[0]).all()
    assert np.nanmin(together.mean[11]) > 1_000


def test_of_a_history_too_short_nothing_is_said(ets: Statistical) -> None:
    histories = [wave(steps=FEWEST_STEPS - 1), wave(steps=FEWEST_STEPS), np.empty(0), np.full(50, np.nan)]
    (said,) = ets.forecast(histories)
    assert np.isfinite(said.mean).all(axis=1).tolist() == [False, True, False, False]
    assert said.quantiles is not None
    assert np.isfinite(said.quantiles).all(axis=(1, 2)).tolist() == [False, True, False, False]
    assert np.isnan(said.mean[[0, 2, 3]]).all()


def test_where_all_are_too_short_nothing_is_said_at_all(ets: Statistical) -> None:
    (said,) = ets.forecast([wave(steps=3)])
    assert said.mean.shape == (1, HORIZON)
    assert np.isnan(said.mean).all()
    (nobody,) = ets.forecast([])
    assert nobody.mean.shape == (0, HORIZON)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_missing_values_are_filled_with_the_one_before_and_left_out_at_the_beginning(missing: float) -> None:
    naive = asked(("Naive", "HistoricAverage"))
    last, mean = naive.forecast([np.array([missing] * 3 + [1.0, 2.0] * 6 + [5.0, missing, missing])])
    assert last.mean[0].tolist() == [5.0] * HORIZON
    assert mean.mean[0].tolist() == pytest.approx([np.mean([1.0, 2.0] * 6 + [5.0] * 3)] * HORIZON)
    assert np.isfinite(last.quantiles).all()  # type: ignore[arg-type]


def test_a_history_is_left_as_it_was(ets: Statistical) -> None:
    history = wave()
    history[5] = np.nan
    before = history.copy()
    ets.forecast([history])
    np.testing.assert_array_equal(history, before)


def test_a_season_is_what_a_model_is_told_and_1_is_none() -> None:
    history = np.tile([1.0, 2.0, 4.0], 10)
    assert asked(("SeasonalNaive",), season=3).forecast([history])[0].mean[0].tolist() == [1, 2, 4, 1, 2, 4]
    assert asked(("SeasonalNaive",), season=1).forecast([history])[0].mean[0].tolist() == [4] * 6


def test_each_model_says_its_own_in_the_order_of_the_names() -> None:
    names = ("HistoricAverage", "SeasonalNaive", "Naive")
    average, seasonal, last = asked(names).forecast([wave()])
    assert average.mean[0] == pytest.approx([wave().mean()] * HORIZON)
    assert seasonal.mean[0] == pytest.approx(wave()[-SEASON : HORIZON - SEASON])
    assert last.mean[0] == pytest.approx([wave()[-1]] * HORIZON)


@pytest.mark.parametrize("name", ["RandomWalkWithDrift", "DynamicOptimizedTheta", "Holt"])
def test_a_model_that_calls_itself_otherwise_is_known_by_the_name_it_was_asked_for(name: str) -> None:
    (said,) = asked((name,)).forecast([wave()])
    assert np.isfinite(said.mean).all()
    assert said.quantiles is not None


@pytest.mark.parametrize("name", ["CrostonClassic", "ADIDA", "SimpleExponentialSmoothingOptimized"])
def test_a_model_that_knows_no_intervals_has_no_quantiles_and_is_nobody_else(name: str) -> None:
    own, naive = asked((name, "SeasonalNaive")).forecast([wave(), wave(steps=3)])
    assert own.quantiles is None
    assert naive.quantiles is not None
    assert np.isfinite(own.mean[0]).all()
    assert np.isnan(own.mean[1]).all()
    assert np.ptp(own.mean[0]) < 1e-9  # flat, as they are; the seasonal naive that stands in for a failed fit is not
    assert np.ptp(naive.mean[0]) > 1


def test_where_a_fit_fails_the_naive_forecast_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from statsforecast.models import AutoETS

    forecast: Callable[..., Any] = AutoETS.forecast

    @functools.wraps(forecast)
    def fails_on_a_thousand(self: Any, y: Any, *args: Any, **options: Any) -> Any:
        if y.max() > 900:
            raise ZeroDivisionError
        return forecast(self, y, *args, **options)

    monkeypatch.setattr(AutoETS, "forecast", fails_on_a_thousand)
    (said,) = asked().forecast([wave(level=1_000.0), wave()])
    assert said.mean[0] == pytest.approx(wave(level=1_000.0)[-SEASON : HORIZON - SEASON])
    assert not np.array_equal(said.mean[1], wave()[-SEASON : HORIZON - SEASON])
    (naive,) = asked(("SeasonalNaive",)).forecast([wave(level=1_000.0)])
    same(said, naive, 0, 0)
    (own,) = asked().forecast([wave()])
    same(own, said, 0, 1)


@pytest.mark.parametrize("name", ["AutoEts", "Naives", "np", "ConformalIntervals", ""])
def test_a_name_that_there_is_not_is_refused_with_some_that_there_are(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"--beside {name}: statsforecast has no such model.*AutoETS, AutoARIMA"):
        asked(("AutoETS", name))


@pytest.mark.parametrize(("name", "word"), [("WindowAverage", "window_size"), ("TSB", "alpha_d, alpha_p")])
def test_a_model_that_a_name_alone_does_not_make_is_refused(name: str, word: str) -> None:
    with pytest.raises(SettingsError, match=rf"--beside {name}: it cannot be made without {word};.*AutoETS"):
        asked((name,))


def test_without_statsforecast_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsforecast.models", None)
    with pytest.raises(DeploymentError, match=r"AutoETS, Theta come from statsforecast.*pip install statsforecast"):
        asked(("AutoETS", "Theta"))


def test_a_library_that_one_model_alone_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from statsforecast.models import AutoETS

    def missing(self: Any, season_length: int = 1, **options: Any) -> Any:
        raise ImportError("AutoETS requires scikit-learn.")

    for name in ("__init__", "forecast"):
        with monkeypatch.context() as patch:
            patch.setattr(AutoETS, name, missing)
            with pytest.raises(DeploymentError, match=r"--beside AutoETS: AutoETS requires scikit-learn\. Install it"):
                asked()
