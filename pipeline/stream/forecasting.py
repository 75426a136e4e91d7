"""Steps to forecasts: the sensors' rows are gathered, run through memory, baseline and model side by side, and stored back.

Who answers, and what the status says of it:

    baseline   there is no model, or what it says is not finite: the baseline answers
    warming    the sensor's state is younger than the model's warm-up, or was reset: the baseline answers
    stale      the model answers, but the window it consumed last held no reading
    ok         the model answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.baselines import LastValue, SeasonalNaive
from models.blocks import Block, iter_blocks
from models.features import SeriesMemory, look_back
from models.forecaster import Column, Forecaster, Model, Prediction, SeriesSpec, StepBlock
from pipeline.stream.columns import BASELINE, OK, STALE, WARMING, Bool, Float32, Float64, Int32, Int64, Steps
from pipeline.stream.scoring import Scorer, default_leads
from pipeline.stream.state import STEPS, SensorTable

Baseline = type[LastValue] | type[SeasonalNaive]
REBUILD_ROWS = 1024
"""Sensors at a time that are run through a new model."""


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
    scores: Float64
    """(m, 2, 5, L) what was said of these steps earlier, against what they brought (`Scorer`)."""
    beside: tuple[Prediction, ...] = ()
    """What the forecasters beside say: mean (m, H, K), quantiles (m, H, K, Q) each."""


class Forecasting:
    """Memory, baseline and (once there is one) model over the rows of a SensorTable, and the scores of what they said.

    spec: the series as the stream delivers it. A model brings its own horizon and quantiles, and the baseline and the scores
    follow it: what is served may so change its shape while it runs. rewarm_steps: how far back a new model is run through what
    is remembered. leads: scored ones; those beyond the horizon are left out; empty: `default_leads`. beside: baselines that are asked
    at every step as well; they never answer.
    """

    def __init__(
        self,
        spec: SeriesSpec,
        model: Model | None = None,
        rewarm_steps: int = 0,
        leads: tuple[int, ...] = (),
        beside: Sequence[Baseline] = (),
    ) -> None:
        self._leads = leads
        self._kinds = beside
        self._rewarm_steps = rewarm_steps
        self._set_model(spec, model)
        self._names = [column.name for column in self.columns()]

    def _set_model(self, spec: SeriesSpec, model: Model | None) -> None:
        if model is not None:
            require_series(model.spec, spec)
        self.spec = spec = model.spec if model else spec
        self.memory = SeriesMemory(spec, look_back(spec) + self._rewarm_steps)
        self.baseline: Forecaster = SeasonalNaive(spec) if spec.seasons else LastValue(spec)
        self.beside = [self.baseline if isinstance(self.baseline, kind) else kind(spec) for kind in self._kinds]
        self.model = model
        self.scorer = Scorer(
            spec, [lead for lead in self._leads if lead <= spec.horizon] or default_leads(spec.horizon)
        )

    def columns(self) -> tuple[Column, ...]:
        return (*self.lasting_columns(), *self.model_columns())

    def lasting_columns(self) -> tuple[Column, ...]:
        """What no change of the model touches."""
        own = [forecaster for forecaster in self.beside if forecaster is not self.baseline]
        return (
            *self.memory.columns(),
            *self.baseline.columns(),
            *(column for forecaster in own for column in forecaster.columns()),
        )

    def model_columns(self) -> tuple[Column, ...]:
        """Those that another model brings in another shape, or begins anew."""
        return (*self.scorer.columns(), *(self.model.columns() if self.model else ()))

    def swap(self, model: Model | None, table: SensorTable, end_ms: Int64) -> None:
        """Another model from here on: its columns are filled by running the steps that are remembered of each sensor through it.
        end_ms: (sensors) end of each sensor's last step. What the old one had said of steps to come is not scored."""
        gone = [column.name for column in self.model_columns()]
        self._set_model(self.spec, model)
        table.replace_columns(gone, self.model_columns())
        self._names = [column.name for column in self.columns()]
        if model is None or not self._rewarm_steps:
            return
        awake = np.flatnonzero(table["memory.steps"] > 0).astype(np.int32)
        for first in range(0, len(awake), REBUILD_ROWS):
            slots = awake[first : first + REBUILD_ROWS]
            rows = table.gather(slots, self._names)
            model.rebuild(rows, *self.memory.recall(rows, end_ms[slots], self._rewarm_steps))
            table.scatter(slots, {column.name: rows[column.name] for column in model.columns()})
        table.touch(awake, STEPS)

    def advance(self, steps: Steps, table: SensorTable) -> Answers:
        """Consume m steps, ordered by (window, slot), and answer at each. Updates the table."""
        m = len(steps)
        said = self._nothing_said(m)
        answers = Answers(
            said.mean,
            said.quantiles,
            np.empty(m, np.uint8),
            np.empty(m, np.int32),
            np.empty(m, np.bool_),
            np.empty((m, *self.scorer.shape)),
            tuple(self._nothing_said(m) for _ in self.beside),
        )
        for block in iter_blocks(steps.slot, steps.reset):
            self._advance_block(block, steps, table, answers)
        return answers

    def _nothing_said(self, m: int) -> Prediction:
        shape = (m, self.spec.horizon, len(self.spec.targets))
        return Prediction(np.empty(shape, np.float32), np.empty((*shape, len(self.spec.quantiles)), np.float32))

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
        prediction = baseline = self.baseline.advance(rows, step_block, context)
        status = np.full(live.shape, BASELINE, np.uint8)
        answered, speaks = None, np.zeros(live.shape, np.bool_)
        if self.model is not None:
            answered = self.model.advance(rows, step_block, context)
            ready = context.steps >= self.model.warmup_steps
            usable = _usable(answered, baseline)
            speaks = ready & usable
            prediction = _choose(speaks, answered, baseline)
            of_model = np.where(steps.count[block.index] > 0, OK, STALE)
            status = np.where(ready, np.where(usable, of_model, BASELINE), WARMING).astype(np.uint8)
        scores = self.scorer.advance(rows, live, context, answered, speaks, baseline)
        at = block.index[live]
        for forecaster, kept in zip(self.beside, answers.beside):
            own = baseline if forecaster is self.baseline else forecaster.advance(rows, step_block, context)
            kept.mean[at], kept.quantiles[at] = own.mean[live], own.quantiles[live]
        table.scatter(block.sensors, rows)
        answers.scores[at] = scores[live]
        answers.mean[at] = prediction.mean[live]
        answers.quantiles[at] = prediction.quantiles[live]
        answers.status[at] = status[live]
        answers.state_steps[at] = context.steps[live]
        answers.known[at] = ~np.isnan(prediction.mean[live][:, 0]).all(axis=-1)


def require_series(found: SeriesSpec, expected: SeriesSpec) -> None:
    """Raises ValueError unless a model for `found` can serve what `expected` describes; horizon and quantiles are its own."""
    for name in ("channels", "targets", "step_ms", "seasons"):
        if getattr(found, name) != getattr(expected, name):
            raise ValueError(
                f"the model was made for {name} = {getattr(found, name)!r}, the stream delivers {getattr(expected, name)!r}"
            )


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
