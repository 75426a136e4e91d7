"""Generated series for tests: seasonal, noisy, ragged, with gaps."""

from __future__ import annotations

import numpy as np

from models.features import SeriesMemory
from models.forecaster import SeriesSpec, StepBlock
from models.sequences import Sequences, empty_rows

STEP_MS = 60_000
SPEC = SeriesSpec(("a.mean", "b.mean", "b.max"), (0, 1), STEP_MS, 5, (0.1, 0.5, 0.9), (4, 12))
SINGLE = SeriesSpec(("a.mean",), (0,), STEP_MS, 6, (0.1, 0.5, 0.9), (8,))


def ends_ms(batch: int, steps: int, first: int = 0) -> np.ndarray:
    return np.broadcast_to((np.arange(steps) + first + 1) * STEP_MS, (batch, steps)).copy()


def noisy(spec: SeriesSpec, batch: int, steps: int, *, seed: int = 0, missing: float = 0.1) -> np.ndarray:
    """(B, T, C) random walks of different sizes and offsets, some values missing."""
    random = np.random.default_rng(seed)
    values = np.cumsum(random.standard_normal((batch, steps, len(spec.channels))), axis=1)
    values = values * random.uniform(0.1, 100, (batch, 1, 1)) + random.uniform(-1000, 1000, (batch, 1, 1))
    values[random.random(values.shape) < missing] = np.nan
    return values


def block(values: np.ndarray, *, first: int = 0, live: np.ndarray | None = None) -> StepBlock:
    batch, steps = values.shape[:2]
    return StepBlock(values, ends_ms(batch, steps, first), np.ones((batch, steps), bool) if live is None else live)


class Bench:
    """A forecaster and a memory over rows of B sensors, as the stream drives them."""

    def __init__(self, forecaster, batch: int) -> None:
        self.forecaster = forecaster
        self.memory = SeriesMemory(forecaster.spec, getattr(forecaster, "ring_steps", 1))
        self.columns = [*self.memory.columns(), *forecaster.columns()]
        self.rows = empty_rows(self.columns, batch)
        self.steps = 0

    def advance(self, values: np.ndarray, live: np.ndarray | None = None):
        steps = block(values, first=self.steps, live=live)
        self.steps += values.shape[1]
        return self.forecaster.advance(self.rows, steps, self.memory.advance(self.rows, steps))

    def take(self, sensors) -> Bench:
        """The same forecaster over a copy of some rows."""
        other = Bench(self.forecaster, 0)
        other.rows = {name: column[sensors].copy() for name, column in self.rows.items()}
        other.steps = self.steps
        return other


def seasonal_sequences(sensors: int = 12, season: int = 8, *, seed: int = 0, longest: int = 400) -> Sequences:
    """Ragged: seasons with an autoregressive disturbance (which seasonal naive cannot follow), gaps, a reset, missing values."""
    random = np.random.default_rng(seed)
    parts = []
    for sensor in range(sensors):
        steps = int(random.integers(longest // 2, longest + 1))
        disturbance = np.zeros(steps)
        for t in range(1, steps):
            disturbance[t] = 0.9 * disturbance[t - 1] + 0.4 * random.standard_normal()
        wave = np.sin(2 * np.pi * (np.arange(longest - steps, longest) % season) / season)
        values = 10.0 ** random.integers(-2, 4) * (5 + 2 * wave + disturbance)
        values[random.random(steps) < 0.03] = np.nan
        reset = np.arange(steps) == 0
        reset[steps // 3] = sensor % 4 == 0
        end_ms = (np.arange(longest - steps, longest) + 1) * STEP_MS
        parts.append((np.full(steps, sensor, np.int32), end_ms, values[:, None], reset))
    sensor, end_ms, values, reset = (np.concatenate(column) for column in zip(*parts))
    order = np.argsort(end_ms, kind="stable")  # as the stream delivers them: sensors interleaved
    return Sequences(sensor[order], end_ms[order], values[order], reset[order])
