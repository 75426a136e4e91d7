"""History as the model sees it: the very serdes and windows of the live path, over a topic's past or a file."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.forecaster import Rows
from models.scaling import FORGETTING
from models.sequences import Sequences, joined
from pipeline.errors import DeploymentError
from pipeline.kafka.source import RecordSource
from pipeline.service.files import FileBatch
from pipeline.service.inputs import readings_of
from pipeline.stream.columns import RecordColumns, Steps
from pipeline.stream.task import StepTask, TaskSettings

POLL_TIMEOUT_MS = 500
LEAD_IN_STEPS = round(4 / FORGETTING)
"""Before the first step that is learned from: by then a running scale has forgotten all but 2 % of what was before."""
FEWEST_SENSORS = 32
"""Fewer would be no fleet: then time goes before sensors do."""


@dataclass(slots=True)
class History:
    """Closed windows of many sensors, gathered partition by partition.

    most_steps: what may be held in memory. Of a larger history every second, fourth, eighth ... sensor is kept, chosen by its name
    alone, so that the choice is the same in every run; where few sensors are left, the older half of the time goes.
    """

    settings: TaskSettings
    most_steps: int | None = None
    sensors: list[str] = field(default_factory=list)
    readings: int = 0
    rejected: int = 0
    one_in: int = 1
    """Of so many sensors one was kept."""
    _ids: dict[bytes, int] = field(default_factory=dict)
    _kept: list[bool] = field(default_factory=list)
    _parts: list[Sequences] = field(default_factory=list)
    _held: int = 0
    _begin: Rows | None = None
    """The running scale of each sensor before the steps that are held."""

    def add(self, task: StepTask, steps: Steps) -> None:
        """Take over the steps that closed in one task; a sensor is known by its name whatever its partition."""
        if not len(steps):
            return
        names = task.table.sensors
        slots = np.unique(steps.slot)
        ids = np.empty(int(slots[-1]) + 1, np.int32)
        kept = np.zeros(len(ids), np.bool_)
        for slot in slots.tolist():
            name = names[slot]
            if name not in self._ids:
                self._ids[name] = len(self.sensors)
                self.sensors.append(name.decode())
                self._kept.append(_is_kept(name, self.one_in))
            ids[slot] = self._ids[name]
            kept[slot] = self._kept[ids[slot]]
        part = Sequences(ids[steps.slot], steps.end_ms, steps.values, steps.reset).take(kept[steps.slot])
        self._parts.append(part)
        self._held += len(part)
        while self.most_steps is not None and self._held > self.most_steps:
            self._thin_out()

    def forget_before(self, end_ms: int) -> None:
        """Steps that ended at or before this time are given up; what they made of each sensor's running scale is kept."""
        kept = self._joined().after(end_ms)
        self._parts, self._held, self._begin = [kept], len(kept), kept.begin

    def sequences(
        self, from_ms: int | None = None, to_ms: int | None = None, newest_ms: int | None = None
    ) -> Sequences:
        """Steps whose windows end inside (from_ms, to_ms], and no earlier than newest_ms before the last one.

        Raises DeploymentError if there are none."""
        found = self._joined()
        if to_ms is not None:
            found = found.until(to_ms)
        if newest_ms is not None and len(found):
            from_ms = max(from_ms if from_ms is not None else 0, int(found.end_ms.max()) - newest_ms)
        if from_ms is not None:
            found = found.after(from_ms)
        if len(found):
            return found
        raise DeploymentError(
            f"no closed window in the history: {self.readings} readings were read, {self.rejected} records were refused; "
            "check the range (--from, --to), readings.fields and readings.event_time"
        )

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """All that is held, as arrays and as what JSON can hold; `restore` takes it back."""
        whole = self._joined()
        arrays = {name: getattr(whole, name) for name in ("sensor", "end_ms", "values", "reset")}
        arrays |= {f"begin.{name}": column for name, column in (self._begin or {}).items()}
        facts = {name: getattr(self, name) for name in ("sensors", "readings", "rejected", "one_in")}
        return arrays, facts | {"kept": [int(kept) for kept in self._kept]}

    def restore(self, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        self.sensors, self.one_in = list(facts["sensors"]), facts["one_in"]
        self.readings, self.rejected = facts["readings"], facts["rejected"]
        self._ids = {name.encode(): number for number, name in enumerate(self.sensors)}
        self._kept = [bool(kept) for kept in facts["kept"]]
        begin = {name.removeprefix("begin."): column for name, column in arrays.items() if name.startswith("begin.")}
        self._begin = begin or None
        whole = Sequences(arrays["sensor"], arrays["end_ms"], arrays["values"], arrays["reset"], self._begin)
        self._parts, self._held = [whole], len(whole)

    def _joined(self) -> Sequences:
        if len(self._parts) != 1:
            self._parts = [joined(self._parts, len(self.settings.rule.channels))]
        self._parts = [replace(self._parts[0], begin=self._begin)]
        return self._parts[0]

    def _thin_out(self) -> None:
        if sum(self._kept) >= 2 * FEWEST_SENSORS:
            self.one_in *= 2
            self._kept = [_is_kept(name, self.one_in) for name in self._ids]
            whole = self._joined()
            self._parts = [whole.take(np.array(self._kept)[whole.sensor])]
            self._held = len(self._parts[0])
        else:
            middle = int(np.median(self._joined().end_ms))
            self.forget_before(middle)


def _is_kept(name: bytes, one_in: int) -> bool:
    return zlib.crc32(name) % one_in == 0


class TopicHistory:
    """The past of a topic, read on from where the last call came to.

    from_ms: record timestamps, epoch ms; None = the whole log. Belongs to a source without a group."""

    def __init__(
        self, settings: TaskSettings, source: RecordSource, from_ms: int | None = None, most_steps: int | None = None
    ) -> None:
        self.history = History(settings, most_steps)
        self._source = source
        everything = source.partitions  # none is assigned before the first poll
        beginning = source.beginning_offsets(everything)
        self._next = beginning if from_ms is None else source.offsets_for_time(from_ms, everything)
        self._tasks = {partition: StepTask(settings) for partition in everything}
        source.on_assigned = self._begin

    def read(self, to_ms: int | None = None, on_progress: Callable[[int, int], None] | None = None) -> History:
        """Up to the end found now, or to record timestamp to_ms. on_progress(read, total) in offsets; what it raises ends the
        reading, and the next call goes on there."""
        source = self._source
        end = source.end_offsets(list(self._next))
        if to_ms is not None:
            until = source.offsets_for_time(to_ms, list(self._next))
            end = {partition: min(end[partition], until[partition]) for partition in end}
        start = dict(self._next)
        total = sum(max(end[partition] - start[partition], 0) for partition in end)
        while any(self._next[partition] < end[partition] for partition in end):
            for records in source.poll(POLL_TIMEOUT_MS):
                self._take(records, end[records.partition])
            for partition, position in source.positions().items():
                self._next[partition] = max(self._next[partition], min(position, end[partition]))
            if on_progress:
                on_progress(sum(max(min(self._next[p], end[p]) - start[p], 0) for p in end), total)
        for partition in source.assignment:  # none yet where there was nothing to read
            source.seek(partition, self._next[partition])
        return self.history

    def _begin(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._source.seek(partition, self._next[partition])

    def _take(self, records: RecordColumns, end: int) -> None:
        records = records.take((records.offsets < end) & (records.offsets >= self._next[records.partition]))
        if not len(records):
            return
        task = self._tasks[records.partition]
        steps, readings, rejected = task.process(records)
        self._next[records.partition] = int(records.offsets[-1]) + 1
        self.history.readings += len(readings)
        self.history.rejected += len(rejected)
        self.history.add(task, steps)


def from_topic(
    settings: TaskSettings,
    source: RecordSource,
    from_ms: int | None,
    to_ms: int | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> History:
    """Read the topic's past up to the end found at the start.

    from_ms, to_ms: record timestamps, epoch ms; None = the whole log. on_progress(read, total) in offsets."""
    return TopicHistory(settings, source, from_ms).read(to_ms, on_progress)


def from_batches(settings: TaskSettings, batches: Iterable[FileBatch], closing: bool = False) -> History:
    """The same from files: one partition, in the order of the rows. closing: the last windows close with the file's end; else they
    stay open, as they do at the end of a topic."""
    history = History(settings)
    task = StepTask(settings)
    offset = 0
    for batch in batches:
        readings = readings_of(batch, settings.format.fields, offset)
        offset += len(readings)
        steps, late = task.advance(readings)
        history.readings += len(readings)
        history.rejected += len(late)
        history.add(task, steps)
    if closing:
        history.add(task, task.close(offset))
    return history
