"""RecordSource against a real broker. The same promises hold on both paths: whole batches, and the client's own iterator."""

import logging
import time

import kafka
import numpy as np
import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from pipeline.errors import DeploymentError
from pipeline.kafka.sink import RecordSink
from pipeline.kafka.source import RecordSource
from pipeline.settings import load
from pipeline.stream.columns import OutgoingRecords
from tests.helpers.broker import make_topic, produce_records, read_all

both_paths = pytest.mark.parametrize("hook", [True, False], ids=["columnar", "plain"])


@pytest.fixture
def settings(broker, domain):
    return load(None, {}, {"kafka.bootstrap_servers": broker.bootstrap_servers, "topics.domain": domain})


@pytest.fixture
def sources(settings):
    """Opens sources and closes them again: `sources(topic, **options)`."""
    opened = []

    def open_source(topic, **options):
        opened.append(RecordSource(settings, topic, **options))
        return opened[-1]

    yield open_source
    for source in opened:
        source.close()


def whole(sources, topic, hook, **options):
    """A reader of all partitions from their beginning, without a group."""

    def from_the_beginning(partitions):
        for partition, offset in source.beginning_offsets(partitions).items():
            source.seek(partition, offset)

    source = sources(topic, group=False, hook=hook, **options)
    source.on_assigned = from_the_beginning
    return source


def until(source, finished, seconds=30):
    """Polls until `finished()`; returns what came."""
    deadline, polled = time.monotonic() + seconds, []
    while True:
        polled += source.poll(200)
        if finished():
            return polled
        assert time.monotonic() < deadline, f"positions {source.positions()}, ends {source.end_offsets()}"


def to_the_end(source):
    return until(source, lambda: source.assignment and source.positions() == source.end_offsets())


def rows(polled):
    """(partition, offset, timestamp, key, value, headers) of every record, by partition and offset."""
    return sorted(
        (c.partition, int(c.offsets[row]), int(c.timestamps_ms[row]), c.key(row), c.value(row), c.headers(row))
        for c in polled
        for row in range(len(c))
    )


def clients_rows(broker, topic, isolation="read_committed"):
    return [
        (r.partition, r.offset, r.timestamp, r.key, r.value, tuple(r.headers))
        for r in read_all(broker, topic, isolation)
    ]


def transact(broker, topic, name, values, commit, partition=0, leave_open=False):
    producer = KafkaProducer(
        bootstrap_servers=broker.bootstrap_servers, transactional_id=name, retry_backoff_ms=5, linger_ms=5
    )
    producer.init_transactions()
    producer.begin_transaction()
    for value in values:
        producer.send(topic, value, key=b"k", partition=partition)
    producer.flush()
    if leave_open:
        return producer
    if commit:
        producer.commit_transaction()
    else:
        producer.abort_transaction()
    producer.close()
    return None


@both_paths
@pytest.mark.parametrize("codec", [None, "gzip", "snappy", "lz4", "zstd"])
def test_every_codec_reads_as_the_clients_own_iterator_does(broker, domain, sources, codec, hook):
    topic = make_topic(broker, f"{domain}.{codec}", 3)
    records = [
        {
            "key": None if n % 5 == 0 else b"sensor-%d" % (n % 17),
            "value": None if n % 7 == 1 and n % 5 else b'{"value": %d}' % n * (n % 4 + 1),
            "headers": [("n", b"%d" % n), ("ü", b"")] if n % 3 == 0 else [],
            "partition": n % 3,
        }
        for n in range(3000)
    ]
    produce_records(broker, topic, records, compression_type=codec, linger_ms=20, batch_size=20_000)
    got = rows(to_the_end(whole(sources, topic, hook)))
    assert len(got) == 3000
    assert got == clients_rows(broker, topic)


@both_paths
def test_null_header_values_come_through(broker, domain, sources, settings, hook):
    topic = make_topic(broker, f"{domain}.headers")
    headers = [(("a", None), ("b", b"")), (), (("__connect.errors.topic", b"x"), ("a", None), ("a", b"2"))]
    with RecordSink(settings, encode=True) as sink:
        sink.deliver([OutgoingRecords(topic, 0, [b"k", None, b""], [b"", b"v", None], headers)])
    got = rows(to_the_end(whole(sources, topic, hook)))
    assert [row[3:] for row in got] == list(zip([b"k", None, b""], [b"", b"v", None], headers))
    assert got == clients_rows(broker, topic)


