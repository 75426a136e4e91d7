"""No forecast knows of what comes later: the leak test of the accuracy benchmark, on a short generated series."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks import accuracy_leak
from benchmarks.accuracy_leak import Leak, leak, noisy
from benchmarks.accuracy_rows import TIME_COLUMN
from pipeline.settings import Settings, changed, parse

HOUR = 3_600_000
START = 1_735_689_600_000
HOURS, FROM, CUTOFF = 220, 120, 200
SETTINGS = """
[windows]
size = "1h"
[forecast]
season = ["6h"]
horizon = 4
[model]
units = 8
[training]
epochs = 10
learning_rate = 0.02
lanes = 8
chunk = 24
[retraining]
every = "60h"
on_drift = false
margin = 0.0
max_lead_loss = 1.0
min_labels = 20
"""


@pytest.fixture
def settings() -> Settings:
    return parse(SETTINGS)


def rhythms(sensors: int = 8) -> pd.DataFrame:
    """Wide: a rhythm of each sensor with a disturbance that dies away slowly, which a seasonal naive forecast cannot follow."""
    random, hours = np.random.default_rng(2), np.arange(HOURS)
    columns: dict[str, object] = {TIME_COLUMN: pd.to_datetime(START + HOUR * hours, unit="ms")}
    for sensor in range(sensors):
        disturbance = np.zeros(HOURS)
        for hour in range(1, HOURS):
            disturbance[hour] = 0.8 * disturbance[hour - 1] + random.normal(0, 1)
        columns[f"pump-{sensor}"] = 20 + 5 * sensor + 3 * np.sin(2 * np.pi * (hours + sensor) / 6) + disturbance
    return pd.DataFrame(columns)


def time_ms(hour: int) -> int:
    return START + HOUR * hour


@pytest.mark.keras
@pytest.mark.parametrize("profile", ["base", "lean"])
def test_noise_after_a_cutoff_changes_no_bit_of_what_was_said_before_it(settings: Settings, profile: str) -> None:
    found = leak(
        changed(settings, {"forecast.profile": profile}, "the test"), rhythms(), time_ms(FROM), time_ms(CUTOFF)
    )
    found.require_none()
    forecasts = 8 * (CUTOFF - FROM + 1) * 4
    columns = ("status", "Millrace", "Millrace-q0.1", "Millrace-q0.5", "Millrace-q0.9", "LastValue", "SeasonalNaive")
    assert tuple(found.different) == columns
    assert (found.compared, found.by_model) == (forecasts * len(columns), forecasts)
    assert found.promoted >= 2  # one of them between the first forecast compared and the cutoff


def test_a_forecast_that_knows_one_step_too_much_is_seen(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    short = rhythms()[:90]  # too short for a model: the baseline answers
    assert not any(leak(settings, short, time_ms(60), time_ms(80)).different.values())
    monkeypatch.setattr(accuracy_leak, "noisy", lambda frame, cutoff_ms, seed: noisy(frame, cutoff_ms - HOUR, seed))
    found = leak(settings, short, time_ms(60), time_ms(80))
    assert found.different["LastValue"] == 8 * 4  # of one forecast a sensor, each lead
    with pytest.raises(AssertionError, match="changed forecasts before it"):
        found.require_none()


def test_noise_leaves_the_past_as_it_is() -> None:
    frame = rhythms()
    other = noisy(frame, time_ms(CUTOFF), seed=0)
    pd.testing.assert_frame_equal(frame[:CUTOFF], other[:CUTOFF])
    assert (frame[CUTOFF:].drop(columns=TIME_COLUMN) != other[CUTOFF:].drop(columns=TIME_COLUMN)).all(axis=None)
    assert frame[TIME_COLUMN].equals(other[TIME_COLUMN])


@pytest.mark.parametrize(
    "found",
    [
        Leak(compared=10, by_model=10, different={"Millrace": 1}, different_later=5, promoted=1),
        Leak(compared=10, by_model=0, different={"Millrace": 0}, different_later=5, promoted=1),
        Leak(compared=10, by_model=10, different={"Millrace": 0}, different_later=5, promoted=0),
        Leak(compared=10, by_model=10, different={"Millrace": 0}, different_later=0, promoted=1),
    ],
    ids=["a value that changed", "no model answered", "nothing was trained", "noise that nobody saw"],
)
def test_a_leak_or_a_test_of_nothing_is_an_error(found: Leak) -> None:
    with pytest.raises(AssertionError):
        found.require_none()
