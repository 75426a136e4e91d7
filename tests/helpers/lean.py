"""Fleets with a daily course for the profile `lean`, and what a task says of them, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.stream.columns import Readings
from pipeline.stream.task import ForecastTask, TaskOutput, TaskSettings
from tests.helpers.streams import HOUR, START, task_settings

DAY = 24
MIDNIGHT = START // (DAY * HOUR) * DAY * HOUR


def lean_settings(
    horizon: int = 12,
    seasons: tuple[int, ...] = (DAY,),
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9),
    profile: str = "lean",
    fields: tuple[str, ...] = ("value",),
    **rule: Any,
) -> TaskSettings:
    settings = task_settings(fields, horizon, seasons, **{"max_gap_steps": 6} | rule)
    return replace(settings, spec=replace(settings.spec, profile=profile, quantiles=quantiles), rewarm_steps=48)


def daily_fleet(
    steps: int, sensors: int, *, seed: int = 0, swing: float = 2.0, noise: float = 0.5, memory: float = 0.9
) -> np.ndarray:
    """(T, S) a course of the day, a disturbance that lasts some hours, levels and sizes of their own."""
    random = np.random.default_rng(seed)
    disturbance = np.zeros((steps, sensors))
    shocks = noise * random.standard_normal((steps, sensors))
    for t in range(1, steps):
        disturbance[t] = memory * disturbance[t - 1] + shocks[t]
    phase = random.uniform(0, 1, sensors)
    course = swing * np.sin(2 * np.pi * (np.arange(steps)[:, None] / DAY + phase))
    size = 10.0 ** random.integers(-1, 3, sensors)
    return random.uniform(-5, 5, sensors) * size + size * (course + disturbance)


def readings(values: np.ndarray, names: Sequence[str] | None = None, *, first: int = 0, start: int = 0) -> Readings:
    """(T, S) -> one reading a step and sensor in the order of time; NaN: none. first: offset; start: step of the first row."""
    sensors = values.shape[1]
    ids = [name.encode() for name in names or [f"pump-{s}" for s in range(sensors)]]
    step, sensor = np.nonzero(~np.isnan(values))
    offsets = first + step.astype(np.int64) * sensors + sensor
    return Readings(
        [ids[s] for s in sensor.tolist()],
        offsets,
        MIDNIGHT + (start + step.astype(np.int64)) * HOUR,
        values[step, sensor][:, None],
        np.arange(len(step)),
    )


@dataclass(frozen=True)
class Said:
    """What was said at each step of each sensor; NaN where nothing."""

    mean: np.ndarray
    """(T, S, H)"""
    quantiles: np.ndarray
    """(T, S, H, Q)"""
    status: np.ndarray
    """(T, S) -1: nothing was said."""

    def squared_error(self, truth: np.ndarray, unit: np.ndarray | float = 1.0) -> np.ndarray:
        """(T, S, H) of the labels that are known; truth: (T, S)."""
        error = labels(truth, self.mean.shape[2]) - self.mean
        return np.asarray((error / np.reshape(unit, (1, -1, 1))) ** 2)

    def coverage(self, truth: np.ndarray) -> np.ndarray:
        """(T, S, H) 1 where the truth lies between the outermost quantiles."""
        label = labels(truth, self.mean.shape[2])
        inside = (label >= self.quantiles[..., 0]) & (label <= self.quantiles[..., -1])
        return np.where(np.isnan(label) | np.isnan(self.mean), np.nan, inside)


def labels(truth: np.ndarray, horizon: int) -> np.ndarray:
    """(T, S, H) the values 1..H steps later."""
    out = np.full((*truth.shape, horizon), np.nan)
    for lead in range(1, horizon + 1):
        out[:-lead, :, lead - 1] = truth[lead:]
    return out


def gathered(outputs: Sequence[TaskOutput], steps: int, names: Sequence[str]) -> Said:
    found = [output.forecasts for output in outputs if len(output.forecasts)]
    _, horizon, _, levels = found[0].quantiles.shape
    mean = np.full((steps, len(names), horizon), np.nan, np.float32)
    quantiles = np.full((*mean.shape, levels), np.nan, np.float32)
    status = np.full(mean.shape[:2], -1)
    place = {name: number for number, name in enumerate(names)}
    for one in found:
        step = (one.issued_at_ms - MIDNIGHT) // HOUR - 1
        sensor = np.array([place[name] for name in one.sensors])
        mean[step, sensor], quantiles[step, sensor] = one.mean[:, :, 0], one.quantiles[:, :, 0]
        status[step, sensor] = one.status
    return Said(mean, quantiles, status)


def said_of(
    values: np.ndarray, settings: TaskSettings | None = None, task: ForecastTask | None = None, *, start: int = 0
) -> Said:
    """A fresh task (or this one, which stands before step `start`) run through all of it at once, the last window closed at the end."""
    task = task or ForecastTask(settings or lean_settings())
    steps, sensors = values.shape
    log = readings(values, first=start * sensors, start=start)
    outputs = [task.take("t", 0, log), task.finish("t", 0, (start + steps) * sensors)]
    return gathered(outputs, start + steps, [f"pump-{s}" for s in range(sensors)])


def unfit(task: ForecastTask) -> list[str]:
    """Columns in which something is neither finite nor a NaN that says "nothing yet"."""
    table = task.table
    begun = {name for name, column in table.columns.items() if np.isnan(column.fill)}
    columns = {name: table[name] for name in table.columns if name not in begun and name.split(".")[0] != "window"}
    bad = [name for name, column in columns.items() if not np.isfinite(column).all()]
    # Rings of what was remembered or said may hold NaN; half precision may overflow in the latter.
    bad += [n for n in begun if not n.startswith(("window", "said", "score")) and np.isinf(table[n]).any()]
    empty = {column.name for column in task.forecasting.partition_columns() if np.isnan(column.fill)}
    bad += [
        name
        for name, value in table.partition.items()
        if (np.isinf(value) if name in empty else ~np.isfinite(value)).any()
    ]
    return bad