@both_paths
@pytest.mark.parametrize("isolation", ["read_committed", "read_uncommitted"])
def test_aborted_transactions_are_seen_by_nobody_who_reads_committed(broker, domain, sources, hook, isolation):
    topic = make_topic(broker, f"{domain}.txn")
    for n in range(4):
        transact(broker, topic, f"{domain}-{n}", [b"%d-%d" % (n, i) for i in range(50)], commit=n % 2 == 0)
        produce_records(broker, topic, [(b"k", b"plain")])
    got = rows(to_the_end(whole(sources, topic, hook, isolation=isolation)))
    assert len(got) == (104 if isolation == "read_committed" else 204)
    assert got == clients_rows(broker, topic, isolation)


@both_paths
@pytest.mark.parametrize("commit", [True, False])
def test_a_log_that_ends_in_a_transaction_marker_can_be_read_to_its_end(broker, domain, sources, hook, commit):
    topic = make_topic(broker, f"{domain}.marker")
    transact(broker, topic, domain, [b"1", b"2"], commit)
    source = whole(sources, topic, hook)
    assert len(rows(to_the_end(source))) == (2 if commit else 0)
    assert source.positions() == {0: 3}


@both_paths
def test_the_end_is_where_the_oldest_open_transaction_begins(broker, domain, sources, hook):
    topic = make_topic(broker, f"{domain}.open")
    produce_records(broker, topic, [(b"k", b"before")])
    producer = transact(broker, topic, domain, [b"open"], commit=False, leave_open=True)
    produce_records(broker, topic, [(b"k", b"after")])
    source = whole(sources, topic, hook)
    assert [row[4] for row in rows(to_the_end(source))] == [b"before"]
    assert source.positions() == {0: 1}
    producer.commit_transaction()
    producer.close()
    assert [row[4] for row in rows(to_the_end(source))] == [b"open", b"after"]


@both_paths
@pytest.mark.parametrize("codec", [None, "lz4"])
def test_reading_may_start_inside_a_batch(broker, domain, sources, hook, codec):
    topic = make_topic(broker, f"{domain}.inside")
    produce_records(
        broker, topic, [(b"k", b"%d" % n) for n in range(100)], compression_type=codec, linger_ms=200, batch_size=10**6
    )
    source = sources(topic, group=False, hook=hook)
    source.on_assigned = lambda _: source.seek(0, 63)
    assert [row[1] for row in rows(to_the_end(source))] == list(range(63, 100))
    source.seek(0, 98)
    assert [row[1] for row in rows(to_the_end(source))] == [98, 99]


def test_what_compaction_took_away_is_a_gap(broker, domain, sources):
    """Segments are rolled by time and cleaned by the broker's own cleaner, which looks every few seconds."""
    configs = {"cleanup.policy": "compact", "segment.ms": "200", "min.cleanable.dirty.ratio": "0.001"}
    topic = make_topic(broker, f"{domain}.compacted", 1, configs | {"max.compaction.lag.ms": "200"})
    produce_records(broker, topic, [(b"s%d" % (n % 5), b"%d" % n) for n in range(60)], linger_ms=50)
    deadline = time.monotonic() + 60
    while len(clients_rows(broker, topic)) >= 60:
        assert time.monotonic() < deadline, "the broker did not compact the topic"
        time.sleep(0.5)
        produce_records(broker, topic, [(b"newest", b"rolls the segment")])
    expected = clients_rows(broker, topic)
    assert len(expected) < expected[-1][1] + 1
    for hook in (True, False):
        assert rows(to_the_end(whole(sources, topic, hook))) == expected


def test_a_poll_gives_one_set_of_columns_a_partition_however_small_the_batches(broker, domain, sources):
    topic = make_topic(broker, f"{domain}.tiny")
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, batch_size=1, linger_ms=0)
    for n in range(500):
        producer.send(topic, b"%d" % n, key=b"k", partition=0)
    producer.flush()
    producer.close()
    polled = to_the_end(whole(sources, topic, True))
    assert [row[4] for row in rows(polled)] == [b"%d" % n for n in range(500)]
    assert len(polled) < 10


@both_paths
def test_a_group_goes_on_where_it_has_committed(broker, domain, sources, hook):
    topic = make_topic(broker, f"{domain}.group", 2)
    produce_records(broker, topic, [{"value": b"%d" % n, "partition": n % 2} for n in range(20)])
    first = sources(topic, hook=hook)
    first.on_assigned = lambda partitions: [first.seek(p, 0) for p in partitions]
    to_the_end(first)
    assert [first.committed(0), first.committed(1)] == [None, None]
    assert first.commit({0: 4, 1: 10})
    assert [first.committed(0), first.committed(1)] == [4, 10]
    first.close()
    second = sources(topic, hook=hook)
    assert [row[:2] for row in rows(to_the_end(second))] == [(0, n) for n in range(4, 10)]


