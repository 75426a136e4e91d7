"""What the linear stages see of a series: means over ranges of lags, as distances from an anchor.

    lag   1 2 3 ... 8 [9 ---- 12][13 ------- 19] ...        near values one by one, then ranges that grow
    band        [S - H ------ S ------]                     around the same phase one season ago, of the series and of its
                                                            seasonal average

Lag 1 is the step consumed last. The anchor is the last value known. Everything is measured in the series' own unit
(`Volatility`), so that what is learned of one series holds for another, and after a change of scale.

Box, G. E. P. and Jenkins, G. M. (1970), Time Series Analysis, for seasonal lags; Corsi, F. (2009), A simple approximate long-memory
model of realized volatility, J. Financial Econometrics 7(2), for means over growing ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.features import LOOK_BACK, lead_knots
from models.forecaster import SeriesSpec

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

CLIP_VOLATILITIES = 12.0
"""Distances beyond say "far out" and no more: one spike must not tear a regression away."""
ANCHOR_STEPS = 9
"""An anchor further than CLIP_VOLATILITIES from the median of so many steps is an outlier; how far, is a feature of its own, from
which a series learns whether such values stay or vanish."""
EXCESS_LIMIT = 1000.0
ABSURD = 1e6
"""Volatilities."""
CONSTANT, EXCESS, RANGES = 0, 1, 2
"""Places of the first features."""

Range = tuple[int, int]


@dataclass(frozen=True)
class LagPlan:
    """Which lags are looked at. Ranges are inclusive."""

    ranges: tuple[Range, ...]
    """Of the series."""
    averages: tuple[Range, ...]
    """Of its seasonal average."""
    harmonics: int
    """Sines and cosines of each season's phase."""
    seasons: int

    @property
    def size(self) -> int:
        """p, how many features there are."""
        return RANGES + len(self.ranges) + len(self.averages) + 2 * self.harmonics * self.seasons

    @property
    def reach(self) -> int:
        """The furthest lag."""
        return max(last for _, last in (*self.ranges, *self.averages))


def full_plan(spec: SeriesSpec) -> LagPlan:
    """About 45 features: what the pooled regression sees."""
    if spec.horizon == 1:
        return _plan(spec, near=16, growth=1.6, bins=12, before=4, after=3, harmonics=2)
    return _plan(spec, near=8, growth=1.6, bins=12, before=1, after=1, harmonics=2)


def small_plan(spec: SeriesSpec) -> LagPlan:
    """About 14: what a regression of each series' own can afford."""
    near, growth = (4, 3.0) if spec.horizon == 1 else (2, 4.0)
    return _plan(spec, near=near, growth=growth, bins=2, before=1, after=1, harmonics=0)


def ground_size(spec: SeriesSpec) -> int:
    """How many inputs of a target a network gets from the stages before it: lag features without constant and calendar, the forecast
    that it corrects at a few leads, its unit."""
    if spec.profile == "base":
        return 0
    plan = full_plan(spec)
    return plan.size - EXCESS - 2 * plan.harmonics * plan.seasons + len(lead_knots(spec.horizon)) + 1


