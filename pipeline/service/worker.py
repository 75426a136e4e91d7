"""The worker: polls, runs one task per partition, and commits what follows from it.

The order of one round, and what a crash after each step leaves behind:
1. poll              nothing happened; rebalances are told here and nowhere else, and no transaction is open
2. run the tasks     nothing happened outside this process
3. settle            a commit whose fate is not known is decided before the next one
4. restore           partitions that arrived get their states back, a piece a round, while the others are served
5. commit            forecasts, dead letters, scores, due checkpoints and offsets, all or nothing (pipeline/kafka/transactions.py)
6. swap              a new champion takes over one partition a round, once nothing is left to commit; its states are a checkpoint of the
                     next round, so that no answer of it can be out before them

State lives in the tasks and runs ahead of what is committed by one round at most. A commit that fails is tried again with the very
same content; a partition that is taken away takes its uncommitted work with it, because whoever has it now makes the same again
from the log. So nothing is ever rolled back, and revocation needs no flush.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from models.forecaster import Model
from pipeline.errors import BrokerUnavailable, DeploymentError
from pipeline.kafka.changelog import Restore
from pipeline.kafka.source import OffsetsUnstable, RecordSource
from pipeline.kafka.transactions import TransactionFailed
from pipeline.service.assembly import task_settings
from pipeline.service.commit import Committer, PartitionWork
from pipeline.service.feed import ModelFeed
from pipeline.service.metrics import WorkerMetrics
from pipeline.service.serving import Serving, begin
from pipeline.settings import Settings
from pipeline.stream.columns import Counts, RecordColumns

log = logging.getLogger(__name__)

POLL_TIMEOUT_MS = 200
POLL_WHILE_RESTORING_MS = 5
"""Restoring goes on between two polls; what is served meanwhile should not wait for it, nor it for that."""
RESTORE_AT_ONCE = 4
"""Each has a consumer of its own."""
COMMITTED_WAIT_MS = 250
HEARD_WITHIN_SECONDS = 3.0
"""A member that was thrown out of its group hears of it with its next heartbeat, within two seconds."""
REPORT_EVERY_SECONDS = 10.0
GIVE_UP_SECONDS = 180.0
"""How long commits may fail, or offsets stay undecided, before a person is asked: longer than a broker's restart."""
FINISH_SECONDS = 20.0


@dataclass(slots=True)
class WorkerReport:
    """What a run of the worker did."""

    counts: Counts = field(default_factory=Counts)
    restored: int = 0
    """Sensors whose states came out of the changelog."""
    rebuilt: int = 0
    """Records read again in silence."""
    checkpoints: int = 0
    swaps: int = 0
    """Partitions that a new champion has taken over."""
    sensors: int = 0
    partitions: int = 0
    """Assigned now; 0 while the group has given none."""
    seconds: float = 0.0


@dataclass(slots=True)
class _Arrival:
    """A partition that has come and whose state has not."""

    since: float
    not_before: float = 0.0
    """When to begin, on the same clock."""
    committed: int | None = None
    committed_before: int | None = None
    """What it was when the checkpoint was found to be ahead of it."""
    decided: bool = False
    """The committed offset is known, and no transaction can change it any more."""
    restore: Restore | None = None


