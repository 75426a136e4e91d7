"""The usual course of a season: for each phase, an average over past seasons.

    E[t] = E[t - S] + a (z[t] - E[t - S])        a = max(1 / n, FORGETTING), n = seasons seen

Winters, P. R. (1960), Forecasting sales by exponentially weighted moving averages, Management Science 6(3): his seasonal term alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.features import Context
from models.forecaster import Column, Rows, SeriesSpec

Float64 = NDArray[np.float64]

FORGETTING = 0.1
RUN_STEPS = 4
"""A run of so many values far from the average is no spike."""


class SeasonalAverage:
    """A ring of the last values of the average, as float32 distances from `memory.origin`. steps: how many are kept."""

    def __init__(self, spec: SeriesSpec, steps: int) -> None:
        self.spec = spec
        self.season = spec.seasons[0] if spec.seasons else 0
        self.steps = max(steps, self.season + RUN_STEPS) if self.season else 0

    def columns(self) -> tuple[Column, ...]:
        if not self.season:
            return ()
        return (Column("average.ring", (self.steps, len(self.spec.targets)), np.dtype(np.float32), fill=np.nan),)

    def advance(self, rows: Rows, context: Context, limit: Float64, live: NDArray[np.bool_]) -> Float64:
        """(B, R' + T, K) the average of the last R' steps and of the block's. limit: (B, T, K) how far a value may stand off at most."""
        batch, steps = context.shape
        targets = len(self.spec.targets)
        if not self.season:
            return np.full((batch, steps, targets), np.nan)
        value = context.target_values - context.origin[:, None, list(self.spec.targets)]
        seen = (context.steps[..., None] - 1) // self.season + 1
        gain = np.maximum(1.0 / np.maximum(seen, 1), FORGETTING)
        out = np.concatenate(
            [rows["average.ring"].astype(np.float64), np.full((batch, steps, targets), np.nan)], axis=1
        )
        for first in range(0, steps, self.season):
            span = slice(first, min(first + self.season, steps))
            at = slice(self.steps + span.start, self.steps + span.stop)
            before = out[:, at.start - self.season : at.stop - self.season]
            off = value[:, span] - before
            held = np.clip(off, -limit[:, span], limit[:, span])
            after = np.where(np.isnan(off), before, before + gain[:, span] * held)
            elsewhere = self._elsewhere(context, out, at, limit[:, span])
            out[:, at] = np.where(np.isnan(before) | elsewhere, value[:, span], after)
        if live.all():
            rows["average.ring"][:] = out[:, steps:]
        else:
            newest = live.sum(axis=1)[:, None] + np.arange(self.steps)
            rows["average.ring"][:] = np.take_along_axis(out, newest[..., None], axis=1)
        return out

    def _elsewhere(self, context: Context, out: Float64, at: slice, limit: Float64) -> NDArray[np.bool_]:
        """(B, steps, K) where the value and those just before it all stand beyond the limit: the course itself has moved, or what it was
        told from was none."""
        series = context.history[..., list(self.spec.targets)].astype(np.float64)
        back = series.shape[1] - out.shape[1]
        beyond = np.ones(limit.shape, np.bool_)
        for ago in range(RUN_STEPS):
            start, stop = at.start - ago, at.stop - ago
            value, before = series[:, start + back : stop + back], out[:, start - self.season : stop - self.season]
            beyond &= np.abs(value - before) > limit
        return beyond
