"""Record batches in Kafka's format v2 -> RecordColumns: a whole fetch at once, no Python object per record.

    fetch   = batch batch batch …
    batch   = header (61 bytes), section (compressed or not)
    section = record record record …
    record  = length, attributes, timestamp delta, offset delta, key, value, headers

A record's place is known only from the lengths of those before it, so one short Python loop walks the record lengths;
everything else (headers of batches, varints, offsets, timestamps) is NumPy over all records of the fetch, however
many batches they came in. Uncompressed sections are not copied.
Format: https://kafka.apache.org/documentation/#messageformat
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from kafka.codec import gzip_decode, lz4_decode, snappy_decode, zstd_decode
from kafka.errors import CorruptRecordError, UnsupportedCodecError, UnsupportedVersionError
from kafka.protocol.consumer import IsolationLevel
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32c
from numpy.typing import NDArray

from pipeline.stream.columns import Bool, Int64, RecordColumns

HEADER = np.dtype(
    [
        ("base_offset", ">i8"),
        ("length", ">i4"),  # of all that follows this field
        ("leader_epoch", ">i4"),
        ("magic", "i1"),
        ("crc", ">u4"),
        ("attributes", ">i2"),
        ("last_offset_delta", ">i4"),
        ("first_timestamp", ">i8"),
        ("max_timestamp", ">i8"),
        ("producer_id", ">i8"),
        ("producer_epoch", ">i2"),
        ("base_sequence", ">i4"),
        ("count", ">i4"),
    ]
)
HEADER_BYTES = HEADER.itemsize  # 61
LENGTH_AT, AFTER_LENGTH, MAGIC_AT, ATTRIBUTES_AT = 8, 12, 16, 21
CODEC_MASK, LOG_APPEND_TIME, TRANSACTIONAL, CONTROL = 0x07, 0x08, 0x10, 0x20
SMALLEST_RECORD = 7  # length, attributes, two deltas, null key, null value, no headers: a byte each

_DECODERS: dict[int, Callable[[bytes], bytes]] = {1: gzip_decode, 2: snappy_decode, 3: lz4_decode, 4: zstd_decode}
_read_length = struct.Struct(">i").unpack_from


@dataclass(frozen=True, slots=True)
class Batches:
    """The complete record batches of one fetch, b of them, in log order."""

    buffer: bytes
    at: Int64
    """(b) where each begins in the buffer."""
    header: NDArray[Any]
    """(b) HEADER."""

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, rows: slice | Bool) -> Batches:
        return Batches(self.buffer, self.at[rows], self.header[rows])

    @property
    def stop(self) -> Int64:
        return self.at + self.column("length") + AFTER_LENGTH

    @property
    def next_offset(self) -> Int64:
        """(b) the offset after each batch, records that compaction took away included."""
        return self.column("base_offset") + self.column("last_offset_delta") + 1

    def column(self, name: str) -> Int64:
        """(b) a field of the header, in this machine's byte order."""
        return np.asarray(self.header[name], np.int64)


def find_batches(buffer: bytes) -> Batches:
    """The complete batches in what a broker sent; an incomplete one at the end is left out.

    Raises CorruptRecordError for lengths that cannot be, UnsupportedVersionError for formats older than Kafka 0.11's.
    """
    at: list[int] = []
    position, size = 0, len(buffer)
    while position + AFTER_LENGTH <= size:
        stop = position + AFTER_LENGTH + _read_length(buffer, position + LENGTH_AT)[0]
        if stop > size:
            break
        if stop <= position + MAGIC_AT or (buffer[position + MAGIC_AT] == 2 and stop < position + HEADER_BYTES):
            raise CorruptRecordError(
                f"a record batch claims {stop - position} bytes, its header alone is {HEADER_BYTES}"
            )
        if buffer[position + MAGIC_AT] != 2:
            raise UnsupportedVersionError(
                f"record format v{buffer[position + MAGIC_AT]}: only v2 (Kafka 0.11 and later) is read; copy the"
                " topic with a newer producer"
            )
        at.append(position)
        position = stop
    starts = np.array(at, np.int64)
    raw = np.frombuffer(buffer, np.uint8)[starts[:, None] + np.arange(HEADER_BYTES)]
    return Batches(buffer, starts, np.ascontiguousarray(raw).view(HEADER).reshape(-1))


