"""What a backtest reads: a stretch of a topic, or a file, as readings by partition, up to a moment of event time.

    until(9:00)   partition 0   8:00 8:40 8:20 | 9:10 ...        each partition up to its first reading of 9:00 or later;
                  partition 1   8:30 | 9:00 8:50 ...             what comes after it waits
    until(None)   the rest

So whoever reads decides what happens at 9:00 knowing of every partition what the log says before 9:00, and nothing of what it says
later. A partition that is ahead is paused: memory does not depend on the length of the log.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from pipeline.errors import DeploymentError
from pipeline.kafka.source import RecordSource
from pipeline.service.files import FileBatch
from pipeline.stream.columns import Readings
from pipeline.stream.serdes import ReadingDecoder, ReadingFormat

POLL_TIMEOUT_MS = 500


class Input(Protocol):
    """Read once, from the beginning to the end."""

    topic: str
    """What the task is told that its readings come from."""
    ends: bool
    """Nothing comes after the last reading: open windows close there."""

    @property
    def partitions(self) -> Sequence[int]: ...

    @property
    def share_read(self) -> float:
        """0 ... 1"""

    rejected: Counter[str]
    """Records before what was handed out last that were no readings, by reason; those behind it when `next_ms` has seen the end. So
    they are counted once, however often somebody stops and goes on behind what was handed out last."""

    def next_ms(self) -> int | None:
        """The smallest event time among the readings that come next; None at the end."""

    def until(self, boundary_ms: int | None) -> Iterator[tuple[int, Readings]]:
        """Partition and readings, up to (not including) each partition's first reading of this time or later."""


class Waiting:
    """Readings that came and were not asked for yet, of one partition."""

    def __init__(self) -> None:
        self._parts: deque[Readings] = deque()

    def add(self, readings: Readings) -> None:
        if len(readings):
            self._parts.append(readings)

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def next_ms(self) -> int:
        return int(self._parts[0].event_time_ms[0])

    def until(self, boundary_ms: int | None) -> Iterator[Readings]:
        while self._parts:
            first = self._parts.popleft()
            beyond = (
                np.empty(0, np.int64) if boundary_ms is None else np.flatnonzero(first.event_time_ms >= boundary_ms)
            )
            if not len(beyond):
                yield first
                continue
            at = int(beyond[0])
            self._parts.appendleft(first.take(slice(at, None)))
            if at:
                yield first.take(slice(0, at))
            return


class FileInput:
    """Batches of a file, as one partition; a reading's offset is its place in the file.

    skip: so many readings at the beginning are left out, as they were taken in before."""

    ends = True
    partitions = (0,)

    def __init__(self, batches: Iterable[FileBatch], fields: Sequence[str], name: str, skip: int = 0) -> None:
        self.topic = name
        self.rejected: Counter[str] = Counter()
        self.share_read = 0.0
        self._fields = fields
        self._batches = iter(batches)
        self._waiting = Waiting()
        self._offset = 0
        self._skip = skip

    def next_ms(self) -> int | None:
        return self._waiting.next_ms if self._fill() else None

    def until(self, boundary_ms: int | None) -> Iterator[tuple[int, Readings]]:
        while self._fill():
            for readings in self._waiting.until(boundary_ms):
                yield 0, readings
            if self._waiting:
                return

    def _fill(self) -> bool:
        """Something waits; False at the end of the file."""
        while not self._waiting:
            batch = next(self._batches, None)
            if batch is None:
                self.share_read = 1.0
                return False
            readings = readings_of(batch, self._fields, self._offset)
            skipped = max(0, self._skip - self._offset)
            self._offset += len(readings)
            self.share_read = batch.share_read
            self._waiting.add(readings.take(slice(skipped, None)))
        return True