class Worker:
    """One member of the consumer group.

    on_progress is called about every ten seconds, and at the end, with the report so far and the lag in records. on_restore is
    called while a partition is restored: partition, offsets read, offsets in all; the last time with both equal.
    """

    def __init__(
        self,
        settings: Settings,
        source: RecordSource,
        committer: Committer,
        model: Model | None = None,
        on_progress: Callable[[WorkerReport, int], None] | None = None,
        on_restore: Callable[[int, int, int], None] | None = None,
        metrics: WorkerMetrics | None = None,
        feed: ModelFeed | None = None,
    ) -> None:
        self.settings = settings
        self.source = source
        self.committer = committer
        self.model = model
        self.report = WorkerReport()
        self.metrics = metrics or WorkerMetrics(CollectorRegistry())
        self._feed = feed
        self.metrics.show_model(model.version if model else "")
        self._task_settings = task_settings(settings)
        self._serving: dict[int, Serving] = {}
        self._arrivals: dict[int, _Arrival] = {}
        self._work: dict[int, PartitionWork] = {}
        """What has not been seen to be committed."""
        self._in_doubt = False
        """The last commit failed: whether it happened nevertheless is to be found out."""
        self._failing_since: float | None = None
        self._unsure_since: float | None = None
        self._holding = False
        self._on_progress = on_progress
        self._on_restore = on_restore
        source.on_assigned, source.on_revoked = self._arrived, self._lost

    def run(self, stop: threading.Event, exit_at_end: bool = False) -> WorkerReport:
        """Work until `stop` is set, or, with exit_at_end, until the offsets found at the start have been reached; then
        write a last checkpoint."""
        started = reported = time.monotonic()
        ends = self.source.end_offsets(self.source.partitions) if exit_at_end else {}
        while not stop.is_set():
            self.round()
            now = time.monotonic()
            self.report.seconds = now - started
            self.report.partitions = len(self._serving) + len(self._arrivals)
            self.report.sensors = sum(len(one.task.table) for one in self._serving.values())
            if self._on_progress and now - reported >= REPORT_EVERY_SECONDS:
                self._on_progress(self.report, self._lag())
                reported = now
            if exit_at_end and self._caught_up(ends):
                break
        self._finish()
        if self._on_progress:
            self._on_progress(self.report, self._lag())
        return self.report

    def round(self, at_end: bool = False) -> None:
        """One poll and all that follows from it."""
        polled = self.source.poll(POLL_WHILE_RESTORING_MS if self._arrivals else POLL_TIMEOUT_MS)
        for records in polled:
            self._process(records)
        if not self._settle():
            return
        if not at_end:
            self._restore_more()
        self._gather(at_end)
        self._commit()
        if not at_end:
            self._swap()

    # -- partitions come and go: called inside poll

    def _arrived(self, partitions: Sequence[int], after_seconds: float = 0.0) -> None:
        now = time.monotonic()
        for partition in partitions:
            self.source.pause([partition])
            self.source.seek(partition, 0)  # where it really begins is known once its state is there
            self._arrivals[partition] = _Arrival(now, now + after_seconds)
        self._show_partitions()

    def _lost(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._drop(partition)
        self._show_partitions()

    def _drop(self, partition: int) -> None:
        self._serving.pop(partition, None)
        self._work.pop(partition, None)
        self.metrics.forget_partition(partition)
        arrival = self._arrivals.pop(partition, None)
        if arrival and arrival.restore:
            arrival.restore.close()

    def _show_partitions(self) -> None:
        self.metrics.show_partitions(len(self._arrivals), len(self._serving))

    # -- restoring

    def _restore_more(self) -> None:
        for partition in sorted(self._arrivals)[:RESTORE_AT_ONCE]:
            arrival = self._arrivals[partition]
            try:
                self._restore_one(partition, arrival)
            except BrokerUnavailable as error:
                if time.monotonic() - arrival.since > GIVE_UP_SECONDS:
                    raise
                log.warning("partition %d: restoring it is tried again: %s", partition, error)

    def _restore_one(self, partition: int, arrival: _Arrival) -> None:
        if time.monotonic() < arrival.not_before:
            return
        if not arrival.decided and not self._ask_committed(partition, arrival):
            return
        if arrival.restore is None:
            arrival.restore = Restore(self.settings, partition)
        done = arrival.restore.advance(POLL_WHILE_RESTORING_MS)
        if self._on_restore:
            self._on_restore(partition, *arrival.restore.progress)
        if done and not self._asks_again(partition, arrival, arrival.restore):
            self._serve(partition, arrival, arrival.restore)

    def _ask_committed(self, partition: int, arrival: _Arrival) -> bool:
        """The offset comes first and the checkpoint after: whoever had the partition can commit neither any more. Unless we were
        thrown out of the group and have not heard of it yet: then `_asks_again` notices."""
        try:
            arrival.committed = self.source.committed(partition, COMMITTED_WAIT_MS)
            arrival.decided = True
        except OffsetsUnstable as unstable:
            waited = time.monotonic() - arrival.since
            if waited > GIVE_UP_SECONDS:
                raise DeploymentError(
                    f'topic "{self.source.topic}", partition {partition}: no committed offset of group '
                    f'"{self.source.group_id}" to be had for {waited:.0f} s ({unstable}); check the brokers, and for hanging '
                    "transactions (kafka-transactions.sh --find-hanging)"
                ) from unstable
        return arrival.decided

    def _asks_again(self, partition: int, arrival: _Arrival, restore: Restore) -> bool:
        """Whether the checkpoint is ahead of the committed offset because somebody commits to this partition at this moment:
        then everything is asked for once more. If the offset has not moved in the meantime it was set back, and that is for
        `plan_start` to say."""
        manifest, committed = restore.manifest(), arrival.committed
        if manifest is None or committed is None or manifest.offset <= committed:
            return False
        if committed == arrival.committed_before:
            return False
        restore.close()
        again = time.monotonic() + HEARD_WITHIN_SECONDS
        self._arrivals[partition] = _Arrival(arrival.since, again, committed_before=committed)
        return True

    def _serve(self, partition: int, arrival: _Arrival, restore: Restore) -> None:
        beginning, end = (
            ask([partition])[partition] for ask in (self.source.beginning_offsets, self.source.end_offsets)
        )
        serving, start = begin(
            self.settings, self._task_settings, self.model, restore, arrival.committed, beginning, end, _now_ms()
        )
        restore.close()
        del self._arrivals[partition]
        self._serving[partition] = serving
        self.source.seek(partition, start.offset)
        if not self._holding:
            self.source.resume([partition])
        seconds = time.monotonic() - arrival.since
        restored = len(serving.task.table)
        self.report.restored += restored
        self.metrics.restored_sensors.inc(restored)
        self.metrics.restored_bytes.inc(restore.read_bytes)
        self.metrics.restore_seconds.observe(seconds)
        self._show_partitions()
        if start.note:
            log.warning("partition %d: %s", partition, start.note)
        again = (
            f", offsets {start.offset} to {start.emit_from} are read again" if start.offset < start.emit_from else ""
        )
        log.info(
            "partition %d: %d sensors restored in %.1f s%s; answers from offset %d on",
            partition,
            restored,
            seconds,
            again,
            start.emit_from,
        )

    # -- readings

    def _process(self, records: RecordColumns) -> None:
        serving = self._serving[records.partition]
        counts, scores = serving.run(records, _now_ms())
        for found in scores:
            self.metrics.score(found)
        replayed = len(records) - counts.records
        self.report.counts.add(counts)
        self.report.rebuilt += replayed
        self.metrics.replayed_records.inc(replayed)

    def _gather(self, at_end: bool = False) -> None:
        """What is due of each partition becomes work to commit."""
        positions, now_ms = self.source.positions(), _now_ms()
        silence_ms = self.settings.forecast.provisional_after_ms
        for partition, serving in self._serving.items():
            if partition in self._work or partition not in positions:
                continue  # its last work is not committed yet, or a rebalance is just taking it away
            if silence_ms is not None and not at_end:
                self.report.counts.forecasts += serving.speak_provisionally(now_ms, silence_ms, self.source.topic)
            work = serving.work(positions[partition], now_ms, at_end)
            if work is not None:
                self._work[partition] = work

    # -- models

    def _swap(self) -> None:
        """Lets the newest champion take over one partition that another model still serves."""
        champion = self._feed.take() if self._feed else None
        if champion is not None:
            self.model = champion
            self.metrics.show_model(champion.version)
        if self.model is None or self._work or self._in_doubt:
            return
        for _, serving in sorted(self._serving.items()):
            if serving.version == self.model.version:
                continue
            if serving.awaited:
                serving.awaited = self.model  # it is still reading again: it begins with the newest
                continue
            with self.metrics.swap_seconds.time():
                serving.swap(self.model, _now_ms())
            self.metrics.swaps.inc()
            self.report.swaps += 1
            return

    # -- committing

    def _commit(self) -> None:
        """Commits the work gathered, or holds everything until that can be done."""
        if not self._work:
            self._release()
            return
        membership = self.source.membership()
        if membership is None or not set(self._work) <= membership.partitions:
            self._hold()  # the next polls tell what is still ours
            self._require_a_group()
            return
        self._unsure_since = None
        started_ms = _now_ms()
        try:
            with self.metrics.commit_seconds.time():
                self.committer.commit(self._work, membership)
        except TransactionFailed as failure:
            self._failed(failure)
            return
        self._done(list(self._work), started_ms)

    def _require_a_group(self) -> None:
        now = time.monotonic()
        self._unsure_since = self._unsure_since or now
        if now - self._unsure_since > GIVE_UP_SECONDS:
            raise DeploymentError(
                f'group "{self.source.group_id}" has not said for {now - self._unsure_since:.0f} s which partitions are this '
                "worker's, so nothing can be committed: a member that joins again and again, or a coordinator that does not "
                "answer (kafka-consumer-groups.sh --describe --members); start this worker again"
            )

    def _failed(self, failure: Exception) -> None:
        self.metrics.transactions.labels("failed").inc()
        self._hold()
        self._in_doubt = True
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > GIVE_UP_SECONDS:
            raise DeploymentError(
                f"nothing could be committed for {now - self._failing_since:.0f} s: {failure}; check the brokers, and if a round "
                "takes longer than that, raise kafka.transaction_timeout"
            ) from failure
        log.warning("a commit failed and is tried again: %s", failure)

    def _settle(self) -> bool:
        """Finds out what became of a commit that failed. False: not yet known."""
        if not self._in_doubt:
            return True
        try:
            self.committer.settle()
            committed = {p: self.source.committed(p, COMMITTED_WAIT_MS) for p in self._work}
        except (TransactionFailed, OffsetsUnstable) as failure:
            self._failed(failure)
            return False
        self._in_doubt = False
        for partition, offset in committed.items():
            serving = self._serving[partition]
            if offset == self._work[partition].offset and offset != serving.committed:
                log.info("partition %d: the commit had happened, up to offset %d", partition, offset)
                self._done([partition], _now_ms())
            elif offset != serving.committed:
                # Somebody else has answered in our place: what we hold is not what the group stands at. Most likely we were
                # thrown out of the group, and the next heartbeat will tell.
                log.warning(
                    "partition %d: the group stands at %s, not %s: starting it again",
                    partition,
                    offset,
                    serving.committed,
                )
                self._drop(partition)
                self._arrived([partition], HEARD_WITHIN_SECONDS)
        return True

    def _done(self, partitions: Iterable[int], started_ms: int) -> None:
        self._failing_since = None
        self.metrics.transactions.labels("committed").inc()
        now_ms = _now_ms()
        for partition in partitions:
            work = self._work.pop(partition)
            self._serving[partition].committed_work(work, now_ms, now_ms - started_ms)
            if work.capture is not None:
                self.report.checkpoints += 1
                self.metrics.checkpoints.inc()
                self.metrics.checkpoint_bytes.inc(work.capture.size_bytes)
                self.metrics.checkpoint_time.labels(str(partition)).set(time.time())
        self._release()

    def _hold(self) -> None:
        """Takes nothing new in; polls go on, so that the group knows that we live."""
        self._holding = True
        self.source.pause(self._serving)

    def _release(self) -> None:
        if self._holding and not self._work:
            self._holding = False
            self.source.resume(self._serving)

    def _finish(self) -> None:
        """A last checkpoint, so that whoever comes next reads nothing again. Given up after a while: it is only a courtesy."""
        deadline = time.monotonic() + FINISH_SECONDS
        self._hold()
        while time.monotonic() < deadline:
            if not self._in_doubt:
                self._gather(at_end=True)
                self._commit()
            if not self._work:
                return
            self._hold()
            self.round(at_end=True)
        log.warning(
            "no last checkpoint within %.0f s: what came since the one before is read again at the next start",
            FINISH_SECONDS,
        )

    # -- how far

    def _caught_up(self, ends: Mapping[int, int]) -> bool:
        """Everything up to the ends is read and committed."""
        positions = self.source.positions()
        return (
            bool(self._serving)
            and not self._arrivals
            and not self._work
            and all(
                min(positions.get(partition, -1), serving.emit_from) >= ends[partition]
                for partition, serving in self._serving.items()
            )
        )

    def _lag(self) -> int:
        """Records that are there and not taken in; -1 while no broker says."""
        positions = self.source.positions()
        try:
            ends = self.source.end_offsets()
        except BrokerUnavailable:
            return -1
        return sum(max(ends[p] - positions.get(p, 0), 0) for p in self._serving)


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
