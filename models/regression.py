"""Online ridge regressions: one for all series of a partition, and a small one for each series.

Hoerl, A. E. and Kennard, R. W. (1970), Ridge regression, Technometrics 12(1); with exponential forgetting it is recursive least squares
(Haykin, S., Adaptive Filter Theory, ch. 10), solved once an epoch from its normal equations rather than updated step by step. Labels
are held within HUBER standard deviations of the forecast of today (Huber, P. J. (1964), Robust estimation of a location parameter).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column, Rows
from models.stages import Float32, Lesson, Shared, View, interpolation, lead_places

Float64 = NDArray[np.float64]

LABELS = "pooled.labels"
"""Pairs that a partition has learned from so far, by target."""
FORGETTING = 0.9999
"""A step."""
VARIANCE_FORGETTING = 0.9998
HUBER = 4.0
HUBER_FROM = 500.0
"""Labels of a series before its own spread is known well enough to hold labels within it."""
LARGEST_LABEL = 200.0
"""Units."""
POOLED_PENALTY = 10.0
OWN_PENALTY = 100.0
"""A series' own regression starts at zero and has to earn what it says."""
LEAST_VARIANCE = 0.01
"""Units squared: no series counts more than this lets it."""
VARIANCE_PLACES = 6


class ResidualSpread:
    """Running variance of a stage's residuals, for each series at a few leads."""

    def __init__(self, prefix: str, horizon: int, targets: int) -> None:
        self._places = lead_places(horizon, VARIANCE_PLACES)
        self._expand = interpolation(horizon, self._places)
        self._targets = targets
        self._variance, self._count = prefix + "variance", prefix + "count"

    def columns(self) -> tuple[Column, ...]:
        float32 = np.dtype(np.float32)
        return (
            Column(self._variance, (self._targets, len(self._places)), float32),
            Column(self._count, (self._targets, len(self._places)), float32),
        )

    def held(self, rows: Rows, residual: Float32, weight: Float32) -> Float32:
        """(N, P, H) residuals, clipped to what is usual of them; NaN stays. Then the variance learns of them."""
        variance, count = _flat(rows[self._variance]), _flat(rows[self._count])
        limit = np.where(count > HUBER_FROM, HUBER * np.sqrt(variance), LARGEST_LABEL) @ self._expand.T
        held = np.clip(residual, -limit[:, None, :], limit[:, None, :])
        at = self._places - 1
        wild = np.clip(residual[..., at], -3 * limit[:, None, at], 3 * limit[:, None, at])
        seen = np.isfinite(wild) & (weight > 0)[..., None]
        fresh = seen.sum(axis=1)
        kept = count * VARIANCE_FORGETTING**fresh
        total = kept + fresh
        variance[:] = (variance * kept + (np.where(seen, wild, 0.0) ** 2).sum(axis=1)) / np.maximum(total, 1.0)
        count[:] = total
        return np.asarray(held, np.float32)

    def overall(self, rows: Rows) -> Float64:
        """(N,) mean over the leads; 1 where nothing is known yet."""
        variance, count = _flat(rows[self._variance]), _flat(rows[self._count])
        known = count > 0
        mean = np.where(known, variance, 0.0).sum(axis=1, dtype=np.float64) / np.maximum(known.sum(axis=1), 1)
        return np.where(known.any(axis=1), mean, 1.0)


class PooledRidge:
    """One regression of each target for all sensors of a partition; a series weighs by the inverse of its residual variance
    (feasible generalised least squares)."""

    name, over = "pooled", ""

    def __init__(self, features: int, horizon: int, targets: int, epoch_steps: int) -> None:
        self._shape = (features, horizon, targets)
        self._kept = FORGETTING**epoch_steps
        self._spread = ResidualSpread("pooled.", horizon, targets)

    def columns(self) -> tuple[Column, ...]:
        return self._spread.columns()

    def partition_columns(self) -> tuple[Column, ...]:
        features, horizon, targets = self._shape
        float64 = np.dtype(np.float64)
        return (
            Column("pooled.gram", (targets, features, features), float64),
            Column("pooled.moment", (targets, features, horizon), float64),
            Column("pooled.weights", (targets, features, horizon), float64),
            Column(LABELS, (targets,), float64),
        )

    def forecast(self, rows: Rows, shared: Shared, view: View) -> Float32:
        series, steps, size = view.full.shape
        weights = shared["pooled.weights"].astype(np.float32)
        if view.targets == 1:
            return np.asarray(view.full.reshape(-1, size) @ weights[0]).reshape(series, steps, -1)
        by_target = view.full.reshape(-1, view.targets, steps, size)
        return np.asarray(np.einsum("bktp,kph->bkth", by_target, weights, optimize=True)).reshape(series, steps, -1)

    def learn(self, rows: Rows, shared: Shared, lesson: Lesson, before: Float32, now: Float32) -> None:
        importance = 1.0 / (self._spread.overall(rows) + LEAST_VARIANCE)
        label, weight = held_labels(self._spread, rows, lesson, now)
        weight = weight * importance[:, None].astype(np.float32)
        features, horizon, targets = self._shape
        for target in range(targets):
            x = lesson.view.full[target::targets].reshape(-1, features)
            own = weight[target::targets].reshape(-1, 1)
            weighted = x * own
            shared["pooled.gram"][target] += weighted.T @ x
            shared["pooled.moment"][target] += weighted.T @ label[target::targets].reshape(-1, horizon)
            shared[LABELS][target] += float((own > 0).sum())

    def settle(self, shared: Shared) -> None:
        gram, moment = shared["pooled.gram"], shared["pooled.moment"]
        penalty = POOLED_PENALTY * np.eye(self._shape[0])
        shared["pooled.weights"][:] = np.linalg.solve(gram + penalty, moment)
        gram *= self._kept
        moment *= self._kept