def _plan(spec: SeriesSpec, *, near: int, growth: float, bins: int, before: int, after: int, harmonics: int) -> LagPlan:
    """before, after: bins by which a band reaches further than the horizon, and than the season."""
    first = spec.seasons[0] if spec.seasons else 0
    ranges = [(lag, lag) for lag in range(2, near + 1)]
    lag, width = near + 1, max(2, near // 2)
    while lag < (first // 2 or LOOK_BACK):
        ranges.append((lag, lag + width - 1))
        lag, width = lag + width, int(width * growth) + 1
    bands = [
        _band(season, spec.horizon, bins if season == first else bins // 2, before, after) for season in spec.seasons
    ]
    averages = bands[0] if bands else ()
    own = {*ranges}
    every = ranges + [pair for band in bands for pair in band if pair not in own]
    return LagPlan(tuple(every), averages, harmonics, len(spec.seasons))


def _band(season: int, horizon: int, bins: int, before: int, after: int) -> tuple[Range, ...]:
    reach = min(horizon, season)
    width = max(1, round(reach / max(bins, 1)))
    starts = range(season - reach + 1 - width * before, season + width * after, width)
    return tuple((lag, lag + width - 1) for lag in starts if lag > 0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """N series over consecutive steps; all but `history` and `average` at the T origins that features are asked of."""

    history: Float64
    """(N, R) the series; NaN = missing."""
    average: Float64
    """(N, R') its seasonal average, ending with the same step; NaN = unknown."""
    first: int
    """Place of the first origin in `history`, counted from its end: the origin stands at history[:, R - first]."""
    anchor: Float64
    """(N, T) the last value known, carried forward; NaN = none."""
    limit: Float64
    """(N, T) volatility: what CLIP_VOLATILITIES counts in."""
    unit: Float64
    """(N, T)"""
    phase: Float64
    """(N, T, seasons) phase of the origin in each season, 0 .. 2 pi."""


def lag_features(plans: Sequence[LagPlan], stretch: Stretch) -> list[Float32]:
    """(N, T, p) of each plan, finite: constant, excess of the anchor, ranges, bands, calendar. A range in which nothing is known is where
    the anchor is."""
    limit = CLIP_VOLATILITIES * stretch.limit
    excess = np.clip(_excess(stretch, limit) / stretch.unit, -EXCESS_LIMIT, EXCESS_LIMIT)
    series = RunningSums.of(stretch.history, stretch)
    average = RunningSums.of(stretch.average, stretch) if any(plan.averages for plan in plans) else None
    return [_features(plan, stretch, limit, excess, series, average) for plan in plans]


def _features(
    plan: LagPlan, stretch: Stretch, limit: Float64, excess: Float64, series: RunningSums, average: RunningSums | None
) -> Float32:
    out = np.empty((*stretch.anchor.shape, plan.size), np.float32)
    anchor = np.where(np.isnan(stretch.anchor), 0.0, stretch.anchor)[..., None]
    out[..., CONSTANT] = 1.0
    out[..., EXCESS] = excess
    at, bound, per_unit = RANGES, (limit / stretch.unit)[..., None], (1.0 / stretch.unit)[..., None]
    for sums, ranges in ((series, plan.ranges), (average, plan.averages)):
        if sums is None or not ranges:
            continue
        distance, known = sums.means(stretch, ranges)
        distance -= anchor
        distance *= per_unit
        np.minimum(distance, bound, out=distance)
        into = out[..., at : at + len(ranges)]
        np.maximum(distance, -bound, out=into, casting="same_kind")
        if known is not None:
            into[~known] = 0.0
        at += len(ranges)
    for harmonic in range(1, plan.harmonics + 1):
        for wave in (np.sin, np.cos):
            out[..., at : at + plan.seasons] = wave(harmonic * stretch.phase)
            at += plan.seasons
    unknown = np.isnan(stretch.anchor)
    if unknown.any():
        out[unknown, EXCESS:] = 0.0
    return out


def damping(features: Float32, stretch: Stretch) -> Float32:
    """(N, T) at most 1: how much a step whose anchor is an outlier may weigh in a regression, so that its features and its label come to
    an ordinary size."""
    allowed = CLIP_VOLATILITIES * stretch.limit / stretch.unit
    return np.minimum(1.0, allowed / np.maximum(np.abs(features[..., EXCESS]), 1e-30)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class RunningSums:
    """Of the first 0, 1, 2 ... values of each series: what means over ranges are told from."""

    values: Float64
    """(N, R + 1)"""
    counts: Float64 | None
    """(N, R + 1) of those that are known; None: all are."""

    @staticmethod
    def of(source: Float64, stretch: Stretch) -> RunningSums:
        """source: (N, R), NaN = missing."""
        known = ~np.isnan(source)
        whole = bool(known.all())
        values = source if whole else np.where(known, source, 0.0)
        # What is absurdly far out is clipped later anyway; in a sum it would cost its neighbours their digits.
        far = ABSURD * stretch.limit[:, -1:]
        centre = np.where(np.isnan(stretch.anchor[:, -1:]), 0.0, stretch.anchor[:, -1:])
        if (np.abs(values).max(axis=1, initial=0.0) > far[:, 0]).any():
            values = np.clip(values, np.minimum(centre - far, 0.0), np.maximum(centre + far, 0.0))
        return RunningSums(_sums(values), None if whole else _sums(known))

    def means(self, stretch: Stretch, ranges: Sequence[Range]) -> tuple[Float64, Bool | None]:
        """(N, T, n) over each range of lags, and where anything is known; None: everywhere."""
        low, high = np.array(ranges, np.int64).T
        size = self.values.shape[1] - 1
        places = size - stretch.first + np.arange(stretch.anchor.shape[1])[:, None] + 1
        newest, oldest = np.maximum(places - low + 1, 0), np.maximum(places - high, 0)
        total = np.take(self.values, newest, axis=1)
        total -= np.take(self.values, oldest, axis=1)
        width = newest - oldest
        if self.counts is None and width.all():
            total *= 1.0 / width
            return total, None
        if self.counts is None:
            count = np.broadcast_to(width.astype(np.float64), total.shape)
        else:
            count = np.take(self.counts, newest, axis=1) - np.take(self.counts, oldest, axis=1)
        known = count > 0.5
        total /= np.where(known, count, 1.0)
        return total, known


def _sums(values: Float64 | Bool) -> Float64:
    """(N, R + 1)"""
    out = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=out[:, 1:])
    return out


def _excess(stretch: Stretch, limit: Float64) -> Float64:
    """(N, T) how far an outlying anchor is from the median of the last steps; 0 where it is none."""
    series, steps = stretch.anchor.shape
    places = stretch.history.shape[1] - stretch.first + np.arange(steps)
    recent = np.stack([stretch.history[:, np.maximum(places - back, 0)] for back in range(1, ANCHOR_STEPS)], axis=2)
    distance = np.abs(recent - stretch.anchor[..., None])
    far = (np.where(np.isnan(distance), 0.0, distance) > limit[..., None]).any(axis=2)
    out = np.zeros((series, steps))
    if far.any():
        own = stretch.anchor[far]
        window = np.concatenate([recent[far], own[:, None]], axis=1)
        excess = own - np.nanmedian(window, axis=1)
        out[far] = np.where(np.abs(excess) > limit[far], excess, 0.0)
    return out
