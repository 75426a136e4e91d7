"""One partition, from records to what is to be sent: the same code for live traffic, catch-up, training and backtests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.forecaster import Model, SeriesSpec
from pipeline.stream.columns import (
    OK,
    PROVISIONAL,
    STALE,
    Bool,
    Counts,
    DeadLetter,
    Forecasts,
    Int64,
    Readings,
    RecordColumns,
    Rejected,
    Steps,
)
from pipeline.stream.forecasting import Answers, Baseline, Forecasting
from pipeline.stream.scoring import Scores, by_window
from pipeline.stream.serdes import CONVERTER, TRANSFORMATION, ReadingDecoder, ReadingFormat
from pipeline.stream.state import STEPS, WINDOWS, SensorTable
from pipeline.stream.windows import NEVER, STREAM_TIME, WindowOperator, WindowRule


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """All that shapes a task's outcome, beside the log and the model."""

    format: ReadingFormat
    rule: WindowRule
    spec: SeriesSpec
    late_to_dead_letters: bool = True
    rewarm_steps: int = 64
    """Steps of a sensor that a new model is run through when it takes over."""
    scored_leads: tuple[int, ...] = ()
    """Empty: `scoring.default_leads`."""


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """What is to be done after some records; nothing of it has happened yet."""

    forecasts: Forecasts
    dead_letters: list[DeadLetter]
    counts: Counts
    scores: Scores
    """Of the windows that closed."""
    next_offset: int
    """The offset to read next, and so the one to commit once the rest has been sent."""
    steps: Steps
    """The windows that closed."""
    answers: Answers
    """To each of them: what `forecasts` is made of."""


class StepTask:
    """The first half: records of one partition to closed windows. What training reads history through."""

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        self.decoder = ReadingDecoder(settings.format)
        self.windows = WindowOperator(settings.rule)
        self.table = self._empty_table()

    def process(self, records: RecordColumns) -> tuple[Steps, Readings, list[Rejected]]:
        """Steps that closed, the readings decoded, and what was refused (late readings included), by row."""
        readings, rejected = self.decoder.decode(records)
        steps, late = self.advance(readings)
        return steps, readings, rejected + [self._late(readings, row) for row in late]

    def _empty_table(self) -> SensorTable:
        return SensorTable(self.windows.columns(), self.windows.partition_columns())

    def advance(self, readings: Readings) -> tuple[Steps, Int64]:
        slots = self.table.slots(readings.sensors)
        steps, late = self.windows.advance(slots, readings, self.table)
        self.table.touch(slots, WINDOWS)
        self.table.touch(steps.slot, WINDOWS, STEPS)
        return steps, late

    def close(self, next_offset: int) -> Steps:
        """No reading will come any more, as at the end of a file: the steps of the open windows, the newest one with them."""
        newest = self.windows.newest_open(self.table)
        if newest == NEVER:
            return self.advance(Readings.none(len(self.settings.format.fields)))[0]
        closes_at_ms = int(self.settings.rule.closes_at_ms(np.array(newest, np.int64)))
        steps = self.windows.close_at(closes_at_ms, self.table)
        steps.offset[:] = next_offset
        self.table.touch(np.arange(len(self.table), dtype=np.int32), WINDOWS, STEPS)
        return steps

    def _late(self, readings: Readings, row: int) -> Rejected:
        rule = self.settings.rule
        time = int(readings.event_time_ms[row])
        newest = time // rule.hop_ms
        message = (
            f"event time {time} came after stream time had closed its window "
            f"[{newest * rule.hop_ms}, {newest * rule.hop_ms + rule.size_ms}), grace {rule.grace_ms} ms; raise windows.grace to wait longer"
        )
        return Rejected(int(readings.record[row]), "late", message)


