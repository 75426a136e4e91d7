"""Records out, at least once: what `deliver` has returned for, all in-sync replicas hold.

Whole record batches are handed to the client's accumulator, one future a batch, where the installed client is the one
this was written for (`clients.KNOWN_CLIENT_VERSION`); record by record through its public `send` otherwise. Either
way the client's sender thread does the network, the retries and the idempotence (no duplicates from retries, order
kept within a partition).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from kafka import TopicPartition
from kafka.errors import (
    IllegalStateError,
    InvalidTimestampError,
    InvalidTopicError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    UnknownTopicOrPartitionError,
)
from kafka.producer.future import FutureRecordMetadata
from kafka.producer.producer_batch import ProducerBatch

from pipeline.errors import DeploymentError
from pipeline.kafka.clients import REQUEST_TIMEOUT_MS, HasKafka, describe, fast_path, make_producer, missing_topic
from pipeline.kafka.encode import EncodedBatch, encode_batches
from pipeline.kafka.partitioner import Partitioner, partition_for
from pipeline.stream.columns import Headers, OutgoingRecords

__all__ = ["Partitioner", "RecordSink", "partition_for"]

BATCH_BYTES = 1_000_000
"""A batch before compression; below clients.MAX_REQUEST_BYTES and a broker's default limit, with room for the request
around it."""
PENDING_BYTES = 64 * 2**20
"""What may be on its way before `async_send` waits: the client itself has no bound and would take the whole replay
into memory."""
DELIVERY_TIMEOUT_MS = 120_000
GRACE_SECONDS = 5.0  # the client times deliveries out by itself; this is for its answer to reach us

# For records sent one by one only:
LINGER_MS = 5
SEND_BATCH_BYTES = 256 * 1024
RECORD_BYTES = 500  # what the client's future and our entry cost in memory beside the bytes


class RecordSink:
    """Sends OutgoingRecords. One thread; not to be shared.

    encode: True = whole batches, False = the client's `send`, None = whichever the installed client allows.
    """

    def __init__(
        self,
        settings: HasKafka,
        *,
        encode: bool | None = None,
        delivery_timeout_ms: int = DELIVERY_TIMEOUT_MS,
        pending_bytes: int = PENDING_BYTES,
    ) -> None:
        self._encode = fast_path(encode, "sending records")
        self._settings = settings
        self._compression = settings.kafka.compression
        self._timeout_seconds = delivery_timeout_ms / 1000
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._pending_limit = pending_bytes
        self._partitions: dict[str, set[int]] = {}
        self._closed = False
        self._producer: Any = self._open()

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has. Raises DeploymentError where it does not exist."""
        return len(self._known_partitions(topic))

    def deliver(self, batches: Sequence[OutgoingRecords]) -> None:
        """Sends everything and returns when every record is acknowledged; takes the order of records per partition
        from the order given.

        Raises DeploymentError when a record could not be delivered in time. Others may have been: the caller delivers
        again from its last committed offset.
        """
        for batch in batches:
            self.async_send(batch)
        self.flush()

    def async_send(self, batch: OutgoingRecords) -> None:
        """Puts the records on their way, and waits while too much is on its way already. `flush` tells whether they
        arrived.

        Raises DeploymentError for records sent earlier that failed, for a topic or partition that does not exist, and
        for a record too large to be sent.
        """
        if not len(batch):
            return
        if batch.partition not in self._known_partitions(batch.topic):
            raise DeploymentError(
                f'topic "{batch.topic}" has {self.partitions(batch.topic)} partitions, records for partition'
                f' {batch.partition} came; "millrace topics check" compares the topics with the settings'
            )
        for pending in self._send_encoded(batch) if self._encode else self._send_one_by_one(batch):
            self._pending.append(pending)
            self._pending_bytes += pending.size_bytes
            while self._pending_bytes > self._pending_limit:
                failure = self._await_oldest(time.monotonic() + self._timeout_seconds + GRACE_SECONDS)
                if failure is not None:
                    self._abandon()
                    raise failure

    def flush(self) -> None:
        """Returns when everything sent so far is acknowledged. Raises DeploymentError naming the first that was not."""
        deadline = time.monotonic() + self._timeout_seconds + GRACE_SECONDS
        failure: DeploymentError | None = None
        while self._pending:
            failed = self._await_oldest(deadline)
            failure = failure or failed
        if failure is not None:
            self._abandon()
            raise failure

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Stops the client's threads; what is not acknowledged by then is given up. Never raises, never hangs."""
        self._closed = True
        try:
            if self._producer is not None:
                self._producer.close(timeout=timeout_seconds)
                self._producer = None
        except KafkaError:  # its flush timed out, and it left itself open
            self._abandon()

    def __enter__(self) -> RecordSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        delivery_timeout_ms = int(self._timeout_seconds * 1000)
        return make_producer(
            self._settings,
            delivery_timeout_ms=delivery_timeout_ms,
            request_timeout_ms=min(REQUEST_TIMEOUT_MS, delivery_timeout_ms - LINGER_MS),
            linger_ms=LINGER_MS,
            batch_size=SEND_BATCH_BYTES,
        )

    def _before_append(self, producer: Any, partition: Any) -> None:
        """For a sink whose batches belong to a transaction."""

    def _client(self) -> Any:
        if self._closed:
            raise DeploymentError("the sink is closed")
        if self._producer is None:
            self._producer = self._open()
        return self._producer

    def _abandon(self) -> None:
        """Gives up whatever is under way, and the producer with it: after a failed batch 3.0.12 fails the next ones,
        too, while it sorts out its sequence numbers. The next record opens another."""
        producer, self._producer = self._producer, None
        self._pending.clear()
        self._pending_bytes = 0
        self._partitions.clear()  # another producer has to learn of a topic before batches are handed to it
        throw_away(producer)

    def _await_oldest(self, deadline: float) -> DeploymentError | None:
        pending = self._pending.popleft()
        self._pending_bytes -= pending.size_bytes
        error = pending.wait(max(0.0, deadline - time.monotonic()))
        return None if error is None else _undelivered(pending.partition, pending.count, pending.size_bytes, error)

    def _known_partitions(self, topic: str) -> set[int]:
        if topic not in self._partitions:
            try:
                self._partitions[topic] = set(self._client().partitions_for(topic))
            except (KafkaTimeoutError, InvalidTopicError, UnknownTopicOrPartitionError) as error:
                raise missing_topic(topic) from error
            except KafkaError as error:
                raise DeploymentError(f'reading the partitions of topic "{topic}": {describe(error)}') from error
        return self._partitions[topic]

    def _send_encoded(self, records: OutgoingRecords) -> Sequence[_Pending]:
        now_ms = time.time_ns() // 1_000_000
        return [
            self._append(TopicPartition(records.topic, records.partition), encoded)
            for encoded in encode_batches(records, self._compression, BATCH_BYTES, now_ms)
        ]

    def _append(self, partition: Any, encoded: EncodedBatch) -> _Pending:
        """What KafkaProducer.send and RecordAccumulator.append of 3.0.12 do for one record, for a whole batch."""
        producer = self._client()
        accumulator = producer._accumulator
        batch = ProducerBatch(partition, encoded)
        batch._record_futures = futures = _FuturesIfSplit(batch)
        accumulator._appends_in_progress.increment()
        try:
            self._before_append(producer, partition)
            with accumulator._tp_lock(partition):
                accumulator._batches[partition].append(batch)
                accumulator._incomplete.add(batch)
        finally:
            accumulator._appends_in_progress.decrement()
        producer._sender.wakeup()
        return _Pending(partition, encoded.next_offset(), encoded.size_in_bytes(), _BatchInFlight(batch, futures))

    def _send_one_by_one(self, records: OutgoingRecords) -> Sequence[_Pending]:
        partition = TopicPartition(records.topic, records.partition)
        timestamps = [None] * len(records) if records.timestamps_ms is None else records.timestamps_ms.tolist()
        headers: Sequence[Headers] = [()] * len(records) if records.headers is None else records.headers
        sent = []
        for key, value, own, timestamp_ms in zip(records.keys, records.values, headers, timestamps):
            size = len(key or b"") + len(value or b"")
            # `send` refuses what the format allows: a header without a value, a record with neither key nor value.
            value = b"" if key is None and value is None else value
            legal = [(name, content or b"") for name, content in own]
            try:
                future = self._client().send(records.topic, value, key, legal, records.partition, timestamp_ms)
            except (KafkaError, IllegalStateError) as error:
                raise _undelivered(partition, 1, size, error) from error
            sent.append(_Pending(partition, 1, size + RECORD_BYTES, _RecordInFlight(future)))
        return sent


