"""The columnar decoder against kafka-python's own, without a broker: the client's reader is the oracle, byte for
byte."""

import random
import struct
from collections import namedtuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError, UnsupportedVersionError
from kafka.protocol.consumer import IsolationLevel
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder
from kafka.record.util import calc_crc32c

from pipeline.kafka.columnar import (
    ColumnarPartitionRecords,
    check_crcs,
    decode_batches,
    find_batches,
    read_varints,
)
from pipeline.stream.columns import zigzag_varint

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
PARTITION = TopicPartition("readings", 3)
Aborted = namedtuple("Aborted", "producer_id first_offset")

optional_bytes = st.none() | st.binary(max_size=200)
header = st.tuples(st.text(max_size=12), optional_bytes)
record = st.tuples(
    st.integers(-1, 2**41), optional_bytes, optional_bytes, st.lists(header, max_size=3).map(tuple)
)  # timestamp, key, value, headers
batch = st.tuples(st.sampled_from(sorted(CODECS)), st.lists(record, min_size=1, max_size=12), st.integers(0, 5))


def build(records, codec=0, base_offset=0, offsets=None, attributes=0, producer_id=-1, epoch=3):
    """One batch as the client's builder writes it, then placed where a broker would: base offset, epoch, attributes."""
    transactional = producer_id >= 0
    builder = MemoryRecordsBuilder(
        2, codec, 1 << 24, 0, transactional, producer_id, 0 if transactional else -1, 0 if transactional else -1
    )
    for row, (timestamp, key, value, headers) in enumerate(records):
        if offsets is not None:
            builder._next_offset = offsets[row]
        assert builder.append(timestamp, key, value, list(headers)) is not None
    builder.close()
    return place(bytearray(builder.buffer()), base_offset, epoch, attributes)


def place(buffer, base_offset, epoch=3, attributes=0):
    struct.pack_into(">qii", buffer, 0, base_offset, len(buffer) - 12, epoch)
    struct.pack_into(">h", buffer, 21, struct.unpack_from(">h", buffer, 21)[0] | attributes)
    struct.pack_into(">I", buffer, 17, calc_crc32c(memoryview(buffer)[21:]))
    return bytes(buffer)


def marker(base_offset, producer_id, commit):
    """A control batch as a transaction coordinator writes it."""
    key = struct.pack(">hh", 0, 1 if commit else 0)
    return build([(1, key, b"\0" * 6, ())], 0, base_offset, attributes=0x20, producer_id=producer_id)


def as_rows(columns):
    return [
        (int(offset), int(timestamp), key, value, columns.headers(row))
        for row, (offset, timestamp, key, value) in enumerate(
            zip(columns.offsets, columns.timestamps_ms, columns.keys(), columns.values())
        )
    ]


