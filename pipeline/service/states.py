"""The changelog for a person: one sensor's state, a check of everything, and the way out when a worker has stopped.

`reset` is what the errors of `pipeline.service.recovery` name. It only runs while the group has no members, and what it does
to checkpoints and offsets is one transaction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.errors import DeploymentError
from pipeline.kafka.changelog import Restore, checkpoint_records, read_checkpoint
from pipeline.kafka.membership import memberless
from pipeline.kafka.partitioner import partition_for
from pipeline.kafka.source import OffsetsUnstable, RecordSource
from pipeline.kafka.topics import group_members
from pipeline.kafka.transactions import TransactionalSink, TransactionFailed
from pipeline.service.assembly import task_settings
from pipeline.settings import Settings
from pipeline.stream.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, Manifest, require_columns
from pipeline.stream.task import ForecastTask
from pipeline.stream.windows import NEVER

SHOWN_VALUES = 8
To = Literal["committed", "beginning", "end", "checkpoint"]


@dataclass(frozen=True, slots=True)
class PartitionState:
    """One partition of the changelog, as `check` found it."""

    partition: int
    sensors: int
    checkpoint: int | None
    """Input offset at which the state stands; None: there is no checkpoint."""
    committed: int | None
    log: str
    """[beginning, end) of the input."""
    model: str
    state_bytes: int
    finding: str
    """What is wrong and how to mend it; empty: nothing."""


def show(settings: Settings, sensor: str) -> list[dict[str, Any]]:
    """One row a column of the sensor's state, as the newest checkpoint has it. Raises DeploymentError where no changelog
    knows the sensor."""
    name = sensor.encode()
    with RecordSource(settings, settings.topics.readings_topic, group=False) as source:
        partitions = source.partitions
    likely = partition_for(name, len(partitions))
    for partition in sorted(partitions, key=lambda number: number != likely):
        checkpoint = read_checkpoint(settings, partition)
        if checkpoint is not None and name in checkpoint.snapshot.sensors:
            return list(_rows_of(checkpoint, partition, checkpoint.snapshot.sensors.index(name)))
    raise DeploymentError(
        f'no checkpoint in "{settings.topics.state_topic}" knows sensor "{sensor}": its first reading may be newer than the '
        "newest checkpoint (state.checkpoint_every), or the id is another (millrace watch shows some)"
    )


def check(settings: Settings) -> list[PartitionState]:
    """Reads the whole changelog and holds it against itself, the group, the log and the settings."""
    found, seen = [], dict[str, int]()
    with RecordSource(settings, settings.topics.readings_topic) as source:
        beginnings, ends = source.beginning_offsets(source.partitions), source.end_offsets(source.partitions)
        for partition in source.partitions:
            log = (beginnings[partition], ends[partition])
            found.append(_check_partition(settings, source, partition, log, seen))
    return found


def reset(settings: Settings, to: To) -> list[dict[str, Any]]:
    """Forgets all checkpoints, so that states are rebuilt from the readings that are left, and sets the group's offsets:

    committed    where they are: nothing is answered twice, nothing left out
    beginning    to the oldest reading that is left: all that is there is answered (again)
    end          to the newest: only what comes from now on is answered
    checkpoint   to where the checkpoints stand, which are kept: for a group whose offsets Kafka has forgotten

    One row a partition. Raises DeploymentError while the group has members, or where `to` does not exist.
    """
    group = settings.kafka.group_id
    if members := group_members(settings, group):
        raise DeploymentError(f'group "{group}" has {members} members: stop its workers first (millrace run)')
    sink = TransactionalSink(settings, f"{group}/reset")
    try:
        with RecordSource(settings, settings.topics.readings_topic) as source:
            return [_reset_partition(settings, source, sink, partition, to) for partition in source.partitions]
    except TransactionFailed as failure:
        raise DeploymentError(f"the reset was not committed ({failure}): run it again") from failure
    finally:
        sink.close()


def _rows_of(checkpoint: Checkpoint, partition: int, slot: int) -> Iterator[dict[str, Any]]:
    yield {"column": "(partition)", "value": partition, "shape": ""}
    yield {"column": "(checkpoint at offset)", "value": checkpoint.offset, "shape": ""}
    yield {"column": "(model)", "value": checkpoint.model or "none", "shape": ""}
    for name, values in checkpoint.snapshot.partition.items():
        yield {"column": f"(partition) {name}", "value": _shown(values), "shape": str(list(values.shape))}
    for name, rows in checkpoint.snapshot.rows.items():
        yield {"column": name, "value": _shown(rows[slot]), "shape": str(list(rows.shape[1:]))}


def _shown(values: Any) -> Any:
    """A number, or the first few of many; what is not finite as text."""
    flat = [_number(value) for value in np.asarray(values).reshape(-1).tolist()]
    if np.asarray(values).shape == ():
        return flat[0]
    rest = len(flat) - SHOWN_VALUES
    return flat if rest <= 0 else [*flat[:SHOWN_VALUES], f"and {rest} more"]


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return "never" if value == NEVER else value


def _check_partition(
    settings: Settings, source: RecordSource, partition: int, log: tuple[int, int], seen: dict[str, int]
) -> PartitionState:
    committed = _committed(source, partition)
    manifest: Manifest | None = None
    size, finding = 0, ""
    with Restore(settings, partition) as restore:
        while not restore.advance():
            pass
        try:
            manifest = restore.manifest()
            checkpoint = restore.checkpoint()
            if checkpoint is not None:
                size = sum(rows.nbytes for rows in checkpoint.snapshot.rows.values())
                finding = _finding(settings, checkpoint, committed, log, partition, seen)
        except DeploymentError as error:
            finding = str(error)
    return PartitionState(
        partition,
        manifest.sensors if manifest else 0,
        manifest.offset if manifest else None,
        committed,
        f"[{log[0]}, {log[1]})",
        manifest.model if manifest else "",
        size,
        finding,
    )


def _finding(
    settings: Settings,
    checkpoint: Checkpoint,
    committed: int | None,
    log: tuple[int, int],
    partition: int,
    seen: dict[str, int],
) -> str:
    """The first thing that is wrong with a checkpoint that could be read."""
    manifest = checkpoint.manifest
    if manifest.group != settings.kafka.group_id:
        return f'belongs to group "{manifest.group}"; set kafka.group_id back, or topics.state to another topic'
    if committed is None:
        return "the group has no committed offset; millrace state reset --to checkpoint"
    if manifest.offset > committed:
        return f"stands after the committed offset {committed}; millrace state reset"
    if not log[0] <= manifest.offset <= log[1]:
        return "stands outside the log; millrace state reset"
    if difference := _shape_difference(settings, checkpoint):
        return difference
    for name, rows in checkpoint.snapshot.rows.items():
        if name.startswith("rnn.") and not np.isfinite(rows).all():
            slot = int(np.flatnonzero(~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim))))[0])
            sensor = checkpoint.snapshot.sensors[slot].decode()
            return f"{name} of sensor {sensor} is not finite; millrace state reset"
    for sensor in map(bytes.decode, checkpoint.snapshot.sensors):
        if seen.setdefault(sensor, partition) != partition:
            return f"sensor {sensor} is in partition {seen[sensor]} too: its readings are not keyed by sensor"
    return ""


def _shape_difference(settings: Settings, checkpoint: Checkpoint) -> str:
    """Columns of the model are the model's affair; all others follow from the settings."""
    task = ForecastTask(task_settings(settings))
    try:
        require_columns(checkpoint.manifest, task.table, task.lasting_columns())
    except CheckpointError as error:
        return f"{error}; set the settings back, or millrace state reset"
    return ""


