"""A time range of one topic into another, at the pace it came in, N times that, or as fast as it goes.

    partition 0   ──────┐
    partition 1   ──────┤  Merge: by time    at_pace    RecordCopier    target topic
    partition 2   ──────┘

Key, value, headers and record timestamp stay byte for byte; the order within a partition stays. Committed records
only, read without a consumer group. The end is fixed by the end offsets found at the start: a live topic is not chased.
Records that lie out of order in the log are found all the same: each partition is read from the first record of the
range to that end, which costs little where nothing of it is in the range.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.clients import HasKafka, make_consumer, missing_topic
from pipeline.kafka.sink import Partitioner, RecordSink
from pipeline.kafka.source import RecordSource
from pipeline.service.replay import NO_TIME, ReplayReport, at_pace, send_all
from pipeline.stream.columns import Float64, Headers, Int32, Int64, OutgoingRecords, RecordColumns

FOREVER: Final = 2**62
LATEST_MS: Final = 2**43
"""The year 2248: no record is looked for beyond."""
FETCHES_AHEAD: Final = 2
WAITING_BYTES: Final = 64 * 2**20
"""So many fetches of a partition, and so many bytes of all, may wait for the other partitions; then only those are
read on that the others wait for."""
FETCH_BYTES_PER_PARTITION: Final = 2**20
"""Kafka's own default: the largest batch that a broker takes by default still fits."""
FETCH_WAIT_MS: Final = 20
"""There is always something to read before the end; only a fetch that was under way when the end was reached waits in
vain."""
POLL_TIMEOUT_MS: Final = 200
SILENCE_SECONDS: Final = 60.0
"""A source that gives nothing for so long, with records left, is down."""


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Record timestamps inside [from_ms ---- to_ms), epoch ms; None = no bound."""

    from_ms: int | None = None
    to_ms: int | None = None

    def __str__(self) -> str:
        start = "the beginning" if self.from_ms is None else _text(self.from_ms)
        return f"[{start}, {'the end' if self.to_ms is None else _text(self.to_ms)})"


@dataclass(frozen=True, slots=True)
class MergedRecords:
    """n records of several partitions, in the order in which they leave."""

    parts: Sequence[RecordColumns]
    """Of one partition each."""
    part: Int32
    """(n) index into `parts`."""
    row: Int64
    """(n) row of that part."""
    event_time_ms: Int64
    """(n) ascending: when each is due, which is not always its timestamp. NO_TIME = at once."""
    share_read: Float64
    """(n) how much of the offsets is behind us after each record, 0 to 1."""

    def __len__(self) -> int:
        return len(self.row)

    def cut(self, start: int, stop: int) -> MergedRecords:
        rows = slice(start, stop)
        return MergedRecords(
            self.parts, self.part[rows], self.row[rows], self.event_time_ms[rows], self.share_read[rows]
        )


class Merge:
    """k partitions -> one stream by time, whatever pieces they come in.

    A record is as late as the newest before it in its partition (stream time, as windows know it), so that the order
    within a partition stays; at the same time the lower partition goes first. A record leaves when no partition can
    bring an earlier one any more.

        partition 0   1  4  2  7            has reached 7
        partition 1   3  5                  has reached 5: what comes next is 5 or later
                      -> 1  3  4  2  5      the 2 came late, after the 4

    Timestamps from the range's end on count as that end, so that a partition past it holds up nobody. A record without
    a timestamp (-1) has that of the newest before it in its partition, here and when the range is asked; where there is
    none it goes first, and is in every range that has no start.

    spans: partition -> [start ---- end), the offsets to read.
    """

    def __init__(self, spans: Mapping[int, tuple[int, int]], wanted: TimeRange | None = None) -> None:
        wanted = wanted or TimeRange()
        self._from_ms = NO_TIME if wanted.from_ms is None else wanted.from_ms
        self._to_ms = FOREVER if wanted.to_ms is None else wanted.to_ms
        self._spans = dict(spans)
        self._position = {partition: start for partition, (start, _) in spans.items()}
        self._reached_ms = dict.fromkeys(spans, NO_TIME)
        self._waiting: dict[int, deque[_Run]] = {partition: deque() for partition in sorted(spans)}

    @property
    def position(self) -> dict[int, int]:
        """The next offset to read of each partition."""
        return dict(self._position)

    @property
    def unfinished(self) -> set[int]:
        """The partitions that have not been read to their end."""
        return {partition for partition, (_, end) in self._spans.items() if self._position[partition] < end}

    @property
    def wanted(self) -> set[int]:
        """The partitions to read on: the others are at their end, or ahead of the rest. Never empty while any is
        unfinished, once `take` has taken what may leave: of the one that has come least far nothing waits."""
        waiting_bytes = sum(len(run.records.body) for queue in self._waiting.values() for run in queue)
        ahead = FETCHES_AHEAD if waiting_bytes < WAITING_BYTES else 1
        return {partition for partition in self.unfinished if len(self._waiting[partition]) < ahead}

    @property
    def share(self) -> float:
        """How much of the offsets has left or was outside the range, 0 to 1."""
        total = sum(max(end - start, 0) for start, end in self._spans.values())
        if not total:
            return 1.0
        return sum(max(self._behind(p) - start, 0) for p, (start, _) in self._spans.items()) / total

    def add(self, records: RecordColumns) -> None:
        """The next records of a partition, in log order."""
        partition = records.partition
        records = records.take(records.offsets < self._spans[partition][1])
        if not len(records):
            return
        self._position[partition] = int(records.offsets[-1]) + 1
        own_ms = np.where(records.timestamps_ms < 0, NO_TIME, records.timestamps_ms)
        due_ms = np.maximum(np.maximum.accumulate(np.minimum(own_ms, self._to_ms)), self._reached_ms[partition])
        self._reached_ms[partition] = int(due_ms[-1])
        own_ms = np.where(own_ms == NO_TIME, due_ms, own_ms)
        rows = np.flatnonzero((own_ms >= self._from_ms) & (own_ms < self._to_ms))
        if len(rows):
            self._waiting[partition].append(_Run(records, rows, due_ms[rows]))

    def passed(self, positions: Mapping[int, int]) -> None:
        """The next offset to read of each partition: there may have been nothing to read before it."""
        for partition, position in positions.items():
            end = self._spans[partition][1]
            self._position[partition] = max(self._position[partition], min(position, end))

    def take(self) -> MergedRecords | None:
        """All records that may leave; None where there are none."""
        until = min(((self._reached_ms[partition], partition) for partition in self.unfinished), default=(FOREVER, -1))
        before = self.share
        runs = [run for partition in self._waiting for run in self._due(partition, until)]
        if not runs:
            return None
        due_ms = np.concatenate([run.due_ms for run in runs])
        # Stable, and the runs are in the order of partitions: at the same time the lower one goes first.
        order = np.argsort(due_ms, kind="stable")
        part = np.repeat(np.arange(len(runs), dtype=np.int32), [len(run.rows) for run in runs])
        return MergedRecords(
            [run.records for run in runs],
            part[order],
            np.concatenate([run.rows for run in runs])[order],
            due_ms[order],
            np.linspace(before, self.share, len(order) + 1)[1:],
        )

    def _due(self, partition: int, until: tuple[int, int]) -> Iterator[_Run]:
        until_ms, last = until
        queue = self._waiting[partition]
        while queue:
            run = queue.popleft()
            # Partition `last` may bring another record at until_ms: lower partitions go before it, higher ones after.
            count = int(np.searchsorted(run.due_ms, until_ms, side="right" if partition <= last else "left"))
            if count:
                yield _Run(run.records, run.rows[:count], run.due_ms[:count])
            if count < len(run.rows):
                queue.appendleft(_Run(run.records, run.rows[count:], run.due_ms[count:]))
                return

    def _behind(self, partition: int) -> int:
        """The offset before which everything has left."""
        queue = self._waiting[partition]
        return int(queue[0].records.offsets[queue[0].rows[0]]) if queue else self._position[partition]


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of one set of records that wait for the other partitions."""

    records: RecordColumns
    rows: NDArray[np.int64]
    due_ms: Int64