class ForecastTask(StepTask):
    """One partition's whole path. Its state is a pure function of the records it was given, in order.

    emit_from: records before this offset only rebuild state. What they caused was sent before, so it is not sent again.
    beside: baselines to be asked at every step as well (`Answers.beside`).
    """

    def __init__(
        self,
        settings: TaskSettings,
        model: Model | None = None,
        emit_from: int = 0,
        beside: Sequence[Baseline] = (),
    ) -> None:
        self.forecasting = Forecasting(settings.spec, model, settings.rewarm_steps, settings.scored_leads, beside)
        super().__init__(settings)
        self.emit_from = emit_from

    @property
    def spec(self) -> SeriesSpec:
        """What is answered: the settings', with the horizon and the quantiles of the model that serves."""
        return self.forecasting.spec

    @property
    def version(self) -> str:
        """Of the model that serves; empty: none."""
        return self.forecasting.model.version if self.forecasting.model else ""

    def lasting_columns(self) -> list[str]:
        """What no change of the model touches."""
        return [column.name for column in (*self.windows.columns(), *self.forecasting.lasting_columns())]

    def swap(self, model: Model | None) -> None:
        """Another model answers from the next record on. Each sensor's hidden state is what the new model makes of the steps that are
        remembered of it. Raises ValueError where it was made for another series."""
        self.forecasting.swap(model, self.table, self.settings.rule.end_ms(self.table["window.emitted"]))

    def run(self, records: RecordColumns) -> TaskOutput:
        """Take in records of one partition, in log order, and say what is to be sent."""
        steps, readings, rejected = self.process(records)
        counts = self._count(records, readings, rejected)
        next_offset = int(records.offsets[-1]) + 1 if len(records) else 0
        letters = self._dead_letters(records, rejected)
        return self._output(records.topic, records.partition, steps, next_offset, counts, letters)

    def take(self, topic: str, partition: int, readings: Readings) -> TaskOutput:
        """The same from readings that are decoded already, as those of a file are. Late ones are counted; there is no record to make a
        dead letter of."""
        steps, late = self.advance(readings)
        counts = Counts(readings=len(readings), late=len(late))
        next_offset = int(readings.offsets[-1]) + 1 if len(readings) else 0
        return self._output(topic, partition, steps, next_offset, counts)

    def finish(self, topic: str, partition: int, next_offset: int) -> TaskOutput:
        """What `close` brings, answered."""
        steps = self.close(next_offset)
        return self._output(topic, partition, steps, next_offset, Counts())

    def _output(
        self,
        topic: str,
        partition: int,
        steps: Steps,
        next_offset: int,
        counts: Counts,
        letters: list[DeadLetter] | None = None,
    ) -> TaskOutput:
        answers = self.forecasting.advance(steps, self.table)
        fresh: Bool = steps.offset >= self.emit_from
        forecasts = self._forecasts(topic, partition, steps, answers, answers.known & fresh)
        counts.forecasts = len(forecasts)
        counts.steps = int(fresh.sum())
        counts.gap_steps = int((fresh & (steps.count == 0)).sum())
        counts.resets = int((fresh & steps.reset).sum())
        scores = self._scores(partition, steps, answers, fresh)
        return TaskOutput(forecasts, letters or [], counts, scores, next_offset, steps, answers)

    def provisional(self, topic: str, partition: int, idle_ms: int, offset: int) -> list[Forecasts]:
        """What there would be to say if stream time had gone on for `idle_ms` without a reading: forecasts of the
        windows that hold readings and would have closed, with status `provisional`. Empty while the newest of them would
        still be open.

        Made on a copy: the task itself, and so all that follows, is as if nobody had asked. offset: of the last record
        taken in. Those that the model answered come apart from those of the baseline.
        """
        newest = self.windows.newest_open(self.table)
        closes_at_ms = int(self.settings.rule.closes_at_ms(np.array(newest, np.int64)))
        if newest == NEVER or int(self.table.partition[STREAM_TIME]) + idle_ms < closes_at_ms:
            return []
        table = self._empty_table()
        table.restore(self.table.snapshot())
        steps = self.windows.close_at(closes_at_ms, table)
        steps.offset[:] = offset
        answers = self.forecasting.advance(steps, table)
        by_model = np.isin(answers.status, (OK, STALE))
        answers.status[:] = PROVISIONAL
        found = [
            self._forecasts(topic, partition, steps, answers, answers.known & by_model),
            replace(
                self._forecasts(topic, partition, steps, answers, answers.known & ~by_model),
                model=self.forecasting.baseline.version,
            ),
        ]
        return [forecasts for forecasts in found if len(forecasts)]

    def _empty_table(self) -> SensorTable:
        columns = (*self.windows.columns(), *self.forecasting.columns())
        table = SensorTable(columns, (*self.windows.partition_columns(), *self.forecasting.partition_columns()))
        self.forecasting.begin(table)
        return table

    def _forecasts(self, topic: str, partition: int, steps: Steps, answers: Answers, chosen: Bool) -> Forecasts:
        rows: Bool | slice = slice(None) if chosen.all() else chosen
        return Forecasts(
            topic=topic,
            partition=partition,
            sensors=self.table.names(steps.slot[rows]),
            issued_at_ms=steps.end_ms[rows],
            mean=answers.mean[rows],
            quantiles=answers.quantiles[rows],
            status=answers.status[rows],
            state_steps=answers.state_steps[rows],
            offset=steps.offset[rows],
            model=self.forecasting.version,
            baseline=self.forecasting.baseline.version,
        )

    def _scores(self, partition: int, steps: Steps, answers: Answers, chosen: Bool) -> Scores:
        forecasting = self.forecasting
        scorer, baseline = forecasting.scorer, forecasting.baseline.version
        return by_window(steps, answers.scores, chosen, partition, self.version, baseline, scorer.leads.tolist())

    def _dead_letters(self, records: RecordColumns, rejected: list[Rejected]) -> list[DeadLetter]:
        return [
            DeadLetter(
                topic=records.topic,
                partition=records.partition,
                offset=int(records.offsets[refused.record]),
                timestamp_ms=int(records.timestamps_ms[refused.record]),
                key=records.key(refused.record),
                value=records.value(refused.record),
                headers=records.headers(refused.record),
                reason=refused.reason,
                message=refused.message,
                stage=TRANSFORMATION if refused.reason == "late" else CONVERTER,
            )
            for refused in sorted(rejected, key=lambda refused: refused.record)
            if records.offsets[refused.record] >= self.emit_from
            and (refused.reason != "late" or self.settings.late_to_dead_letters)
        ]

    def _count(self, records: RecordColumns, readings: Readings, rejected: list[Rejected]) -> Counts:
        """Of the records from `emit_from` on: what was read again in silence counted when it was read first."""
        counts = Counts(
            records=int((records.offsets >= self.emit_from).sum()),
            readings=int((readings.offsets >= self.emit_from).sum()),
        )
        for refused in rejected:
            if records.offsets[refused.record] >= self.emit_from:
                counts.rejected[refused.reason] = counts.rejected.get(refused.reason, 0) + 1
        counts.late = counts.rejected.pop("late", 0)
        return counts
