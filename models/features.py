"""What is remembered of a series, and what forecasters are shown of it.

`SeriesMemory` keeps the last steps of each sensor and its running scale; `advance` turns a block of steps into a
`Context`, in which everything is as of each step: nothing in it depends on later steps, on other sensors, or on how the
steps were cut into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column, Rows, SeriesSpec, StepBlock
from models.scaling import RunningScale

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

CLIP = 8.0
"""Scaled inputs beyond +-8 say "far out" and no more."""
LARGEST = 1e37
"""Values are held within what float32 outputs can carry; squares stay far inside float64."""
LEAD_KNOTS = 8
MEMORY_RING = "memory.ring"
LOOK_BACK = 24
"""Steps, where there is no season."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What a network builds on, where stages stand before it: their forecast, which it corrects."""

    base: Float32
    """(B, T, H, K) the stages' forecast: distance from the last value, in `unit`."""
    unit: Float64
    """(B, T, K) what the network counts in, > 0."""
    inputs: Float32
    """(B, T, F') what it is shown beside its own inputs."""


@dataclass(frozen=True)
class Context:
    """A block as forecasters see it: B sensors, T steps, C channels, K targets; R steps of history before the block."""

    spec: SeriesSpec
    end_ms: NDArray[np.int64]
    """(B, T)"""
    values: Float64
    """(B, T, C) raw units; NaN = missing, and in padding."""
    observed: Bool
    """(B, T, C)"""
    last: Float64
    """(B, T, K) the value observed last, carried forward; NaN if none since the last reset, and in padding."""
    mean: Float64
    """(B, T, C) running mean."""
    channel_scale: Float64
    """(B, T, C) running standard deviation, never 0."""
    steps: NDArray[np.int32]
    """(B, T) steps consumed since the state began or was last reset, this one included."""
    origin: Float64
    """(B, C) what `history` is measured from; NaN if nothing was observed yet."""
    history: Float32
    """(B, R + T, C) value - origin of the R steps before the block and of the block; NaN = missing or before the
    beginning."""
    shared: Rows = field(default_factory=dict)
    """State of the partition as a whole, to be read."""
    ground: Ground | None = None

    def on(self, ground: Ground) -> Context:
        return replace(self, ground=ground)

    @property
    def shape(self) -> tuple[int, int]:
        return self.steps.shape[0], self.steps.shape[1]

    @cached_property
    def local(self) -> Float32:
        """(B, T, C) distance from the mean of the last `look_back` steps, in scale, clipped to +-8; 0 where missing.

        A level that moves is forgotten within a season, where the running mean takes a thousand steps: what a network learns
        from it holds before and after (reversible instance normalisation: Kim, T. et al. (2022), ICLR, has the idea)."""
        level = _rolling_mean(self.history, self.shape[1], look_back(self.spec))
        return _clipped((self.values - self.origin[:, None] - level) / self.channel_scale)

    @cached_property
    def scale(self) -> Float64:
        """(B, T, K) the targets' running standard deviation."""
        return self.channel_scale[..., self._targets]

    @cached_property
    def target_values(self) -> Float64:
        """(B, T, K) NaN = missing."""
        return self.values[..., self._targets]

    @cached_property
    def season_known(self) -> Bool:
        """(B, T) True once a whole season (the shortest) was consumed."""
        if not self.spec.seasons:
            return np.zeros(self.shape, np.bool_)
        return self.steps >= self.spec.seasons[0]

    def season_values(self, leads: Sequence[int] | None = None) -> Float64:
        """(B, T, len(leads), K) what the shortest season said for each lead (1..H unless told): the value at t + h - S
        ceil(h/S).

        Falls back to the last value where that step is missing or unknown, and without a season; NaN where `last` is.
        """
        lead = np.asarray(range(1, self.spec.horizon + 1) if leads is None else leads)
        last = self.last[:, :, None, :]
        if not self.spec.seasons:
            return np.repeat(last, len(lead), axis=2)
        season = self.spec.seasons[0]
        values = self._at(lead - season * -(-lead // season))
        return np.where(np.isnan(values), last, values)

    def lagged(self, lag: int) -> Float64:
        """(B, T, K) the targets `lag` steps ago; NaN = missing or before the beginning. lag <= R."""
        return self._at(np.array([-lag]))[:, :, 0]

    def differences(self) -> Float32:
        """(B, T, C) step to step, in scale, clipped; 0 where either is missing."""
        before = self.history.shape[1] - self.shape[1]
        change = self.history[:, before:] - self.history[:, before - 1 : -1]
        return _clipped(change / self.channel_scale)

    def calendar(self) -> Float32:
        """(B, T, 2 * seasons) sine and cosine of the window end's phase in each season."""
        phase = season_phase(self.spec, self.end_ms)
        return np.concatenate([np.sin(phase), np.cos(phase)], axis=2, dtype=np.float32, casting="same_kind")

    def window(self, steps: int) -> Float32:
        """(B, T, steps, C) the last values in the scale of now, oldest first; 0 where missing. steps <= R + 1."""
        before = self.history.shape[1] - self.shape[1]
        positions = np.arange(before, before + self.shape[1])[:, None] + np.arange(1 - steps, 1)
        centre = (self.mean - self.origin[:, None])[:, :, None, :]
        return _clipped((self.history[:, positions] - centre) / self.channel_scale[:, :, None, :])

    @property
    def _targets(self) -> Any:
        """A slice where all channels are targets, so that picking them copies nothing."""
        everything = self.spec.targets == tuple(range(len(self.spec.channels)))
        return slice(None) if everything else list(self.spec.targets)

    def _at(self, offsets: NDArray[np.int64]) -> Float64:
        """(B, T, n, K) targets at so many steps from each step; NaN = missing."""
        before = self.history.shape[1] - self.shape[1]
        positions = np.arange(before, before + self.shape[1])[:, None] + offsets
        found = np.take(self.history[..., self._targets], positions, axis=1).astype(np.float64)
        found += self.origin[:, None, None, self._targets]
        return found


class SeriesMemory:
    """The columns every forecaster shares: a ring of the last steps, the last value, the running scale."""

    def __init__(self, spec: SeriesSpec, ring_steps: int | None = None) -> None:
        self.spec = spec
        self.ring_steps = max(look_back(spec), *spec.seasons, ring_steps or 1)
        self.scaling = RunningScale(len(spec.channels))

    def columns(self) -> tuple[Column, ...]:
        channels = len(self.spec.channels)
        return (
            # The ring is kept as float32 distances from a float64 origin: half the bytes, and 1e9 + small keeps its
            # small part.
            Column(MEMORY_RING, (self.ring_steps, channels), np.dtype(np.float32), fill=np.nan),
            Column("memory.origin", (channels,), np.dtype(np.float64), fill=np.nan),
            Column("memory.last", (len(self.spec.targets),), np.dtype(np.float64), fill=np.nan),
            Column("memory.steps", (), np.dtype(np.int32)),
            *self.scaling.columns(),
        )

    def advance(self, rows: Rows, block: StepBlock, shared: Rows | None = None) -> Context:
        """Consume a block: rows are updated in place, the Context says what was known at each step."""
        observed = np.isfinite(block.values) & block.live[..., None]
        values = np.where(observed, np.clip(block.values, -LARGEST, LARGEST), np.nan)
        mean, scale = self.scaling.advance(rows, values, observed)
        origin = rows["memory.origin"]
        origin[:] = np.where(np.isnan(origin), _first(values, observed), origin)
        history = self._remember(rows, values - origin[:, None], block.live)
        targets = list(self.spec.targets)
        last = carried_forward(rows["memory.last"], values[..., targets], observed[..., targets])
        rows["memory.last"][:] = last[:, -1]
        last[~block.live] = np.nan
        steps = rows["memory.steps"][:, None] + np.cumsum(block.live, axis=1, dtype=np.int32)
        rows["memory.steps"][:] = steps[:, -1]
        return Context(
            self.spec, block.end_ms, values, observed, last, mean, scale, steps, origin, history, shared or {}
        )

    def recall(
        self, rows: Rows, end_ms: NDArray[np.int64], most: int, shared: Rows | None = None
    ) -> tuple[StepBlock, Context]:
        """The last steps once more, at most `most` of them and those since the last reset, for a forecaster that has not
        seen them. end_ms: (B,) end of each sensor's last step.

        Everything is as it was at each step, but for the scale, which is today's. Rows are left as they are."""
        ring = rows["memory.ring"]
        count = np.minimum(rows["memory.steps"], min(most, self.ring_steps - look_back(self.spec))).astype(np.int64)
        steps = max(1, int(count.max(initial=0)))
        history = moved_left(ring, steps - count)
        ordinal = np.arange(steps)
        live = ordinal < count[:, None]
        origin = rows["memory.origin"].copy()
        known = history.astype(np.float64) + origin[:, None]
        values = np.where(live[..., None], known[:, self.ring_steps - steps :], np.nan)
        ends = end_ms[:, None] + (ordinal - count[:, None] + 1) * self.spec.step_ms
        mean, scale = self.scaling.now(rows)
        shape = values.shape
        context = Context(
            self.spec,
            ends,
            values,
            np.isfinite(values),
            self._last_values(rows, known)[:, self.ring_steps - steps :],
            np.broadcast_to(mean[:, None], shape),
            np.broadcast_to(scale[:, None], shape),
            (rows["memory.steps"][:, None] - count[:, None] + ordinal + 1).astype(np.int32),
            origin,
            history,
            shared or {},
        )
        return StepBlock(values, ends, live), context

    def _last_values(self, rows: Rows, known: Float64) -> Float64:
        """(B, R, K) the value observed last at each step of the ring; where the ring holds none, the one before it."""
        values = known[..., list(self.spec.targets)]
        observed = np.isfinite(values)
        before = np.where(observed.any(axis=1), np.nan, rows["memory.last"])
        return carried_forward(before, values, observed)

    def _remember(self, rows: Rows, distance: Float64, live: Bool) -> Float32:
        ring = rows["memory.ring"]
        history = np.concatenate([ring, distance.astype(np.float32)], axis=1)
        if live.all():
            ring[:] = history[:, -self.ring_steps :]
        else:
            newest = live.sum(axis=1)[:, None] + np.arange(self.ring_steps)
            ring[:] = np.take_along_axis(history, newest[..., None], axis=1)
        return history


def look_back(spec: SeriesSpec) -> int:
    """Steps before one that a forecaster is shown with it."""
    return spec.seasons[0] if spec.seasons else LOOK_BACK


def lead_knots(horizon: int) -> tuple[int, ...]:
    """About 8 leads from 1 to H at which the season is shown to a network; it interpolates.

    >>> lead_knots(24)
    (1, 4, 8, 11, 14, 17, 21, 24)
    >>> lead_knots(3)
    (1, 2, 3)
    """
    return tuple(np.unique(np.round(np.linspace(1, horizon, min(horizon, LEAD_KNOTS))).astype(int)).tolist())


def season_phase(spec: SeriesSpec, end_ms: NDArray[np.int64]) -> Float64:
    """(..., seasons) phase of each window's end in each season, 0 .. 2 pi."""
    period_ms = np.array(spec.seasons, np.int64) * spec.step_ms
    if not len(period_ms):
        return np.empty((*end_ms.shape, 0))
    return np.asarray(2 * np.pi * (end_ms[..., None] % period_ms) / period_ms)


def input_size(spec: SeriesSpec, ground: int = 0) -> int:
    """F of `rnn_inputs`. ground: inputs of a target's ground."""
    season = len(spec.targets) * len(lead_knots(spec.horizon)) + 1 if spec.seasons else 0
    return 3 * len(spec.channels) + season + 2 * len(spec.seasons) + ground * len(spec.targets)


def rnn_inputs(context: Context) -> Float32:
    """(B, T, F): values around their local level, whether observed, first differences; what the season says at a few leads, from the last
    value on and in scale, and whether it is known; calendar. A network so knows all that the seasonal naive forecast
    knows."""
    batch, steps = context.shape
    parts = [context.local, context.observed.astype(np.float32), context.differences()]
    if context.spec.seasons:
        ahead = context.season_values(lead_knots(context.spec.horizon)) - context.last[:, :, None, :]
        parts.append(_clipped(ahead / context.scale[:, :, None, :]).reshape(batch, steps, -1))
        parts.append(context.season_known[..., None].astype(np.float32))
    parts.append(context.calendar())
    if context.ground is not None:
        parts.append(context.ground.inputs)
    return np.concatenate(parts, axis=2)


def scaled_inputs(spec: SeriesSpec) -> Bool:
    """(F,) of `rnn_inputs`: which are distances in scale, so that another scale would make them larger or smaller."""
    channels = len(spec.channels)
    season = len(spec.targets) * len(lead_knots(spec.horizon)) if spec.seasons else 0
    flags = [True] * channels + [False] * channels + [True] * channels + [True] * season
    return np.array(flags + [False] * (input_size(spec) - len(flags)))


def to_float32(values: NDArray[Any]) -> Float32:
    """Rounded to float32; what lies beyond its range is held at LARGEST, so that finite stays finite."""
    return np.asarray(np.clip(values, -LARGEST, LARGEST), np.float32)


def _clipped(scaled: NDArray[Any]) -> Float32:
    """To +-CLIP, 0 for NaN."""
    held = np.clip(scaled, -CLIP, CLIP)
    return np.where(np.isnan(held), 0.0, held).astype(np.float32)


def _rolling_mean(history: Float32, steps: int, window: int) -> Float64:
    """(B, T, C) mean of the known ones among the `window` values up to each of the last `steps`; NaN where there are none."""
    recent = history[:, history.shape[1] - steps - window + 1 :].astype(np.float64)
    known = ~np.isnan(recent)
    if steps == 1:
        count, total = known.sum(axis=1, keepdims=True), np.where(known, recent, 0.0).sum(axis=1, keepdims=True)
    else:
        count, total = (_window_sums(part, window) for part in (known.astype(np.float64), np.where(known, recent, 0.0)))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _window_sums(values: Float64, window: int) -> Float64:
    sums = np.cumsum(values, axis=1)
    sums[:, window:] -= sums[:, :-window].copy()
    return sums[:, window - 1 :]


def moved_left(ring: Float32, places: NDArray[np.int64]) -> Float32:
    """(B, R, C) each row's steps so many places earlier; NaN comes in from the right."""
    if not places.any():
        return ring.copy()
    at = np.arange(ring.shape[1]) + places[:, None]
    moved = np.take_along_axis(ring, np.minimum(at, ring.shape[1] - 1)[..., None], axis=1)
    moved[at >= ring.shape[1]] = np.nan
    return moved


def _first(values: Float64, observed: Bool) -> Float64:
    """(B, C) each channel's first observed value of the block; NaN if there is none."""
    at = observed.argmax(axis=1)[:, None]
    return np.asarray(np.take_along_axis(values, at, axis=1)[:, 0], np.float64)


def carried_forward(before: Float64, values: Float64, observed: Bool) -> Float64:
    """(B, T, K) each step's value, or the newest observed one before it. before: (B, K)."""
    if values.shape[1] == 1:
        return np.where(observed, values, before[:, None])
    step = np.arange(1, values.shape[1] + 1)[:, None]
    newest = np.maximum.accumulate(np.where(observed, step, 0), axis=1)
    return np.take_along_axis(np.concatenate([before[:, None], values], axis=1), newest, axis=1)
