"""What we encode is what the client would have encoded, and reads back as what went in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder

from pipeline.errors import DeploymentError
from pipeline.kafka.columnar import decode_batches, find_batches
from pipeline.kafka.encode import CODECS, encode_batches
from pipeline.kafka.partitioner import Partitioner, murmur2_of, partition_for
from pipeline.stream.columns import OutgoingRecords

optional_bytes = st.none() | st.binary(max_size=200)
header = st.tuples(st.text(max_size=12), optional_bytes)
record = st.tuples(st.integers(0, 2**41), optional_bytes, optional_bytes, st.lists(header, max_size=3).map(tuple))


def outgoing(records):
    timestamps, keys, values, headers = zip(*records)
    return OutgoingRecords("t", 0, keys, values, headers, np.array(timestamps, np.int64))


def encoded(records, compression="none", max_bytes=1 << 20, now_ms=77):
    batches = list(encode_batches(records, compression, max_bytes, now_ms))
    for batch in batches:
        batch.close()
    return batches


@given(st.lists(record, min_size=1, max_size=30), st.sampled_from(sorted(CODECS)))
@settings(max_examples=150, deadline=None)
def test_a_batch_is_byte_for_byte_the_clients(records, compression):
    builder = MemoryRecordsBuilder(2, CODECS[compression], 1 << 24)
    for timestamp, key, value, headers in records:
        builder.append(timestamp, key, value, list(headers))
    builder.close()
    (batch,) = encoded(outgoing(records), compression)
    assert bytes(batch.buffer()) == bytes(builder.buffer())
    assert batch.size_in_bytes() == len(builder.buffer())


@given(st.lists(record, min_size=1, max_size=60), st.integers(1200, 4000), st.sampled_from(sorted(CODECS)))
@settings(max_examples=100, deadline=None)
def test_records_cut_into_batches_read_back_in_order_and_no_batch_is_too_large(records, max_bytes, compression):
    batches = encoded(outgoing(records), compression, max_bytes)
    assert all(len(batch.buffer()) <= max_bytes for batch in batches)
    read = []
    for batch in batches:
        columns = decode_batches("t", 0, find_batches(bytes(batch.buffer())))
        assert columns.offsets.tolist() == list(range(batch.next_offset()))
        headers = map(columns.headers, range(len(columns)))
        read += zip(columns.timestamps_ms.tolist(), columns.keys(), columns.values(), headers)
    assert read == records


def test_many_records_carry_deltas_and_lengths_of_several_bytes():
    records = [(10**9 + (n % 3) * 10**7 - n, b"k" * (n % 90), b"v" * (n % 5000), ()) for n in range(9000)]
    (batch,) = encoded(outgoing(records), "none", 1 << 26)
    back = [(r.timestamp, r.key, r.value, tuple(r.headers)) for r in MemoryRecords(bytes(batch.buffer())).next_batch()]
    assert back == records


def test_records_without_timestamps_carry_the_time_of_sending():
    (batch,) = encoded(OutgoingRecords("t", 0, [b"a", None], [None, b"b"]), now_ms=1234)
    assert [r.timestamp for r in MemoryRecords(bytes(batch.buffer())).next_batch()] == [1234, 1234]


def test_a_record_that_fits_into_no_request_is_refused_with_its_size_and_place():
    records = OutgoingRecords("plant.forecasts.v1", 2, [b"k", b"k"], [b"v", b"v" * 5000])
    with pytest.raises(
        DeploymentError, match=r'5\d\d\d bytes for topic "plant.forecasts.v1", partition 2: at most 4000'
    ):
        encoded(records, max_bytes=4000)


def test_a_batch_keeps_the_sequence_number_of_its_first_try():
    (batch,) = list(encode_batches(OutgoingRecords("t", 0, [b"a"], [b"b"]), "none", 1 << 20, 5))
    batch.set_producer_state(17, 2, 40, False)
    batch.close()
    header = find_batches(bytes(batch.buffer())).header[0]
    assert (header["producer_id"], header["producer_epoch"], header["base_sequence"]) == (17, 2, 40)
    with pytest.raises(RuntimeError, match="already left"):
        batch.set_producer_state(17, 3, 0, False)


@given(st.lists(st.binary(max_size=40), max_size=40))
def test_keys_are_hashed_as_the_client_hashes_them(keys):
    assert murmur2_of(keys).tolist() == [murmur2(key) for key in keys]


def test_known_hashes_of_kafkas_own_test_suite():
    """org.apache.kafka.common.utils.UtilsTest.testMurmur2."""
    cases = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536, b"abc": 479470107}
    assert [int(np.int32(h.view(np.int32))) for h in murmur2_of(list(cases))] == list(cases.values())


@given(st.lists(st.binary(max_size=12), max_size=30), st.integers(1, 50))
def test_each_key_has_one_partition_however_often_it_is_asked_for(keys, partitions):
    partitioner = Partitioner(partitions)
    expected = [partition_for(key, partitions) for key in keys]
    assert partitioner(keys).tolist() == expected
    assert partitioner(keys).tolist() == expected


def test_records_without_a_key_go_round():
    assert sorted(Partitioner(3)([None] * 6).tolist()) == [0, 0, 1, 1, 2, 2]