@dataclass(frozen=True, slots=True)
class RecordCopier:
    """Records as they were, for the partitions of another topic.

    The same number where both topics have as many partitions, so that whatever rule the source's producers followed
    still holds. Else by key, Kafka's default rule; a record without a key goes to its partition modulo the target's
    number, so that those of a partition stay together, in their order.
    """

    topic: str
    source_partitions: int
    target_partitions: int

    @property
    def by_key(self) -> bool:
        return self.source_partitions != self.target_partitions

    @property
    def rule(self) -> str:
        """Which of the two, for people."""
        target = f"{self.topic} has {_partitions(self.target_partitions)}"
        if not self.by_key:
            return f"{target}, as the source: each record keeps its own"
        return (
            f"{target}, the source {self.source_partitions}: each record goes by its key (Kafka's default rule),"
            f" one without a key to its own modulo {self.target_partitions}"
        )

    def encode(self, records: MergedRecords) -> list[OutgoingRecords]:
        """One OutgoingRecords for each partition; within each, the order of `records`."""
        n = len(records)
        source = np.array([part.partition for part in records.parts], np.int32)[records.part]
        keys, values, headers = np.empty(n, object), np.empty(n, object), np.empty(n, object)
        timestamps_ms = np.empty(n, np.int64)
        for at, chosen in _by_part(records):
            keys[at], values[at] = _objects(chosen.keys()), _objects(chosen.values())
            headers[at] = _objects(_headers(chosen))
            timestamps_ms[at] = chosen.timestamps_ms
        target = self._partitions(source, keys.tolist())
        out = []
        for partition in np.unique(target).tolist():
            at = np.flatnonzero(target == partition)
            own_headers = headers[at].tolist()
            out.append(
                OutgoingRecords(
                    self.topic,
                    partition,
                    keys[at].tolist(),
                    values[at].tolist(),
                    own_headers if any(own_headers) else None,
                    timestamps_ms[at],
                )
            )
        return out

    def _partitions(self, source: Int32, keys: list[bytes | None]) -> Int32:
        """source: (n) the partition of each record, keys: (n) -> (n) the partition where it goes."""
        if not self.by_key:
            return source
        # Anew each time: of a topic in which every key is another one, a Partitioner would remember them all.
        by_key: Int32 = Partitioner(self.target_partitions)([b"" if key is None else key for key in keys])
        without = np.fromiter((key is None for key in keys), np.bool_, len(keys))
        return np.where(without, source % self.target_partitions, by_key)


