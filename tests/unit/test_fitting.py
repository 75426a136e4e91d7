"""Challengers before the gate: a good one, a poisoned one, one that begins with the champion's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.sequences import Sequences
from pipeline.service.assembly import task_settings
from pipeline.service.fitting import Challenge, challenge
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
