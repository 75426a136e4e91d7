"""Records out, exactly once: forecasts, dead letters, checkpoint and input offsets in one Kafka transaction (KIP-98), fenced by
the consumer group's generation (KIP-447).

The commit protocol, in the order of the code:

1. begin            a transaction of the producer's own id
2. send             every batch, whole, one future a batch
3. flush            and ask every future: the client's flush() itself swallows failures
4. require open     the producer is still in the transaction that it began
5. send offsets     with the group's metadata as it was when the partitions were known to be ours; left out where there is no group
6. commit           within a time limit

Whatever goes wrong, and wherever, one rule holds: the producer is thrown away, and `TransactionFailed` is raised. Whether the
transaction was committed is then not known here, and nothing is guessed: `settle` opens another producer with the same id, upon
which the broker ends the old transaction (completes it, if its commit had been decided, else aborts it), and from then on the group's
committed offsets tell which it was.

kafka-python 3.0.12 needs the following guards (numbers as in tests/contract/test_transactions.py, which shows each):

| the client's defect | guard |
|---|---|
| 1 offsets of an aborted transaction are sent again with the next one | a producer is never used after a failure |
| 2 a record that timed out is dropped, and commit succeeds without it | step 3 asks every future |
| 3 OUT_OF_ORDER_SEQUENCE while committing is swallowed | step 3 comes before step 6 |
| 4 after an epoch bump in mid-transaction the producer calls itself ready | step 4 |
| 5 commit with unsent batches stops lingering for good: a request a batch from then on | step 3 comes before step 6 |
| 6 init, offsets, commit and abort wait without a limit | each runs on a thread that is given up after a while (abort is not needed) |
| 7 a fenced producer takes a fresh id and goes on | step 5 names member and generation, and a fenced member stops (see `commit`) |
| 8 the first request of a transaction waits `retry_backoff_ms` for the one before | `retry_backoff_ms` is 5 |
| 9 a batch that expired while it was retried breaks the sender thread's state | a producer is never used after a failure |
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from kafka import OffsetAndMetadata, TopicPartition
from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    IllegalStateError,
    InvalidRecordError,
    InvalidTimestampError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    UnsupportedVersionError,
)

from pipeline.errors import DeploymentError
from pipeline.kafka.clients import HasKafka, client_is_known, describe, make_producer
from pipeline.kafka.membership import Membership, fenced
from pipeline.kafka.sink import GRACE_SECONDS, LINGER_MS, SEND_BATCH_BYTES, RecordSink, throw_away
from pipeline.stream.columns import OutgoingRecords

log = logging.getLogger(__name__)

R = TypeVar("R")

RETRY_BACKOFF_MS = 5
"""The first request of a transaction often comes while the broker still ends the one before, and is tried again after so long:
12 ms a transaction, where the client's default of 100 ms makes it 114."""
FINAL = (
    AuthorizationError,
    FencedInstanceIdError,
    InvalidRecordError,
    InvalidTimestampError,
    MessageSizeTooLargeError,
    UnsupportedVersionError,
)
"""Failures that would come again: a person has to act."""


class TransactionFailed(Exception):
    """The transaction was not seen to commit. `settle`, then ask the group what is committed."""


