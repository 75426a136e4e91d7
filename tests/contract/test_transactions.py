"""TransactionalSink against a real broker: the protocol, and each guard against a defect of kafka-python 3.0.12.

Every guard is tested twice: with it nothing is lost or repeated, and without it (`guarded=False` takes it away) the very same fault does
the damage. So the tests show that the guards are needed, and that the faults are real.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress

import pytest
from kafka.errors import KafkaError, NotLeaderForPartitionError, OutOfOrderSequenceNumberError
from kafka.structs import ConsumerGroupMetadata

from pipeline.errors import DeploymentError
from pipeline.kafka.membership import Membership
from pipeline.kafka.source import RecordSource
from pipeline.kafka.transactions import RETRY_BACKOFF_MS, TransactionalSink, TransactionFailed, bounded
from pipeline.settings import load
from pipeline.stream.columns import OutgoingRecords
from tests.helpers.broker import make_topic, read_all
from tests.helpers.faults import FaultyNetwork

both = pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
PARTITIONS = 3


class Bench:
    """An input and an output topic, a sink, and the group whose offsets it commits."""

    def __init__(self, broker, domain, timeout="20s"):
        self.broker = broker
        self.settings = load(
            None,
            {},
            {
                "kafka.bootstrap_servers": broker.bootstrap_servers,
                "kafka.transaction_timeout": timeout,
                "topics.domain": domain,
            },
        )
        self.source_topic = make_topic(broker, f"{domain}.in", PARTITIONS)
        self.topic = make_topic(broker, f"{domain}.out", PARTITIONS)
        self.group = self.settings.kafka.group_id
        self.sinks = []

    def sink(self, name="", **options):
        sink = TransactionalSink(self.settings, name or f"{self.group}-{uuid.uuid4().hex}", **options)
        self.sinks.append(sink)
        sink.settle()
        return sink

    def network(self, sink):
        return FaultyNetwork(sink._records.producer())

    def alone(self):
        """Offsets of a group without members: nobody to be fenced by."""
        return Membership(self.source_topic, frozenset(range(PARTITIONS)), ConsumerGroupMetadata(self.group))

    def values(self, isolation="read_committed"):
        return [record.value.decode() for record in read_all(self.broker, self.topic, isolation)]

    def committed(self, partition):
        with RecordSource(self.settings, self.source_topic) as source:
            return source.committed(partition)

    def close(self):
        for sink in self.sinks:
            sink.close()


@pytest.fixture
def bench(broker, domain):
    made = []

    def make(**options):
        made.append(Bench(broker, domain, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def texts(topic, *values, partition=0):
    return OutgoingRecords(topic, partition, [b"k"] * len(values), [value.encode() for value in values])


@pytest.mark.parametrize("encode", [True, False], ids=["encoded", "send"])
def test_records_and_offsets_are_committed_together(bench, encode):
    bench = bench()
    sink = bench.sink(encode=encode)
    sink.commit([texts(bench.topic, "a", "b"), texts(bench.topic, "c", partition=1)], {0: 7, 1: 9}, bench.alone())
    sink.commit([texts(bench.topic, "d")], {0: 8}, bench.alone())
    sink.commit([], {2: 3}, bench.alone())
    assert bench.values() == ["a", "b", "d", "c"]
    assert [bench.committed(partition) for partition in range(3)] == [8, 9, 3]


def test_nothing_of_a_transaction_that_was_given_up_is_ever_seen(bench):
    bench = bench()
    sink = bench.sink("worker-1")
    sink._begin()
    sink._send([texts(bench.topic, "half done")])
    sink._flush()
    sink._send_offsets({0: 5}, bench.alone())
    sink.close()  # as kill -9 would
    successor = bench.sink("worker-1")
    assert bench.values("read_uncommitted") == ["half done"]
    successor.commit([texts(bench.topic, "whole")], {0: 6}, bench.alone())
    assert bench.values() == ["whole"]
    assert bench.committed(0) == 6


def test_a_commit_whose_answer_was_lost_is_found_in_the_groups_offsets(bench):
    bench = bench(timeout="4s")
    sink = bench.sink()
    bench.network(sink).silence("EndTxnRequest")
    with pytest.raises(TransactionFailed, match="committing a transaction: no answer within 4 s"):
        sink.commit([texts(bench.topic, "a")], {0: 1}, bench.alone())
    sink.settle()
    assert bench.committed(0) == 1
    assert bench.values() == ["a"]


def test_1_offsets_of_a_failed_transaction_do_not_come_along_with_the_next(bench):
    run_1(bench(), guarded=True)


def test_1_unguarded(bench):
    run_1(bench(), guarded=False)


def run_1(bench, guarded):
    sink = bench.sink()
    if not guarded:
        keep_the_producer(sink)
    stale = Membership(bench.source_topic, frozenset([0]), ConsumerGroupMetadata(bench.group, 3, "nobody"))
    with pytest.raises(TransactionFailed):
        sink.commit([texts(bench.topic, "a")], {0: 111}, stale)
    sink.settle()
    sink.commit([texts(bench.topic, "b")], {1: 5}, bench.alone())
    assert bench.committed(1) == 5
    assert bench.committed(0) == (None if guarded else 111)


@both
def test_2_a_record_that_timed_out_fails_its_transaction(bench, guarded):
    bench = bench(timeout="3s")
    sink = bench.sink()
    if not guarded:
        sink._flush = lambda: sink._records.producer().flush(10)
    network = bench.network(sink)
    network.fail("ProduceRequest", NotLeaderForPartitionError, times=float("inf"))
    if guarded:
        with pytest.raises(TransactionFailed, match="not delivered"):
            sink.commit([texts(bench.topic, "lost")], {0: 1}, bench.alone())
        sink.settle()
        assert bench.committed(0) is None
        sink.commit([texts(bench.topic, "lost")], {0: 1}, bench.alone())
        assert bench.values() == ["lost"]
    else:
        sink.commit([texts(bench.topic, "lost")], {0: 1}, bench.alone())
        assert bench.committed(0) == 1
        assert bench.values() == []


@both
def test_3_an_error_while_committing_fails_the_transaction(bench, guarded):
    bench = bench()
    sink = bench.sink()
    network = bench.network(sink)
    network.fail("ProduceRequest", OutOfOrderSequenceNumberError)
    if guarded:
        with pytest.raises(TransactionFailed, match="OutOfOrderSequenceNumber"):
            sink.commit([texts(bench.topic, "lost")], {0: 1}, bench.alone())
        sink.settle()
        sink.commit([texts(bench.topic, "lost")], {0: 1}, bench.alone())
        assert bench.values() == ["lost"]
        return
    sink._begin()
    sink._send([texts(bench.topic, "lost")])
    sink._commit()  # without a flush before: success
    assert bench.values() == []


@both
def test_4_a_producer_that_left_its_transaction_commits_nothing(bench, guarded):
    bench = bench()
    sink = bench.sink()
    network = bench.network(sink)
    sink._begin()
    network.fail("ProduceRequest", OutOfOrderSequenceNumberError)
    sink._send([texts(bench.topic, "a"), texts(bench.topic, "b")])
    manager = sink._records.producer()._transaction_manager
    wait(lambda: manager._current_state.name == "READY")  # it bumped its epoch, and calls itself ready
    if guarded:
        with pytest.raises(Exception, match="it is in state READY"):
            sink._require_open()
        sink._records.abandon()
        sink.settle()
    else:
        sink._records._pending.clear()
    sink.commit([texts(bench.topic, "a", "b")], {0: 2}, bench.alone())
    # what was queued for the transaction that is gone leaves with the next one
    assert Counter(bench.values()) == (Counter("ab") if guarded else Counter("abb"))


@both
def test_5_a_commit_leaves_no_flush_behind_that_never_ends(bench, guarded):
    bench = bench()
    sink = bench.sink(encode=False)
    if not guarded:
        sink._flush = lambda: None
    accumulator = sink._records.producer()._accumulator
    for attempt in range(
        3 if guarded else 30
    ):  # it takes a commit that finds batches unsent, which is a matter of milliseconds
        sink.commit([texts(bench.topic, *map(str, range(500)))], {0: 1 + attempt}, bench.alone())
        if accumulator.flush_in_progress():
            break
    # in progress: every record from here on is a request of its own, however long it might linger
    assert accumulator.flush_in_progress() is not guarded


@both
@pytest.mark.parametrize("request_name", ["EndTxnRequest", "TxnOffsetCommitRequest"])
def test_6_no_step_waits_without_a_limit(bench, guarded, request_name, monkeypatch):
    bench = bench(timeout="2s")
    sink = bench.sink()
    bench.network(sink).silence(request_name)
    if not guarded:
        monkeypatch.setattr("pipeline.kafka.transactions.bounded", lambda _, __, call, *arguments: call(*arguments))
    ended = []

    def commit():
        try:
            sink.commit([texts(bench.topic, "a")], {0: 1}, bench.alone())
        except TransactionFailed as failure:
            ended.append(str(failure))

    thread = threading.Thread(target=commit, daemon=True)
    thread.start()
    thread.join(10)
    assert thread.is_alive() is not guarded
    if guarded:
        assert "no answer within 2 s" in ended[0]


def test_6_a_call_given_up_says_what_it_was():
    with pytest.raises(Exception, match="sleeping: no answer within 0 s"):
        bounded("sleeping", 0.05, time.sleep, 1)
    assert bounded("adding", 1, int.__add__, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        bounded("dividing", 1, int.__truediv__, 1, 0)


@both
def test_7_a_worker_that_lost_its_place_commits_nothing_although_it_takes_its_id_back(bench, guarded):
    bench = bench()
    with RecordSource(bench.settings, bench.source_topic) as gone:
        stale = joined(gone)
    with RecordSource(bench.settings, bench.source_topic) as present:
        current = joined(present)
        zombie = bench.sink("worker-1")
        twin = bench.sink("worker-1")
        twin.commit([texts(bench.topic, "twin")], {0: 1}, current)
        proof = stale if guarded else bench.alone()
        with pytest.raises(TransactionFailed):
            zombie.commit([texts(bench.topic, "zombie")], {0: 1}, proof)
        zombie.settle()
        if guarded:
            with pytest.raises(TransactionFailed, match="metadata mismatch"):
                zombie.commit([texts(bench.topic, "zombie")], {0: 1}, proof)
            assert bench.values() == ["twin"]
        else:
            zombie.commit([texts(bench.topic, "zombie")], {0: 1}, proof)
            assert bench.values() == ["twin", "zombie"]


def test_7_of_two_workers_with_one_instance_id_the_older_stops_and_says_why(bench):
    bench = bench()
    settings = load(None, {}, {**_overrides(bench), "kafka.group_instance_id": "pump-house"})
    with RecordSource(settings, bench.source_topic) as older:
        first = joined(older)
        sink = bench.sink("g-pump-house")
        sink.commit([], {0: 1}, first)
        with RecordSource(settings, bench.source_topic) as newer:
            joined(newer)
            with pytest.raises(DeploymentError, match=r'group_instance_id = "pump-house".*name of its own'):
                sink.commit([], {0: 2}, first)


def test_8_transactions_do_not_wait_a_tenth_of_a_second_for_each_other(bench):
    bench = bench()
    assert bench.sink()._records.producer().config["retry_backoff_ms"] == RETRY_BACKOFF_MS == 5


@both
def test_9_after_a_batch_expired_in_mid_retry_the_next_transaction_goes_through(bench, guarded):
    bench = bench(timeout="3s")
    sink = bench.sink()
    if not guarded:
        keep_the_producer(sink)
    network = bench.network(sink)
    network.fail("ProduceRequest", NotLeaderForPartitionError, times=float("inf"))
    with pytest.raises(TransactionFailed):
        sink.commit([texts(bench.topic, "a")], {0: 1}, bench.alone())
    network.heal()
    sink.settle()
    if guarded:
        sink.commit([texts(bench.topic, "a")], {0: 1}, bench.alone())
        assert bench.values() == ["a"]
    else:
        with pytest.raises(TransactionFailed):
            sink.commit([texts(bench.topic, "a")], {0: 1}, bench.alone())
        assert bench.values() == []


def test_what_can_never_be_sent_stops_at_once(bench, broker, domain):
    bench = bench()
    narrow = make_topic(broker, f"{domain}.narrow", 1, {"max.message.bytes": "500"})
    sink = bench.sink()
    with pytest.raises(DeploymentError, match=r"max\.message\.bytes"):
        sink.commit([OutgoingRecords(narrow, 0, [b"k"], [random.Random(5).randbytes(9_000)])], {0: 1}, bench.alone())
    sink.settle()
    assert bench.committed(0) is None


def test_a_broker_that_does_not_answer_is_named():
    settings = load(None, {}, {"kafka.bootstrap_servers": "127.0.0.1:1", "kafka.transaction_timeout": "1s"})
    with pytest.raises(DeploymentError, match=r"127\.0\.0\.1:1.*millrace broker status"):
        TransactionalSink(settings, "x")


def keep_the_producer(sink):
    """Takes the guard away: after a failure the same producer aborts and goes on."""

    def abort():
        sink._records._pending.clear()
        producer = sink._records._producer
        if producer is not None and producer._transaction_manager._current_state.name != "READY":
            with suppress(KafkaError):
                bounded("aborting", 5, producer.abort_transaction)

    sink._records.abandon = abort
    sink._records._abandon = abort


def joined(source):
    source.on_assigned = lambda partitions: [source.seek(partition, 0) for partition in partitions]
    wait(lambda: source.poll(100) is not None and len(source.assignment) == PARTITIONS and source.membership())
    return source.membership()


def wait(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def _overrides(bench):
    return {"kafka.bootstrap_servers": bench.broker.bootstrap_servers, "topics.domain": bench.settings.topics.domain}