def clients_rows(buffer, from_offset=0, **options):
    part = Fetcher.PartitionRecords(from_offset, PARTITION, MemoryRecords(buffer), **options)
    rows = [(r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in part.take(None)]
    return rows, part


def our_rows(buffer, from_offset=0, **options):
    part = ColumnarPartitionRecords(from_offset, PARTITION, MemoryRecords(buffer), **options)
    return [row for columns in part.take(None) for row in as_rows(columns)], part


def assert_same(buffer, from_offset=0, **options):
    expected, theirs = clients_rows(buffer, from_offset, **options)
    got, ours = our_rows(buffer, from_offset, **options)
    assert got == expected
    assert ours.next_fetch_offset == theirs.next_fetch_offset
    assert ours.leader_epoch == theirs.leader_epoch
    assert bool(ours) == bool(theirs)
    return got


@given(st.lists(batch, max_size=6), st.data())
@settings(max_examples=150, deadline=None)
def test_any_batches_decode_as_the_clients_own_reader_does(batches, data):
    fetch, offset = b"", data.draw(st.integers(0, 2**40))
    first = offset
    for codec, records, gap in batches:
        fetch += build(records, CODECS[codec], offset)
        offset += len(records) + gap
    start = data.draw(st.integers(first, max(offset - 1, first)))
    cut = data.draw(st.integers(0, 70))  # a broker cuts the last batch of a fetch wherever its limit falls
    assert_same(fetch[: len(fetch) - cut] if cut < len(fetch) else fetch, start)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_each_codec_with_null_keys_and_values_and_headers(codec):
    records = [
        (1000, None, b"v" * 300, ()),
        (1005, b"k", None, (("name", b"x"), ("null", None))),
        (990, b"", b"", (("é", b""),)),
        (1001, None, None, ()),
    ]
    rows = assert_same(build(records * 50, CODECS[codec], 7))
    assert len(rows) == 200
    assert rows[1] == (8, 1005, b"k", None, (("name", b"x"), ("null", None)))


def test_a_fetch_that_starts_inside_a_batch_gives_the_rest_of_it():
    fetch = build([(t, b"k", b"%d" % t, ()) for t in range(10)], 3, 100)
    assert [row[0] for row in assert_same(fetch, 106)] == [106, 107, 108, 109]


def test_offsets_that_compaction_took_away_leave_gaps_and_the_next_fetch_goes_past_them():
    fetch = build([(t, b"k", b"v", ()) for t in range(3)], 0, 50, offsets=[1, 4, 9])
    longer = bytearray(fetch)
    struct.pack_into(">i", longer, 23, 12)  # the last three records of the batch are gone as well
    rows = assert_same(place(longer, 50))
    assert [row[0] for row in rows] == [51, 54, 59]
    assert our_rows(place(longer, 50))[1].next_fetch_offset == 63


def test_a_batch_that_compaction_emptied_is_passed_over():
    empty = bytearray(build([(1, b"k", b"v", ())], 0, 10)[:61])
    struct.pack_into(">i", empty, 57, 0)
    struct.pack_into(">i", empty, 23, 4)
    fetch = place(empty, 10) + build([(2, b"k", b"w", ())], 0, 15)
    assert [row[0] for row in assert_same(fetch, 10)] == [15]
    assert our_rows(place(empty, 10), 10)[1].next_fetch_offset == 15


def test_log_append_time_is_the_time_of_every_record_of_its_batch():
    fetch = build([(t, b"k", b"v", ()) for t in (5, 9, 7)], 0, 0, attributes=0x08) + build([(6, b"k", b"v", ())], 0, 3)
    assert [row[1] for row in assert_same(fetch)] == [9, 9, 9, 6]


def test_ten_thousand_batches_of_one_record_each():
    fetch = b"".join(build([(1000 + n, b"s%d" % (n % 7), b"%d" % n, ())], 0, n) for n in range(10_000))
    columns = ColumnarPartitionRecords(0, PARTITION, MemoryRecords(fetch)).take()
    assert len(columns) == 1
    assert columns[0].values() == [b"%d" % n for n in range(10_000)]


@pytest.mark.parametrize("isolation", [IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED])
def test_aborted_transactions_and_markers_are_left_out_only_where_asked(isolation):
    def txn(producer, offset, name):
        return build([(1, b"k", name + b"%d" % n, ()) for n in range(3)], 3, offset, producer_id=producer)

    fetch = b"".join(
        [
            txn(1, 0, b"kept"),
            txn(2, 3, b"aborted"),
            txn(1, 6, b"kept"),
            marker(9, 2, commit=False),
            txn(2, 10, b"kept again"),
            marker(13, 1, commit=True),
            build([(1, b"k", b"plain", ())], 0, 14),
            txn(1, 15, b"aborted"),
            marker(18, 1, commit=False),
            marker(19, 2, commit=True),
        ]
    )
    aborted = [Aborted(1, 15), Aborted(2, 3)]
    rows = assert_same(fetch, isolation_level=isolation, aborted_transactions=aborted)
    voided = [row for row in rows if row[3].startswith(b"aborted")]
    assert len(voided) == (0 if isolation == IsolationLevel.READ_COMMITTED else 6)
    assert our_rows(fetch, isolation_level=isolation, aborted_transactions=aborted)[1].next_fetch_offset == 20


def test_a_fetch_of_control_records_alone_gives_nothing_and_moves_on():
    rows, part = our_rows(marker(5, 1, commit=True) + marker(6, 2, commit=True), 5)
    assert rows == []
    assert part.next_fetch_offset == 7
    assert not part


def test_a_damaged_batch_is_refused_and_what_came_before_it_is_delivered_first():
    good, bad = build([(1, b"k", b"v", ())], 0, 0), bytearray(build([(1, b"k", b"value", ())], 0, 1))
    bad[-3] ^= 0x40
    part = ColumnarPartitionRecords(0, PARTITION, MemoryRecords(good + bytes(bad)))
    assert len(part.take()[0]) == 1
    assert part.next_fetch_offset == 1
    with pytest.raises(CorruptRecordError, match="offset 1 fails its CRC"):
        part.take()
    assert not part  # drained: whoever polls on fetches again, and does not spin on what is left


def test_without_crc_checks_a_wrong_crc_is_not_looked_at():
    wrong = bytearray(build([(1, b"k", b"v", ())]))
    wrong[17] ^= 1
    assert_same(bytes(wrong), check_crcs=False)


def test_records_of_the_old_formats_are_refused_by_name():
    builder = MemoryRecordsBuilder(1, 0, 1 << 16)
    builder.append(1, b"k", b"v" * 100)
    builder.close()
    with pytest.raises(UnsupportedVersionError, match="record format v1"):
        find_batches(bytes(builder.buffer()))


@given(st.lists(record, min_size=1, max_size=8), st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_records_behind_a_valid_crc_are_refused_exactly_where_the_format_is_broken(records, data):
    fetch = bytearray(build(records, 0, 100))
    for _ in range(data.draw(st.integers(1, 4))):
        fetch[data.draw(st.integers(61, len(fetch) - 1))] = data.draw(st.integers(0, 255))
    assert_decodes_by_the_book(place(fetch, 100), len(records))


@given(st.binary(max_size=300), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused_unless_they_happen_to_be_records(section, count):
    fetch = bytearray(build([(1, b"", b"", ())])[:61]) + section
    struct.pack_into(">i", fetch, 57, count)
    assert_decodes_by_the_book(place(fetch, 100), count)


def assert_decodes_by_the_book(fetch, count):
    expected = read_by_the_book(fetch[61:], count)
    try:
        columns = decode_batches("t", 0, find_batches(fetch), -(2**63))
    except CorruptRecordError:
        assert expected is None
        return
    first_ms = np.int64(struct.unpack_from(">q", fetch, 27)[0])
    with np.errstate(over="ignore"):
        offset_deltas, timestamp_deltas = columns.offsets - 100, columns.timestamps_ms - first_ms
    deltas = list(zip(offset_deltas.tolist(), timestamp_deltas.tolist()))
    assert expected == list(zip(deltas, columns.keys(), columns.values(), columns.headers_count.tolist()))


def read_by_the_book(section, count):
    """The format's specification, one record at a time; None where the bytes break it."""
    at, rows = 0, []

    def varint():
        nonlocal at
        result = 0
        for shift in range(0, 70, 7):
            byte = section[at]
            at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                result &= 2**64 - 1
                return (result >> 1) ^ -(result & 1)
        raise IndexError("more than ten bytes")

    def nullable(end):
        nonlocal at
        size = varint()
        if size < 0:
            return None
        at += size
        if at > end:
            raise IndexError("past the record")
        return section[at - size : at]

    try:
        for _ in range(count):
            size = varint()
            end = at + size
            if size < 0 or end > len(section):
                return None
            at += 1
            deltas = (varint(), varint())[::-1]
            key, value, headers = nullable(end), nullable(end), varint()
            if headers < 0:
                return None
            for _ in range(headers):
                if nullable(end) is None:
                    return None
                nullable(end)
            if at != end:
                return None
            rows.append((deltas, key, value, headers))
    except IndexError:
        return None
    return rows if at == len(section) else None


@pytest.mark.parametrize("count", [-1, 2**31 - 1, 1000])
def test_an_impossible_number_of_records_is_refused_before_anything_is_read(count):
    fetch = bytearray(build([(1, b"k", b"v", ())]))
    struct.pack_into(">i", fetch, 57, count)
    with pytest.raises(CorruptRecordError, match="more records than"):
        decode_batches("t", 0, find_batches(place(fetch, 0)))


@pytest.mark.parametrize("length", [-1, 0, 10, 48])
def test_a_batch_shorter_than_its_header_is_refused(length):
    fetch = bytearray(build([(1, b"k", b"v", ())]))
    struct.pack_into(">i", fetch, 8, length)
    with pytest.raises(CorruptRecordError, match="header alone is 61"):
        find_batches(bytes(fetch))


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_a_compressed_section_that_does_not_unpack_is_refused(codec):
    fetch = bytearray(build([(1, b"k", b"v" * 500, ())] * 20, CODECS[codec]))
    fetch[61:] = random.Random(5).randbytes(len(fetch) - 61)
    with pytest.raises(CorruptRecordError):
        decode_batches("t", 0, find_batches(place(fetch, 0)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50))
def test_varints_of_any_length_read_back(numbers):
    encoded = [zigzag_varint(number) for number in numbers]
    starts = np.cumsum([0, *map(len, encoded)])
    values, after = read_varints(np.frombuffer(b"".join(encoded), np.uint8), starts[:-1])
    assert values.tolist() == numbers
    assert after.tolist() == starts[1:].tolist()


def test_crcs_are_checked_per_batch():
    fetch = b"".join(build([(1, b"k", b"%d" % n, ())], 0, n) for n in range(5))
    check_crcs(find_batches(fetch))
    damaged = bytearray(fetch)
    damaged[-1] ^= 1
    with pytest.raises(CorruptRecordError, match="offset 4"):
        check_crcs(find_batches(bytes(damaged)))
