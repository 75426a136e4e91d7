"""How much a series moves within a quarter of a season: the unit of the linear stages, and what "far out" is counted in.

    v' = v + a (min(d^2, 25 v) - v)        d = z[t] - z[t - q]        q = a quarter of the season

A level that wanders and a season's own swing do not count as noise here, as they do in a standard deviation. Two memories: a slow one
(the unit in which a regression adds up its past) and a fast one (what the network's input and output are scaled by). Both are held
within bounds of the running standard deviation, which follows a change of unit quickly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.features import LOOK_BACK, Context, look_back
from models.forecaster import Column, Rows, SeriesSpec

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

SLOW_SEASONS, FAST_SEASONS = 200, 14
"""How long each remembers."""
WINSOR = 5.0
"""A move further out than so many volatilities counts as if it stood there."""
FLOOR, CEILING = 1 / 16, 8.0
"""Bounds, in running standard deviations."""


class Volatility:
    """Root mean square of q-step differences of each target, as of each step."""

    def __init__(self, spec: SeriesSpec) -> None:
        self.spec = spec
        self.lag = max(1, look_back(spec) // 4)
        season = spec.seasons[0] if spec.seasons else LOOK_BACK
        self._gains = np.array([1 / (SLOW_SEASONS * season), 1 / (FAST_SEASONS * season)])

    def columns(self) -> tuple[Column, ...]:
        """Mean squares, in raw units squared: slow and fast; and how many moves were seen."""
        targets = len(self.spec.targets)
        return (
            Column("volatility.square", (targets, 2), np.dtype(np.float64)),
            Column("volatility.count", (targets,), np.dtype(np.int32)),
        )

    def advance(self, rows: Rows, context: Context) -> tuple[Float64, Float64]:
        """(B, T, K) slow and fast, > 0."""
        moved = context.target_values - context.lagged(self.lag)
        square, count = rows["volatility.square"], rows["volatility.count"]
        seen = np.isfinite(moved)
        energy = np.where(seen, moved, 0.0) ** 2
        path, counts = np.empty((*moved.shape, 2)), np.empty(moved.shape, np.int32)
        for step in range(moved.shape[1]):
            now = seen[:, step]
            count += now
            gain = np.where(now[..., None], np.maximum(1.0 / np.maximum(count, 1)[..., None], self._gains), 0.0)
            limit = np.where((square > 0) & (count > self.lag)[..., None], WINSOR**2 * square, np.inf)
            square += gain * (np.minimum(energy[:, step, :, None], limit) - square)
            path[:, step], counts[:, step] = square, count
        young = counts <= self.lag
        return self._bounded(path, young, context.scale)

    def now(self, rows: Rows, scale: Float64) -> tuple[Float64, Float64]:
        """(B, K) slow and fast as they stand. scale: (B, K) running standard deviations."""
        return self._bounded(rows["volatility.square"], rows["volatility.count"] <= self.lag, scale)

    def _bounded(self, square: Float64, young: Bool, scale: Float64) -> tuple[Float64, Float64]:
        """young: too few moves were seen to go by them alone."""
        scale = scale[..., None]
        found = np.clip(np.sqrt(square), FLOOR * scale, CEILING * scale)
        found = np.where(young[..., None], np.maximum(found, scale), found)
        return found[..., 0], found[..., 1]
