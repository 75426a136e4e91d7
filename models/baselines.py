"""Last value and seasonal naive, with Gaussian intervals: what every model has to beat, and what answers before there
is one.

Hyndman, R. J. and Athanasopoulos, G., Forecasting: Principles and Practice, 3rd ed., sections 5.2 and 5.5: with sigma
the standard deviation of the one-step (one-season) errors, the spread at lead h is sigma sqrt(h), or sigma sqrt(k + 1)
with k = (h - 1) // S.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features import Context, to_float32
from models.forecaster import Column, Prediction, Rows, SeriesSpec, StepBlock
from models.scaling import RunningVariance


class LastValue:
    """Tomorrow as now."""

    name = "LastValue"
    version = "LastValue"
    warmup_steps = 0

    def __init__(self, spec: SeriesSpec) -> None:
        self.spec = spec
        self._errors = RunningVariance("last_value.", len(spec.targets))
        self._growth = np.sqrt(np.arange(1.0, spec.horizon + 1))

    def columns(self) -> tuple[Column, ...]:
        return self._errors.columns()

    def advance(self, rows: Rows, block: StepBlock, context: Context) -> Prediction:
        sigma, _ = self._errors.advance(rows, context.target_values - context.lagged(1))
        mean = np.repeat(to_float32(context.last)[:, :, None, :], self.spec.horizon, axis=2)
        return gaussian(mean, sigma[:, :, None, :] * self._growth[:, None], self.spec.quantiles)


class SeasonalNaive:
    """Each lead as at the same phase of the newest season; like LastValue until a whole season is known, or without a
    season."""

    name = "SeasonalNaive"
    version = "SeasonalNaive"
    warmup_steps = 0

    def __init__(self, spec: SeriesSpec) -> None:
        self.spec = spec
        self._errors = RunningVariance("seasonal_naive.", len(spec.targets))
        self._last_value_errors = RunningVariance("seasonal_naive.last_value_", len(spec.targets))
        lead = np.arange(1, spec.horizon + 1)
        self._last_value_growth = np.sqrt(lead.astype(np.float64))
        self._growth = np.sqrt((lead - 1) // spec.seasons[0] + 1.0) if spec.seasons else self._last_value_growth

    def columns(self) -> tuple[Column, ...]:
        return (*self._errors.columns(), *self._last_value_errors.columns())

    def advance(self, rows: Rows, block: StepBlock, context: Context) -> Prediction:
        truth, last = context.target_values, context.last[:, :, None, :]
        sigma, _ = self._last_value_errors.advance(rows, truth - context.lagged(1))
        spread = sigma[:, :, None, :] * self._last_value_growth[:, None]
        if not self.spec.seasons:
            return gaussian(np.repeat(last, self.spec.horizon, axis=2), spread, self.spec.quantiles)
        sigma, measured = self._errors.advance(rows, truth - context.lagged(self.spec.seasons[0]))
        seasonal = sigma[:, :, None, :] * self._growth[:, None]
        spread = np.where(measured[:, :, None, :], seasonal, spread)
        mean = np.where(context.season_known[:, :, None, None], context.season_values(), last)
        return gaussian(mean, spread, self.spec.quantiles)


def gaussian(mean: NDArray[Any], spread: NDArray[Any], quantiles: tuple[float, ...]) -> Prediction:
    """mean, spread: (B, T, H, K), original units. Rounding keeps the order of the quantiles: it is monotone."""
    middle, width = to_float32(mean), to_float32(spread)
    out = np.empty((*middle.shape, len(quantiles)), np.float32)
    for q, level in enumerate(quantiles):
        out[..., q] = middle + width * np.float32(NormalDist().inv_cdf(level))
    return Prediction(middle, out)
