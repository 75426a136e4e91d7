"""Nothing that comes later is known to a forecast: the same backtest twice, the second time with noise after a cutoff.

    [ ---- as it is ---- | ---- as it is ---- )
    [ ---- as it is ---- | ------ noise ----- )
issued up to here: the same ^   behind it: not the same
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from benchmarks.accuracy_rows import ROWS, TIME_COLUMN, read
from benchmarks.accuracy_run import Job, Told, changes_of, passed
from pipeline.service.keeping import Memory
from pipeline.service.matching import Kept
from pipeline.service.passage import Outcome, frame_of
from pipeline.settings import Settings

TEST_STEPS: Final = 1_500
"""Of the test that a real row's leak test goes through ..."""
CUTOFF_STEPS: Final = 1_000
"""... and how many of them come before the noise."""
NOISE: Final = 5.0
"""In standard deviations of each series."""
NOT_SAID: Final = ("y", "model_version")
"""Columns of the long frame that are no part of a forecast: the truth, and a name that holds the time at which a model was saved."""
KEY: Final = ["unique_id", "cutoff", "lead"]


@dataclass(frozen=True, slots=True)
class Leak:
    """What two backtests had in common. Values are those of all columns that say something: means, quantiles, statuses."""

    compared: int
    """Values of forecasts issued up to the cutoff ..."""
    by_model: int
    """... leads among them that a trained model answered ..."""
    different: dict[str, int] = field(default_factory=dict)
    """... and how many values differ, by column. None may."""
    different_later: int = 0
    """Values that differ behind the cutoff. Some must, or the noise was not seen at all."""
    promoted: int = 0
    """Models promoted up to the cutoff."""

    def require_none(self) -> None:
        """Raises AssertionError where something leaks, or where nothing was tested."""
        assert not any(self.different.values()), (
            f"readings after the cutoff changed forecasts before it: {self.different}"
        )
        assert self.by_model > 0, f"no trained model answered before the cutoff: {self}"
        assert self.promoted > 0, f"no model was promoted before the cutoff: {self}"
        assert self.different_later > 0, f"noise after the cutoff changed nothing: {self}"

    def __str__(self) -> str:
        return (
            f"{self.compared:,} values up to the cutoff, {sum(self.different.values())} of them different; "
            f"{self.different_later:,} different behind it; {self.by_model:,} leads up to the cutoff "
            f"answered by {self.promoted} trained models"
        )


def leak(
    settings: Settings, frame: pd.DataFrame, from_ms: int, cutoff_ms: int, seed: int = 0, tell: Told = lambda text: None
) -> Leak:
    """frame: wide, TIME_COLUMN and a column a series; readings from cutoff_ms on become noise. Compared are forecasts issued from
    from_ms on: all those up to cutoff_ms know of readings before it only."""
    runs = [_run(settings, own, from_ms, tell) for own in (frame, noisy(frame, cutoff_ms, seed))]
    (outcome, said), (_, other) = runs
    assert said[KEY].equals(other[KEY]), "noise changed which forecasts there are"
    before = (said["cutoff"] <= pd.Timestamp(cutoff_ms - settings.windows.size_ms, unit="ms")).to_numpy()
    columns = [column for column in said.columns if column not in (*NOT_SAID, *KEY, "ds")]
    differs = {column: _differs(said[column], other[column]) for column in columns}
    return Leak(
        compared=int(before.sum()) * len(columns),
        by_model=int((before & said["status"].isin(["ok", "stale"]).to_numpy()).sum()),
        different={column: int((own & before).sum()) for column, own in differs.items()},
        different_later=sum(int((own & ~before).sum()) for own in differs.values()),
        promoted=sum(change.kind == "promoted" and change.time_ms <= cutoff_ms for change in outcome.changes),
    )


def leak_of_row(job: Job, folder: Path, tell: Told) -> Leak:
    """The first steps of the row's test."""
    row = ROWS[job.row]
    series = read(row, folder).until(row.test + TEST_STEPS)
    settings = row.settings_for(job.horizon, job.profile, job.seed, changes_of(job.changes))
    return leak(
        settings, series.frame, series.time_ms(row.test), series.time_ms(row.test + CUTOFF_STEPS), job.seed, tell
    )


def noisy(frame: pd.DataFrame, cutoff_ms: int, seed: int) -> pd.DataFrame:
    """The same with noise from the cutoff on."""
    names = [name for name in frame.columns if name != TIME_COLUMN]
    after = (frame[TIME_COLUMN] >= pd.Timestamp(cutoff_ms, unit="ms")).to_numpy()
    values = frame[names].to_numpy(np.float64, copy=True)
    noise = np.random.default_rng(seed).standard_normal((int(after.sum()), len(names)))
    values[after] = values.mean(axis=0) + NOISE * values.std(axis=0) * noise
    return pd.concat([frame[[TIME_COLUMN]], pd.DataFrame(values, frame.index, names)], axis=1)


def _run(settings: Settings, frame: pd.DataFrame, from_ms: int, tell: Told) -> tuple[Outcome, pd.DataFrame]:
    keeper = Memory()
    outcome = passed(settings, frame, Kept(from_ms), keeper, tell)
    long: pd.DataFrame = frame_of(keeper.tables, outcome.matching.shape.schema)
    return outcome, long.sort_values(KEY, ignore_index=True)


def _differs(one: pd.Series[Any], other: pd.Series[Any]) -> Any:
    """(n) by the bits, so that a NaN equals itself."""
    if one.dtype == np.float32:
        return one.to_numpy().view(np.int32) != other.to_numpy().view(np.int32)
    return (one != other).to_numpy()
