"""How good forecasts are on a held-back stretch: run through the whole history statefully, scored where the truth is
known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features import SeriesMemory
from models.forecaster import Forecaster, SeriesSpec
from models.measures import pinball_loss
from models.sequences import Futures, Sequences, Walk

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one forecaster. Errors are in standard deviations of each sensor over the training part, so that sensors
    compare."""

    name: str
    pinball: float
    """Mean over the quantile levels."""
    mse: float
    mae: float
    coverage: float
    """Share of truths between the outermost quantiles; `expected_coverage` of them should be."""
    expected_coverage: float
    labels: int
    """How many (step, lead, target) were scored."""
    by_lead: dict[str, list[float]]
    """pinball, mse, mae, coverage of each lead 1..H; NaN where no truth was known."""

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "pinball", "mse", "mae", "coverage", "expected_coverage", "labels", "by_lead")
        return {name: getattr(self, name) for name in names}


def evaluate(
    sequences: Sequences, forecasters: Sequence[Forecaster], holdout_from_ms: int, before: Walk | None = None
) -> list[Figures]:
    """Score what each forecaster says at the steps that end after `holdout_from_ms`, all of them on the same labels.

    before: where a walk over the steps up to then, with forecasters of these names, has come to; it is gone on from there. None: all begin
    with the first step.

    Left out for all: steps at which any of them is still warming up, and sensors without variation in the training
    part.
    """
    spec = forecasters[0].spec
    sequences = sequences.by_sensor()
    futures = Futures(sequences, spec)
    unit = training_deviation(sequences, spec, holdout_from_ms)
    warmup = max(forecaster.warmup_steps for forecaster in forecasters)
    ring_steps = max(getattr(forecaster, "ring_steps", 1) for forecaster in forecasters)
    if before is None:
        onward = Walk(SeriesMemory(spec, ring_steps), forecasters, sequences.sensors, sequences.begin)
        position = np.arange(len(sequences))
    else:
        onward = before.taken_up_by(forecasters, sequences.sensors)
        position = np.flatnonzero(sequences.end_ms > holdout_from_ms)
    totals = [_Totals(spec) for _ in forecasters]
    for block, context, predictions in onward.through(sequences.take(position)):
        scored = block.live & (context.end_ms > holdout_from_ms) & (context.steps > warmup)
        if not scored.any():
            continue
        at = position[block.index[scored]]
        truth = futures.after(at, int(sequences.end_ms.max()))
        scale = unit[sequences.sensor[at]][:, None, :]
        for total, prediction in zip(totals, predictions, strict=True):
            total.add(truth, scale, prediction.mean[scored], prediction.quantiles[scored])
    return [total.figures(forecaster.name) for total, forecaster in zip(totals, forecasters, strict=True)]


def training_deviation(sequences: Sequences, spec: SeriesSpec, until_ms: int) -> Float64:
    """(sensors, K) standard deviation of the targets over the steps up to `until_ms`; NaN where it is 0 or unknown."""
    kept = sequences.until(until_ms)
    values = kept.values[:, list(spec.targets)]
    known = np.isfinite(values)
    shape = (sequences.sensors, values.shape[1])
    count, total, squares = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    np.add.at(count, kept.sensor, known)
    np.add.at(total, kept.sensor, np.where(known, values, 0.0))
    mean = total / np.maximum(count, 1)
    np.add.at(squares, kept.sensor, np.where(known, values - mean[kept.sensor], 0.0) ** 2)
    deviation = np.sqrt(squares / np.maximum(count, 1))
    return np.where(deviation > 1e-9 * np.abs(mean), deviation, np.nan)


class _Totals:
    """Sums over labels, lead by lead."""

    def __init__(self, spec: SeriesSpec) -> None:
        self.levels = np.array(spec.quantiles)
        self.sums = {name: np.zeros(spec.horizon) for name in ("pinball", "mse", "mae", "coverage", "labels")}

    def add(self, truth: Float64, scale: Float64, mean: NDArray[np.float32], quantiles: NDArray[np.float32]) -> None:
        """truth, mean: (n, H, K); scale: (n, 1, K); quantiles: (n, H, K, Q)."""
        error = (truth - mean) / scale
        known = np.isfinite(error)
        shortfall = (truth[..., None] - quantiles) / scale[..., None]
        loss = pinball_loss(shortfall, self.levels)
        inside = (truth >= quantiles[..., 0]) & (truth <= quantiles[..., -1])
        scores = {"pinball": loss, "mse": error**2, "mae": np.abs(error), "coverage": inside, "labels": known}
        for name, score in scores.items():
            self.sums[name] += np.where(known, score, 0.0).sum(axis=(0, 2))

    def figures(self, name: str) -> Figures:
        labels = self.sums["labels"]
        scores = ("pinball", "mse", "mae", "coverage")
        overall = {score: float(self.sums[score].sum() / max(labels.sum(), 1)) for score in scores}
        known = np.where(labels > 0, labels, np.nan)
        by_lead = {score: (self.sums[score] / known).tolist() for score in scores}
        expected = float(self.levels[-1] - self.levels[0])
        return Figures(name, **overall, expected_coverage=expected, labels=int(labels.sum()), by_lead=by_lead)
