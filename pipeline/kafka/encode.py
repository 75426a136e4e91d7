"""OutgoingRecords -> record batches in Kafka's format v2, whole, ready for the wire: about a microsecond a record in
plain Python, where the client's `send` takes twenty.

The header is written last: the producer's id, epoch and sequence number are known only when the batch leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from kafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32c

from pipeline.errors import DeploymentError
from pipeline.stream.columns import Headers, OutgoingRecords, zigzag_varint

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
HEADER_BYTES = 61
RECORD_OVERHEAD = 21  # the client's own bound: 5 bytes length, 1 attributes, 10 timestamp, 5 offset
FIELD_OVERHEAD = 5  # the longest length of a key, value, header name or header value

_ENCODERS: dict[int, Callable[[bytes], bytes]] = {1: gzip_encode, 2: snappy_encode, 3: lz4_encode, 4: zstd_encode}
_CRC_AT, _ATTRIBUTES_AT, _TRANSACTIONAL = 17, 21, 0x10
_SMALL = tuple(zigzag_varint(number) for number in range(-1, 4096))  # [number + 1]


class EncodedBatch:
    """One record batch, complete but for its header: stands in for the client's MemoryRecordsBuilder in a
    ProducerBatch."""

    def __init__(self, section: bytes, codec: int, count: int, first_timestamp_ms: int, max_timestamp_ms: int) -> None:
        self.producer_id = self.producer_epoch = self.base_sequence = -1
        self._section = section
        self._codec = codec
        self._count = count
        self._timestamps_ms = (first_timestamp_ms, max_timestamp_ms)
        self._transactional = False
        self._buffer: bytearray | None = None

    def append(self, *_: Any, **__: Any) -> None:
        """None: the batch is full. The client then opens another."""

    def is_full(self) -> bool:
        return True

    def next_offset(self) -> int:
        return self._count

    def size_in_bytes(self) -> int:
        return HEADER_BYTES + len(self._section)

    def compression_rate(self) -> float:
        return 1.0

    def set_producer_state(
        self, producer_id: int, producer_epoch: int, base_sequence: int, transactional: bool
    ) -> None:
        """Called once, when the batch is about to leave; a retry must keep the sequence number of the first try."""
        if self._buffer is not None:
            raise RuntimeError("bug: the producer state of a batch that has already left must not change")
        self.producer_id, self.producer_epoch, self.base_sequence = producer_id, producer_epoch, base_sequence
        self._transactional = transactional

    def close(self) -> None:
        if self._buffer is not None:
            return
        buffer = bytearray(HEADER_BYTES)
        buffer += self._section
        DefaultRecordBatch.HEADER_STRUCT.pack_into(
            buffer,
            0,
            0,  # base offset: the broker's
            len(buffer) - 12,
            0,  # leader epoch: the broker's
            2,
            0,  # CRC: below
            self._codec | (_TRANSACTIONAL if self._transactional else 0),
            self._count - 1,
            *self._timestamps_ms,
            self.producer_id,
            self.producer_epoch,
            self.base_sequence,
            self._count,
        )
        struct.pack_into(">I", buffer, _CRC_AT, calc_crc32c(memoryview(buffer)[_ATTRIBUTES_AT:]))
        self._buffer = buffer

    def buffer(self) -> bytearray:
        if self._buffer is None:
            raise RuntimeError("bug: the batch is read before it was closed")
        return self._buffer


def encode_batches(records: OutgoingRecords, compression: str, max_bytes: int, now_ms: int) -> Iterator[EncodedBatch]:
    """The records as batches of at most `max_bytes` each before compression, in order.

    Raises DeploymentError for a record that is larger than that by itself.
    """
    for rows in cut(records, max_bytes):
        yield encode_batch(records, rows, compression, now_ms)


def encode_batch(records: OutgoingRecords, rows: slice, compression: str, now_ms: int) -> EncodedBatch:
    if records.timestamps_ms is None:
        first_ms = max_ms = now_ms
        deltas: Sequence[int] = [0] * (rows.stop - rows.start)
    else:
        timestamps = records.timestamps_ms[rows]
        first_ms, max_ms = int(timestamps[0]), int(timestamps.max())
        deltas = (timestamps - first_ms).tolist()
    headers = None if records.headers is None else records.headers[rows]
    section = encode_section(records.keys[rows], records.values[rows], headers, deltas)
    codec = CODECS[compression]
    if codec:
        compressed = _ENCODERS[codec](section)
        if len(compressed) < len(section):
            return EncodedBatch(compressed, codec, len(deltas), first_ms, max_ms)
    return EncodedBatch(section, 0, len(deltas), first_ms, max_ms)


def encode_section(
    keys: Sequence[bytes | None],
    values: Sequence[bytes | None],
    headers: Sequence[Headers] | None,
    timestamp_deltas: Sequence[int],
) -> bytes:
    """The records of one batch, uncompressed: length, attributes, deltas, key, value, headers of each."""
    out: list[bytes] = []
    append = out.append
    tails = repeat(b"\0") if headers is None else map(_encode_headers, headers)
    offset = -1
    for key, value, delta, tail in zip(keys, values, timestamp_deltas, tails):
        offset += 1
        fields = (
            b"\0"  # attributes: unused
            + (_SMALL[delta + 1] if -1 <= delta < 4095 else zigzag_varint(delta))
            + (_SMALL[offset + 1] if offset < 4095 else zigzag_varint(offset))
            + (b"\1" if key is None else _length(len(key)) + key)
            + (b"\1" if value is None else _length(len(value)) + value)
            + tail
        )
        append(_length(len(fields)))
        append(fields)
    return b"".join(out)


def cut(records: OutgoingRecords, max_bytes: int) -> Iterator[slice]:
    """Rows that fit into one batch, greedily. Sizes are upper bounds, so that what is cut here is never refused as
    too large."""
    total = len(records)
    sizes = np.fromiter(map(_size, records.keys, records.values), np.int64, total)
    if records.headers is not None:
        sizes += np.fromiter(map(_headers_size, records.headers), np.int64, total)
    if total and sizes.max() > max_bytes - HEADER_BYTES:
        row = int(sizes.argmax())
        raise DeploymentError(
            f'a record of {sizes[row]} bytes for topic "{records.topic}", partition {records.partition}: at most'
            f" {max_bytes} bytes"
            " fit into one produce request; forecast fewer steps, targets or quantiles, or lower readings.max_bytes"
        )
    ends = np.cumsum(sizes)
    start, before = 0, 0
    while start < total:
        stop = int(np.searchsorted(ends, before + max_bytes - HEADER_BYTES, side="right"))
        yield slice(start, stop)
        start, before = stop, int(ends[stop - 1])


def _length(size: int) -> bytes:
    return _SMALL[size + 1] if size < 4095 else zigzag_varint(size)


def _encode_headers(headers: Headers) -> bytes:
    if not headers:
        return b"\0"
    out = [_length(len(headers))]
    for name, value in headers:
        encoded = name.encode()
        out += (_length(len(encoded)), encoded)
        out += (b"\1",) if value is None else (_length(len(value)), value)
    return b"".join(out)


def _size(key: bytes | None, value: bytes | None) -> int:
    return RECORD_OVERHEAD + 3 * FIELD_OVERHEAD + len(key or b"") + len(value or b"")


def _headers_size(headers: Headers) -> int:
    return sum(2 * FIELD_OVERHEAD + 4 * len(name) + len(value or b"") for name, value in headers)
