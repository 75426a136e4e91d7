"""One run of `benchmarks.accuracy`: the product's own backtest of a row, or plain recursive least squares; and its figures."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.accuracy_rows import ROWS, TIME_COLUMN, Row, Series, read, scaling
from models.measures import ABSOLUTE, BANDED, COVERED, LABELS, PINBALL, SQUARED
from pipeline.service.backtest import matching_for
from pipeline.service.files import FileLayout
from pipeline.service.inputs import FileInput
from pipeline.service.keeping import Keeper
from pipeline.service.matching import Kept
from pipeline.service.outlook import prepared
from pipeline.service.passage import Outcome, Passage, Progress
from pipeline.service.timeline import Change, Scheduled, Shelf
from pipeline.settings import Settings
from pipeline.stream.columns import Bool, Steps

PLAIN_RLS: Final = "plain RLS"
LAYOUT: Final = FileLayout(TIME_COLUMN, ("*",))
FORGETTING: Final = 0.9999
"""Of plain RLS, a step."""
LAGS: Final = 24
"""Of plain RLS, where there is no season."""

Float64 = NDArray[np.float64]
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured in a process of its own."""

    row: str
    horizon: int
    profile: str
    """PLAIN_RLS, or one of the product's."""
    seed: int = 0
    changes: tuple[str, ...] = ()
    """section.key=value"""

    @property
    def label(self) -> str:
        """Of runs that differ in row, horizon and seed alone."""
        return " ".join([self.profile, *self.changes])

    def __str__(self) -> str:
        return f"{self.row} H{self.horizon} {self.label} seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Origins(Kept):
    """Those of which every lead has come by the end of the protocol."""

    to_ms: int = 0
    """Issued at or before this time."""

    def of(self, steps: Steps) -> Bool:
        chosen: Bool = Kept.of(self, steps) & (steps.end_ms <= self.to_ms)
        return chosen


class Nowhere:
    """Keeps no forecast: the figures come from the sums of errors."""

    def write(self, table: pa.Table) -> None:
        pass


def measured(job: Job, folder: Path) -> dict[str, Any]:
    """The job, its figures by forecaster, and its seconds: what JSON can hold."""
    row, began = ROWS[job.row], time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {job}: {text}", file=sys.stderr, flush=True)

    series = read(row, folder)
    if series.moved:
        tell(f"the times of {row.file} are irregular at {series.moved} rows; it is put onto a regular grid")
    if job.profile == PLAIN_RLS:
        found: dict[str, Any] = {"figures": {PLAIN_RLS: plain_rls(series, row, job.horizon)}}
    else:
        found = of_product(job, series, row, tell)
    return asdict(job) | found | {"seconds": time.monotonic() - began}


def of_product(job: Job, series: Series, row: Row, tell: Told) -> dict[str, Any]:
    settings = row.settings_for(job.horizon, job.profile, job.seed, changes_of(job.changes))
    kept = Origins(series.time_ms(row.test), to_ms=series.time_ms(row.end - job.horizon))
    outcome = passed(settings, series.frame, kept, Nowhere(), tell)
    matching = outcome.matching
    forecasts = row.end - job.horizon + 1 - row.test
    labels = matching.errors.sums[: len(series.names), :, :, LABELS]
    if not (labels == forecasts).all():
        raise ValueError(
            f"{job}: {labels.min():,.0f} to {labels.max():,.0f} labels a series, lead and forecaster; expected {forecasts:,} of each"
        )
    deviation = dict(zip(series.names, scaling(series, row)[1].tolist()))
    return {
        "figures": figures_of(outcome, np.array([deviation[name] for name in matching.series_names])),
        "trainings": Counter(change.kind for change in outcome.changes),
        "events": [_told(change) for change in outcome.changes],
    }


def passed(
    settings: Settings, frame: pd.DataFrame, kept: Kept, keeper: Keeper, tell: Told = lambda text: None
) -> Outcome:
    """What `millrace backtest --data FILE --retrain-every retraining.every` goes through, but that what is learned from begins with the
    file, and what is kept with `kept`. frame: wide, TIME_COLUMN and a column a series."""
    data = prepared(settings, [frame], LAYOUT, None, None, tell)
    with tempfile.TemporaryDirectory(prefix="millrace-accuracy-") as folder:
        timeline = Scheduled(Shelf(Path(folder)), data.settings, data.core, None)
        source = FileInput(data.read(None), data.core.format.fields, "frame")
        matching = matching_for(data.core, timeline, kept)
        progress = _Progress(data.facts.first_ms, data.facts.last_ms, timeline.changes, tell)
        return Passage(data.settings, source, timeline, matching, keeper, progress).run()