def _by_part(records: MergedRecords) -> Iterator[tuple[NDArray[np.int64], RecordColumns]]:
    """Where the records of each part stand, and those records."""
    order = np.argsort(records.part, kind="stable")
    starts = np.flatnonzero(np.diff(records.part[order], prepend=-1))
    for at in np.split(order, starts[1:]):
        yield at, records.parts[int(records.part[at[0]])].take(records.row[at])


def _headers(records: RecordColumns) -> list[Headers]:
    if not records.headers_count.any():
        return [()] * len(records)
    return [records.headers(row) for row in range(len(records))]


def _objects(items: Sequence[Any]) -> NDArray[Any]:
    """(n) the very objects: left to itself NumPy makes texts of bytes, without the zeros at their end, and tables of
    tuples."""
    return np.fromiter(items, object, len(items))


def copy(
    source: RecordSource,
    wanted: TimeRange,
    copier: RecordCopier,
    sink: RecordSink,
    speed: float | None,
    clock: Callable[[], float],
    sleep: Callable[[float], bool],
    on_progress: Callable[[ReplayReport], None] = lambda report: None,
    report: ReplayReport | None = None,
) -> ReplayReport:
    """Copies what the range holds now, and returns when every record is acknowledged.

    source: from `open_source`, not yet polled. speed, clock, sleep: as for `replay`.
    Raises DeploymentError for a broker that does not give or take a record.
    """
    report = report or ReplayReport()

    def sent(records: MergedRecords) -> None:
        timestamps_ms = [chosen.timestamps_ms for _, chosen in _by_part(records)]
        known = np.concatenate([times[times >= 0] for times in timestamps_ms])
        report.count(len(records), known, float(records.share_read[-1]))
        on_progress(report)

    def passed_over(share: float) -> None:
        report.share_read = share
        on_progress(report)

    merge = Merge(find_spans(source, wanted), wanted)
    batches = read(source, merge, lambda: sleep(0), clock, passed_over)
    send_all(at_pace(batches, MergedRecords.cut, speed, clock, sleep), copier.encode, sink, sent, clock)
    return report


