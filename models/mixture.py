"""Who is believed: several forecasts of the same step, weighted by how they did, and quantiles that keep what they promise.

What was said of a few leads waits in the sensor's row (`SaidBefore`) until the step it spoke of has closed. Then

    weights      w ~ exp(-SHARPNESS (L / min L - 1)),  L the exponentially forgotten squared error: Cesa-Bianchi, N. and Lugosi, G. (2006),
                 Prediction, Learning, and Games, ch. 2 (exponentially weighted average forecaster)
    quantiles    f +- exp(theta) s,  theta += rate (missed - promised): Gibbs, I. and Candes, E. (2021), Adaptive conformal inference
                 under distribution shift, NeurIPS; with labels that come late

Series that are new begin with what is usual in their partition. Distances are from the anchor, in each series' unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column, Rows
from models.stages import Float32, Shared, interpolation, lead_places

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]

PLACES = 6
"""Leads at which errors are weighed and quantiles kept; between them it is interpolated."""
KEPT = 8
"""Forecasts of each lead that wait at a time, about: of a far lead every n-th is kept, its errors hang together anyway."""
MEMORY_SEASONS = (10.0, 50.0)
"""How long errors are remembered, twice: what is better now counts, and that a series that is calm for weeks has not lost its bursts."""
SHARPNESS = 25.0
RATE = 0.005
"""Of the quantiles, a step, at the level RATE_FOR."""
RATE_FOR = 0.1
WIDEST = 4.0
"""Bound of theta: e^4 = 55 times as wide as the stages say."""
FAR = 30.0
"""An error counts no more than so many times what is usual of the best expert: one spike does not make all experts alike."""
USUAL_STEPS = 50.0
"""What is usual in the partition counts like so many steps of the series' own."""
LEAST_LOSS = 1e-3
"""Units squared: a series that has stood still so far will have errors again."""
MEDIAN_OF = 2000
LEAST_SPREAD = 1e-3
"""Units."""
UNTRIED = 4.0
"""Of an expert of whom nothing is known: its squared error relative to the baseline's."""


@dataclass(frozen=True, slots=True)
class Matured:
    """What was said of one lead, and what came: c of the newest ones of each of B sensors."""

    label: Float64
    """(B, c, K) NaN = not known, or none."""
    said: Float64
    """(B, c, K, V)"""


