"""The contract of the stages that stand before and around the network.

    View ──Stage.forecast──> correction of what the stages before it said       at every step, in batch over series
    Lesson ──Stage.learn──> rows and shared                                     once an epoch, when labels have matured
    Stage.settle(shared)                                                        after all sensors of the partition

Axes: N series (sensors x targets), T steps, P pairs of an epoch, p features, H leads. Distances are from the anchor, in each series' unit.
Learning happens at epoch boundaries on the grid of steps, never in between: how the log was cut into polls cannot matter, and inside an
epoch all steps of all sensors are one batched call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column, Rows

Float32 = NDArray[np.float32]
Shared = dict[str, NDArray[Any]]
"""State of a partition as a whole: column name -> array of the column's shape, changed in place."""


@dataclass(frozen=True, slots=True)
class View:
    """What is known at some steps."""

    full: Float32
    """(N, T, p) features, `full_plan`."""
    small: Float32
    """(N, T, k) features, `small_plan`."""
    targets: int
    """K: series n is of target n % K."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Pairs of a step and what followed it, all of it known by now."""

    view: View
    """Of the steps."""
    label: Float32
    """(N, P, H) distances; NaN = missing."""
    weight: Float32
    """(N, P) 0: no pair."""
    steps: NDArray[np.int64]
    """(N,) steps that have passed since the last lesson: how much is to be forgotten."""


class Stage(Protocol):
    """One regression of a cascade."""

    name: str
    over: str
    """The stage whose forecast it corrects; empty: the anchor's."""

    def columns(self) -> tuple[Column, ...]:
        """Per sensor."""

    def partition_columns(self) -> tuple[Column, ...]:
        """Per partition."""

    def forecast(self, rows: Rows, shared: Shared, view: View) -> Float32:
        """(N, T, H) what to add to the forecast that it corrects."""

    def learn(self, rows: Rows, shared: Shared, lesson: Lesson, before: Float32, now: Float32) -> None:
        """before, now: (N, P, H) what the stage that it corrects, and it itself, would say of the lesson's steps today."""

    def settle(self, shared: Shared) -> None:
        """All sensors have had their lesson."""


def lead_places(horizon: int, count: int) -> NDArray[np.int64]:
    """(m,) leads from 1 to H, at most `count` of them, denser where errors grow faster: near the beginning.

    >>> lead_places(24, 6).tolist(), lead_places(3, 6).tolist()
    ([1, 3, 7, 12, 17, 24], [1, 2, 3])
    """
    share = np.linspace(0.0, 1.0, min(horizon, count)) ** 1.5 if horizon > count else np.linspace(0.0, 1.0, horizon)
    return np.unique(np.round(1 + (horizon - 1) * share).astype(np.int64))


def interpolation(horizon: int, places: NDArray[Any]) -> Float32:
    """(H, m) weights that carry values at some leads (1.., fractions allowed) to all leads, linearly, flat beyond the ends."""
    position = np.interp(np.arange(1, horizon + 1), places, np.arange(len(places)))
    low = np.minimum(position.astype(np.int64), len(places) - 1)
    high = np.minimum(low + 1, len(places) - 1)
    out = np.zeros((horizon, len(places)), np.float32)
    rows = np.arange(horizon)
    np.add.at(out, (rows, low), 1.0 - (position - low))
    np.add.at(out, (rows, high), position - low)
    return out