class OwnRidge:
    """A regression of each series' own on what the pooled one leaves over; the leads are carried by a few knots."""

    over = "pooled"

    def __init__(
        self, name: str, features: int, horizon: int, targets: int, knots: int, of: str, penalty: float = OWN_PENALTY
    ) -> None:
        """of: "full" or "small", which features of the view it sees."""
        self.name = name
        self._of = of
        self._size, self._targets = features, targets
        self._knots = min(knots, horizon)
        self._penalty = penalty
        places = (np.arange(self._knots) + 0.5) * horizon / self._knots + 0.5
        self._expand = interpolation(horizon, places)
        self._project = (self._expand @ np.linalg.inv(self._expand.T @ self._expand)).astype(np.float32)
        self._lower = np.tril_indices(features)
        self._spread = ResidualSpread(f"{name}.", horizon, targets)

    def columns(self) -> tuple[Column, ...]:
        float32 = np.dtype(np.float32)
        moment = (self._targets, self._size, self._knots)
        return (
            # A symmetric matrix: the lower half is enough.
            Column(f"{self.name}.gram", (self._targets, len(self._lower[0])), float32),
            Column(f"{self.name}.moment", moment, float32),
            Column(f"{self.name}.weights", moment, float32),
            *self._spread.columns(),
        )

    def partition_columns(self) -> tuple[Column, ...]:
        return ()

    def forecast(self, rows: Rows, shared: Shared, view: View) -> Float32:
        weights = _flat(rows[f"{self.name}.weights"])
        return np.asarray((self._features(view) @ weights) @ self._expand.T, np.float32)

    def learn(self, rows: Rows, shared: Shared, lesson: Lesson, before: Float32, now: Float32) -> None:
        label, weight = held_labels(self._spread, rows, lesson, now)
        residual = (label - before) @ self._project
        x = self._features(lesson.view)
        weighted = (x * weight[..., None]).transpose(0, 2, 1)
        kept = (FORGETTING**lesson.steps).astype(np.float32)[:, None]
        gram, moment = _flat(rows[f"{self.name}.gram"]), _flat(rows[f"{self.name}.moment"])
        gram *= kept
        gram += (weighted @ x)[:, self._lower[0], self._lower[1]]
        moment *= kept[..., None]
        moment += weighted @ residual
        whole = np.empty((len(gram), self._size, self._size))
        whole[:, self._lower[0], self._lower[1]] = gram
        whole[:, self._lower[1], self._lower[0]] = gram
        whole += self._penalty * np.eye(self._size)
        _flat(rows[f"{self.name}.weights"])[:] = np.linalg.solve(whole, moment.astype(np.float64))

    def settle(self, shared: Shared) -> None:
        """Nothing is shared."""

    def _features(self, view: View) -> Float32:
        return view.full if self._of == "full" else view.small


def held_labels(spread: ResidualSpread, rows: Rows, lesson: Lesson, now: Float32) -> tuple[Float32, Float32]:
    """Labels within what is usual around today's forecast, which also stands in for missing ones; and the pairs' weights, in proportion
    to what was known of them."""
    residual = lesson.label - now
    known = np.isfinite(residual)
    weight = lesson.weight if known.all() else lesson.weight * known.mean(axis=2, dtype=np.float32)
    held = spread.held(rows, residual, lesson.weight)
    return now + np.where(known, held, np.float32(0)), weight


def _flat(column: NDArray[Any]) -> NDArray[Any]:
    """(B, K, ...) -> (B * K, ...), a view: writing to it writes to the rows."""
    flat = column.reshape(-1, *column.shape[2:])
    assert np.shares_memory(flat, column) or not column.size
    return flat
