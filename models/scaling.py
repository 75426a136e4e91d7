"""Running mean and variance of every channel of every sensor, forgetting slowly.

West, D. H. D. (1979), Updating mean and variance estimates: an improved method, CACM 22(9). With the gain a = max(1/n,
forgetting) the first values count alike and old ones fade afterwards:

    mean' = mean + a d        variance' = (1 - a)(variance + a d^2)        d = x - mean
"""

from __future__ import annotations

from math import inf, isnan, nan, sqrt

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column, Rows

Float64 = NDArray[np.float64]

FORGETTING = 1 / 1000
WINSOR = 12.0
"""A value further out than so many standard deviations counts as if it stood there: one spike of 1000 sigma leaves the
scale nearly as it was, while a lasting change of unit is followed within some hundred steps (the variance may grow by
14 % a step)."""
RELATIVE_FLOOR = 1e-12
"""Of the mean's magnitude: where float64 itself has no more digits. A series of 1e9 + small keeps its small part."""
ABSOLUTE_FLOOR = 1e-30
FEW_SERIES = 16
"""Below, plain floats go through a block of steps faster than NumPy can be called for each step; same operations, same
bits."""


class RunningScale:
    """Mean and scale as of each step, the step itself included. Missing values are skipped; resets are survived."""

    def __init__(self, channels: int, prefix: str = "memory.", forgetting: float = FORGETTING) -> None:
        self.channels = channels
        self.forgetting = forgetting
        self._count, self._mean, self._variance = (prefix + part for part in ("count", "mean", "variance"))

    def columns(self) -> tuple[Column, ...]:
        shape = (self.channels,)
        return (
            Column(self._count, shape, np.dtype(np.int32), survives_reset=True),
            Column(self._mean, shape, np.dtype(np.float64), survives_reset=True),
            Column(self._variance, shape, np.dtype(np.float64), survives_reset=True),
        )

    def advance(self, rows: Rows, values: Float64, observed: NDArray[np.bool_]) -> tuple[Float64, Float64]:
        """values: (B, T, C), finite where observed (B, T, C) -> mean and scale (B, T, C); scale > 0."""
        count, mean, variance = rows[self._count], rows[self._mean], rows[self._variance]
        means, variances = np.empty_like(values), np.empty_like(values)
        if _few(values):
            for b, c in np.ndindex(mean.shape):
                series = np.where(observed[b, :, c], values[b, :, c], nan).tolist()
                state = int(count[b, c]), float(mean[b, c]), float(variance[b, c])
                path, (count[b, c], mean[b, c], variance[b, c]) = _scale_path(series, *state, self.forgetting)
                means[b, :, c], variances[b, :, c] = np.array(path).T
            return means, np.maximum(np.sqrt(variances), _floor(means))
        for step in range(values.shape[1]):
            seen = observed[:, step]
            count += seen
            gain = np.where(seen, np.maximum(1.0 / np.maximum(count, 1), self.forgetting), 0.0)
            error = np.where(seen, values[:, step], mean) - mean
            limit = np.where(variance > _floor(mean) ** 2, WINSOR * np.sqrt(variance), np.inf)
            np.clip(error, -limit, limit, out=error)
            mean += gain * error
            variance += gain * error**2
            variance *= 1.0 - gain
            means[:, step], variances[:, step] = mean, variance
        return means, np.maximum(np.sqrt(variances), _floor(means))

    def now(self, rows: Rows) -> tuple[Float64, Float64]:
        """Mean and scale (B, C) as they stand; scale > 0."""
        mean = rows[self._mean].copy()
        return mean, np.maximum(np.sqrt(rows[self._variance]), _floor(mean))


class RunningVariance:
    """Mean square of forecast errors, with the same forgetting: what a baseline's interval is made of."""

    def __init__(self, prefix: str, targets: int, forgetting: float = FORGETTING) -> None:
        self.targets = targets
        self.forgetting = forgetting
        self._count, self._variance = prefix + "count", prefix + "variance"

    def columns(self) -> tuple[Column, ...]:
        shape = (self.targets,)
        return (
            Column(self._count, shape, np.dtype(np.int32), survives_reset=True),
            Column(self._variance, shape, np.dtype(np.float64), survives_reset=True),
        )

    def advance(self, rows: Rows, error: Float64) -> tuple[Float64, NDArray[np.bool_]]:
        """error: (B, T, K), NaN = none at this step -> standard deviation (B, T, K), and whether any error was seen
        yet."""
        count, variance = rows[self._count], rows[self._variance]
        deviation, known = np.empty_like(error), np.empty(error.shape, np.bool_)
        if _few(error):
            for b, k in np.ndindex(variance.shape):
                state = int(count[b, k]), float(variance[b, k])
                path, (count[b, k], variance[b, k]) = _variance_path(error[b, :, k].tolist(), *state, self.forgetting)
                deviation[b, :, k], known[b, :, k] = np.array(path).T
            return np.sqrt(deviation), known
        for step in range(error.shape[1]):
            seen = ~np.isnan(error[:, step])
            square = np.where(seen, error[:, step], 0.0) ** 2
            count += seen
            gain = np.where(seen, np.maximum(1.0 / np.maximum(count, 1), self.forgetting), 0.0)
            limit = np.where(variance > 0, WINSOR**2 * variance, np.inf)
            variance += gain * (np.minimum(square, limit) - variance)
            deviation[:, step], known[:, step] = variance, count > 0
        return np.sqrt(deviation), known


def _floor(mean: Float64) -> Float64:
    return np.maximum(RELATIVE_FLOOR * np.abs(mean), ABSOLUTE_FLOOR)


def _few(values: Float64) -> bool:
    """(B, T, C): more than one step of a handful of series, as when one machine's history is caught up with."""
    batch, steps, channels = values.shape
    return bool(steps > 1 and batch * channels <= FEW_SERIES)


def _scale_path(
    series: list[float], count: int, mean: float, variance: float, forgetting: float
) -> tuple[list[tuple[float, float]], tuple[int, float, float]]:
    """One series of `RunningScale`, NaN = missing: (mean, variance) after each step, and the state in the end."""
    path = []
    for value in series:
        if not isnan(value):
            count += 1
            gain = max(1.0 / count, forgetting)
            error = value - mean
            floor = max(RELATIVE_FLOOR * abs(mean), ABSOLUTE_FLOOR)
            limit = WINSOR * sqrt(variance) if variance > floor * floor else inf
            error = min(max(error, -limit), limit)
            mean += gain * error
            variance += gain * (error * error)
            variance *= 1.0 - gain
        path.append((mean, variance))
    return path, (count, mean, variance)


def _variance_path(
    errors: list[float], count: int, variance: float, forgetting: float
) -> tuple[list[tuple[float, bool]], tuple[int, float]]:
    """One series of `RunningVariance`, NaN = none: (variance, whether any was seen) after each step, and the state."""
    path = []
    for error in errors:
        if not isnan(error):
            count += 1
            gain = max(1.0 / count, forgetting)
            limit = WINSOR**2 * variance if variance > 0 else inf
            variance += gain * (min(error * error, limit) - variance)
        path.append((variance, count > 0))
    return path, (count, variance)
