"""The worker: polls, runs one task per partition, sends, then commits.

The order of one round, and what a crash after each step leaves behind:
1. poll              nothing happened
2. run the tasks     nothing happened outside this process
3. deliver           forecasts and dead letters are written; read again, they are sent once more (at least once)
4. commit offsets    done

A partition that arrives is read again from the start of its log to the committed offset without sending anything:
its state is what it would be had this worker always had it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from models.forecaster import Forecaster
from pipeline.errors import DeploymentError
from pipeline.kafka.sink import RecordSink
from pipeline.kafka.source import RecordSource
from pipeline.service.assembly import task_settings
from pipeline.settings import Settings
from pipeline.stream.columns import Counts, OutgoingRecords, RecordColumns
from pipeline.stream.serdes import encode_dead_letters, encode_forecasts
from pipeline.stream.task import ForecastTask, TaskOutput

log = logging.getLogger(__name__)

POLL_TIMEOUT_MS = 200
REPORT_EVERY_SECONDS = 10.0


@dataclass(slots=True)
class WorkerReport:
    """What a run of the worker did."""

    counts: Counts = field(default_factory=Counts)
    rebuilt: int = 0
    """Records read again in silence to rebuild state."""
    sensors: int = 0
    partitions: int = 0
    """Assigned now; 0 while the group has given none."""
    seconds: float = 0.0


class Worker:
    """One member of the consumer group.

    on_progress is called about every ten seconds, and at the end, with the report so far and the lag in records."""

    def __init__(
        self,
        settings: Settings,
        source: RecordSource,
        sink: RecordSink,
        model: Forecaster | None = None,
        on_progress: Callable[[WorkerReport, int], None] | None = None,
    ) -> None:
        self.settings = settings
        self.source = source
        self.sink = sink
        self.model = model
        self.report = WorkerReport()
        self._task_settings = task_settings(settings)
        self._tasks: dict[int, ForecastTask] = {}
        self._next_offset: dict[int, int] = {}
        self._on_progress = on_progress
        source.on_assigned, source.on_revoked = self._arrived, self._lost

    def run(self, stop: threading.Event, exit_at_end: bool = False) -> WorkerReport:
        """Work until `stop` is set, or, with exit_at_end, until the offsets found at the start have been reached."""
        started = reported = time.monotonic()
        ends = self.source.end_offsets(self.source.partitions) if exit_at_end else {}
        while not stop.is_set():
            self.round()
            now = time.monotonic()
            self.report.seconds = now - started
            self.report.partitions = len(self._tasks)
            if self._on_progress and now - reported >= REPORT_EVERY_SECONDS:
                self._on_progress(self.report, self._lag())
                reported = now
            if exit_at_end and self._caught_up(ends):
                break
        if self._on_progress:
            self._on_progress(self.report, self._lag())
        return self.report

    def round(self) -> None:
        """One poll and all that follows from it."""
        polled = self.source.poll(POLL_TIMEOUT_MS)
        outputs = [self._process(records) for records in polled]
        outgoing = [batch for output in outputs for batch in self._encode(output)]
        if outgoing:
            self.sink.deliver(outgoing)
        self._commit()

    def _arrived(self, partitions: Sequence[int]) -> None:
        beginnings, ends = self.source.beginning_offsets(partitions), self.source.end_offsets(partitions)
        for partition in partitions:
            self._start(partition, beginnings[partition], ends[partition])

    def _lost(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            # Its state lives in the log; whoever has the partition now reads it from there.
            self._tasks.pop(partition, None)
            self._next_offset.pop(partition, None)

    def _start(self, partition: int, beginning: int, end: int) -> None:
        committed = self.source.committed(partition)
        emit_from = beginning if committed is None else committed
        if not beginning <= emit_from <= end:
            # Going on would leave readings unanswered: those that are gone, or those that come before the offset again.
            raise DeploymentError(
                f'topic "{self.source.topic}", partition {partition}: the group "{self.source.group_id}" has committed '
                f"offset {committed}, the log holds [{beginning}, {end}). Retention or a new topic of the same name took "
                "the records away: set kafka.group_id to a new name to answer all that is left from the beginning, "
                "and lengthen topics.readings_retention"
            )
        if committed is not None and beginning > 0:
            log.warning(
                "partition %d: the log starts at offset %d, older readings are gone; "
                "the states of its sensors are rebuilt from what is left",
                partition,
                beginning,
            )
        self.source.seek(partition, beginning)
        self._tasks[partition] = ForecastTask(self._task_settings, self.model, emit_from)
        self._next_offset[partition] = beginning
        log.info("partition %d: rebuilding state from offset %d to %d", partition, beginning, emit_from)

    def _process(self, records: RecordColumns) -> TaskOutput:
        task = self._tasks[records.partition]
        first, expected = int(records.offsets[0]), self._next_offset[records.partition]
        if first < expected:
            raise RuntimeError(
                f"{records.topic}-{records.partition}: offset {first} came after {expected - 1}: a bug in the source"
            )
        output = task.run(records)
        self._next_offset[records.partition] = output.next_offset
        self.report.counts.add(output.counts)
        self.report.rebuilt += len(records) - output.counts.records
        self.report.sensors = sum(len(task.table) for task in self._tasks.values())
        return output

    def _encode(self, output: TaskOutput) -> list[OutgoingRecords]:
        topics, spec = self.settings.topics, self._task_settings.spec
        batches = []
        if len(output.forecasts):
            batches.append(
                encode_forecasts(
                    output.forecasts, spec.target_names, spec.quantiles, spec.step_ms, topics.forecasts_topic
                )
            )
        if output.dead_letters:
            partition = output.dead_letters[0].partition
            batches.append(encode_dead_letters(output.dead_letters, topics.dead_letters_topic, partition))
        return batches

    def _commit(self) -> None:
        """Positions of what was sent; one that only rebuilds state stays behind the committed offset and is left alone."""
        positions = self.source.positions()
        due = {
            partition: position
            for partition, position in positions.items()
            if partition in self._tasks and position > self._tasks[partition].emit_from
        }
        # While the group rearranges, nothing is committed: the next round tries again for what is still ours.
        if due and self.source.commit(due):
            for partition, position in due.items():
                self._tasks[partition].emit_from = position

    def _caught_up(self, ends: Mapping[int, int]) -> bool:
        """Everything up to the ends is read, sent and committed."""
        positions = self.source.positions()
        return bool(self._tasks) and all(
            min(positions.get(partition, -1), task.emit_from) >= ends[partition]
            for partition, task in self._tasks.items()
        )

    def _lag(self) -> int:
        positions = self.source.positions()
        ends = self.source.end_offsets()
        return sum(max(ends[partition] - positions.get(partition, 0), 0) for partition in self._tasks)