def test_a_group_without_offsets_must_be_told_where_to_start(broker, domain, sources):
    source = sources(make_topic(broker, f"{domain}.fresh"))
    with pytest.raises(DeploymentError, match=rf'partition 0: the group "millrace-{domain}" has committed no offset'):
        until(source, lambda: source.assignment)


@both_paths
def test_an_offset_that_is_no_longer_in_the_log_is_a_clear_error(broker, domain, sources, hook):
    topic = make_topic(broker, f"{domain}.deleted")
    produce_records(broker, topic, [(b"k", b"%d" % n) for n in range(10)])
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(topic, 0): 6})
    source = sources(topic, group=False, hook=hook)
    source.on_assigned = lambda _: source.seek(0, 2)
    with pytest.raises(DeploymentError, match=r"partition 0: offset 2 was asked for, the log holds \[6, 10\)"):
        until(source, lambda: False, seconds=10)
    source.seek(0, source.beginning_offsets()[0])
    assert [row[1] for row in rows(to_the_end(source))] == [6, 7, 8, 9]


def test_a_topic_that_does_not_exist_is_named(broker, domain, sources):
    with pytest.raises(DeploymentError, match=f'topic "{domain}.nowhere" does not exist.*millrace topics create'):
        sources(f"{domain}.nowhere")


def test_a_partition_that_does_not_exist_is_named(broker, domain, sources):
    with pytest.raises(DeploymentError, match=r"has partitions \[0, 1\], not \[5\]"):
        sources(make_topic(broker, f"{domain}.two", 2), group=False, partitions=[1, 5])


def test_a_broker_that_does_not_answer_is_named():
    nowhere = load(None, {}, {"kafka.bootstrap_servers": "127.0.0.1:1"})
    with pytest.raises(DeploymentError, match=r"connecting to 127.0.0.1:1: .*millrace broker status"):
        RecordSource(nowhere, "readings", bootstrap_timeout_ms=500)


def test_two_members_share_the_partitions_and_who_has_lost_one_cannot_commit_it(broker, domain, sources):
    topic = make_topic(broker, f"{domain}.shared", 4)
    produce_records(broker, topic, [{"value": b"%d" % n, "partition": n % 4} for n in range(40)])
    events = []

    def member(name):
        source = sources(topic, max_poll_interval_ms=60_000, session_timeout_ms=10_000, heartbeat_interval_ms=200)
        source.on_assigned = lambda ps: (events.append((name, "+", tuple(ps))), [source.seek(p, 0) for p in ps])
        source.on_revoked = lambda ps: events.append((name, "-", tuple(ps)))
        return source

    first = member("first")
    to_the_end(first)
    assert events == [("first", "+", (0, 1, 2, 3))]
    second = member("second")
    deadline = time.monotonic() + 30
    while len(first.assignment) != 2 or len(second.assignment) != 2:
        first.poll(100)
        second.poll(100)
        assert time.monotonic() < deadline, events
    lost = [event for event in events if event[:2] == ("first", "-")]
    assert [set(event[2]) for event in lost] == [set(second.assignment)]  # who stays, stays: nothing else was revoked
    assert not set(first.assignment) & set(second.assignment)
    while not first.commit({first.assignment[0]: 1}):  # the group may still be settling
        first.poll(100)
        second.poll(100)
        assert time.monotonic() < deadline, events
    assert not first.commit({first.assignment[0]: 2, second.assignment[0]: 1})
    assert first.committed(first.assignment[0]) == 2
    assert first.committed(second.assignment[0]) is None
    second.close()
    until(first, lambda: len(first.assignment) == 4)


def test_a_join_that_outlasts_many_short_polls_is_finished_all_the_same(broker, domain, sources):
    """Caused by metadata: the client forgets in mid-way that it is joining, and stands outside of the group for good."""
    topic = make_topic(broker, f"{domain}.grows", 2)
    source = sources(topic, session_timeout_ms=6_000)
    source.on_assigned = lambda ps: [source.seek(p, 0) for p in ps]
    until(source, lambda: source.membership() is not None and len(source.assignment) == 2)
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        admin.create_partitions({topic: 3})
    source._consumer._client.cluster.request_update()
    deadline = time.monotonic() + 30
    while len(source.assignment) < 3 or source.membership() is None:
        source.poll(1)
        time.sleep(0.05)  # longer than the poll: the join goes on in the background, and ends between two polls
        assert time.monotonic() < deadline, source._consumer.group_metadata()
    generation = source.membership().metadata.generation_id
    until(source, lambda: time.monotonic() > deadline - 24)
    assert source.membership().metadata.generation_id == generation  # and is not begun again and again


