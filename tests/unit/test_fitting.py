"""Challengers before the gate: a good one, a poisoned one, one that begins with the champion's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.sequences import Sequences
from pipeline.service.assembly import task_settings
from pipeline.service.fitting import Challenge, challenge, learned_spec
from pipeline.settings import Settings, load

HOUR = 3_600_000
SENSORS, HOURS, SEASON = 10, 260, 8
pytestmark = pytest.mark.keras


def settings_with(**changes: Any) -> Settings:
    wanted = {
        "readings.fields": ["value"],
        "forecast.horizon": 4,
        "forecast.season": ["8h"],
        "model.units": 8,
        "training.epochs": 6,
        "training.lanes": 8,
        "training.chunk": 24,
        "retraining.min_labels": 100,
    }
    return load(None, {}, wanted | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def settings() -> Settings:
    return settings_with()


def history(seed: int = 0) -> Sequences:
    """A rhythm, and a disturbance that dies away slowly."""
    random = np.random.default_rng(seed)
    disturbance = np.zeros((HOURS, SENSORS))
    for hour in range(1, HOURS):
        disturbance[hour] = 0.8 * disturbance[hour - 1] + random.normal(0, 1, SENSORS)
    values = 20 + 2 * np.sin(2 * np.pi * np.arange(HOURS)[:, None] / SEASON) + disturbance
    sensor = np.tile(np.arange(SENSORS, dtype=np.int32), HOURS)
    end_ms = np.repeat((np.arange(HOURS) + 1) * HOUR, SENSORS)
    return Sequences(sensor, end_ms, values.reshape(-1, 1), np.zeros(len(sensor), np.bool_))


def shuffled_before(sequences: Sequences, border_ms: int) -> Sequences:
    """What is trained on follows from nothing; what is judged by is as it was."""
    random, values = np.random.default_rng(3), sequences.values.copy()
    for sensor in range(SENSORS):
        own = np.flatnonzero((sequences.sensor == sensor) & (sequences.end_ms <= border_ms))
        values[own] = values[random.permutation(own)]
    return replace(sequences, values=values)


@pytest.fixture(scope="module")
def champion(settings: Settings) -> Challenge:
    return challenge(settings, task_settings(settings).spec, history(), None)


def test_a_first_model_that_beats_the_baselines_is_promoted(champion: Challenge) -> None:
    assert champion.verdict.promoted, champion.verdict.reason
    assert [figures.name for figures in champion.figures] == ["challenger", "LastValue", "SeasonalNaive"]
    assert len({figures.labels for figures in champion.figures}) == 1
    assert champion.parent == ""
    assert champion.manifest == json.loads(json.dumps(champion.manifest))


def test_a_challenger_that_learned_from_shuffled_targets_is_refused(settings: Settings, champion: Challenge) -> None:
    whole = history(seed=1)
    poisoned = shuffled_before(whole, whole.split_ms(settings.training.holdout))
    spec, served = task_settings(settings).spec, champion.model.forecaster
    for shape in (settings, settings_with(model__units=6)):  # from the champion's weights, and from nothing
        found = challenge(shape, spec, poisoned, served)
        assert not found.verdict.promoted
        own, against, *_ = found.figures
        assert own.pinball > 1.1 * against.pinball
        assert "is not lower than the champion's" in found.verdict.reason


def test_the_next_one_begins_with_the_champions_weights_and_is_never_worse_where_it_stops(
    settings: Settings, champion: Challenge
) -> None:
    short = settings_with(training__epochs=1)
    found = challenge(short, task_settings(short).spec, history(), champion.model.forecaster)
    assert (found.parent, found.model.warm) == (champion.version, True)
    own, served, *_ = found.figures
    assert served.name == "champion"
    assert own.pinball < 1.05 * served.pinball  # one epoch from nothing is far from it
    scratch = challenge(short, task_settings(short).spec, history(), None)
    assert own.pinball < scratch.figures[0].pinball


def test_a_champion_of_another_horizon_is_not_compared_and_that_is_said(
    settings: Settings, champion: Challenge
) -> None:
    longer = settings_with(forecast__horizon=6, training__epochs=1)
    found = challenge(longer, task_settings(longer).spec, history(), champion.model.forecaster)
    assert [figures.name for figures in found.figures] == ["challenger", "LastValue", "SeasonalNaive"]
    assert f"the champion {champion.version} forecasts another horizon" in found.verdict.reason
    assert found.parent == ""


def test_after_a_change_no_more_than_half_of_what_is_new_is_held_back(settings: Settings) -> None:
    whole = history()
    last, changed = HOURS * HOUR, (HOURS - 20) * HOUR
    found = challenge(settings, task_settings(settings).spec, whole, None, changed_ms=changed)
    assert found.model.holdout_from_ms == last - 10 * HOUR
    usual = challenge(settings, task_settings(settings).spec, whole, None, changed_ms=HOUR)
    assert usual.model.holdout_from_ms == whole.split_ms(settings.training.holdout)


# -- forecast.estimate_season


def hourly(values: np.ndarray) -> Sequences:
    """(T, S)"""
    hours, sensors = values.shape
    sensor = np.tile(np.arange(sensors, dtype=np.int32), hours)
    end_ms = np.repeat((np.arange(hours) + 1) * HOUR, sensors)
    return Sequences(sensor, end_ms, values.reshape(-1, 1), np.zeros(len(sensor), np.bool_))


def days_and_weeks() -> Sequences:
    """Days that are small at the end of the week."""
    hours = np.arange(8 * 168)
    course = np.where(hours // 24 % 7 >= 5, 0.3, 1.0) * (2 + np.sqrt(2) * np.sin(2 * np.pi * hours / 24))
    return hourly(course[:, None] + 0.2 * np.random.default_rng(0).standard_normal((len(hours), 3)))


def days() -> Sequences:
    hours = np.arange(40 * 24)[:, None]
    return hourly(np.sin(2 * np.pi * hours / 24) + 0.5 * np.random.default_rng(0).standard_normal((len(hours), 3)))


def noise() -> Sequences:
    return hourly(np.random.default_rng(0).standard_normal((1500, 3)))


@pytest.mark.parametrize(("series", "expected"), [(days, (24,)), (days_and_weeks, (24, 168)), (noise, ())])
def test_open_seasons_are_those_that_the_history_shows(series: Any, expected: tuple[int, ...]) -> None:
    spec = task_settings(settings_with(forecast__estimate_season=True)).spec
    assert (spec.seasons, spec.seasons_open) == ((8,), True)
    found = learned_spec(spec, series(), None)
    assert found == replace(spec, seasons=expected)
    assert found.seasons_open


def test_the_champions_seasons_are_kept_and_those_that_were_set_are_not_touched(champion: Challenge) -> None:
    spec = task_settings(settings_with(forecast__estimate_season=True)).spec
    served = champion.model.forecaster
    assert served.spec.seasons == (8,)
    assert learned_spec(replace(spec, seasons=(12,)), days_and_weeks(), served).seasons == (8,)
    settled = replace(spec, seasons_open=False)
    assert learned_spec(settled, days_and_weeks(), None) is settled


def test_a_challenger_has_the_champions_seasons_where_they_are_open(champion: Challenge) -> None:
    settings = settings_with(forecast__estimate_season=True, forecast__season=["12h"], training__epochs=1)
    found = challenge(settings, task_settings(settings).spec, history(), champion.model.forecaster)
    assert found.model.forecaster.spec.seasons == (8,)
    assert [figures.name for figures in found.figures][:2] == ["challenger", "champion"]
    assert found.parent == champion.version
