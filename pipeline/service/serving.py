"""One partition being served: its task, what it has made and not committed, and when its state is to be written."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.forecaster import Forecaster
from pipeline.errors import DeploymentError
from pipeline.kafka.changelog import Restore, unusable
from pipeline.service.commit import PartitionWork
from pipeline.service.recovery import Found, Start, plan_start
from pipeline.settings import Settings, TopicSettings
from pipeline.stream.checkpoint import (
    ROW_BYTES,
    CheckpointError,
    CheckpointPolicy,
    CheckpointWriter,
    require_columns,
    row_bytes,
)
from pipeline.stream.columns import Forecasts, OutgoingRecords, RecordColumns
from pipeline.stream.serdes import encode_dead_letters, encode_forecasts
from pipeline.stream.task import ForecastTask, TaskOutput, TaskSettings

NOWHERE = -1
"""No offset at all."""


@dataclass(slots=True)
class Serving:
    """`committed`: what the group stands at (None: nowhere yet). `next_offset`: the first one not taken in."""

    partition: int
    task: ForecastTask
    writer: CheckpointWriter
    policy: CheckpointPolicy
    committed: int | None
    next_offset: int
    heard_ms: int
    """When a record came last, on the worker's clock."""
    _made: list[OutgoingRecords] = field(default_factory=list)
    _spoken_at: int = NOWHERE
    """next_offset for which provisional forecasts were made."""

    @property
    def emit_from(self) -> int:
        return self.task.emit_from

    def run(self, records: RecordColumns, topics: TopicSettings, now_ms: int) -> TaskOutput:
        """Takes records in; what they cause waits for `work`."""
        first = int(records.offsets[0])
        if first < self.next_offset:
            raise RuntimeError(
                f"{records.topic}-{records.partition}: offset {first} came after {self.next_offset - 1}: a bug in the source"
            )
        output = self.task.run(records)
        self.next_offset = output.next_offset
        self.heard_ms = now_ms
        if len(output.forecasts):
            self._say(output.forecasts, topics)
        if output.dead_letters:
            self._made.append(encode_dead_letters(output.dead_letters, topics.dead_letters_topic, self.partition))
        return output

    def speak_provisionally(self, now_ms: int, silence_ms: int, topic: str, topics: TopicSettings) -> int:
        """What the last open windows would say, once per silence. Returns how many forecasts that made."""
        idle_ms = now_ms - self.heard_ms
        replaying = self.next_offset < self.emit_from
        if idle_ms < silence_ms or replaying or self._spoken_at == self.next_offset:
            return 0
        found = self.task.provisional(topic, self.partition, idle_ms, self.next_offset - 1)
        for forecasts in found:
            self._say(forecasts, topics)
            self._spoken_at = self.next_offset
        return sum(map(len, found))

    def _say(self, forecasts: Forecasts, topics: TopicSettings) -> None:
        spec = self.task.settings.spec
        self._made.append(
            encode_forecasts(forecasts, spec.target_names, spec.quantiles, spec.step_ms, topics.forecasts_topic)
        )

    def work(self, position: int, now_ms: int, at_end: bool) -> PartitionWork | None:
        """What is to be committed now; None: nothing. position: the next offset that the source will give (past control
        records). at_end: a checkpoint is due whatever the policy says."""
        if position < self.next_offset:
            return None  # a rebalance has just set the source elsewhere; the next poll takes the partition away
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
    model: Forecaster | None,
    restore: Restore,
    committed: int | None,
    beginning: int,
    end: int,
    now_ms: int,
) -> tuple[Serving, Start]:
    """A partition from what its changelog, its group and its log say. Raises DeploymentError where a person must act."""
    manifest = restore.manifest()
    version = model.version if model else ""
    group = settings.kafka.group_id
    topic = settings.topics.readings_topic
    start = plan_start(
        Found(topic, restore.partition, group, beginning, end, committed, manifest, version, settings.model.path)
    )
    forecast_task = ForecastTask(task, model, start.emit_from)
    table = forecast_task.table
    writer = CheckpointWriter(table, group, version, settings.readings.max_sensor_bytes, restore.keys())
    if start.restore and manifest is not None and manifest.sensors:
        checkpoint = restore.checkpoint()
        assert checkpoint is not None
        try:
            require_columns(manifest, table)
        except CheckpointError as error:
            raise unusable(error, restore.topic, restore.partition) from error
        table.restore(checkpoint.snapshot)
        writer.restored(manifest)
    # Without any checkpoint the first is due at once, so that no restart finds nothing; before a rebuilt state takes the place of
    # an older one, that one stays for a while.
    stands_at = None if manifest is None else manifest.offset if start.restore else NOWHERE
    phase = restore.partition * 0.618 % 1
    policy = CheckpointPolicy(settings.state.checkpoint_every_ms, now_ms, phase, stands_at)
    serving = Serving(restore.partition, forecast_task, writer, policy, committed, start.offset, now_ms)
    return serving, start


def require_small_rows(task: TaskSettings, model: Forecaster | None, max_sensor_bytes: int) -> None:
    """Raises DeploymentError where one sensor's state does not fit into a record of the changelog."""
    columns = ForecastTask(task, model).table.columns.values()
    for family, size in (row_bytes(columns) | {"sensors": max_sensor_bytes}).items():
        if size > ROW_BYTES:
            raise DeploymentError(
                f"the state of one sensor takes {size:,} bytes ({family}), a record of the changelog holds {ROW_BYTES:,}; "
                "shorten forecast.season (the last season is remembered step by step), or widen windows.hop"
            )