class SaidBefore:
    """Rings of what was said at a few leads, in half precision. values: how many are kept of each."""

    def __init__(self, horizon: int, targets: int, values: int, epoch_steps: int) -> None:
        self.leads = lead_places(horizon, PLACES)
        self.stride = np.maximum(1, (self.leads + epoch_steps) // KEPT)
        # The place of a forecast is taken again only after its label has come and the epoch has ended.
        self._places = -(-(self.leads + epoch_steps) // self.stride)
        self._begin = np.concatenate([[0], np.cumsum(self._places)[:-1]])
        self._epoch = epoch_steps
        self._shape = (int(self._places.sum()), targets, values)

    def columns(self) -> tuple[Column, ...]:
        return (Column("said.before", self._shape, np.dtype(np.float16), fill=np.nan),)

    def keep(self, rows: Rows, steps: NDArray[np.int32], live: Bool, said: Float32) -> None:
        """steps: (B, T) ordinal of each step since the last reset; said: (B, T, K, m, V)."""
        for number in range(len(self.leads)):
            sensor, step = np.nonzero(live & (steps % self.stride[number] == 0))
            place = self._place(number, steps[sensor, step].astype(np.int64))
            with np.errstate(over="ignore"):  # beyond half precision it is infinite, and counts as far
                rows["said.before"][sensor, place] = said[sensor, step, :, number]

    def matured(self, rows: Rows, number: int, steps: Int64, pending: Int64, distances: Distances) -> Matured:
        """Of one lead, all whose step closed in the last `pending` (B,) of `steps` (B,) steps."""
        lead, stride = int(self.leads[number]), int(self.stride[number])
        newest = (steps - lead) // stride * stride
        origin = newest[:, None] - stride * np.arange(-(-self._epoch // stride))
        due = (origin >= 1) & (origin + lead > (steps - pending)[:, None])
        label = distances.between(steps[:, None] - origin, lead)
        place = self._place(number, np.maximum(origin, 0))
        said = rows["said.before"][np.arange(len(steps))[:, None], place].astype(np.float64)
        return Matured(np.where(due[..., None], label, np.nan), said)

    def _place(self, number: int, step: Int64) -> Int64:
        return np.asarray(self._begin[number] + step // self.stride[number] % self._places[number], np.int64)


@dataclass(frozen=True, slots=True)
class Distances:
    """Of the steps that are remembered: values and anchors of the ring, in units."""

    value: Float64
    """(B, R, K)"""
    anchor: Float64
    """(B, R, K)"""

    def between(self, back: Int64, lead: int) -> Float64:
        """(B, c, K) value at `lead` steps after the step that was `back` (B, c) steps ago, as a distance from the anchor there."""
        last = self.value.shape[1] - 1
        origin = np.clip(last - back, 0, last)
        sensor = np.arange(len(self.value))[:, None]
        return np.asarray(self.value[sensor, np.minimum(origin + lead, last)] - self.anchor[sensor, origin], np.float64)


class Mixture:
    """Weights of E experts for each series at a few leads."""

    def __init__(
        self, experts: Sequence[str], stands_for: Sequence[int], baseline: int, season: int, horizon: int, targets: int
    ) -> None:
        """stands_for: (E,) whose error counts where an expert had said nothing; baseline: who is believed until anything is known."""
        self.experts = tuple(experts)
        self._stands_for = np.array(stands_for)
        self._leads = lead_places(horizon, PLACES)
        self._expand = interpolation(horizon, self._leads)
        self._targets = targets
        self._kept = 1.0 - 1.0 / (np.array(MEMORY_SEASONS) * season)
        self._untried = np.full(len(experts), UNTRIED)
        self._untried[baseline] = 1.0

    def columns(self) -> tuple[Column, ...]:
        float32 = np.dtype(np.float32)
        shape = (self._targets, len(self._leads), len(self._kept))
        return (Column("mixture.loss", (*shape, len(self.experts)), float32), Column("mixture.count", shape, float32))

    def partition_columns(self) -> tuple[Column, ...]:
        shape = (self._targets, len(self._leads), len(self._kept), len(self.experts))
        return (Column("mixture.usual", shape, np.dtype(np.float64), fill=np.nan),)

    def losses(self, rows: Rows, shared: Shared) -> Float64:
        """(B, K, m, 2, E) squared error of each expert by memory, units squared."""
        usual = shared["mixture.usual"]
        usual = np.where(np.isnan(usual), self._untried, usual)
        count = rows["mixture.count"][..., None]
        return (rows["mixture.loss"] + USUAL_STEPS * usual) / (count + USUAL_STEPS)

    def weights(self, losses: Float64) -> Float32:
        """(B, K, H, E), summing to 1."""
        relative = (losses / (losses.min(axis=-1, keepdims=True) + 1e-9)).mean(axis=-2)
        weight = np.exp(-SHARPNESS * (relative - relative.min(axis=-1, keepdims=True)))
        weight /= weight.sum(axis=-1, keepdims=True)
        by_expert = np.ascontiguousarray(np.moveaxis(weight, -1, 0), np.float32)
        return np.asarray(np.moveaxis(by_expert @ self._expand.T, 0, -1))

    def mixed(self, experts: Sequence[Float32], weights: Float32) -> Float32:
        """(B, K, T, H) from E forecasts of that shape; where one is NaN, the one that it stands on speaks. weights: (B, K, H, E)."""
        out = np.zeros_like(experts[0])
        for number, expert in enumerate(experts):
            if np.isnan(expert.sum()):
                silent = np.isnan(expert)
                expert = np.where(silent, experts[self._stands_for[number]], expert)
            out += expert * weights[:, :, None, :, number]
        return out

    def forget(self, rows: Rows, pending: Int64) -> None:
        kept = (self._kept ** pending[:, None]).astype(np.float32)[:, None, None, :]
        rows["mixture.count"] *= kept
        rows["mixture.loss"] *= kept[..., None]

    def learn(self, rows: Rows, shared: Shared, number: int, stride: int, matured: Matured) -> None:
        said = matured.said[..., : len(self.experts)]
        said = np.where(np.isnan(said), said[..., self._stands_for], said)
        error = np.abs(matured.label[..., None] - said)
        known = np.asarray(
            ~np.isnan(error).any(axis=-1)
        )  # infinite: said so far out that half precision does not hold it
        best = np.maximum(self.losses(rows, shared)[:, :, number, 0].min(axis=-1), LEAST_LOSS)
        far = FAR * np.sqrt(best)[:, None, :, None]
        square = np.minimum(np.where(known[..., None], error, 0.0), far) ** 2
        rows["mixture.loss"][:, :, number] += stride * square.sum(axis=1)[:, :, None]
        rows["mixture.count"][:, :, number] += stride * known.sum(axis=1)[:, :, None]

    def settle(self, rows: Rows, shared: Shared) -> None:
        """What is usual: the median over all series that know something. rows: of all sensors."""
        count = rows["mixture.count"][..., None]
        usual, known = shared["mixture.usual"], count > 0
        if known.any():
            each = np.where(known, rows["mixture.loss"] / np.maximum(count, 1e-9), np.nan)
            usual[:] = np.where(known.any(axis=0), _median(each), usual)


class Calibration:
    """How far each quantile lies from the point forecast, relative to what the stages say."""

    def __init__(self, prefix: str, levels: Sequence[float], horizon: int, targets: int) -> None:
        self._width, self._usual = prefix + "width", prefix + "usual"
        self.levels = np.array(levels)
        self.tracked = np.flatnonzero(np.abs(self.levels - 0.5) > 1e-9)
        """The median is the point forecast."""
        self._leads = lead_places(horizon, PLACES)
        self._expand = interpolation(horizon, self._leads)
        self._targets = targets
        outer = self.levels[self.tracked]
        self._above = outer > 0.5
        self._sign = np.where(self._above, 1, -1).astype(np.float32)
        self._cannot_cross = max(self._above.sum(), (~self._above).sum()) <= 1
        self._promised = np.where(self._above, 1 - outer, outer)
        # As fast for a level that is seldom passed: its misses say more.
        self._rate = RATE * np.sqrt(RATE_FOR * (1 - RATE_FOR) / (outer * (1 - outer)))
        self._normal = np.array([abs(NormalDist().inv_cdf(level)) for level in outer], np.float32)

    def columns(self) -> tuple[Column, ...]:
        shape = (self._targets, len(self._leads), len(self.tracked))
        return (Column(self._width, shape, np.dtype(np.float32), fill=np.nan),)

    def partition_columns(self) -> tuple[Column, ...]:
        shape = (self._targets, len(self._leads), len(self.tracked))
        return (Column(self._usual, shape, np.dtype(np.float64)),)

    def gaussian(self, losses: Float64) -> Float32:
        """(B, K, 1, H, Q') spreads where no stage says any: those of the errors of the best expert."""
        deviation = np.sqrt(losses[..., 0, :].min(axis=-1)) @ self._expand.T
        return np.asarray(deviation[:, :, None, :, None] * self._normal, np.float32)

    def distances(self, quantiles: Float32) -> Float32:
        """(..., Q) any ascending quantiles -> (..., Q') how far each tracked one is from the middle one."""
        middle = int(np.argmin(np.abs(self.levels - 0.5)))
        return np.asarray(np.abs(np.take(quantiles, self.tracked, axis=-1) - quantiles[..., middle : middle + 1]))

    def offsets(self, rows: Rows, shared: Shared, spread: Float32) -> Float32:
        """(B, K, T, H, Q) distances from the point forecast, ascending. spread: (B, K, T or 1, H, Q') what the stages say, >= 0."""
        width = rows[self._width]
        width = np.where(np.isnan(width), shared[self._usual], width)
        by_level = np.ascontiguousarray(np.moveaxis(width, -1, 0), np.float32)
        factor = np.moveaxis(np.exp(by_level @ self._expand.T), 0, -1)
        off = np.maximum(spread, np.float32(LEAST_SPREAD)) * (factor * self._sign)[:, :, None]
        out = np.zeros((*off.shape[:-1], len(self.levels)), np.float32)
        for number, level in enumerate(self.tracked.tolist()):
            out[..., level] = off[..., number]
        return out if self._cannot_cross else np.sort(out, axis=-1)

    def learn(self, rows: Rows, shared: Shared, number: int, stride: int, matured: Matured) -> None:
        quantile = matured.said[..., -len(self.tracked) :]
        label = matured.label[..., None]
        known: Bool = np.isfinite(label) & ~np.isnan(quantile)
        beyond = np.where(self._above, label - quantile, quantile - label) > LEAST_SPREAD
        step = np.where(known, beyond - self._promised, 0.0).sum(axis=1)
        width = rows[self._width][:, :, number]
        width = np.where(np.isnan(width), shared[self._usual][:, number], width)
        learned = np.clip(width + self._rate * stride * step, -WIDEST, WIDEST)
        rows[self._width][:, :, number] = np.where(known.any(axis=1), learned, rows[self._width][:, :, number])

    def settle(self, rows: Rows, shared: Shared) -> None:
        """rows: of all sensors."""
        width, usual = rows[self._width], shared[self._usual]
        known = np.isfinite(width)
        if known.any():
            usual[:] = np.where(known.any(axis=0), _median(width), usual)


def _median(values: Float32 | Float64) -> Float64:
    """Along the first axis, of those that are known; 0 where none is. Some thousand tell it well enough."""
    values = values[:: max(1, len(values) // MEDIAN_OF)]
    known = np.isfinite(values).any(axis=0)
    return np.asarray(np.where(known, np.nanmedian(np.where(known, values, 0.0), axis=0), 0.0), np.float64)