class _InFlight(Protocol):
    def wait(self, timeout_seconds: float) -> Exception | None: ...


@dataclass(frozen=True, slots=True)
class _Pending:
    """Something sent and not yet known to have arrived."""

    partition: Any
    count: int
    size_bytes: int
    in_flight: _InFlight

    def wait(self, timeout_seconds: float) -> Exception | None:
        return self.in_flight.wait(timeout_seconds)


class _BatchInFlight:
    """A whole batch: one future, unless the client had to split it."""

    def __init__(self, batch: Any, futures: _FuturesIfSplit) -> None:
        self._future = batch.produce_future
        self._futures = futures

    def wait(self, timeout_seconds: float) -> Exception | None:
        deadline = time.monotonic() + timeout_seconds
        self._future.wait(timeout_seconds)
        if self._futures.made:
            return self._futures.wait(deadline)
        if not self._future.is_done:
            return _timeout(f"no acknowledgement within {timeout_seconds:.0f} s")
        if self._future.failed():
            return _as_exception(self._future.exception)
        error_of = self._future.value[2]  # (base offset, append time, None or record -> exception)
        return None if error_of is None else _as_exception(error_of(0))


class _FuturesIfSplit:
    """The record futures of a batch that has none, made when the client asks for them.

    A broker that finds a batch too large for its topic makes the client split it; the client then moves each record's
    future to the smaller batch it went into, and the batch's own future never completes.
    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self.made: list[Any] = []

    def __len__(self) -> int:
        return int(self._batch.record_count)

    def __getitem__(self, row: int) -> Any:
        future = FutureRecordMetadata(self._batch.produce_future, row, None, None, -1, -1, -1)
        self.made.append(future)
        return future

    def wait(self, deadline: float) -> Exception | None:
        while len(self.made) < len(self) and time.monotonic() < deadline:
            time.sleep(0.001)  # the sender thread is still splitting
        if len(self.made) < len(self):
            return _timeout("the client did not finish splitting a batch")
        errors = (_RecordInFlight(future).wait(max(0.0, deadline - time.monotonic())) for future in self.made)
        return next((error for error in errors if error is not None), None)


class _RecordInFlight:
    def __init__(self, future: Any) -> None:
        self._future = future

    def wait(self, timeout_seconds: float) -> Exception | None:
        try:
            self._future.get(timeout=timeout_seconds)
        except KafkaError as error:
            return _as_exception(error)
        return None


def throw_away(producer: Any) -> None:
    """Ends a producer at once: what it has not sent by now it will not send."""
    producer._sender.force_close()
    producer._sender.join(GRACE_SECONDS)
    with suppress(KafkaError):  # its thread hangs, and holds on to what it has: it is a daemon and ends with us
        producer.close(timeout=0)


def _undelivered(partition: Any, count: int, size_bytes: int, error: Exception) -> DeploymentError:
    hint = "check that the broker and its replicas are up (millrace broker status)"
    if isinstance(error, MessageSizeTooLargeError):
        hint = "raise the topic's max.message.bytes"
    elif isinstance(error, UnknownTopicOrPartitionError):
        hint = 'create the topic with "millrace topics create"'
    elif isinstance(error, InvalidTimestampError) or "invalid record" in str(error):
        # The client passes the broker's words on without their error code.
        hint = (
            "most likely a timestamp further ahead of the broker's clock than the topic's"
            " message.timestamp.after.max.ms allows (an hour, unless set)"
        )
    failure = DeploymentError(
        f'{count} record(s), {size_bytes} bytes, for topic "{partition.topic}", partition {partition.partition}'
        f" were not delivered: {describe(error)}; {hint}"
    )
    failure.__cause__ = error
    return failure


def _as_exception(error: Any) -> Exception:
    return error if isinstance(error, Exception) else KafkaError(str(error))


def _timeout(message: str) -> Exception:
    return _as_exception(KafkaTimeoutError(message))