class TransactionalSink:
    """Commits records together with the input offsets that they follow from. One thread; not to be shared.

    Making one opens it: raises DeploymentError when no broker answers, or it refuses us.

    transactional_id: a worker that takes another's place uses the other's id, so that what that one left open is ended at once
    and not when it times out.
    """

    def __init__(self, settings: HasKafka, transactional_id: str, *, encode: bool | None = None) -> None:
        self.transactional_id = transactional_id
        self._timeout_seconds = settings.kafka.transaction_timeout_ms / 1000
        self._records = _TransactionalRecords(settings, transactional_id, encode)

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has. Raises DeploymentError where it does not exist."""
        return self._records.partitions(topic)

    def commit(
        self, batches: Sequence[OutgoingRecords], offsets: Mapping[int, int], membership: Membership | None
    ) -> None:
        """Commits all of it or nothing: when this returns, readers of committed records see the batches, and the group
        stands at the offsets (the next to read, by input partition).

        membership: None where no group is concerned, and `offsets` empty. The transactional id alone then keeps two writers
        apart: the one that was opened first fails, once. After `settle` it is the other's turn to fail, so whoever commits without
        a group reads what is committed before it tries again.

        Raises TransactionFailed where it may or may not have been committed, and DeploymentError where trying again cannot
        help. Either way the producer is gone; `settle` before the next commit.
        """
        if offsets and membership is None:
            raise ValueError(f"offsets {dict(offsets)} came without a membership: whose are they?")
        try:
            self._begin()
            self._send(batches)
            self._flush()
            self._require_open()
            if membership is not None:
                self._send_offsets(offsets, membership)
            self._commit()
        except DeploymentError as error:
            self._records.abandon()
            if isinstance(error.__cause__, KafkaError) and not isinstance(error.__cause__, FINAL):
                raise TransactionFailed(str(error)) from error
            raise
        except (KafkaError, IllegalStateError) as error:
            self._records.abandon()
            if isinstance(error, FINAL):
                raise _final(error, membership) from error
            raise TransactionFailed(describe(error)) from error

    def settle(self) -> None:
        """Ends whatever a producer with this id left open, one way or the other, and makes ready for the next commit.
        Nothing happens where all is well. Raises TransactionFailed where no broker answers, and DeploymentError where it
        refuses us."""
        try:
            self._records.producer()
        except DeploymentError as error:
            self._records.abandon()
            if isinstance(error.__cause__, FINAL):
                raise
            raise TransactionFailed(str(error)) from error

    def close(self) -> None:
        """Stops the client's threads. A transaction that is open is given up: the broker aborts it when it times out."""
        self._records.abandon()

    # -- the steps of the protocol

    def _begin(self) -> None:
        self._records.producer().begin_transaction()

    def _send(self, batches: Sequence[OutgoingRecords]) -> None:
        for batch in batches:
            self._records.async_send(batch)

    def _flush(self) -> None:
        self._records.flush()

    def _require_open(self) -> None:
        if not client_is_known():
            return
        state = self._records.producer()._transaction_manager._current_state.name
        if state != "IN_TRANSACTION":
            raise IllegalStateError(f"the producer left its transaction: it is in state {state}")

    def _send_offsets(self, offsets: Mapping[int, int], membership: Membership) -> None:
        named = {TopicPartition(membership.topic, p): OffsetAndMetadata(o, "", -1) for p, o in offsets.items()}
        producer = self._records.producer()
        bounded(
            "sending offsets", self._timeout_seconds, producer.send_offsets_to_transaction, named, membership.metadata
        )

    def _commit(self) -> None:
        bounded("committing a transaction", self._timeout_seconds, self._records.producer().commit_transaction)


class _TransactionalRecords(RecordSink):
    """The sink's sending, by a producer with a transactional id."""

    def __init__(self, settings: HasKafka, transactional_id: str, encode: bool | None) -> None:
        self._transactional_id = transactional_id
        self._transaction_timeout_ms = settings.kafka.transaction_timeout_ms
        super().__init__(settings, encode=encode, delivery_timeout_ms=settings.kafka.transaction_timeout_ms)

    def producer(self) -> Any:
        return self._client()

    def abandon(self) -> None:
        if self._producer is not None:
            self._abandon()

    def _open(self) -> Any:
        # A transaction that does not end in time is aborted by the broker; no request of it may outlast that.
        timeout_ms = self._transaction_timeout_ms
        producer = make_producer(
            self._settings,
            transactional_id=self._transactional_id,
            transaction_timeout_ms=timeout_ms,
            delivery_timeout_ms=timeout_ms,
            request_timeout_ms=timeout_ms // 2,
            max_block_ms=timeout_ms,
            retry_backoff_ms=RETRY_BACKOFF_MS,
            linger_ms=LINGER_MS,
            batch_size=SEND_BATCH_BYTES,
        )
        try:
            bounded("opening transactions", timeout_ms / 1000 + GRACE_SECONDS, producer.init_transactions)
        except KafkaError as error:
            throw_away(producer)
            raise DeploymentError(
                f'opening transactions as "{self._transactional_id}": {describe(error)}; check the brokers (a transaction log'
                " needs transaction.state.log.replication.factor of them) and the ACLs of the transactional id"
            ) from error
        return producer

    def _before_append(self, producer: Any, partition: Any) -> None:
        producer._transaction_manager.maybe_add_partition_to_transaction(partition)

    def _abandon(self) -> None:
        if self._producer is None:  # another step has seen to it
            return
        super()._abandon()


def bounded(what: str, timeout_seconds: float, call: Callable[..., R], *arguments: Any) -> R:
    """A call of the client that has no time limit of its own, on a thread that is given up after so long.

    Raises KafkaTimeoutError then, else whatever the call raises."""
    outcome: Future[R] = Future()

    def run() -> None:
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=f"millrace: {what}", daemon=True).start()
    try:
        return outcome.result(timeout_seconds)
    except FutureTimeoutError:
        raise KafkaTimeoutError(f"{what}: no answer within {timeout_seconds:.0f} s") from None


def _final(error: Exception, membership: Membership | None) -> DeploymentError:
    if isinstance(error, FencedInstanceIdError) and membership is not None:
        return fenced(membership.instance_id)
    return DeploymentError(
        f"committing a transaction: {describe(error)}; check the ACLs of the group, the topics and the transactional id"
    )
