"""Which partition a key belongs to: Kafka's default rule, murmur2 of the key modulo the number of partitions.

Every client that keeps to the rule finds the same sensor in the same partition, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from kafka.partitioner.default import murmur2
from numpy.typing import NDArray

from pipeline.stream.columns import Int32

_SEED, _M = 0x9747B28C, np.uint32(0x5BD1E995)


def partition_for(key: bytes, partitions: int) -> int:
    """The partition of one key.

    >>> [partition_for(key, 4) for key in (b"pump-17", b"pump-18", b"")]
    [2, 1, 1]
    """
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)


class Partitioner:
    """The partitions of many keys at once; each distinct key is hashed once and remembered (about 100 bytes a key).

    Records without a key go to the partitions in turn.
    """

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self._known: dict[bytes, int] = {}
        self._turn = 0

    def __call__(self, keys: Sequence[bytes | None]) -> Int32:
        """(n) int32, the partition of each key."""
        new = {key for key in keys if key is not None and key not in self._known}
        if new:
            distinct = list(new)
            hashes = murmur2_of(distinct) & np.uint32(0x7FFFFFFF)
            self._known.update(zip(distinct, (hashes % np.uint32(self._partitions)).tolist()))
        if None not in keys:
            return np.fromiter(map(self._known.__getitem__, keys), np.int32, len(keys))  # type: ignore[arg-type]
        return np.array([self._next() if key is None else self._known[key] for key in keys], np.int32)

    def _next(self) -> int:
        self._turn = (self._turn + 1) % self._partitions
        return self._turn


def murmur2_of(keys: Sequence[bytes]) -> NDArray[np.uint32]:
    """MurmurHash2 of each key, as org.apache.kafka.common.utils.Utils.murmur2 computes it; keys of one length
    together."""
    sizes = np.fromiter(map(len, keys), np.int64, len(keys))
    out = np.empty(len(keys), np.uint32)
    for size in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == size)
        data = np.frombuffer(b"".join([keys[row] for row in rows.tolist()]), np.uint8).reshape(len(rows), size)
        out[rows] = _murmur2(data)
    return out


def _murmur2(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(m, size) bytes -> (m) hashes. uint32 arithmetic wraps as Java's does."""
    rows, size = data.shape
    whole = size & ~3
    words = np.ascontiguousarray(data[:, :whole]).view("<u4").astype(np.uint32)
    hashed = np.full(rows, _SEED ^ size, np.uint32)
    for column in range(whole // 4):
        k = words[:, column] * _M
        k ^= k >> np.uint32(24)
        hashed = hashed * _M ^ k * _M
    for place in reversed(range(size - whole)):
        hashed ^= data[:, whole + place].astype(np.uint32) << np.uint32(8 * place)
    if size > whole:
        hashed *= _M
    hashed ^= hashed >> np.uint32(13)
    hashed *= _M
    hashed ^= hashed >> np.uint32(15)
    return hashed