def _reset_partition(
    settings: Settings, source: RecordSource, sink: TransactionalSink, partition: int, to: To
) -> dict[str, Any]:
    beginning, end = source.beginning_offsets([partition])[partition], source.end_offsets([partition])[partition]
    committed = _committed(source, partition)
    with Restore(settings, partition) as restore:
        while not restore.advance():
            pass
        keys = restore.keys()
        stands_at = None
        if to == "checkpoint":
            manifest = restore.manifest()
            stands_at = manifest.offset if manifest else beginning
    offset = {"committed": committed, "beginning": beginning, "end": end, "checkpoint": stands_at}[to]
    row = {"partition": partition, "was committed": committed, "states": "kept" if to == "checkpoint" else "forgotten"}
    if to == "committed" and committed is not None and not beginning <= committed <= end:
        raise DeploymentError(
            f"partition {partition}: the committed offset {committed} is outside the log [{beginning}, {end}): choose "
            "--to beginning or --to end"
        )
    if to == "committed" and committed is None:
        offset = beginning
    assert offset is not None
    batches = []
    if to != "checkpoint":
        table = ForecastTask(task_settings(settings)).table
        writer = CheckpointWriter(table, settings.kafka.group_id, "", settings.readings.max_sensor_bytes, keys)
        batches = [checkpoint_records(writer.capture(beginning), settings.topics.state_topic, partition)]
    sink.commit(batches, {partition: offset}, memberless(source.topic, settings.kafka.group_id))
    return row | {"now committed": offset, "states from offset": stands_at if to == "checkpoint" else beginning}


def _committed(source: RecordSource, partition: int) -> int | None:
    try:
        return source.committed(partition)
    except OffsetsUnstable as error:
        raise DeploymentError(f"partition {partition}: its committed offset is not to be had ({error})") from error
