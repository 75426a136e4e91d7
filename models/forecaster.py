"""The contract between the stream and every forecaster.

A forecaster owns no memory. It declares the state columns it needs per sensor; the caller keeps them in a table, hands
over the rows of the sensors whose windows have closed, and stores the rows back. So one forecaster serves live traffic,
catch-up, training and backtests alike, and its whole state can be checkpointed without asking it.

    rows (B sensors) + block (B x T steps) --SeriesMemory.advance--> Context --Forecaster.advance--> Prediction

Axes, everywhere: B sensors, T steps, C channels, K targets, H leads, Q quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Rows = dict[str, NDArray[Any]]
"""Gathered state: column name -> (B, *shape). The caller's private copy, updated in place by `advance`."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of per-sensor state."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float = 0.0
    """The value of a sensor never seen, and of one whose state was reset."""
    survives_reset: bool = False
    """True for what stays true of a sensor after a long gap, such as its running mean and variance."""

    @property
    def bytes_per_sensor(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SeriesSpec:
    """What a forecaster is told about the series it will see. Equal specs mean interchangeable forecasters."""

    channels: tuple[str, ...]
    """C names such as "temperature.mean": what a step holds, in order."""
    targets: tuple[int, ...]
    """K indices into `channels`: what is forecast."""
    step_ms: int
    horizon: int
    """H: leads 1..H; lead h speaks of the window that ends at issued_at + h * step_ms."""
    quantiles: tuple[float, ...]
    """Q levels, strictly ascending, inside (0, 1)."""
    seasons: tuple[int, ...] = ()
    """Season lengths in steps, ascending, each >= 2; empty if there is none."""
    seasons_open: bool = field(default=False, compare=False)
    """The seasons are not known beforehand: training estimates them, and a model brings its own."""
    profile: str = "base"
    """What stands around the network: "base" nothing, "lean" and "accuracy" a cascade (`models.cascade`)."""

    @property
    def brought(self) -> tuple[str, ...]:
        """What a model for these series brings along itself: it may differ."""
        return ("horizon", "quantiles", *(("seasons",) if self.seasons_open else ()), "seasons_open")

    @property
    def target_names(self) -> tuple[str, ...]:
        """Field names of the targets: the channel's name without its aggregate."""
        return tuple(self.channels[k].rsplit(".", 1)[0] for k in self.targets)


@dataclass(frozen=True, slots=True)
class StepBlock:
    """T consecutive steps of each of B sensors, padded on the right. No reset falls inside a block: the caller cuts
    there and refills the reset rows first."""

    values: NDArray[np.float64]
    """(B, T, C) raw units; NaN = missing (all NaN in a window without readings)."""
    end_ms: NDArray[np.int64]
    """(B, T) end of the window, epoch ms."""
    live: NDArray[np.bool_]
    """(B, T) False = padding: must leave the state untouched; its outputs are ignored."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Forecasts in the series' own units, made at each step of a block."""

    mean: NDArray[np.float32]
    """(B, T, H, K) point forecast. NaN where a target has never been observed, and in padding; finite elsewhere."""
    quantiles: NDArray[np.float32]
    """(B, T, H, K, Q), never decreasing along Q; NaN where the mean is."""
    ground: Any = None
    """What the network built on (`models.features.Ground`), where stages stand before it."""


class Forecaster(Protocol):
    """What `check_forecaster` (tests/contract) holds every forecaster to."""

    name: str
    """How tables call it: "LastValue", "SeasonalNaive", "FeedForward", "Millrace"."""
    version: str
    """Which weights answered; the name itself for a forecaster without weights."""
    spec: SeriesSpec
    warmup_steps: int
    """It has something to say of a sensor once that many steps were consumed since the last reset."""

    def columns(self) -> tuple[Column, ...]:
        """Its own columns, beside those of SeriesMemory. Names carry a prefix of its own."""

    def advance(self, rows: Rows, block: StepBlock, context: Any) -> Prediction:
        """Consume the block and forecast at each of its steps.

        Guarantees: the outcome for a sensor does not depend on the others in the block, nor on how its steps were cut
        into blocks (up to float32 rounding); padding changes nothing; `rows` is updated in place."""


class Model(Forecaster, Protocol):
    """A forecaster that is trained, and may take another's place while the service runs."""

    def rebuild(self, rows: Rows, block: StepBlock, context: Any) -> None:
        """Fill its own columns with what the block makes of an empty state. `block` and `context` are what
        `SeriesMemory.recall` remembers."""
