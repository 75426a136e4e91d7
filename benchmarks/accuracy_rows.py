"""The rows of `benchmarks.accuracy`: data, protocol, settings, and the figures to hold the product's against.

Rows are put onto a regular grid of time: the first row's own time, and each row a step after the one before it, as the protocol counts
rows. That changes nothing in ETTm1, ETTh2 and Exchange. Weather has a time twice (2020-05-12 06:00) and lacks nine steps
(2020-05-29): by its own times the windows would average the former, and make empty steps of the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.settings import Settings, parse

TIME_COLUMN: Final = "time"


class Errors(NamedTuple):
    """In standard deviations of the training rows."""

    mse: float
    mae: float


@dataclass(frozen=True, slots=True)
class Known:
    """What there is to hold a horizon's figures against; None: nothing."""

    published: Errors | None = None
    """The best published without a leak, plain recursive least squares included."""
    target: Errors | None = None
    pinball: float | None = None
    """The mean pinball loss, to stay below."""
    of_last_value: float | None = None
    """The MSE, as a multiple of LastValue's, to stay below."""


@dataclass(frozen=True, slots=True)
class Row:
    """One series of the protocol. Rows of the file, half-open: [0 -- train -- test -- end), validation before test."""

    name: str
    file: str
    train: int
    test: int
    """First row that is a target of the test."""
    end: int
    horizons: Mapping[int, Known]
    settings: str
    """As a user would write them, in TOML."""
    encoding: str = "utf-8"

    def settings_for(self, horizon: int, profile: str, seed: int, changes: Mapping[str, str]) -> Settings:
        """changes: TOML key -> value as text, over everything else. Raises SettingsError."""
        asked = {"forecast.horizon": horizon, "forecast.profile": profile, "training.seed": seed}
        return parse(self.settings, f"settings of {self.name}", {}, asked | dict(changes))


ROWS: Final = {
    row.name: row
    for row in (
        Row(
            name="ETTm1",
            file="ETTm1.csv",
            train=11_520,
            test=14_400,
            end=57_600,
            horizons={
                24: Known(Errors(0.418, 0.392), Errors(0.383, 0.371), pinball=0.125),
                48: Known(Errors(0.548, 0.452), Errors(0.508, 0.435)),
                96: Known(Errors(0.628, 0.488), Errors(0.592, 0.479)),
            },
            settings="""
[windows]
size = "15m"
[forecast]
season = ["24h"]
[training]
history = "208d"
holdout = 0.05
[retraining]
every = "30d"
on_drift = false
margin = 0.0
epochs = 4
""",
        ),
        Row(
            name="ETTh2",
            file="ETTh2.csv",
            train=2_880,
            test=3_600,
            end=14_400,
            horizons={
                1: Known(Errors(0.348, 0.323), Errors(0.314, 0.318)),
                24: Known(Errors(1.638, 0.578), Errors(1.444, 0.537)),
                48: Known(Errors(2.664, 0.688), Errors(2.450, 0.640)),
            },
            settings="""
[windows]
size = "1h"
[forecast]
season = ["24h"]
[training]
holdout = 0.05
[retraining]
every = "30d"
on_drift = false
margin = 0.0
epochs = 4
""",
        ),
        Row(
            name="Weather",
            file="weather_jena.csv",
            train=10_539,
            test=13_174,
            end=52_696,
            horizons={
                24: Known(Errors(0.671, 0.353), Errors(0.655, 0.320)),
                48: Known(Errors(0.909, 0.467), Errors(0.865, 0.422)),
            },
            encoding="latin-1",
            settings="""
[windows]
size = "10m"
[forecast]
season = ["24h"]
[training]
history = "139d"
holdout = 0.05
[retraining]
every = "18d"
on_drift = false
margin = 0.0
epochs = 4
""",
        ),
        Row(
            name="Exchange",
            file="exchange_rate.csv",
            train=1_517,
            test=1_897,
            end=7_588,
            horizons={24: Known(of_last_value=1.02), 48: Known(of_last_value=1.02)},
            settings="""
[windows]
size = "1d"
[training]
holdout = 0.05
[retraining]
every = "376d"
on_drift = false
margin = 0.0
epochs = 4
""",
        ),
    )
}
"""Trained again every 5 % of the run, at most 20,000 steps back. By the schedule alone: what drift brings is measured elsewhere.
Exchange names no season, and a day's has no two steps of a day: it has none."""


@dataclass(frozen=True, slots=True)
class Series:
    """The rows of a file up to the end of the protocol, on a regular grid."""

    frame: pd.DataFrame
    """Wide: TIME_COLUMN, and a column a series, float64."""
    step_ms: int
    moved: int
    """Rows that stand elsewhere than their own time says."""

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.frame.columns if name != TIME_COLUMN]

    @property
    def values(self) -> NDArray[np.float64]:
        """(rows, series)"""
        return self.frame[self.names].to_numpy(np.float64)

    def time_ms(self, row: int) -> int:
        """Where this row's window begins. A forecast of origin i is issued there: the window before has closed."""
        first = pd.Timestamp(self.frame[TIME_COLUMN].iloc[0])
        return int(first.timestamp() * 1000) + row * self.step_ms

    def until(self, row: int) -> Series:
        return Series(self.frame.iloc[:row], self.step_ms, self.moved)


def read(row: Row, folder: Path) -> Series:
    """Raises FileNotFoundError and ValueError where the file is not what the protocol speaks of."""
    frame = pd.read_csv(folder / row.file, encoding=row.encoding, nrows=row.end)
    if len(frame) < row.end:
        raise ValueError(f"{row.file} has {len(frame):,} rows; expected {row.end:,} or more")
    step_ms = int(row.settings_for(1, "base", 0, {}).windows.hop_ms)
    own = pd.to_datetime(frame.iloc[:, 0]).to_numpy("datetime64[ms]")
    grid = own[0] + np.arange(row.end) * np.timedelta64(step_ms, "ms")
    values = frame.iloc[:, 1:].astype(np.float64)
    moved = int((np.diff(own) != np.timedelta64(step_ms, "ms")).sum())
    return Series(pd.concat([pd.DataFrame({TIME_COLUMN: grid}), values], axis=1), step_ms, moved)


def scaling(series: Series, row: Row) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(series) mean and (series) standard deviation of the training rows; 1 for a constant."""
    past = series.values[: row.train]
    deviation = past.std(axis=0)
    return past.mean(axis=0), np.where(deviation > 0, deviation, 1.0)
