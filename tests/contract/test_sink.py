"""RecordSink against a real broker, on both paths: whole encoded batches, and the client's `send`."""

import random
import time

import numpy as np
import pytest
from kafka.admin import KafkaAdminClient

from pipeline.errors import DeploymentError
from pipeline.kafka import sink as sink_module
from pipeline.kafka.sink import RecordSink
from pipeline.settings import load
from pipeline.stream.columns import OutgoingRecords
from tests.helpers.broker import make_topic, read_all

both_paths = pytest.mark.parametrize("encode", [True, False], ids=["encoded", "send"])


@pytest.fixture
def overrides(broker, domain):
    return {"kafka.bootstrap_servers": broker.bootstrap_servers, "topics.domain": domain}


@pytest.fixture
def settings(overrides):
    return load(None, {}, overrides)


def numbered(topic, partition, count, size=20, **columns):
    keys, values = [b"s%d" % (n % 7) for n in range(count)], [b"%0*d" % (size, n) for n in range(count)]
    return OutgoingRecords(topic, partition, keys, values, **columns)


def values_of(broker, topic, partition=0):
    return [record.value for record in read_all(broker, topic) if record.partition == partition]


@both_paths
@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
def test_what_is_delivered_reads_back_through_the_plain_client(broker, domain, overrides, compression, encode):
    topic = make_topic(broker, f"{domain}.{compression}", 2)
    now_ms = int(time.time() * 1000)
    count = 3000
    sent = [
        OutgoingRecords(
            topic,
            partition,
            [b"s%d" % (n % 9) if n % 4 else None for n in range(count)],
            [b'{"n": %d}' % n if n % 5 else None if n % 4 else b"" for n in range(count)],
            [(("reason", b"late"), ("empty", b"")) if n % 3 == 0 else () for n in range(count)],
            now_ms - np.arange(count, dtype=np.int64)[:: 1 - 2 * partition],
        )
        for partition in range(2)
    ]
    with RecordSink(load(None, {}, overrides | {"kafka.compression": compression}), encode=encode) as sink:
        sink.deliver(sent)
    got = [(r.partition, r.timestamp, r.key, r.value, tuple(r.headers)) for r in read_all(broker, topic)]
    assert got == [
        (batch.partition, timestamp, key, value, headers)
        for batch in sent
        for timestamp, key, value, headers in zip(batch.timestamps_ms.tolist(), batch.keys, batch.values, batch.headers)
    ]


@both_paths
def test_several_deliveries_keep_their_order(broker, domain, settings, encode):
    topic = make_topic(broker, f"{domain}.order")
    with RecordSink(settings, encode=encode) as sink:
        for start in range(0, 1000, 100):
            values = [b"%d" % n for n in range(start, start + 100)]
            sink.deliver(
                [
                    OutgoingRecords(topic, 0, [b"k"] * 50, values[:50]),
                    OutgoingRecords(topic, 0, [b"k"] * 50, values[50:]),
                ]
            )
        sink.deliver([])
        sink.deliver([OutgoingRecords(topic, 0, [], [])])
    assert values_of(broker, topic) == [b"%d" % n for n in range(1000)]


def test_more_than_a_request_holds_goes_out_in_several_batches(broker, domain, settings):
    topic = make_topic(broker, f"{domain}.large")
    noise = random.Random(3)
    records = OutgoingRecords(topic, 0, [b"k"] * 500, [noise.randbytes(10_000) for _ in range(500)])
    with RecordSink(settings, encode=True) as sink:
        sink.deliver([records])
    assert values_of(broker, topic) == records.values


def test_a_batch_too_large_for_its_topic_is_split_and_arrives_in_order(broker, domain, settings):
    topic = make_topic(broker, f"{domain}.narrow", 1, {"max.message.bytes": "20000"})
    noise = random.Random(4)
    records = OutgoingRecords(topic, 0, [b"k"] * 300, [noise.randbytes(1000) for _ in range(300)])
    with RecordSink(settings, encode=True) as sink:
        sink.deliver([records, numbered(topic, 0, 10)])
    assert values_of(broker, topic) == [*records.values, *numbered(topic, 0, 10).values]