def find_spans(source: RecordSource, wanted: TimeRange) -> dict[int, tuple[int, int]]:
    """Partition -> [start ---- end): from the first record of the range to the end as it is now."""
    everything = source.partitions
    end = source.end_offsets(everything)
    if wanted.from_ms is None or wanted.from_ms <= 0:
        start = source.beginning_offsets(everything)
    else:
        start = source.offsets_for_time(wanted.from_ms, everything)
    return {partition: (min(start[partition], end[partition]), end[partition]) for partition in everything}


def read(
    source: RecordSource,
    merge: Merge,
    stopped: Callable[[], bool],
    clock: Callable[[], float],
    on_share: Callable[[float], None] = lambda share: None,
) -> Iterator[MergedRecords]:
    """What the merge lets go, as it comes; partitions that are ahead of the others are not read on meanwhile. Ends
    early when `stopped`.

    on_share: called with `Merge.share` when nothing could leave, and at the end. Raises BrokerUnavailable when nothing
    comes any more, and what RecordSource.poll raises."""
    reading = merge.wanted

    def begin(partitions: Sequence[int]) -> None:
        for partition in partitions:
            source.seek(partition, merge.position[partition])
        source.pause(set(partitions) - reading)

    source.on_assigned = begin
    moved_at = clock()
    while merge.unfinished and not stopped():
        before = merge.position
        for records in source.poll(POLL_TIMEOUT_MS):
            merge.add(records)
        merge.passed(source.positions())
        if merge.position != before:
            moved_at = clock()
        elif clock() - moved_at > SILENCE_SECONDS:
            raise _silent(source, merge)
        batch = merge.take()
        source.pause(reading - merge.wanted)
        source.resume(merge.wanted - reading)
        reading = merge.wanted
        if batch is None:
            on_share(merge.share)
        else:
            yield batch
            moved_at = clock()  # at the original pace hours have passed
    on_share(merge.share)


def open_source(settings: HasKafka, topic: str) -> RecordSource:
    """A reader of the topic's committed records, without a group. `settings` names the cluster.

    Raises DeploymentError where there is no such topic, or no broker."""
    try:
        return RecordSource(
            settings,
            topic,
            group=False,
            max_partition_fetch_bytes=FETCH_BYTES_PER_PARTITION,
            fetch_max_wait_ms=FETCH_WAIT_MS,
        )
    except DeploymentError as error:
        if str(error) != str(missing_topic(topic)):
            raise
        raise DeploymentError(
            f'topic "{topic}" does not exist at {settings.kafka.bootstrap_servers}, or we may not see it; check'
            " --from-topic and the ACLs, and --from-servers where it is in another cluster"
        ) from None


