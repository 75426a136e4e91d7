"""One partition being served: its task, what it has made and not committed, and when its state is to be written."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from models.forecaster import Model
from pipeline.errors import DeploymentError
from pipeline.kafka.changelog import Restore, unusable
from pipeline.kafka.lineage import Swap, swap_record
from pipeline.service.commit import PartitionWork
from pipeline.service.recovery import Found, Start, plan_start
from pipeline.settings import Settings, TopicSettings
from pipeline.stream.checkpoint import (
    ROW_BYTES,
    CheckpointError,
    CheckpointPolicy,
    CheckpointWriter,
    Manifest,
    different_columns,
    require_columns,
    row_bytes,
)
from pipeline.stream.columns import Counts, Forecasts, OutgoingRecords, RecordColumns
from pipeline.stream.scoring import Scores, encode_scores
from pipeline.stream.serdes import encode_dead_letters, encode_forecasts
from pipeline.stream.task import ForecastTask, TaskOutput, TaskSettings

log = logging.getLogger(__name__)

NOWHERE = -1
"""No offset at all."""


@dataclass(slots=True)
class Serving:
    """`committed`: what the group stands at (None: nowhere yet). `next_offset`: the first one not taken in."""

    partition: int
    topics: TopicSettings
    task: ForecastTask
    writer: CheckpointWriter
    policy: CheckpointPolicy
    committed: int | None
    next_offset: int
    heard_ms: int
    """When a record came last, on the worker's clock."""
    awaited: Model | None = None
    """Takes over where answers begin: until then the log is read again in silence, without any model."""
    publish_scores: bool = True
    _made: list[OutgoingRecords] = field(default_factory=list)
    _spoken_at: int = NOWHERE
    """next_offset for which provisional forecasts were made."""

    @property
    def emit_from(self) -> int:
        return self.task.emit_from

    @property
    def version(self) -> str:
        """Of the model that answers from `emit_from` on; empty: none."""
        return self.awaited.version if self.awaited else self.task.version

    def run(self, records: RecordColumns, now_ms: int) -> tuple[Counts, list[Scores]]:
        """Takes records in; what they cause waits for `work`."""
        first = int(records.offsets[0])
        if first < self.next_offset:
            raise RuntimeError(
                f"{records.topic}-{records.partition}: offset {first} came after {self.next_offset - 1}: a bug in the source"
            )
        self.heard_ms = now_ms
        counts, scores = Counts(), list[Scores]()
        silent = int(np.searchsorted(records.offsets, self.emit_from)) if self.awaited else 0
        for part in (records.take(slice(0, silent)), records.take(slice(silent, None))):
            if not len(part):
                continue
            if self.awaited and part.offsets[0] >= self.emit_from:
                self.swap(self.awaited, now_ms)
            output = self.task.run(part)
            self.next_offset = output.next_offset
            self._keep(output)
            counts.add(output.counts)
            scores.append(output.scores)
        return counts, scores

    def swap(self, model: Model, now_ms: int) -> None:
        """From the next record on `model` answers. Where, becomes a record of the models topic; the states, a checkpoint."""
        offset, before = max(self.next_offset, self.emit_from), self.task.version or "the baseline"
        state: Literal["ring", "start"] = "ring" if len(self.task.table) else "start"
        self.task.swap(model)
        self.awaited = None
        self.writer = self.writer.successor(model.version)
        self.policy.demand(now_ms)
        log.info(
            "partition %d: from offset %d on %s answers, before it %s", self.partition, offset, model.version, before
        )
        key, value = swap_record(Swap(partition=self.partition, offset=offset, version=model.version, state=state))
        self._made.append(OutgoingRecords(self.topics.models_topic, 0, [key], [value]))

    def speak_provisionally(self, now_ms: int, silence_ms: int, topic: str) -> int:
        """What the last open windows would say, once per silence. Returns how many forecasts that made."""
        idle_ms = now_ms - self.heard_ms
        replaying = self.next_offset < self.emit_from
        if idle_ms < silence_ms or replaying or self._spoken_at == self.next_offset:
            return 0
        found = self.task.provisional(topic, self.partition, idle_ms, self.next_offset - 1)
        for forecasts in found:
            self._say(forecasts)
            self._spoken_at = self.next_offset
        return sum(map(len, found))

    def _keep(self, output: TaskOutput) -> None:
        if len(output.forecasts):
            self._say(output.forecasts)
        if output.dead_letters:
            self._made.append(encode_dead_letters(output.dead_letters, self.topics.dead_letters_topic, self.partition))
        if self.publish_scores and len(output.scores):
            self._made.append(encode_scores(output.scores, self.topics.scores_topic))

    def _say(self, forecasts: Forecasts) -> None:
        spec = self.task.spec
        self._made.append(
            encode_forecasts(forecasts, spec.target_names, spec.quantiles, spec.step_ms, self.topics.forecasts_topic)
        )

    def work(self, position: int, now_ms: int, at_end: bool) -> PartitionWork | None:
        """What is to be committed now; None: nothing. position: the next offset that the source will give (past control
        records). at_end: a checkpoint is due whatever the policy says."""
        if position < self.next_offset:
            return None  # a rebalance has just set the source elsewhere; the next poll takes the partition away
        if self.awaited and position >= self.emit_from:
            self.swap(self.awaited, now_ms)
        checkpoint = self.policy.should_checkpoint(now_ms, position) or (at_end and position != self.policy.stands_at)
        offset = max(position, self.emit_from)
        if not (self._made or checkpoint or offset > (self.committed or 0)):
            return None
        made, self._made = self._made, []
        return PartitionWork(offset, made, self.writer.capture(position) if checkpoint else None)

    def committed_work(self, work: PartitionWork, now_ms: int, took_ms: int) -> None:
        """It is out, and the group stands at its offset."""
        self.committed = self.task.emit_from = work.offset
        if work.capture is not None:
            self.policy.done(now_ms, took_ms, work.capture.offset)


