"""Steps to forecasts: the sensors' rows are gathered, run through memory, baseline and model side by side, and stored back.

Who answers, and what the status says of it:

    baseline   there is no model, or what it says is not finite: the baseline answers
    warming    the sensor's state is younger than the model's warm-up, or was reset: the baseline answers
    stale      the model answers, but the window it consumed last held no reading
    ok         the model answers
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.baselines import LastValue, SeasonalNaive
from models.blocks import Block, iter_blocks
from models.features import SeriesMemory
from models.forecaster import Column, Forecaster, Prediction, SeriesSpec, StepBlock
from pipeline.stream.columns import BASELINE, OK, STALE, WARMING, Bool, Float32, Int32, Steps
from pipeline.stream.state import SensorTable


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer per step, in the order of the steps."""

    mean: Float32
    """(m, H, K)"""
    quantiles: Float32
    """(m, H, K, Q)"""
    status: NDArray[np.uint8]
    """(m)"""
    state_steps: Int32
    """(m)"""
    known: Bool
    """(m) False where no target has ever been observed: there is nothing to say yet."""


class Forecasting:
    """Memory, baseline and (once there is one) model over the rows of a SensorTable."""

    def __init__(self, spec: SeriesSpec, model: Forecaster | None = None) -> None:
        if model is not None and model.spec != spec:
            raise ValueError(f"the model was made for {model.spec}, the stream delivers {spec}")
        self.spec = spec
        self.memory = SeriesMemory(spec)
        self.baseline: Forecaster = SeasonalNaive(spec) if spec.seasons else LastValue(spec)
        self.model = model
        self._names = [column.name for column in self.columns()]

    def columns(self) -> tuple[Column, ...]:
        model = self.model.columns() if self.model else ()
        return (*self.memory.columns(), *self.baseline.columns(), *model)

    def advance(self, steps: Steps, table: SensorTable) -> Answers:
        """Consume m steps, ordered by (window, slot), and answer at each. Updates the table."""
        m, spec = len(steps), self.spec
        answers = Answers(
            np.empty((m, spec.horizon, len(spec.targets)), np.float32),
            np.empty((m, spec.horizon, len(spec.targets), len(spec.quantiles)), np.float32),
            np.empty(m, np.uint8),
            np.empty(m, np.int32),
            np.empty(m, np.bool_),
        )
        for block in iter_blocks(steps.slot, steps.reset):
            self._advance_block(block, steps, table, answers)
        return answers

    def _advance_block(self, block: Block, steps: Steps, table: SensorTable, answers: Answers) -> None:
        if block.reset.any():
            table.refill(block.sensors[block.reset], self._names)
        rows = table.gather(block.sensors, self._names)
        live = block.live
        values = steps.values[block.index]
        if not live.all():
            values = np.where(live[:, :, None], values, np.nan)
        step_block = StepBlock(values, steps.end_ms[block.index], live)
        context = self.memory.advance(rows, step_block)
        prediction = self.baseline.advance(rows, step_block, context)
        status = np.full(live.shape, BASELINE, np.uint8)
        if self.model is not None:
            answered = self.model.advance(rows, step_block, context)
            ready = context.steps >= self.model.warmup_steps
            usable = _usable(answered, prediction)
            prediction = _choose(ready & usable, answered, prediction)
            of_model = np.where(steps.count[block.index] > 0, OK, STALE)
            status = np.where(ready, np.where(usable, of_model, BASELINE), WARMING).astype(np.uint8)
        table.scatter(block.sensors, rows)
        at = block.index[live]
        answers.mean[at] = prediction.mean[live]
        answers.quantiles[at] = prediction.quantiles[live]
        answers.status[at] = status[live]
        answers.state_steps[at] = context.steps[live]
        answers.known[at] = ~np.isnan(prediction.mean[live][:, 0]).all(axis=-1)


def _usable(model: Prediction, baseline: Prediction) -> Bool:
    """(B, T) True where the model's answer is finite. A target never observed is NaN in both, and no fault."""
    if bool(np.isfinite(model.mean).all() and np.isfinite(model.quantiles).all()):
        return np.ones(model.mean.shape[:2], np.bool_)
    unknown = np.isnan(baseline.mean).all(axis=2)
    finite = np.isfinite(model.mean).all(axis=2) & np.isfinite(model.quantiles).all(axis=(2, 4))
    return np.asarray(np.logical_or(unknown, finite).all(axis=2))


def _choose(chosen: Bool, model: Prediction, baseline: Prediction) -> Prediction:
    """The model's answer where it is chosen (B, T), else the baseline's."""
    if chosen.all():
        return model
    return Prediction(
        np.where(chosen[:, :, None, None], model.mean, baseline.mean),
        np.where(chosen[:, :, None, None, None], model.quantiles, baseline.quantiles),
    )
