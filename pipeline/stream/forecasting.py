"""Steps to forecasts: the sensors' rows are gathered, run through memory, baseline and model side by side, and stored back.

In the profiles `lean` and `accuracy` the model is a cascade, with a trained network in it or without one. It learns while it runs: before
the first step of each epoch all sensors of the partition have a lesson, from what has matured.

Who answers, and what the status says of it:

    baseline   there is no model (or, in a cascade, nothing was learned yet), or what it says is not finite: the baseline answers
    warming    the sensor's state is younger than the model's warm-up, or was reset: the baseline answers
    stale      the model answers, but the window it consumed last held no reading
    ok         the model answers
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.baselines import LastValue, SeasonalNaive
from models.blocks import Block, iter_blocks
from models.cascade import Cascade
from models.epochs import epochs
from models.features import MEMORY_RING, SeriesMemory, look_back
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
        self.model = model
        self.cascade = model if isinstance(model, Cascade) else Cascade.of(spec)
        ring_steps = self.cascade.ring_steps if self.cascade else 1
        self.memory = SeriesMemory(spec, max(look_back(spec) + self._rewarm_steps, ring_steps))
        self.baseline: Forecaster = SeasonalNaive(spec) if spec.seasons else LastValue(spec)
        self.beside = [self.baseline if isinstance(self.baseline, kind) else kind(spec) for kind in self._kinds]
        self.scorer = Scorer(
            spec, [lead for lead in self._leads if lead <= spec.horizon] or default_leads(spec.horizon)
        )

    @property
    def speaker(self) -> Model | None:
        """Who answers, if not the baseline: the trained model, or a cascade that is still without one."""
        return self.model or self.cascade

    @property
    def version(self) -> str:
        """Of who answers."""
        return (self.speaker or self.baseline).version

    def columns(self) -> tuple[Column, ...]:
        online = self.cascade.online_columns() if self.cascade else ()
        return (*self.memory.columns(), *self._baseline_columns(), *online, *self.model_columns())

    def partition_columns(self) -> tuple[Column, ...]:
        return self.cascade.partition_columns() if self.cascade else ()

    def lasting_columns(self) -> tuple[Column, ...]:
        """What no change of the model touches. Where there is a cascade, its horizon says how far back is remembered."""
        memory = [column for column in self.memory.columns() if self.cascade is None or column.name != MEMORY_RING]
        return (*memory, *self._baseline_columns())

    def model_columns(self) -> tuple[Column, ...]:
        """Those that another model brings in another shape, or begins anew."""
        trained = self.cascade.network_columns() if self.cascade else self.model.columns() if self.model else ()
        return (*self.scorer.columns(), *trained)

    def _baseline_columns(self) -> tuple[Column, ...]:
        own = [forecaster for forecaster in self.beside if forecaster is not self.baseline]
        return tuple(column for forecaster in (self.baseline, *own) for column in forecaster.columns())

    def begin(self, table: SensorTable) -> None:
        """What a partition that has learned nothing yet begins with."""
        if self.cascade is not None:
            self.cascade.begin(table.partition)

    def swap(self, model: Model | None, table: SensorTable, end_ms: Int64) -> None:
        """Another model from here on: its columns are filled by running the steps that are remembered of each sensor through it; what a
        cascade has learned goes on. end_ms: (sensors) end of each sensor's last step. What the old one had said of steps to come is not
        scored."""
        before, shared = {column.name: column for column in self.columns()}, self.partition_columns()
        online = self.cascade.online_columns() if self.cascade else ()
        ring = table[MEMORY_RING].copy()
        self._set_model(self.spec, model)
        begun = {column.name for column in self.model_columns()}
        learned = self.cascade.online_columns() if self.cascade else ()
        if (learned, self.partition_columns()) != (
            online,
            shared,
        ):  # another horizon: what was learned was learned for others
            begun |= {column.name for column in learned}
            table.replace_partition_columns([column.name for column in shared], self.partition_columns())
        self.begin(table)
        kept = {column.name for column in self.columns() if before.get(column.name) == column} - begun
        table.replace_columns(before.keys() - kept, [column for column in self.columns() if column.name not in kept])
        if MEMORY_RING not in kept:
            newest = min(ring.shape[1], self.memory.ring_steps)
            table[MEMORY_RING][:, -newest:] = ring[:, -newest:]
        self._names = [column.name for column in self.columns()]
        if model is None or not self._rewarm_steps:
            return
        awake = np.flatnonzero(table["memory.steps"] > 0).astype(np.int32)
        for first in range(0, len(awake), REBUILD_ROWS):
            slots = awake[first : first + REBUILD_ROWS]
            rows = table.gather(slots, self._names)
            model.rebuild(rows, *self.memory.recall(rows, end_ms[slots], self._rewarm_steps, table.partition))
            table.scatter(slots, {column.name: rows[column.name] for column in self.model_columns()})
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
        for span in self._between_lessons(steps, table):
            for block in iter_blocks(steps.slot[span], steps.reset[span]):
                self._advance_block(block.shifted(span.start), steps, table, answers)
        return answers

    def _between_lessons(self, steps: Steps, table: SensorTable) -> Iterator[slice]:
        """The steps, cut at the borders of epochs; the lessons are given there."""
        if self.cascade is None:
            yield slice(0, len(steps))
            return
        columns = {name: table[name] for name in self._names}
        for number, span in epochs(steps.end_ms, self.spec.step_ms, self.cascade.epoch_steps):
            taught = self.cascade.teach(number, columns, table.partition)
            table.touch(taught, STEPS)
            yield span

    def _nothing_said(self, m: int) -> Prediction:
        shape = (m, self.spec.horizon, len(self.spec.targets))
        return Prediction(np.empty(shape, np.float32), np.empty((*shape, len(self.spec.quantiles)), np.float32))

    def _advance_block(self, block: Block, steps: Steps, table: SensorTable, answers: Answers) -> None:
        if block.reset.any():
            table.refill(block.sensors[block.reset], self._names)
        stages = ("pooled.", "own.", "full.")
        names = [n for n in self._names if not (n.startswith(stages) and not n.endswith(".weights"))]
        rows = table.gather(block.sensors, names)
        live = block.live
        values = steps.values[block.index]
        if not live.all():
            values = np.where(live[:, :, None], values, np.nan)
        step_block = StepBlock(values, steps.end_ms[block.index], live)
        context = self.memory.advance(rows, step_block, table.partition)
        prediction = baseline = self.baseline.advance(rows, step_block, context)
        status = np.full(live.shape, BASELINE, np.uint8)
        answered, speaks = None, np.zeros(live.shape, np.bool_)
        if self.speaker is not None:
            answered = self.speaker.advance(rows, step_block, context)
            ready = context.steps >= self.speaker.warmup_steps
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
        unchanged = (
            "own.weights",
            "full.weights",
            "mixture.loss",
            "mixture.count",
            "calibration.error_width",
            "calibration.network_width",
        )
        table.scatter(block.sensors, {name: value for name, value in rows.items() if name not in unchanged})
        answers.scores[at] = scores[live]
        answers.mean[at] = prediction.mean[live]
        answers.quantiles[at] = prediction.quantiles[live]
        answers.status[at] = status[live]
        answers.state_steps[at] = context.steps[live]
        answers.known[at] = ~np.isnan(prediction.mean[live][:, 0]).all(axis=-1)


def require_series(found: SeriesSpec, expected: SeriesSpec) -> None:
    """Raises ValueError unless a model for `found` can serve what `expected` describes; what a model brings along is its own."""
    for name in ("channels", "targets", "step_ms", "seasons", "profile"):
        if name not in expected.brought and getattr(found, name) != getattr(expected, name):
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
