"""Records in: a consumer group member (or a reader of fixed partitions) that hands out columns.

Positions are the caller's business. The source never commits, resets or skips on its own: a partition that has just
been assigned starts where the caller seeks to, else at the group's committed offset, and where there is neither that
is an error, as is an offset that retention has deleted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kafka import OffsetAndMetadata, TopicPartition
from kafka.errors import (
    CommitFailedError,
    CorruptRecordError,
    FencedInstanceIdError,
    IllegalGenerationError,
    KafkaError,
    KafkaTimeoutError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    RetriableError,
    UnknownMemberIdError,
)

from pipeline.errors import DeploymentError
from pipeline.kafka.clients import (
    REQUEST_TIMEOUT_MS,
    HasKafka,
    client_is_known,
    describe,
    fast_path,
    make_consumer,
    missing_topic,
    telling_deployment_errors,
)
from pipeline.kafka.columnar import ColumnarPartitionRecords
from pipeline.kafka.membership import Assignor, Joins, Listener, Membership, Place, Rebalances, fenced, hold
from pipeline.stream.columns import RecordColumns

log = logging.getLogger(__name__)

PartitionsHook = Callable[[Sequence[int]], None]

HEARTBEAT_MS = 2_000
"""How often a member shows that it lives, and so how soon it hears of a rebalance."""
FETCH_BYTES_PER_PARTITION = 2 * 2**20
FETCH_BYTES = 32 * 2**20
COLUMNS_PER_POLL = 1_000  # with the hook the client counts column sets, one a partition
RECORDS_PER_POLL = 20_000  # without it, records


class OffsetsUnstable(Exception):
    """A transaction that commits offsets of the group is still open: ask again later."""


class RecordSource:
    """Reads one topic. One thread; not to be shared.

    group: True = a member of `settings.kafka.group_id`; False = all partitions, or those given, without a group.
    hook: True = decode whole batches, False = the client's own iterator, None = whichever the installed client allows.
    on_assigned, on_revoked: called inside `poll`, on the thread that polls, with partition numbers. In `on_assigned`
    the caller may use every method of the source, and seeks where it wants to start. When `on_revoked` is called the
    partitions are already gone: whatever is to be committed has to be committed before `poll`.
    """

    def __init__(
        self,
        settings: HasKafka,
        topic: str,
        *,
        group: bool = True,
        isolation: str = "read_committed",
        hook: bool | None = None,
        partitions: Iterable[int] | None = None,
        on_assigned: PartitionsHook | None = None,
        on_revoked: PartitionsHook | None = None,
        **consumer_options: Any,
    ) -> None:
        self.topic = topic
        self.group_id = settings.kafka.group_id if group else None
        self.on_assigned = on_assigned
        self.on_revoked = on_revoked
        self._hooked = fast_path(hook, f'reading topic "{topic}"')
        self._rebalances = Rebalances()
        self._assignor = Assignor(self._missed_a_generation)
        self._owned: set[int] = set()
        self._sought: set[int] = set()
        self._paused: set[int] = set()
        self._consumer = make_consumer(
            settings,
            group_id=self.group_id,
            group_instance_id=(settings.kafka.group_instance_id or None) if group else None,
            session_timeout_ms=consumer_options.pop("session_timeout_ms", settings.kafka.session_timeout_ms),
            heartbeat_interval_ms=consumer_options.pop(
                "heartbeat_interval_ms", min(HEARTBEAT_MS, settings.kafka.session_timeout_ms // 3)
            ),
            partition_assignment_strategy=(self._assignor,),
            isolation_level=isolation,
            max_partition_fetch_bytes=consumer_options.pop("max_partition_fetch_bytes", FETCH_BYTES_PER_PARTITION),
            fetch_max_bytes=FETCH_BYTES,
            max_poll_records=COLUMNS_PER_POLL if self._hooked else RECORDS_PER_POLL,
            **consumer_options,
        )
        if self._hooked:
            self._consumer._fetcher.PartitionRecords = ColumnarPartitionRecords
        self._joins: Joins | None = None
        self._place: Place | None = None
        if client_is_known():
            if group:
                self._joins, self._place = Joins(self._consumer), Place(self._consumer)
            _do_not_sleep_on_data(self._consumer._fetcher)
        try:
            self._begin(group, partitions)
        except BaseException:
            self.close()
            raise

    @property
    def assignment(self) -> list[int]:
        """The partitions that are this source's now, ascending."""
        return sorted(self._owned)

    @property
    def partitions(self) -> list[int]:
        """All partitions of the topic, whoever reads them."""
        with telling_deployment_errors(f'asking for the partitions of topic "{self.topic}"'):
            return sorted(self._consumer.partitions_for_topic(self.topic) or ())

    def poll(self, timeout_ms: int = 200) -> list[RecordColumns]:
        """What has arrived, at most one set of columns a partition; waits up to `timeout_ms` for the first.

        Keep the timeout at half a second or less: a signal handler's wish to stop is seen between two polls.
        Raises DeploymentError for an offset outside the log, a partition without a start, damaged records, a broker that
        refuses, or another member that has taken this one's place.
        """
        self._settle()
        if self._joins is not None and self._place is not None:
            self._place.require()
            self._joins.before_poll()
        with telling_deployment_errors(f'reading topic "{self.topic}"'):
            fetched = self._poll_client(timeout_ms)
        # What was fetched of a partition that then went away is not ours, even if it has come back: it begins anew.
        kept = sorted(set(fetched) - self._settle())
        return [columns for partition in kept for columns in self._columns(partition, fetched[partition])]

    def positions(self) -> dict[int, int]:
        """The next offset that `poll` will give, of each assigned partition. Control records and gaps are passed
        over, so that a partition read to its end stands at `end_offsets()`. One that a rebalance is just taking away, or whose
        position the client has yet to validate with a broker, is left out."""
        own = self._held(self._owned)
        if client_is_known():  # its public position() asks a broker now and then, and raises when there is none
            known = self._consumer._subscription.all_consumed_offsets()
            return {p: int(known[self._tp(p)].offset) for p in own if self._tp(p) in known}
        found = {p: self._position(p) for p in own}
        return {p: position for p, position in found.items() if position is not None}

    def seek(self, partition: int, offset: int) -> None:
        """The next poll starts there. Nothing happens where a rebalance is just taking the partition away."""
        if partition not in self._owned:
            raise ValueError(f'partition {partition} of topic "{self.topic}" is not assigned: {self.assignment} are')
        if self._held([partition]):
            self._consumer.seek(self._tp(partition), offset)
        self._sought.add(partition)

    def beginning_offsets(self, partitions: Iterable[int] | None = None) -> dict[int, int]:
        """The oldest offset that retention has left, of each partition given (default: assigned)."""
        return self._offsets(self._consumer.beginning_offsets, partitions)

    def end_offsets(self, partitions: Iterable[int] | None = None) -> dict[int, int]:
        """The offset after the last one readable: under read_committed the last stable offset, where the oldest open
        transaction begins."""
        return self._offsets(self._consumer.end_offsets, partitions)

    def offsets_for_time(self, timestamp_ms: int, partitions: Iterable[int] | None = None) -> dict[int, int]:
        """The first offset whose record timestamp is `timestamp_ms` or later; the end offset where there is none."""
        tps = self._tps(partitions)
        with telling_deployment_errors(f'asking for offsets of topic "{self.topic}"'):
            found = self._consumer.offsets_for_times(dict.fromkeys(tps, timestamp_ms), REQUEST_TIMEOUT_MS)
        ends = self.end_offsets(tp.partition for tp in tps)
        return {tp.partition: found[tp].offset if found.get(tp) else ends[tp.partition] for tp in tps}

    def committed(self, partition: int, wait_ms: int = REQUEST_TIMEOUT_MS) -> int | None:
        """The group's committed offset, the next one to read; None where it has never committed.

        Under read_committed only an offset that no open transaction can still change is an answer (KIP-447). Raises
        OffsetsUnstable when there was none within `wait_ms`."""
        if self.group_id is None:
            return None
        with telling_deployment_errors(f'asking for the offsets of group "{self.group_id}"'):
            try:
                offset = self._consumer.committed(self._tp(partition), timeout_ms=wait_ms)
            except (KafkaTimeoutError, RetriableError) as error:
                raise OffsetsUnstable(describe(error)) from error
        return None if offset is None or offset < 0 else int(offset)

    def membership(self) -> Membership | None:
        """Which partitions are ours beyond doubt, and the proof of it; None between two generations of the group, and
        while `poll` has yet to tell what a rebalance did.

        The client names a new generation, and calls itself stable, before it has taken partitions away. A commit with that
        generation would be let through although it speaks of partitions that are another's by now: so a generation counts
        only once the assignment that came with it has been taken over. An older one does no harm, because the broker refuses
        it; until the next generation begins it is good, so that a rebalance under way does not stop anybody.
        """
        generation = self._assignor.generation
        metadata = self._consumer.group_metadata()
        joined = metadata.generation_id >= 0 and metadata.member_id and metadata.generation_id == generation
        if not joined or self._rebalances.waiting():
            return None
        return Membership(self.topic, frozenset(self._held(self._owned)), metadata)

    def commit(self, offsets: Mapping[int, int]) -> bool:
        """Commits the next offset to read of each partition given. True when the group has all of them.

        False while the group is rearranging itself: partitions that another member has by now are left alone, it reads
        on from what was committed before; those still assigned after the next poll can be committed then.
        Raises DeploymentError when the broker fails or refuses.
        """
        if self.group_id is None:
            raise ValueError("a source without a group has nothing to commit to: RecordSource(…, group=True)")
        own = {self._tp(p): OffsetAndMetadata(offset, "", -1) for p, offset in offsets.items() if self._still_ours(p)}
        if own:
            try:
                with telling_deployment_errors(f'committing for group "{self.group_id}"'):
                    self._commit(own)
            except _GroupMovedOn as moved:
                log.info("the group moved on, offsets not committed: %s", moved)
                return False
        return len(own) == len(offsets)

    def pause(self, partitions: Iterable[int]) -> None:
        """Reads these no further until `resume`; in `on_assigned`, does not begin with them."""
        paused = set(partitions) & self._owned
        self._paused |= paused
        self._consumer.pause(*map(self._tp, self._held(paused)))

    def resume(self, partitions: Iterable[int]) -> None:
        resumed = set(partitions) & self._owned
        self._paused -= resumed
        self._consumer.resume(*map(self._tp, self._held(resumed)))

    def close(self) -> None:
        """Leaves the group (a static member does not) and closes the connections, within ten seconds. Commits
        nothing."""
        self.on_assigned = self.on_revoked = None
        try:
            self._consumer.close(autocommit=False, timeout_ms=10_000)
        except KafkaError as error:
            log.info("closing the consumer of topic %s: %s", self.topic, describe(error))

    def __enter__(self) -> RecordSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, group: bool, partitions: Iterable[int] | None) -> None:
        existing = self.partitions
        if not existing:
            raise missing_topic(self.topic)
        if group:
            listener = Listener(self._rebalances, self._consumer, self._assignor)
            self._consumer.subscribe([self.topic], listener=listener)
            return
        wanted = sorted(existing if partitions is None else partitions)
        if unknown := set(wanted) - set(existing):
            raise DeploymentError(f'topic "{self.topic}" has partitions {existing}, not {sorted(unknown)}')
        self._consumer.assign([self._tp(p) for p in wanted])
        hold(self._consumer, map(self._tp, wanted))
        self._rebalances.assigned(wanted)

    def _poll_client(self, timeout_ms: int) -> dict[int, list[Any]]:
        try:
            return {tp.partition: found for tp, found in self._consumer.poll(timeout_ms).items()}
        except FencedInstanceIdError as error:
            raise fenced(self._consumer.config["group_instance_id"]) from error
        except OffsetOutOfRangeError as error:
            raise self._out_of_range(error.args[0]) from error
        except CorruptRecordError as error:
            raise DeploymentError(
                f'topic "{self.topic}", positions {self.positions()}: {describe(error)}; the log or the network is'
                " damaged: repair the broker's disk, or seek past the batch"
            ) from error
        except RetriableError as error:  # a broker restarts, a leader moves: the client finds its way back by itself
            log.warning("reading topic %s: %s; trying again", self.topic, describe(error))
            time.sleep(timeout_ms / 1000)
            return {}

    def _columns(self, partition: int, found: list[Any]) -> list[RecordColumns]:
        if self._hooked:
            return found  # one: a partition has one fetch at a time, and a fetch is one set of columns
        records = ((r.offset, r.timestamp, r.key, r.value, r.headers or ()) for r in found)
        return [RecordColumns.build(self.topic, partition, records)]

    def _settle(self) -> set[int]:
        """Tells the caller what the rebalances since the last call did, and lets new partitions run once they have a
        start. Returns the partitions that were taken away."""
        taken: set[int] = set()
        for kind, partitions in self._rebalances.take():
            if kind == "revoked":
                lost = sorted(self._owned & set(partitions))
                self._owned -= set(lost)
                taken |= set(lost)
                if lost and self.on_revoked:
                    self.on_revoked(lost)
                continue
            new = self._held(set(partitions) - self._owned)  # a later event may have taken one away again
            self._owned |= set(new)
            self._sought -= set(new)
            self._paused -= set(new)
            if new and self.on_assigned:
                self.on_assigned(new)
            self._start(new)
        return taken

    def _missed_a_generation(self, kept: Iterable[Any]) -> None:
        """Called on the client's network thread. The client believes that it never lost these partitions, but the group
        went on without it for a generation, in which they may have been another's: they begin anew."""
        log.warning("the group went on without this worker: partitions that it still has begin anew")
        again = list(kept)
        self._rebalances.revoked(tp.partition for tp in again)  # first: from here on nothing is committed for them
        hold(self._consumer, again)
        self._rebalances.assigned(tp.partition for tp in again)

    def _position(self, partition: int) -> int | None:
        try:
            return int(self._consumer.position(self._tp(partition), timeout_ms=REQUEST_TIMEOUT_MS))
        except KafkaError:
            return None

    def _start(self, partitions: Sequence[int]) -> None:
        for partition in self._held(partitions):
            if partition not in self._sought:
                offset = self.committed(partition)
                if offset is None:
                    raise DeploymentError(
                        f'topic "{self.topic}", partition {partition}: the group "{self.group_id}" has committed no'
                        " offset and no start was given; seek() in on_assigned, to beginning_offsets() or end_offsets()"
                    )
                self._consumer.seek(self._tp(partition), offset)
            if partition not in self._paused:
                self._consumer.resume(self._tp(partition))

    def _held(self, partitions: Iterable[int]) -> list[int]:
        """Those the client still has, ascending: a rebalance may go on in the background between two polls."""
        return sorted(set(partitions) & {tp.partition for tp in self._consumer.assignment()})

    def _still_ours(self, partition: int) -> bool:
        return partition in self._owned and not self._rebalances.revokes(partition)

    def _commit(self, offsets: dict[Any, Any]) -> None:
        try:
            self._consumer.commit(offsets, timeout_ms=REQUEST_TIMEOUT_MS)
        except FencedInstanceIdError as error:
            raise fenced(self._consumer.config["group_instance_id"]) from error
        except (CommitFailedError, IllegalGenerationError, RebalanceInProgressError, UnknownMemberIdError) as error:
            raise _GroupMovedOn(describe(error)) from error

    def _out_of_range(self, asked: Mapping[Any, int]) -> DeploymentError:
        partitions = [tp.partition for tp in asked]
        first, end = self.beginning_offsets(partitions), self.end_offsets(partitions)
        parts = [
            f"partition {tp.partition}: offset {offset} was asked for, the log holds [{first[tp.partition]},"
            f" {end[tp.partition]})"
            for tp, offset in asked.items()
        ]
        return DeploymentError(
            f'topic "{self.topic}", {"; ".join(parts)}. Retention or a new topic of the same name took the records'
            " away: lengthen topics.readings_retention, or start the group anew from the beginning (what is missing stays missing)"
        )

    def _offsets(
        self, ask: Callable[[list[Any], int], Mapping[Any, int]], partitions: Iterable[int] | None
    ) -> dict[int, int]:
        with telling_deployment_errors(f'asking for offsets of topic "{self.topic}"'):
            return {tp.partition: int(offset) for tp, offset in ask(self._tps(partitions), REQUEST_TIMEOUT_MS).items()}

    def _tps(self, partitions: Iterable[int] | None) -> list[Any]:
        return [self._tp(p) for p in (self.assignment if partitions is None else partitions)]

    def _tp(self, partition: int) -> Any:
        return TopicPartition(self.topic, partition)


class _GroupMovedOn(Exception):
    """A commit came too late: the partitions have another owner, or the group is choosing one."""


def _do_not_sleep_on_data(fetcher: Any) -> None:
    """3.0.12 calls itself idle, and then sleeps `retry_backoff_ms`, also when a fetch has arrived between its look
    into the buffer and its look at the requests under way."""
    fetch_records = fetcher.fetch_records

    def fetch_records_awake(*args: Any, **options: Any) -> tuple[Any, bool]:
        records, idle = fetch_records(*args, **options)
        return records, idle and not fetcher._completed_fetches

    fetcher.fetch_records = fetch_records_awake