def figures_of(outcome: Outcome, deviation: Float64) -> dict[str, dict[str, Any]]:
    """By forecaster. deviation: (series), in the order of `outcome.matching.series_names`."""
    matching = outcome.matching
    unit = deviation[:, None, None]
    sums = matching.errors.sums[: len(deviation)]
    scaled = {
        ABSOLUTE: sums[..., ABSOLUTE] / unit,
        SQUARED: sums[..., SQUARED] / unit**2,
        PINBALL: sums[..., PINBALL] / unit,
    }
    found = {}
    for f, name in enumerate(matching.shape.forecasters):
        labels, banded, covered = (sums[..., f, which] for which in (LABELS, BANDED, COVERED))
        own = _errors(scaled[SQUARED][..., f], scaled[ABSOLUTE][..., f], labels)
        coverage = covered.sum(axis=1) / banded.sum(axis=1)
        found[name] = own | {
            "pinball": float(scaled[PINBALL][..., f].sum() / banded.sum()),
            "coverage": float(covered.sum() / banded.sum()),
            "coverage_by_series": coverage.tolist(),
            "worst_coverage": float(coverage[np.abs(coverage - 0.8).argmax()]),
        }
    return found


def _errors(squared: Float64, absolute: Float64, labels: Float64) -> dict[str, Any]:
    """Each (series, leads), sums."""
    return {
        "mse": float(squared.sum() / labels.sum()),
        "mae": float(absolute.sum() / labels.sum()),
        "mse_by_lead": (squared.sum(axis=0) / labels.sum(axis=0)).tolist(),
        "mse_by_series": (squared.sum(axis=1) / labels.sum(axis=1)).tolist(),
        "mae_by_series": (absolute.sum(axis=1) / labels.sum(axis=1)).tolist(),
    }


def plain_rls(series: Series, row: Row, horizon: int) -> dict[str, Any]:
    """Recursive least squares of each series on its own last season, every lead directly. A pair of origin j is learned from at
    origin j + horizon, when its last target has been seen."""
    settings = row.settings_for(horizon, "base", 0, {})
    lags = int(max(settings.forecast.season_ms, default=LAGS * series.step_ms)) // series.step_ms
    mean, deviation = scaling(series, row)
    z = np.ascontiguousarray(((series.values - mean) / deviation).T)  # (series, rows)
    count, rows = z.shape
    weights, spread = np.zeros((count, lags + 1, horizon)), np.tile(np.eye(lags + 1), (count, 1, 1))
    squared, absolute, origins = np.zeros((count, horizon)), np.zeros((count, horizon)), 0

    def inputs(origin: int) -> Float64:
        """(series, 1, 1 + lags)"""
        return np.concatenate([np.ones((count, 1)), z[:, origin - lags : origin]], axis=1)[:, None, :]

    for origin in range(lags + horizon, rows - horizon + 1):
        seen = origin - horizon
        x = inputs(seen)
        gain = x @ spread
        size = FORGETTING + gain @ x.transpose(0, 2, 1)
        error = z[:, None, seen:origin] - x @ weights
        column = gain.transpose(0, 2, 1)
        weights += column @ (error / size)
        spread -= column @ (gain / size)
        spread /= FORGETTING
        if origin >= row.test:
            wrong = z[:, origin : origin + horizon] - (inputs(origin) @ weights)[:, 0]
            squared += wrong**2
            absolute += np.abs(wrong)
            origins += 1
    return _errors(squared, absolute, np.full_like(squared, origins))


def changes_of(texts: Sequence[str]) -> Mapping[str, str]:
    """section.key=value -> key and value. Raises ValueError for anything else."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"--set {text}: expected section.key=value, such as training.epochs=5")
        found[key.strip()] = value.strip()
    return found


@dataclass(slots=True)
class _Progress:
    """Tells of every change of the model, and of every tenth of the way."""

    first_ms: int
    last_ms: int
    changes: Sequence[Change]
    tell: Told
    _told: int = 0
    _tenths: int = 0

    def __call__(self, at: Progress) -> None:
        for change in self.changes[self._told :]:
            self.tell(f"{change.kind}: {change.reason}")
        self._told = len(self.changes)
        tenths = 10 * ((at.event_ms or self.first_ms) - self.first_ms) // max(self.last_ms - self.first_ms, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            self.tell(f"{10 * tenths} % read")


def _told(change: Change) -> dict[str, Any]:
    return {"time_ms": change.time_ms, "kind": change.kind, "trigger": change.trigger, "reason": change.reason}