def check_crcs(batches: Batches) -> None:
    """Raises CorruptRecordError where a batch's CRC-32C is not the one it carries."""
    view = memoryview(batches.buffer)
    for at, stop, expected in zip(batches.at.tolist(), batches.stop.tolist(), batches.header["crc"].tolist()):
        if calc_crc32c(view[at + ATTRIBUTES_AT : stop]) != expected:
            offset = struct.unpack_from(">q", batches.buffer, at)[0]
            raise CorruptRecordError(f"the record batch at offset {offset} fails its CRC check")


def committed_batches(batches: Batches, aborted: deque[Any], aborted_producers: set[int]) -> Bool:
    """(b) False for batches of aborted transactions. Both arguments are the reader's memory and are advanced.

    `aborted`: the broker's list for this fetch, ascending `first_offset`; from there on the producer's batches are
    void, until its abort marker.
    """
    keep = np.ones(len(batches), bool)
    attributes = batches.header["attributes"]
    if not aborted and not aborted_producers:
        return keep
    for row in np.flatnonzero(attributes & (TRANSACTIONAL | CONTROL)).tolist():
        producer = int(batches.header["producer_id"][row])
        last = int(batches.next_offset[row]) - 1
        while aborted and aborted[0].first_offset <= last:
            aborted_producers.add(aborted.popleft().producer_id)
        if attributes[row] & CONTROL:
            if _is_abort_marker(batches, row):
                aborted_producers.discard(producer)
        elif producer in aborted_producers:
            keep[row] = False
    return keep


def decode_batches(topic: str, partition: int, batches: Batches, from_offset: int = 0) -> RecordColumns:
    """All records of these batches from `from_offset` on, in one set of columns over one body.

    Raises CorruptRecordError for bytes that are not what the format says; nothing is read outside the batches.
    """
    batches = batches[(batches.header["count"] != 0) & (batches.next_offset > from_offset)]
    body, starts, stops = _sections(batches)
    counts = batches.column("count")
    columns = decode_sections(body, starts, stops, counts)
    offsets = columns.offset_delta + batches.column("base_offset").repeat(counts)
    timestamps = columns.timestamp_delta + batches.column("first_timestamp").repeat(counts)
    by_broker = (batches.header["attributes"] & LOG_APPEND_TIME) != 0
    if by_broker.any():
        appended = batches.column("max_timestamp").repeat(counts)
        timestamps = np.where(by_broker.repeat(counts), appended, timestamps)
    decoded = RecordColumns(
        topic,
        partition,
        body,
        offsets,
        timestamps,
        columns.key_at,
        columns.key_len,
        columns.value_at,
        columns.value_len,
        columns.headers_at,
        columns.headers_count,
    )
    if len(offsets) and offsets[0] < from_offset:  # a fetch from the middle of a batch gets the whole batch
        return decoded.take(offsets >= from_offset)
    return decoded


@dataclass(frozen=True, slots=True)
class SectionColumns:
    """n records as the sections hold them: deltas to their batch's header, positions into the body. All (n) int64."""

    timestamp_delta: Int64
    offset_delta: Int64
    key_at: Int64
    key_len: Int64
    value_at: Int64
    value_len: Int64
    headers_at: Int64
    headers_count: Int64


def decode_sections(body: bytes, starts: Int64, stops: Int64, counts: Int64) -> SectionColumns:
    """The records of s sections `body[start:stop]`, uncompressed, each with its number of records.

    Raises CorruptRecordError unless every section holds exactly its records, and every record exactly its fields.
    """
    if (counts < 0).any() or (counts * SMALLEST_RECORD > stops - starts).any():
        raise CorruptRecordError("a record batch claims more records than its bytes can hold")
    if not len(counts):
        return SectionColumns(*(np.zeros(0, np.int64) for _ in range(8)))
    data = np.frombuffer(body, np.uint8)
    record = _record_starts(body, starts, stops, counts)
    ends = np.append(record[1:], 0)
    ends[np.cumsum(counts) - 1] = stops
    length, at = read_varints(data, record)
    timestamp_delta, after = read_varints(data, at + 1)  # the byte between is the record's attributes: unused
    offset_delta, after = read_varints(data, after)
    key_len, key_at = read_varints(data, after)
    value_len, value_at = read_varints(data, _skip(key_at, key_len, len(body)))
    headers_count, headers_at = read_varints(data, _skip(value_at, value_len, len(body)))
    # Positions only grow from field to field, so whatever went astray on the way, also past the end, shows here.
    if (at + length != ends).any() or (_skip_headers(data, headers_at, headers_count, ends) != ends).any():
        raise CorruptRecordError("a record's length does not match its fields")
    key_len, value_len = np.maximum(key_len, -1), np.maximum(value_len, -1)
    return SectionColumns(
        timestamp_delta, offset_delta, key_at, key_len, value_at, value_len, headers_at, headers_count
    )