class TopicInput:
    """Partitions of a topic, each [start ---- end) in offsets.

    source: of all partitions, without a group."""

    ends = False

    def __init__(
        self, source: RecordSource, format: ReadingFormat, starts: Mapping[int, int], ends: Mapping[int, int]
    ) -> None:
        self.topic = source.topic
        self.rejected: Counter[str] = Counter()
        self._source = source
        self._decoders = {partition: ReadingDecoder(format) for partition in starts}
        self._starts, self._next, self._ends = dict(starts), dict(starts), dict(ends)
        self._waiting = {partition: Waiting() for partition in starts}
        self._refused: dict[int, deque[tuple[int, str]]] = {partition: deque() for partition in starts}
        self._paused: set[int] = set()
        source.on_assigned = self._begin

    @property
    def partitions(self) -> Sequence[int]:
        return sorted(self._starts)

    @property
    def share_read(self) -> float:
        total = sum(max(end - self._starts[partition], 0) for partition, end in self._ends.items())
        done = sum(self._next[p] - self._starts[p] for p in self._starts)
        return min(done / total, 1.0) if total else 1.0

    def next_ms(self) -> int | None:
        while lacking := [p for p in self._next if not self._waiting[p] and not self._at_end(p)]:
            self._poll(lacking)
        found = min((waiting.next_ms for waiting in self._waiting.values() if waiting), default=None)
        if found is None:
            for partition in self._refused:
                self._count_refused(partition, self._ends[partition])
        return found

    def until(self, boundary_ms: int | None) -> Iterator[tuple[int, Readings]]:
        while True:
            for partition, waiting in self._waiting.items():
                for readings in waiting.until(boundary_ms):
                    self._count_refused(partition, int(readings.offsets[-1]))
                    yield partition, readings
            behind = [p for p, waiting in self._waiting.items() if not waiting and not self._at_end(p)]
            if not behind:
                return
            self._poll(behind)

    def _begin(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._source.seek(partition, self._next[partition])

    def _at_end(self, partition: int) -> bool:
        return self._next[partition] >= self._ends[partition]

    def _count_refused(self, partition: int, before: int) -> None:
        waiting = self._refused[partition]
        while waiting and waiting[0][0] < before:
            self.rejected[waiting.popleft()[1]] += 1

    def _poll(self, wanted: Sequence[int]) -> None:
        """One poll, of these partitions only."""
        assigned = self._source.assignment
        self._source.pause(set(assigned) - set(wanted) - self._paused)
        self._source.resume(self._paused & set(wanted))
        self._paused = set(assigned) - set(wanted)
        for records in self._source.poll(POLL_TIMEOUT_MS):
            partition = records.partition
            records = records.take(
                (records.offsets >= self._next[partition]) & (records.offsets < self._ends[partition])
            )
            if not len(records):
                continue
            readings, rejected = self._decoders[partition].decode(records)
            offsets = records.offsets[[refused.record for refused in rejected]].tolist()
            self._refused[partition].extend((at, refused.reason) for at, refused in zip(offsets, rejected))
            self._waiting[partition].add(readings)
            self._next[partition] = int(records.offsets[-1]) + 1
        for partition, position in self._source.positions().items():  # past control records and gaps
            self._next[partition] = max(self._next[partition], min(position, self._ends[partition]))


def readings_of(batch: FileBatch, fields: Sequence[str], offset: int) -> Readings:
    """A file's batch as the stream sees it. offset: of its first reading. Raises DeploymentError for a field that is not there."""
    missing = [name for name in fields if name not in batch.field_names]
    if missing:
        raise DeploymentError(
            f"the file has no field {missing[0]!r}: it has {', '.join(batch.field_names)}; set readings.fields to what the file holds"
        )
    columns = [batch.field_names.index(name) for name in fields]
    sensors = [name.encode() for name in batch.sensors]
    n = len(batch)
    return Readings(
        [sensors[code] for code in batch.codes.tolist()],
        np.arange(offset, offset + n),
        batch.event_time_ms,
        batch.values[:, columns],
        np.arange(n),
    )
