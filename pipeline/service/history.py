"""History as the model sees it: the very serdes and windows of the live path, over a topic's past or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.sequences import Sequences
from pipeline.errors import DeploymentError
from pipeline.kafka.source import RecordSource
from pipeline.service.files import FileBatch
from pipeline.stream.columns import Int32, Readings, Steps
from pipeline.stream.task import StepTask, TaskSettings

POLL_TIMEOUT_MS = 500


@dataclass(slots=True)
class History:
    """Closed windows of many sensors, gathered partition by partition."""

    settings: TaskSettings
    sensors: list[str] = field(default_factory=list)
    readings: int = 0
    rejected: int = 0
    _ids: dict[bytes, int] = field(default_factory=dict)
    _parts: list[tuple[Int32, Steps]] = field(default_factory=list)

    def add(self, task: StepTask, steps: Steps) -> None:
        """Take over the steps that closed in one task; a sensor is known by its name whatever its partition."""
        if not len(steps):
            return
        names = task.table.sensors
        slots = np.unique(steps.slot)
        ids = np.empty(int(slots[-1]) + 1, np.int32)
        for slot in slots.tolist():
            name = names[slot]
            if name not in self._ids:
                self._ids[name] = len(self.sensors)
                self.sensors.append(name.decode())
            ids[slot] = self._ids[name]
        self._parts.append((ids[steps.slot], steps))

    def sequences(
        self, from_ms: int | None = None, to_ms: int | None = None, newest_ms: int | None = None
    ) -> Sequences:
        """Steps whose windows end inside (from_ms, to_ms], and no earlier than newest_ms before the last one.

        Raises DeploymentError if there are none."""
        if self._parts:
            sensor = np.concatenate([ids for ids, _ in self._parts])
            end_ms = np.concatenate([steps.end_ms for _, steps in self._parts])
            keep = np.ones(len(sensor), np.bool_)
            if from_ms is not None:
                keep &= end_ms > from_ms
            if to_ms is not None:
                keep &= end_ms <= to_ms
            if newest_ms is not None and keep.any():
                keep &= end_ms > end_ms[keep].max() - newest_ms
            if keep.any():
                values = np.concatenate([steps.values for _, steps in self._parts])
                reset = np.concatenate([steps.reset for _, steps in self._parts])
                return Sequences(sensor[keep], end_ms[keep], values[keep], reset[keep])
        raise DeploymentError(
            f"no closed window in the history: {self.readings} readings were read, {self.rejected} records were refused; "
            "check the range (--from, --to), readings.fields and readings.event_time"
        )


def from_topic(
    settings: TaskSettings,
    source: RecordSource,
    from_ms: int | None,
    to_ms: int | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> History:
    """Read the topic's past up to the end found at the start.

    from_ms, to_ms: record timestamps, epoch ms; None = the whole log. on_progress(read, total) in offsets."""
    history = History(settings)
    everything = source.partitions  # none is assigned before the first poll
    start = source.beginning_offsets(everything) if from_ms is None else source.offsets_for_time(from_ms, everything)
    end = source.end_offsets(everything)
    if to_ms is not None:
        until = source.offsets_for_time(to_ms, everything)
        end = {partition: min(end[partition], until[partition]) for partition in end}

    def begin(partitions: Sequence[int]) -> None:
        for partition in partitions:
            source.seek(partition, start[partition])

    source.on_assigned = begin
    tasks = {partition: StepTask(settings) for partition in end}
    total = sum(max(end[partition] - start[partition], 0) for partition in end)
    while any(
        source.positions().get(partition, 0) < end[partition] for partition in end if start[partition] < end[partition]
    ):
        for records in source.poll(POLL_TIMEOUT_MS):
            if int(records.offsets[-1]) >= end[records.partition]:
                records = records.take(records.offsets < end[records.partition])
            if not len(records):
                continue
            task = tasks[records.partition]
            steps, readings, rejected = task.process(records)
            history.readings += len(readings)
            history.rejected += len(rejected)
            history.add(task, steps)
        if on_progress:
            positions = source.positions()
            read = sum(min(positions.get(p, start[p]), end[p]) - start[p] for p in end if start[p] < end[p])
            on_progress(read, total)
    return history


def from_batches(settings: TaskSettings, batches: Iterable[FileBatch]) -> History:
    """The same from files: one partition, in the order of the rows."""
    history = History(settings)
    task = StepTask(settings)
    offset = 0
    for batch in batches:
        readings = _readings(settings, batch, offset)
        offset += len(readings)
        steps, late = task.advance(readings)
        history.readings += len(readings)
        history.rejected += len(late)
        history.add(task, steps)
    return history


def _readings(settings: TaskSettings, batch: FileBatch, offset: int) -> Readings:
    columns = [batch.field_names.index(name) for name in settings.format.fields if name in batch.field_names]
    missing = [name for name in settings.format.fields if name not in batch.field_names]
    if missing:
        raise DeploymentError(
            f"the file has no field {missing[0]!r}: it has {', '.join(batch.field_names)}; set readings.fields to what the file holds"
        )
    sensors = [name.encode() for name in batch.sensors]
    n = len(batch.event_time_ms)
    return Readings(
        [sensors[code] for code in batch.codes.tolist()],
        np.arange(offset, offset + n),
        batch.event_time_ms,
        batch.values[:, columns],
        np.arange(n),
    )