def target_partitions(settings: HasKafka, sink: RecordSink, topic: str, source_partitions: int) -> int:
    """How many partitions the target has. Raises DeploymentError where there is no such topic."""
    try:
        return sink.partitions(topic)
    except DeploymentError as error:
        if str(error) != str(missing_topic(topic)):
            raise
        raise DeploymentError(
            f'topic "{topic}" does not exist at {settings.kafka.bootstrap_servers}, or we may not see it; check --topic'
            ' and the ACLs, or make it: "millrace topics create" does, with settings that name it (topics.readings) and'
            f" topics.partitions = {source_partitions}, as the source has"
        ) from None


def is_same_cluster(one: HasKafka, other: HasKafka) -> bool:
    """Whether both settings lead to one cluster, whatever they call its brokers. Raises DeploymentError when one does
    not answer."""
    if one.kafka.bootstrap_servers == other.kafka.bootstrap_servers:
        return True
    ids = [_cluster_id(settings) for settings in (one, other)]
    return ids[0] is not None and ids[0] == ids[1]


def held(source: RecordSource) -> tuple[int, int] | None:
    """The timestamp of the topic's first record (the earliest among the partitions) and its newest, epoch ms; None
    where it holds none with a timestamp. Asks the broker some ninety times, a few milliseconds each, reads nothing."""
    everything = source.partitions
    end = source.end_offsets(everything)
    first = source.offsets_for_time(0, everything)
    holding = [partition for partition in everything if first[partition] < end[partition]]
    if not holding:
        return None

    def at(time_ms: int) -> dict[int, int]:
        return source.offsets_for_time(time_ms, holding)

    # Offsets only grow with the time asked for: to the first timestamp all stay, to the newest one is before its end.
    oldest_ms = _last_true(lambda time_ms: all(first[p] == offset for p, offset in at(time_ms).items()))
    newest_ms = _last_true(lambda time_ms: any(offset < end[p] for p, offset in at(time_ms).items()))
    return oldest_ms, newest_ms


def nothing_copied(source: RecordSource, wanted: TimeRange) -> str:
    """For people: why a range was empty."""
    everything = source.partitions
    begin, end = source.beginning_offsets(everything), source.end_offsets(everything)
    if begin == end:
        return f'nothing to copy: topic "{source.topic}" holds no records'
    times = held(source)
    if times is None:
        return f'nothing to copy: the records of topic "{source.topic}" have no timestamps; leave out --from and --to'
    return (
        f'nothing to copy in {wanted}: the record timestamps of topic "{source.topic}" go from {_text(times[0])} to'
        f" {_text(times[1])}; change --from and --to"
    )


def _last_true(holds: Callable[[int], bool]) -> int:
    """The last time at which it holds, of those before LATEST_MS: it holds at 0, and no more once it does not."""
    low, high = 0, LATEST_MS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _cluster_id(settings: HasKafka) -> str | None:
    """None where the broker tells none. The client learns it with its first metadata, and has no public way to ask."""
    consumer = make_consumer(settings)
    try:
        cluster_id = getattr(getattr(consumer, "_cluster", None), "cluster_id", None)
    finally:
        consumer.close(autocommit=False)
    return None if cluster_id is None else str(cluster_id)


def _silent(source: RecordSource, merge: Merge) -> BrokerUnavailable:
    return BrokerUnavailable(
        f'topic "{source.topic}": nothing came for {SILENCE_SECONDS:.0f} s, although partitions'
        f" {sorted(merge.unfinished)} are not at their end; check that the brokers run (millrace broker status);"
        " what was copied so far stays"
    )


def _partitions(count: int) -> str:
    return f"{count} partition{'' if count == 1 else 's'}"


def _text(moment_ms: int) -> str:
    moment = np.datetime64(moment_ms, "ms")
    return f"{moment.astype('datetime64[s]') if moment_ms % 1000 == 0 else moment}Z"
