"""Measures of forecasts, gathered label by label: every forecaster on the same labels, or none.

    MAE, MSE, RMSE      in the series' own unit; `scaled_` in standard deviations of the series
    MASE                MAE over the in-sample error of repeating one season ago (or one step, without a season)      [1]
    sMAPE               mean of |y - f| / (|y| + |f|), between 0 and 1; 0 where both are 0
    pinball             mean over the quantile levels                                                               [2]
    coverage, width     of the interval between the outermost quantiles

Axes: n forecasts, H leads, F forecasters, Q quantiles.

[1] Hyndman, R. J. and Koehler, A. B. (2006), Another look at measures of forecast accuracy, Int. J. Forecasting 22(4).
[2] Koenker, R. and Bassett, G. (1978), Regression quantiles, Econometrica 46(1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

SUMS: Final = ("labels", "absolute", "squared", "symmetric", "banded", "pinball", "covered", "width")
"""What is summed over labels; banded: labels of forecasters that give quantiles."""
LABELS, ABSOLUTE, SQUARED, SYMMETRIC, BANDED, PINBALL, COVERED, WIDTH = range(len(SUMS))
MEASURES: Final = (
    "MAE", "RMSE", "MSE", "MASE", "sMAPE", "pinball", "coverage", "width", "scaled_MAE", "scaled_MSE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Said:
    """What one forecaster said, beside what came."""

    mean: NDArray[Any]
    """(n, H); NaN = nothing was said."""
    quantiles: NDArray[Any] | None
    """(n, H, Q), ascending along Q; None: it gives none."""


class ErrorSums:
    """Sums over labels of many series: (S, H, F, 8), and how often the truth lay at or below each quantile: (F, Q).

    levels: all that any forecast may have, ascending. Grows with the number of series, never with time."""

    def __init__(self, forecasters: Sequence[str], horizon: int, levels: Sequence[float]) -> None:
        self.forecasters = tuple(forecasters)
        self.levels = np.array(levels)
        self.sums: Float64 = np.zeros((0, horizon, len(forecasters), len(SUMS)))
        self.below: Float64 = np.zeros((len(forecasters), len(levels)))
        self.of_level: Float64 = np.zeros((len(forecasters), len(levels)))
        """Labels that the counts in `below` are out of."""

    def add(self, series: Int64, truth: Float64, said: Sequence[Said], levels: Sequence[float]) -> None:
        """n forecasts. series: (n) number of the series; truth: (n, H') with H' <= H, NaN = not known; said: one a forecaster;
        levels: of the quantiles in `said`. A label counts where the truth is known and every forecaster has said something finite."""
        if not len(series):
            return
        self._grow(int(series.max()) + 1)
        known = np.isfinite(truth)
        for one in said:
            known &= np.isfinite(one.mean)
            if one.quantiles is not None:
                known &= np.isfinite(one.quantiles).all(axis=-1)
        order = np.argsort(series, kind="stable")
        first = np.flatnonzero(np.diff(series[order], prepend=-1))
        own = series[order][first]
        places = np.searchsorted(self.levels, np.array(levels))
        for f, one in enumerate(said):
            sums = _sums(truth, one, known, np.array(levels))
            self.sums[own, : truth.shape[1], f] += np.add.reduceat(sums[order], first, axis=0)
            if one.quantiles is not None:
                below = (_as_said(truth, one.quantiles)[..., None] <= one.quantiles) & known[..., None]
                self.below[f, places] += below.sum(axis=(0, 1))
                self.of_level[f, places] += known.sum()

    def figures(self, scale: Float64, deviation: Float64) -> Figures:
        """scale, deviation: (S) what MASE and the scaled errors divide by, one a series, those without a label too; NaN = unknown: the
        series is left out of them."""
        self._grow(len(scale))
        return Figures(self.forecasters, self.sums[: len(scale)], scale, deviation)

    @property
    def reliability(self) -> dict[str, Float64]:
        """Forecaster -> (Q) share of truths at or below each quantile; NaN where there was none."""
        with np.errstate(invalid="ignore"):
            shares = self.below / self.of_level
        return dict(zip(self.forecasters, shares))

    def _grow(self, series: int) -> None:
        if series > len(self.sums):
            grown = np.zeros((max(series, 2 * len(self.sums)), *self.sums.shape[1:]))
            grown[: len(self.sums)] = self.sums
            self.sums = grown


@dataclass(frozen=True, slots=True)
class Figures:
    """Measures out of sums of some series."""

    forecasters: tuple[str, ...]
    sums: Float64
    """(S, H, F, 8)"""
    scale: Float64
    """(S) naive error, for MASE."""
    deviation: Float64
    """(S) standard deviation, for the scaled errors."""

    def over_all(self) -> Mapping[str, Float64]:
        """MEASURES and "labels": (F) each, over all series and leads; NaN without labels."""
        return self._measures((0, 1))

    def by_lead(self) -> Mapping[str, Float64]:
        """(H, F)"""
        return self._measures((0,))

    def by_series(self) -> Mapping[str, Float64]:
        """(S, F)"""
        return self._measures((1,))

    def _measures(self, axes: tuple[int, ...]) -> Mapping[str, Float64]:
        total = self.sums.sum(axis=axes)

        def mean(which: int, of: int = LABELS) -> Float64:
            return _ratio(total[..., which], total[..., of])

        return {
            "labels": total[..., LABELS],
            "MAE": mean(ABSOLUTE),
            "RMSE": np.sqrt(mean(SQUARED)),
            "MSE": mean(SQUARED),
            "MASE": self._scaled(ABSOLUTE, self.scale, axes),
            "sMAPE": mean(SYMMETRIC),
            "pinball": mean(PINBALL, BANDED),
            "coverage": mean(COVERED, BANDED),
            "width": mean(WIDTH, BANDED),
            "scaled_MAE": self._scaled(ABSOLUTE, self.deviation, axes),
            "scaled_MSE": self._scaled(SQUARED, self.deviation**2, axes),
        }

    def _scaled(self, which: int, unit: Float64, axes: tuple[int, ...]) -> Float64:
        """Mean over labels of errors in units of each series; series without a unit are left out."""
        known = np.isfinite(unit) & (unit > 0)
        over = np.where(known, unit, 1.0)[:, None, None]
        weight = known[:, None, None]
        total = (self.sums[..., which] / over * weight).sum(axis=axes)
        return _ratio(total, (self.sums[..., LABELS] * weight).sum(axis=axes))


class InSample:
    """What a series did before it was forecast: the errors of a naive forecast one step ahead, and the standard deviation. Where it did
    nothing yet, what it did in all. One row a series."""

    def __init__(self) -> None:
        self._before = np.zeros((0, _KEPT))
        self._whole = np.zeros((0, _KEPT))
        self._origin = np.zeros(0)
        """First value of each series: squares are taken of what is left without it, so that they keep their digits."""

    def add(self, series: Int64, truth: Float64, naive: Float64, before: NDArray[np.bool_]) -> None:
        """m steps. naive: (m) what the naive forecast had said of them, NaN = nothing; before: (m) the step belongs to the past of
        what is evaluated."""
        if not len(series):
            return
        self.grow(int(series.max()) + 1)
        known = np.isfinite(truth)
        new = np.flatnonzero(known & np.isnan(self._origin[series]))
        self._origin[series[new[::-1]]] = truth[new[::-1]]
        error = np.abs(truth - naive)
        labelled = np.isfinite(error)
        centred = np.where(known, truth - self._origin[series], 0.0)
        kept = np.stack([known, centred, centred**2, labelled, np.where(labelled, error, 0.0)], axis=1)
        np.add.at(self._whole, series, kept)
        np.add.at(self._before, series[before], kept[before])

    def units(self) -> tuple[Float64, Float64]:
        """(S) mean absolute naive error and (S) standard deviation of each series; NaN where unknown."""
        before, whole = self._units(self._before), self._units(self._whole)
        naive, deviation = (np.where(np.isfinite(own), own, other) for own, other in zip(before, whole))
        return naive, deviation

    def state(self) -> dict[str, Float64]:
        return {"before": self._before, "whole": self._whole, "origin": self._origin}

    def restore(self, state: Mapping[str, Float64]) -> None:
        self._before, self._whole, self._origin = state["before"], state["whole"], state["origin"]

    def _units(self, sums: Float64) -> tuple[Float64, Float64]:
        count, total, squares, labels, errors = sums.T
        mean = _ratio(total, count)
        deviation = np.sqrt(np.maximum(_ratio(squares, count) - mean**2, 0.0))
        naive, usual = _ratio(errors, labels), np.abs(self._origin + mean)
        return (
            np.where(naive > _FORECAST_DIGITS * usual, naive, np.nan),
            np.where(deviation > _TRUTH_DIGITS * usual, deviation, np.nan),
        )

    def grow(self, series: int) -> None:
        """There are at least so many series, whether or not anything is known of them."""
        if series > len(self._origin):
            size = max(series, 2 * len(self._origin))
            for name, fill in (("_before", 0.0), ("_whole", 0.0), ("_origin", np.nan)):
                old = getattr(self, name)
                grown = np.full((size, *old.shape[1:]), fill)
                grown[: len(old)] = old
                setattr(self, name, grown)


_KEPT: Final = 5
_FORECAST_DIGITS: Final = 2.0**-23
"""Relative to a series' level. What is said is float32: smaller errors of a constant series are its rounding, and no unit."""
_TRUTH_DIGITS: Final = 1e-12
"""The same for what came: float64, means of many readings."""


def pinball_loss(shortfall: Float64, levels: Float64) -> Float64:
    """Mean over the levels. shortfall: (..., Q) truth - quantile, in whatever unit; levels: (Q) -> (...)."""
    return np.asarray(np.maximum(levels * shortfall, (levels - 1) * shortfall).mean(axis=-1))


def _sums(truth: Float64, said: Said, known: NDArray[np.bool_], levels: Float64) -> Float64:
    """(n, H, 8); 0 where not known."""
    error = truth - said.mean
    size = np.abs(truth) + np.abs(said.mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        symmetric = np.where(size > 0, np.abs(error) / size, 0.0)
    out = np.zeros((*truth.shape, len(SUMS)))
    out[..., LABELS], out[..., ABSOLUTE], out[..., SQUARED] = 1.0, np.abs(error), error**2
    out[..., SYMMETRIC] = symmetric
    if said.quantiles is not None:
        low, high, came = said.quantiles[..., 0], said.quantiles[..., -1], _as_said(truth, said.quantiles)
        out[..., BANDED], out[..., PINBALL] = 1.0, pinball_loss(truth[..., None] - said.quantiles, levels)
        out[..., COVERED], out[..., WIDTH] = (came >= low) & (came <= high), high.astype(np.float64) - low
    out[~known] = 0.0
    return out


def _as_said(truth: Float64, quantiles: NDArray[Any]) -> NDArray[Any]:
    """In the digits of the quantiles: 20.1 lies between the float32 nearest to it and itself."""
    with np.errstate(over="ignore"):
        return truth.astype(quantiles.dtype)


def _ratio(part: Float64, whole: Float64) -> Float64:
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0))