@both_paths
@pytest.mark.parametrize("comes_back", [False, True], ids=["gone", "back again"])
def test_what_was_fetched_of_a_partition_that_then_went_away_is_handed_to_nobody(
    broker, domain, sources, hook, comes_back
):
    topic = make_topic(broker, f"{domain}.taken", 2)
    produce_records(broker, topic, [{"value": b"%d" % n, "partition": n % 2} for n in range(10)])
    source = whole(sources, topic, hook)
    lost = []
    source.on_revoked = lost.extend
    poll = source._consumer.poll

    def poll_during_a_rebalance(timeout_ms):
        fetched = poll(timeout_ms)
        if not lost and TopicPartition(topic, 0) in fetched:  # as the client's network thread does at any time
            source._rebalances.revoked([0])
            if comes_back:
                source._rebalances.assigned([0])
        return fetched

    source._consumer.poll = poll_during_a_rebalance
    until_lost = until(source, lambda: lost)
    assert all(columns.partition == 1 for columns in until_lost)
    if comes_back:
        read = rows(until_lost + to_the_end(source))
        assert [row[:2] for row in read] == [(partition, offset) for partition in range(2) for offset in range(5)]


@both_paths
def test_a_paused_partition_gives_nothing_until_it_is_resumed(broker, domain, sources, hook):
    topic = make_topic(broker, f"{domain}.paused", 2)
    produce_records(broker, topic, [{"value": b"%d" % n, "partition": n % 2} for n in range(10)])
    source = sources(topic, group=False, hook=hook)
    source.on_assigned = lambda _: (source.seek(0, 0), source.seek(1, 0), source.pause([1]))
    polled = until(source, lambda: source.positions() == {0: 5, 1: 0})
    assert {c.partition for c in polled} == {0}
    source.resume([1])
    assert {c.partition for c in to_the_end(source)} == {1}


@both_paths
def test_offsets_are_found_by_time(broker, domain, sources, hook):
    topic = make_topic(broker, f"{domain}.time", 2, {"retention.ms": "-1"})
    produce_records(
        broker, topic, [{"value": b"v", "partition": 0, "timestamp_ms": 1_700_000_000_000 + n * 1000} for n in range(5)]
    )
    source = whole(sources, topic, hook)
    source.poll(0)
    assert source.offsets_for_time(1_700_000_002_500) == {0: 3, 1: 0}
    assert source.offsets_for_time(1_800_000_000_000) == {0: 5, 1: 0}


@both_paths
def test_where_the_broker_stamps_records_its_time_is_the_timestamp(broker, domain, sources, hook):
    topic = make_topic(broker, f"{domain}.append", 1, {"message.timestamp.type": "LogAppendTime"})
    before_ms = int(time.time() * 1000)
    produce_records(broker, topic, [{"value": b"v", "timestamp_ms": 5}] * 3)
    got = rows(to_the_end(whole(sources, topic, hook)))
    assert got == clients_rows(broker, topic)
    assert all(row[2] >= before_ms - 1000 for row in got)


def test_a_static_member_keeps_its_partitions_over_a_restart(broker, domain):
    static = {"kafka.bootstrap_servers": broker.bootstrap_servers, "topics.domain": domain}
    settings = load(None, {}, static | {"kafka.group_instance_id": "worker-1"})
    topic = make_topic(broker, f"{domain}.static", 2)
    for _ in range(2):
        with RecordSource(settings, topic) as source:
            source.on_assigned = lambda partitions, source=source: [source.seek(p, 0) for p in partitions]
            until(source, lambda source=source: source.assignment == [0, 1])


def test_another_version_of_the_client_is_served_by_its_own_iterator_and_the_log_says_so(
    broker, domain, sources, monkeypatch, caplog
):
    topic = make_topic(broker, f"{domain}.version")
    produce_records(broker, topic, [(b"k", b"v")])
    monkeypatch.setattr(kafka, "__version__", "3.1.0")
    with caplog.at_level(logging.WARNING):
        source = whole(sources, topic, None)
    assert "kafka-python 3.1.0 is installed" in caplog.text
    (columns,) = to_the_end(source)
    assert columns.values() == [b"v"]
    assert columns.offsets.dtype == np.int64