@both_paths
def test_a_record_the_topic_refuses_fails_the_delivery_and_says_where_and_why(broker, domain, settings, encode):
    topic = make_topic(broker, f"{domain}.refused", 1, {"max.message.bytes": "5000"})
    huge = OutgoingRecords(topic, 0, [b"k"], [random.Random(5).randbytes(20_000)])
    with RecordSink(settings, encode=encode) as sink:
        with pytest.raises(
            DeploymentError, match=rf'"{topic}", partition 0 were not delivered: MessageSizeTooLarge.*raise'
        ):
            sink.deliver([huge])
        sink.deliver([numbered(topic, 0, 3)])  # and the sink is still of use
    assert values_of(broker, topic) == numbered(topic, 0, 3).values


@both_paths
def test_a_record_too_large_for_any_request_is_refused_at_once(broker, domain, settings, encode):
    topic = make_topic(broker, f"{domain}.huge")
    with RecordSink(settings, encode=encode) as sink, pytest.raises(DeploymentError, match=f'"{topic}", partition 0'):
        sink.deliver([OutgoingRecords(topic, 0, [b"k"], [bytes(2_000_000)])])


@both_paths
def test_a_delivery_nobody_acknowledges_ends_in_an_error_and_not_in_a_hang(broker, domain, settings, encode):
    topic = make_topic(broker, f"{domain}.lonely")
    sink = RecordSink(settings, encode=encode, delivery_timeout_ms=2000)
    sink.deliver([numbered(topic, 0, 10)])
    with KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers) as admin:
        admin.delete_topics([topic])
    with pytest.raises(DeploymentError, match=f'"{topic}", partition 0 were not delivered'):
        sink.deliver([numbered(topic, 0, 10)])
    sink.close()
    sink.close()


@both_paths
def test_topics_and_partitions_that_do_not_exist_are_named(broker, domain, settings, encode, monkeypatch):
    topic = make_topic(broker, f"{domain}.two", 2)
    monkeypatch.setattr("pipeline.kafka.clients.METADATA_TIMEOUT_MS", 1000)
    with RecordSink(settings, encode=encode) as sink:
        assert sink.partitions(topic) == 2
        with pytest.raises(DeploymentError, match="has 2 partitions, records for partition 7 came"):
            sink.deliver([numbered(topic, 7, 1)])
        with pytest.raises(DeploymentError, match=f'topic "{domain}.nowhere" does not exist.*millrace topics create'):
            sink.deliver([numbered(f"{domain}.nowhere", 0, 1)])


@both_paths
def test_a_replay_never_has_more_on_its_way_than_allowed(broker, domain, settings, encode):
    topic = make_topic(broker, f"{domain}.replay")
    limit = 50_000
    with RecordSink(settings, encode=encode, pending_bytes=limit) as sink:
        for _ in range(40):
            sink.async_send(numbered(topic, 0, 250, size=40))
            assert sink._pending_bytes <= limit
        sink.flush()
        assert sink._pending_bytes == 0
    assert values_of(broker, topic) == numbered(topic, 0, 250, size=40).values * 40


def test_a_null_header_value_stays_null(broker, domain, settings):
    topic = make_topic(broker, f"{domain}.null")
    headers = [(("absent", None), ("empty", b""))]
    with RecordSink(settings, encode=True) as sink:
        sink.deliver([OutgoingRecords(topic, 0, [None], [None], headers)])
    (record,) = read_all(broker, topic)
    assert (record.key, record.value, tuple(record.headers)) == (None, None, headers[0])


def test_a_closed_sink_takes_no_more(broker, domain, settings):
    topic = make_topic(broker, f"{domain}.closed")
    sink = RecordSink(settings, encode=True)
    sink.deliver([numbered(topic, 0, 1)])
    sink.close()
    with pytest.raises(DeploymentError, match="closed"):
        sink.async_send(numbered(topic, 0, 1))
    assert len(values_of(broker, topic)) == 1


def test_the_batch_size_leaves_room_in_a_brokers_default_limit():
    assert sink_module.BATCH_BYTES + 61 < 1_048_576


@pytest.mark.parametrize("encode", [True, False])
def test_a_timestamp_ahead_of_the_brokers_clock_is_named_as_the_cause(broker, domain, settings, encode):
    topic = make_topic(broker, f"{domain}.ahead")
    tomorrow = np.array([(time.time() + 86_400) * 1000], np.int64)
    with (
        RecordSink(settings, encode=encode) as sink,
        pytest.raises(DeploymentError, match=r"message\.timestamp\.after\.max\.ms"),
    ):
        sink.deliver([OutgoingRecords(topic, 0, [b"k"], [b"v"], timestamps_ms=tomorrow)])
