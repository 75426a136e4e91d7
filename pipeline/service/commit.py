"""How what a round made leaves the worker: in one transaction, or at least once.

Both take the work of several partitions and return when it is out and the group stands at its offsets. Both raise
TransactionFailed when that is not known: the caller asks the group (after `settle`) and tries the very same work again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.kafka.changelog import checkpoint_records
from pipeline.kafka.membership import Membership
from pipeline.kafka.sink import RecordSink
from pipeline.kafka.source import RecordSource
from pipeline.kafka.transactions import TransactionalSink, TransactionFailed
from pipeline.settings import Settings
from pipeline.stream.checkpoint import Capture
from pipeline.stream.columns import OutgoingRecords


@dataclass(slots=True)
class PartitionWork:
    """What one input partition has to say, and the offset that follows from it."""

    offset: int
    """The next offset to read: what is committed."""
    outgoing: list[OutgoingRecords] = field(default_factory=list)
    capture: Capture | None = None


Work = Mapping[int, PartitionWork]
"""By input partition."""


class Committer(Protocol):
    def commit(self, work: Work, membership: Membership) -> None: ...
    def settle(self) -> None: ...
    def close(self) -> None: ...


class ExactlyOnce:
    """Forecasts, dead letters, checkpoints and offsets: all or nothing."""

    def __init__(self, transactions: TransactionalSink, state_topic: str) -> None:
        self._transactions = transactions
        self._state_topic = state_topic

    def commit(self, work: Work, membership: Membership) -> None:
        batches = [*_outgoing(work), *_checkpoints(work, self._state_topic)]
        self._transactions.commit(batches, _offsets(work), membership)

    def settle(self) -> None:
        self._transactions.settle()

    def close(self) -> None:
        self._transactions.close()


class AtLeastOnce:
    """Forecasts and dead letters first, then offsets; checkpoints in a transaction with the offsets, because half a
    checkpoint would be none."""

    def __init__(
        self, sink: RecordSink, transactions: TransactionalSink, source: RecordSource, state_topic: str
    ) -> None:
        self._sink = sink
        self._transactions = transactions
        self._source = source
        self._state_topic = state_topic

    def commit(self, work: Work, membership: Membership) -> None:
        self._sink.deliver(list(_outgoing(work)))
        checkpoints = list(_checkpoints(work, self._state_topic))
        if checkpoints:
            self._transactions.commit(checkpoints, _offsets(work), membership)
        elif not self._source.commit(_offsets(work)):
            raise TransactionFailed("the group moved on before the offsets were committed")

    def settle(self) -> None:
        self._transactions.settle()

    def close(self) -> None:
        self._sink.close()
        self._transactions.close()


def open_transactions(settings: Settings) -> TransactionalSink:
    """A sink for this worker's transactions, ready to commit. Opened before the worker joins its group: what a worker of the
    same kafka.group_instance_id left open is ended by that. Raises DeploymentError when no broker answers or it refuses us."""
    name = settings.kafka.group_instance_id or uuid.uuid4().hex
    return TransactionalSink(settings, f"{settings.kafka.group_id}-{name}")


def make_committer(settings: Settings, transactions: TransactionalSink, source: RecordSource) -> Committer:
    """As kafka.processing_guarantee says."""
    if settings.kafka.processing_guarantee == "exactly_once":
        return ExactlyOnce(transactions, settings.topics.state_topic)
    return AtLeastOnce(RecordSink(settings), transactions, source, settings.topics.state_topic)


def _outgoing(work: Work) -> Iterator[OutgoingRecords]:
    for partition in sorted(work):
        yield from work[partition].outgoing


def _checkpoints(work: Work, topic: str) -> Iterator[OutgoingRecords]:
    for partition in sorted(work):
        capture = work[partition].capture
        if capture is not None:
            yield checkpoint_records(capture, topic, partition)


def _offsets(work: Work) -> dict[int, int]:
    return {partition: one.offset for partition, one in work.items()}