def begin(
    settings: Settings,
    task: TaskSettings,
    model: Model | None,
    restore: Restore,
    committed: int | None,
    beginning: int,
    end: int,
    now_ms: int,
) -> tuple[Serving, Start]:
    """A partition from what its changelog, its group and its log say. Raises DeploymentError where a person must act."""
    manifest = restore.manifest()
    version = model.version if model else ""
    group, topics = settings.kafka.group_id, settings.topics
    start = plan_start(
        Found(
            topics.readings_topic,
            restore.partition,
            group,
            beginning,
            end,
            committed,
            manifest,
            version,
            topics.models_topic,
        )
    )
    same = start.restore and manifest is not None and manifest.model == version
    forecast_task = ForecastTask(task, model if same else None, start.emit_from)
    written = version if same else ""
    writer = CheckpointWriter(forecast_task.table, group, written, settings.readings.max_sensor_bytes, restore.keys())
    if start.restore and manifest is not None and manifest.sensors:
        _take_back(forecast_task, writer, restore, manifest)
    # Without any checkpoint the first is due at once, so that no restart finds nothing; before a rebuilt state takes the place of
    # an older one, that one stays for a while.
    stands_at = None if manifest is None else manifest.offset if start.restore else NOWHERE
    phase = restore.partition * 0.618 % 1
    policy = CheckpointPolicy(settings.state.checkpoint_every_ms, now_ms, phase, stands_at)
    awaited = None if same else model
    serving = Serving(
        restore.partition,
        topics,
        forecast_task,
        writer,
        policy,
        committed,
        start.offset,
        now_ms,
        awaited,
        settings.scoring.publish,
    )
    return serving, start


def _take_back(task: ForecastTask, writer: CheckpointWriter, restore: Restore, manifest: Manifest) -> None:
    """The rows of the checkpoint. Columns that belong to another model, or to other scores, begin anew."""
    checkpoint = restore.checkpoint()
    assert checkpoint is not None
    try:
        require_columns(manifest, task.table, task.lasting_columns())
    except CheckpointError as error:
        raise unusable(error, restore.topic, restore.partition) from error
    different = different_columns(manifest, task.table)
    if different:
        task.table.restore(checkpoint.snapshot.without(different, task.table))
    else:
        task.table.restore(checkpoint.snapshot)
        writer.restored(manifest)


def require_small_rows(task: TaskSettings, model: Model | None, max_sensor_bytes: int) -> None:
    """Raises DeploymentError where one sensor's state does not fit into a record of the changelog."""
    columns = ForecastTask(task, model).table.columns.values()
    for family, size in (row_bytes(columns) | {"sensors": max_sensor_bytes}).items():
        if size > ROW_BYTES:
            raise DeploymentError(
                f"the state of one sensor takes {size:,} bytes ({family}), a record of the changelog holds {ROW_BYTES:,}; "
                "shorten forecast.season (the last season is remembered step by step), or widen windows.hop"
            )
