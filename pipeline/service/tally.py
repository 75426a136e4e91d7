"""What came out of the service: every forecast and every dead letter read back, counted and scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from models.baselines import LastValue, SeasonalNaive
from models.features import SeriesMemory
from models.forecaster import Forecaster, SeriesSpec
from models.measures import pinball_loss
from models.sequences import walk
from pipeline.service.ledger import Account
from pipeline.stream.columns import STATUSES, RecordColumns

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Served:
    """n distinct forecasts of one target, in the order they were read."""

    sensor: NDArray[np.int64]
    issued_at_ms: NDArray[np.int64]
    status: NDArray[np.int64]
    """(n) index into STATUSES."""
    state_steps: NDArray[np.int64]
    mean: Float64
    """(n, H)"""
    quantiles: Float64
    """(n, H, Q)"""


@dataclass(frozen=True, slots=True)
class Score:
    """How far off one forecaster was, in the target's unit."""

    name: str
    mae: float
    pinball: float
    """Mean over leads and quantile levels."""
    coverage: float
    """Share of truths between the outermost quantiles."""
    mae_by_lead: Float64
    """(H)"""
    labels: int


@dataclass(slots=True)
class Tally:
    """Counts what is read of the forecasts and dead letter topics. What comes a second time is told apart: nothing should."""

    spec: SeriesSpec
    target: str
    names: Sequence[str]
    dead_letters: dict[tuple[int, int], str] = field(default_factory=dict)
    """(partition, offset) of the reading -> reason."""
    dead_letters_read: int = 0
    _rows: list[tuple[int, int, int, int, list[list[float]]]] = field(default_factory=list)
    _seen: set[tuple[int, int]] = field(default_factory=set)
    _index: dict[str, int] = field(default_factory=dict)
    forecasts_read: int = 0
    strangers: int = 0
    """Forecasts of sensors that never sent anything."""

    def __post_init__(self) -> None:
        self._index = {name: i for i, name in enumerate(self.names)}

    @property
    def forecasts(self) -> int:
        """Distinct ones: one for each sensor and step."""
        return len(self._rows)

    @property
    def newest_steps(self) -> dict[int, int]:
        """Sensor -> the state_steps of its newest forecast."""
        return {sensor: steps for sensor, _, _, steps, _ in self._rows}

    def first_steps_since(self, count: int) -> dict[int, int]:
        """Sensor -> state_steps of its first forecast after the first `count` distinct ones."""
        first: dict[int, int] = {}
        for sensor, _, _, steps, _ in self._rows[count:]:
            first.setdefault(sensor, steps)
        return first

    def take_forecasts(self, records: RecordColumns) -> None:
        for value in records.values():
            self.forecasts_read += 1
            message = orjson.loads(value or b"")
            sensor = self._index.get(message["sensor"])
            if sensor is None:
                self.strangers += 1
                continue
            key = (sensor, message["issued_at"])
            if key in self._seen:
                continue
            self._seen.add(key)
            series = list(message["targets"][self.target].values())
            self._rows.append((*key, STATUSES.index(message["status"]), message["state_steps"], series))

    def take_dead_letters(self, records: RecordColumns) -> None:
        for row in range(len(records)):
            headers = {name: (content or b"").decode() for name, content in records.headers(row)}
            place = (int(headers["__connect.errors.partition"]), int(headers["__connect.errors.offset"]))
            self.dead_letters[place] = headers["millrace.reason"]
            self.dead_letters_read += 1

    def reasons(self) -> dict[str, int]:
        """Distinct dead letters by reason."""
        return dict(Counter(self.dead_letters.values()))

    def statuses(self) -> dict[str, int]:
        """Distinct forecasts by status."""
        counts = Counter(status for _, _, status, _, _ in self._rows)
        return {name: counts[code] for code, name in enumerate(STATUSES) if counts[code]}

    def served(self, after_ms: int | None = None) -> Served:
        """The forecasts issued after a time, as columns; all unless given."""
        rows = [row for row in self._rows if after_ms is None or row[1] > after_ms]
        sensor, issued, status, steps = (np.array([row[i] for row in rows], np.int64) for i in range(4))
        shape = (len(rows), 1 + len(self.spec.quantiles), self.spec.horizon)
        series = np.array([row[4] for row in rows], np.float64).reshape(shape)
        return Served(sensor, issued, status, steps, series[:, 0], np.moveaxis(series[:, 1:], 1, 2))

    def broken_counts(self, account: Account) -> int:
        """Forecasts whose state_steps is not one more than the one before: 0 says that no state was ever lost or taken twice."""
        served = self.served()
        order = np.lexsort((served.issued_at_ms, served.sensor))
        sensor, steps = served.sensor[order], served.state_steps[order]
        begins = account.resets[sensor, account.window_of(served.issued_at_ms[order])]
        expected = np.where(np.r_[True, sensor[1:] != sensor[:-1]] | begins, 1, np.r_[0, steps[:-1]] + 1)
        return int((steps != expected).sum())