def read_varints(data: NDArray[np.uint8], at: Int64) -> tuple[Int64, Int64]:
    """Zigzag varints at n positions -> (values, positions after them). Positions outside are clipped: the caller
    checks them."""
    first = data.take(at, mode="clip")
    value = (first & 0x7F).astype(np.int64)
    after = at + 1
    rows = np.flatnonzero(first & 0x80)
    shift = 7
    while len(rows):
        if shift > 63:
            raise CorruptRecordError("a varint of more than ten bytes")
        byte = data.take(after[rows], mode="clip")
        value[rows] |= (byte & 0x7F).astype(np.int64) << shift
        after[rows] += 1
        rows = rows[byte > 0x7F]
        shift += 7
    # The shift right must not drag the sign in: the bits are unsigned until the zigzag is undone.
    return (value.view(np.uint64) >> np.uint64(1)).view(np.int64) ^ -(value & 1), after


class ColumnarPartitionRecords:
    """Stands in for kafka-python 3.0.12's `Fetcher.PartitionRecords`; `take` gives one RecordColumns for the whole
    fetch.

    The fetcher calls: `bool()`, `take(n)`, `drain()`, and reads `topic_partition`, `next_fetch_offset`,
    `leader_epoch`, `bytes_read`. Like the original it delivers what came before a corrupt batch and raises at the
    next call; unlike it, it is then drained, so that a caller who polls on meets the same error again instead of an
    endless loop.
    """

    def __init__(
        self,
        fetch_offset: int,
        tp: Any,
        records: Any,
        key_deserializer: Any = None,
        value_deserializer: Any = None,
        check_crcs: bool = True,
        isolation_level: int = IsolationLevel.READ_UNCOMMITTED,
        aborted_transactions: Sequence[Any] | None = None,
        metric_aggregator: Any = None,
        on_drain: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self.topic_partition = tp
        self.next_fetch_offset = self._fetch_offset = fetch_offset
        self.leader_epoch = -1
        self.bytes_read = self.records_read = 0
        self._buffer: bytes | None = bytes(records._buffer)
        self._check_crcs = check_crcs
        self._read_committed = isolation_level == IsolationLevel.READ_COMMITTED
        self._aborted = sorted(aborted_transactions or (), key=lambda transaction: transaction.first_offset)
        self._metric_aggregator = metric_aggregator
        self._on_drain = on_drain
        self._error: Exception | None = None

    def __bool__(self) -> bool:
        return self._buffer is not None

    def drain(self) -> None:
        if self._buffer is None:
            return
        self._buffer = self._error = None
        if self._metric_aggregator:
            self._metric_aggregator.record(self.topic_partition, self.bytes_read, self.records_read)
        self._on_drain(self)

    def take(self, n: int | None = None) -> list[RecordColumns]:
        """All records of this fetch, as a list of at most one RecordColumns; `n` counts those, so it never cuts one."""
        if self._buffer is None:
            return []
        if self._error is not None:
            error = self._error
            self.drain()
            raise error
        try:
            batches, columns = self._decode_what_is_sound(self._buffer)
        except Exception:
            self.drain()
            raise
        if len(batches):
            self.next_fetch_offset = int(batches.next_offset[-1])
            self.leader_epoch = int(batches.header["leader_epoch"][-1])
        self.bytes_read = int((batches.stop - batches.at).sum())
        self.records_read = len(columns)
        if self._error is None:
            self.drain()
        return [columns] if len(columns) else []

    def _decode_what_is_sound(self, buffer: bytes) -> tuple[Batches, RecordColumns]:
        batches = find_batches(buffer)
        try:
            return batches, self._decode(batches)
        except CorruptRecordError as error:
            sound = self._sound_prefix(batches)
            if not sound:
                raise
            self._error = error
            return batches[:sound], self._decode(batches[:sound])

    def _sound_prefix(self, batches: Batches) -> int:
        for row in range(len(batches)):
            try:
                self._decode(batches[: row + 1])
            except CorruptRecordError:
                return row
        return len(batches)

    def _decode(self, batches: Batches) -> RecordColumns:
        if self._check_crcs:
            check_crcs(batches)
        wanted = (batches.header["attributes"] & CONTROL) == 0
        if self._read_committed:
            wanted &= committed_batches(batches, deque(self._aborted), set())
        topic, partition = self.topic_partition
        return decode_batches(topic, partition, batches[wanted], self._fetch_offset)


def _is_abort_marker(batches: Batches, row: int) -> bool:
    marker = next(iter(DefaultRecordBatch(batches.buffer[batches.at[row] : batches.stop[row]])), None)
    return bool(marker is not None and marker.abort)


def _sections(batches: Batches) -> tuple[bytes, Int64, Int64]:
    """One body with the uncompressed sections of all batches: (body, starts, stops). The fetch itself where none is
    compressed."""
    starts, stops = batches.at + HEADER_BYTES, batches.stop
    codecs = batches.header["attributes"] & CODEC_MASK
    if not codecs.any():
        return batches.buffer, starts, stops
    view = memoryview(batches.buffer)
    pieces = [
        _uncompress(codec, view[start:stop])
        for codec, start, stop in zip(codecs.tolist(), starts.tolist(), stops.tolist())
    ]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return b"".join(pieces), np.concatenate(([0], ends[:-1])), ends


def _uncompress(codec: int, section: memoryview) -> bytes | memoryview:
    if codec == 0:
        return section
    if codec not in _DECODERS:
        raise UnsupportedCodecError(f"unknown compression codec {codec} in a record batch")
    try:
        return _DECODERS[codec](section.tobytes())
    except NotImplementedError as error:
        raise UnsupportedCodecError(str(error)) from error
    except Exception as error:  # each codec's library has its own class for damaged input
        raise CorruptRecordError(f"a compressed record batch cannot be read: {error!r}") from error


def _record_starts(body: bytes, starts: Int64, stops: Int64, counts: Int64) -> Int64:
    """(n) where each record begins. Sections of one record, which is how idle producers write, cost no Python loop."""
    total = int(counts.sum())
    walked = counts > 1
    if not walked.any():
        return np.asarray(starts[counts == 1])
    found: list[int] = []
    try:
        for start, count in zip(starts[walked].tolist(), counts[walked].tolist()):
            _walk(body, start, count, found)
    except IndexError:
        raise CorruptRecordError("a record's length points past the end of its batch") from None
    if walked.all():
        return np.array(found, np.int64)
    record = np.empty(total, np.int64)
    several = walked.repeat(counts)
    record[several] = found
    record[~several] = starts[counts == 1]
    return record


def _walk(body: bytes, position: int, count: int, found: list[int]) -> None:
    """Appends where `count` records begin, from `position` on. The one loop per record: lengths only, 1 and 2 bytes
    first.

    A zigzag length of n is stored as 2 n, so its low seven bits are half in the first byte: (b & 127 | c << 7) >> 1.
    """
    append = found.append
    for _ in range(count):
        append(position)
        byte = body[position]
        if byte < 0x80:
            position += (byte >> 1) + 1
            continue
        second = body[position + 1]
        if second < 0x80:
            position += (byte >> 1) + (second << 6) - 62  # - 64 for the first byte's flag, + 2 for the two bytes
            continue
        value, shift, position = byte & 0x7F | (second & 0x7F) << 7, 14, position + 2
        while True:
            byte = body[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        position += value >> 1


def _skip(at: Int64, length: Int64, limit: int) -> Int64:
    """Positions after fields of these lengths; negative = null. Lengths beyond the body are refused here, lest sums
    overflow."""
    if len(length) and length.max() > limit:
        raise CorruptRecordError(f"a field of {length.max()} bytes in {limit} bytes of records")
    return at + np.maximum(length, 0)


def _skip_headers(data: NDArray[np.uint8], at: Int64, count: Int64, ends: Int64) -> Int64:
    """Positions after each record's headers: one round per header, over the records that have so many."""
    if not count.any():
        return at
    if (count < 0).any() or (count * 2 > ends - at).any():
        raise CorruptRecordError("a record claims more headers than its bytes can hold")
    after = at.copy()
    for round_ in range(int(count.max())):
        rows = np.flatnonzero(count > round_)
        length, here = read_varints(data, after[rows])
        if (length < 0).any():
            raise CorruptRecordError("a header without a name")
        length, here = read_varints(data, _skip(here, length, len(data)))
        after[rows] = _skip(here, length, len(data))
    return after