def compare(served: Served, account: Account, spec: SeriesSpec, name: str, max_rows: int = 60_000) -> list[Score]:
    """The served forecasts and the baselines, on the same labels: all windows that have closed by now."""
    rows = np.arange(len(served.sensor))
    if len(rows) > max_rows:
        rows = rows[:: -(-len(rows) // max_rows)]
    sensor, issued = served.sensor[rows], account.window_of(served.issued_at_ms[rows])
    truth = _truth(account, sensor, issued, spec.horizon)
    levels = np.array(spec.quantiles)
    scores = [_score(name, truth, served.mean[rows], served.quantiles[rows], levels)]
    single = SeriesSpec(("temperature.mean",), (0,), spec.step_ms, spec.horizon, spec.quantiles, spec.seasons)
    baselines: list[Forecaster] = [LastValue(single), *([SeasonalNaive(single)] if spec.seasons else [])]
    for baseline, (mean, quantiles) in zip(baselines, _baselines(account, single, baselines, sensor, issued)):
        scores.append(_score(baseline.name, truth, mean, quantiles, levels))
    return scores


def _truth(account: Account, sensor: Any, issued: Any, horizon: int) -> Float64:
    """(n, H) what came; NaN where no reading came in time or the window is still open."""
    closed = np.where(account.steps, account.truth, np.nan)
    padded = np.concatenate([closed, np.full((len(closed), horizon), np.nan)], axis=1)
    return np.asarray(padded[sensor[:, None], issued[:, None] + np.arange(1, horizon + 1)])


def _baselines(
    account: Account, spec: SeriesSpec, baselines: Sequence[Forecaster], sensor: Any, issued: Any
) -> list[tuple[Float64, Float64]]:
    """(n, H) and (n, H, Q) of each baseline, at the same moments."""
    sequences = account.sequences()
    wanted = np.full(account.steps.shape, -1, np.int64)
    wanted[sensor, issued] = np.arange(len(sensor))
    row_of = wanted[account.steps]  # position in the sequences -> row
    shape = (len(sensor), spec.horizon)
    out = [(np.full(shape, np.nan), np.full((*shape, len(spec.quantiles)), np.nan)) for _ in baselines]
    for block, _, predictions in walk(sequences, SeriesMemory(spec), baselines):
        rows = np.where(block.live, row_of[block.index], -1)
        chosen = rows >= 0
        for (mean, quantiles), prediction in zip(out, predictions):
            mean[rows[chosen]] = prediction.mean[chosen][:, :, 0]
            quantiles[rows[chosen]] = prediction.quantiles[chosen][:, :, 0]
    return out


def _score(name: str, truth: Float64, mean: Float64, quantiles: Float64, levels: Float64) -> Score:
    known = np.isfinite(truth)
    labels = max(int(known.sum()), 1)
    error = np.where(known, np.abs(truth - mean), 0.0)
    short = truth[..., None] - quantiles
    pinball = np.where(known, pinball_loss(short, levels), 0.0)
    inside = known & (truth >= quantiles[..., 0]) & (truth <= quantiles[..., -1])
    by_lead = error.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return Score(
        name,
        float(error.sum() / labels),
        float(pinball.sum() / labels),
        float(inside.sum() / labels),
        np.where(known.any(axis=0), by_lead, np.nan),
        int(known.sum()),
    )
