"""A checkpoint: the whole memory of one partition's task, as keyed records for a compacted topic.

    manifest             JSON: layout, input offset, group, model, columns, a checksum of every block below
    partition            the partition's own columns (stream time)
    sensors/00000000     ids of the sensors in slots [0, block_slots)
    windows/00000000     their open windows: changes with every reading
    steps/00000000       all else: changes when a window closes
    sensors/00000001     slots [block_slots, 2 block_slots) …

A checkpoint writes the manifest and those blocks that changed since the one before; compaction keeps the newest of each key, and
that is the state. The manifest's checksums say which version of each block belongs to it, so that a topic that lost a block, or holds
parts of two checkpoints, is noticed.

A block is `b"MR"`, the layout, the number of rows, then column after column, C order, little-endian. Nothing in it depends on this
machine, on time, or on how the log was cut into batches.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.forecaster import Column
from pipeline.stream.state import FAMILIES, SensorTable, Snapshot, family_of

LAYOUT: Final = 1
"""Of manifest and blocks. What another version wrote is refused, never guessed at."""
MANIFEST, PARTITION = b"manifest", b"partition"
SENSORS: Final = "sensors"
BLOCK_BYTES: Final = 384 * 1024
"""What a block holds at most, before compression: well below the megabyte that one record may have."""
ROW_BYTES: Final = 900_000
"""What one sensor's columns of one family may take: a row is never cut in two."""

_HEAD = struct.Struct("<2sHI")
_TAG = b"MR"

Record = tuple[bytes, bytes | None]
"""Key and value; None deletes the key (a tombstone)."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used. `reason` is one of

    layout    another version wrote it            columns   the settings give a row another shape
    damaged   blocks are missing, altered, or parts of different checkpoints
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ColumnSpec(msgspec.Struct, frozen=True):
    """A column as the manifest names it. dtype: NumPy's, little-endian, such as "<f4"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True):
    """What stands under the key `manifest`."""

    layout: int
    offset: int
    """The input offset to read next: the state is what the readings before it made of it."""
    group: str
    """Consumer group whose committed offsets belong to this state."""
    model: str
    """Version of the model whose hidden states these are; empty: there was none."""
    sensors: int
    block_slots: int
    """Sensors in a block."""
    columns: tuple[ColumnSpec, ...]
    partition_columns: tuple[ColumnSpec, ...]
    checksums: dict[str, list[int]]
    """Kind of block ("partition", "sensors", "windows", "steps") -> CRC-32 of each block's value, in order."""

    @property
    def blocks(self) -> int:
        return -(-self.sensors // self.block_slots)

    def block_keys(self) -> Iterator[bytes]:
        """Every key that the checkpoint consists of, the manifest's own left out."""
        yield PARTITION
        for kind in (SENSORS, *FAMILIES):
            yield from (block_key(kind, number) for number in range(self.blocks))

    def rows(self, block: int) -> int:
        """Sensors in this block."""
        return min(self.block_slots, self.sensors - block * self.block_slots)

    def checksum(self, key: bytes) -> int:
        kind, _, number = key.decode().partition("/")
        return self.checksums[kind][int(number or 0)]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint, read back."""

    manifest: Manifest
    snapshot: Snapshot

    @property
    def offset(self) -> int:
        return self.manifest.offset

    @property
    def model(self) -> str:
        return self.manifest.model


@dataclass(frozen=True, slots=True)
class Capture:
    """What one checkpoint is to write."""

    offset: int
    records: list[Record]
    """Blocks first, the manifest last."""

    @property
    def size_bytes(self) -> int:
        return sum(len(value or b"") for _, value in self.records)


def block_key(kind: str, number: int) -> bytes:
    return b"%s/%08d" % (kind.encode(), number)


def block_slots(columns: Iterable[Column], max_sensor_bytes: int) -> int:
    """Sensors in a block: the largest power of two whose blocks stay below BLOCK_BYTES, between 1 and 1024.

    >>> block_slots([Column("rnn.hidden", (1, 64), np.dtype(np.float32))], max_sensor_bytes=256)
    1024
    >>> block_slots([Column("memory.ring", (1000, 4), np.dtype(np.float32))], max_sensor_bytes=256)
    16
    """
    widest = max([max_sensor_bytes + 4, *row_bytes(columns).values()])
    return max(1, 1 << min(10, (BLOCK_BYTES // widest).bit_length() - 1 if widest <= BLOCK_BYTES else 0))


def row_bytes(columns: Iterable[Column]) -> dict[str, int]:
    """Family -> bytes of one sensor."""
    sizes = dict.fromkeys(FAMILIES, 0)
    for column in columns:
        sizes[family_of(column.name)] += column.bytes_per_sensor
    return sizes


class CheckpointWriter:
    """Turns what changed in one task's table into records. Belongs to the task for as long as it lives.

    Each `capture` stands on the one before: whoever calls it sees to it that the records of all captures are written, in
    order, or gives up writer and task together.
    """

    def __init__(
        self, table: SensorTable, group: str, model: str, max_sensor_bytes: int, written: Iterable[bytes] = ()
    ) -> None:
        """written: the keys that the topic holds already; those that are no part of the next checkpoint are deleted with it.
        If `table` was restored from them, call `restored`."""
        self._table = table
        self._group, self._model, self._max_sensor_bytes = group, model, max_sensor_bytes
        self._slots = block_slots(table.columns.values(), max_sensor_bytes)
        self._columns = tuple(map(_spec, table.columns.values()))
        self._partition_columns = tuple(_array_spec(name, value) for name, value in sorted(table.partition.items()))
        self._families = {family: [name for name in table.columns if family_of(name) == family] for family in FAMILIES}
        self._checksums: dict[str, list[int]] = {kind: [] for kind in (PARTITION.decode(), SENSORS, *FAMILIES)}
        self._written_keys = set(written) - {MANIFEST}
        self._named = 0  # sensors whose ids are written

    def restored(self, manifest: Manifest) -> None:
        """The table is what this manifest says: only what changes from here on needs to be written."""
        if manifest.block_slots != self._slots:
            return
        self._checksums = {kind: list(sums) for kind, sums in manifest.checksums.items()}
        self._named = manifest.sensors
        self._table.all_saved()

    def successor(self, model: str) -> CheckpointWriter:
        """The writer for the same table once another model has brought its columns: its first capture is everything."""
        return CheckpointWriter(self._table, self._group, model, self._max_sensor_bytes, self._written_keys)

    def capture(self, offset: int) -> Capture:
        """What changed since the last capture, as records. offset: the input offset to read next."""
        records: list[Record] = [*self._sensor_blocks()]
        for family in FAMILIES:
            records += self._family_blocks(family)
        records.append(self._note(PARTITION, _pack(self._table.partition[c.name] for c in self._partition_columns)))
        manifest = self._manifest(offset)
        keys = set(manifest.block_keys())
        records += [(key, None) for key in sorted(self._written_keys - keys)]
        self._written_keys = keys
        self._table.all_saved()
        return Capture(offset, [*records, (MANIFEST, msgspec.json.encode(manifest))])

    def _manifest(self, offset: int) -> Manifest:
        return Manifest(
            layout=LAYOUT,
            offset=offset,
            group=self._group,
            model=self._model,
            sensors=len(self._table),
            block_slots=self._slots,
            columns=self._columns,
            partition_columns=self._partition_columns,
            checksums={kind: list(sums) for kind, sums in self._checksums.items()},
        )

    def _sensor_blocks(self) -> Iterator[Record]:
        total = len(self._table)
        if total == self._named:
            return
        for block in range(self._named // self._slots, -(-total // self._slots)):
            ids = self._table.sensors[block * self._slots : (block + 1) * self._slots]
            lengths = np.fromiter(map(len, ids), np.dtype("<u4"), len(ids))
            value = _HEAD.pack(_TAG, LAYOUT, len(ids)) + lengths.tobytes() + b"".join(ids)
            yield self._note(block_key(SENSORS, block), value)
        self._named = total

    def _family_blocks(self, family: str) -> Iterator[Record]:
        changed = np.flatnonzero(self._table.changed(family))
        for block in np.unique(changed // self._slots).tolist():
            rows = slice(block * self._slots, min((block + 1) * self._slots, len(self._table)))
            columns = (self._table[name][rows] for name in self._families[family])
            yield self._note(block_key(family, block), _pack(columns, rows.stop - rows.start))

    def _note(self, key: bytes, value: bytes) -> Record:
        kind, _, number = key.decode().partition("/")
        sums, at = self._checksums[kind], int(number or 0)
        sums += [0] * (at + 1 - len(sums))
        sums[at] = zlib.crc32(value)
        return key, value


def read_manifest(value: bytes) -> Manifest:
    """Raises CheckpointError for another layout, and for what is no manifest."""
    try:
        layout = msgspec.json.decode(value, type=_OnlyLayout).layout
        if layout != LAYOUT:
            raise CheckpointError(
                "layout", f"its layout is version {layout}, this Millrace reads and writes version {LAYOUT}"
            )
        return msgspec.json.decode(value, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError("damaged", f"its manifest cannot be read ({error})") from error


def assemble(manifest: Manifest, blocks: Mapping[bytes, bytes]) -> Checkpoint:
    """The checkpoint whose manifest this is, from the newest value of each key.

    Raises CheckpointError: a block is missing, or is not the one that the manifest speaks of.
    """
    for key in manifest.block_keys():
        _require(key, blocks.get(key), manifest)
    sensors: list[bytes] = []
    for block in range(manifest.blocks):
        sensors += _ids(blocks[block_key(SENSORS, block)])
    if len(sensors) != manifest.sensors or len(set(sensors)) != len(sensors):
        raise CheckpointError(
            "damaged", f"it names {len(set(sensors))} different sensors, its manifest says {manifest.sensors}"
        )
    rows = _rows(manifest, blocks)
    partition = _unpack(blocks[PARTITION], manifest.partition_columns, None)
    return Checkpoint(manifest, Snapshot(tuple(sensors), rows, partition))


def require_columns(manifest: Manifest, table: SensorTable, names: Iterable[str] | None = None) -> None:
    """Raises CheckpointError unless the checkpoint's rows are what the table holds. names: only these columns of the rows are
    looked at, and those of the partition."""
    different = different_columns(manifest, table)
    if names is not None:
        rows = {spec.name for spec in manifest.columns} | table.columns.keys()
        different = {name: shapes for name, shapes in different.items() if name not in rows or name in set(names)}
    if different:
        name, (theirs, ours) = min(different.items())
        raise CheckpointError(
            "columns",
            f"its column {name} is {theirs}, these settings give {ours}"
            + (f" (and {len(different) - 1} more differ)" if len(different) > 1 else ""),
        )


def different_columns(manifest: Manifest, table: SensorTable) -> dict[str, tuple[str, str]]:
    """Columns that are not the same in both: name -> shape in the checkpoint, shape in the table."""
    theirs = {spec.name: spec for spec in (*manifest.columns, *manifest.partition_columns)}
    ours = {spec.name: spec for spec in map(_spec, table.columns.values())}
    ours |= {name: _array_spec(name, value) for name, value in table.partition.items()}
    return {
        name: (_shape(theirs.get(name)), _shape(ours.get(name)))
        for name in theirs.keys() | ours.keys()
        if theirs.get(name) != ours.get(name)
    }


class _OnlyLayout(msgspec.Struct):
    layout: int


def _rows(manifest: Manifest, blocks: Mapping[bytes, bytes]) -> dict[str, NDArray[Any]]:
    rows = {spec.name: np.empty((manifest.sensors, *spec.shape), spec.dtype) for spec in manifest.columns}
    for family in FAMILIES:
        specs = [spec for spec in manifest.columns if family_of(spec.name) == family]
        for block in range(manifest.blocks):
            count, first = manifest.rows(block), block * manifest.block_slots
            for name, values in _unpack(blocks[block_key(family, block)], specs, count).items():
                rows[name][first : first + count] = values
    return rows


def _require(key: bytes, value: bytes | None, manifest: Manifest) -> None:
    if value is None:
        raise CheckpointError("damaged", f"its block {key.decode()} is missing")
    try:
        expected = manifest.checksum(key)
    except (KeyError, IndexError):
        raise CheckpointError("damaged", f"its manifest has no checksum for block {key.decode()}") from None
    if zlib.crc32(value) != expected:
        raise CheckpointError("damaged", f"its block {key.decode()} is not the one that the manifest speaks of")


def _pack(columns: Iterable[NDArray[Any]], rows: int = 0) -> bytes:
    parts = [np.ascontiguousarray(column, column.dtype.newbyteorder("<")).tobytes() for column in columns]
    return b"".join([_HEAD.pack(_TAG, LAYOUT, rows), *parts])


def _unpack(value: bytes, specs: Iterable[ColumnSpec], rows: int | None) -> dict[str, NDArray[Any]]:
    """rows: of each column; None: the columns are no rows but arrays of their own. The arrays may be views."""
    at, found = _HEAD.size, {}
    for spec in specs:
        shape = spec.shape if rows is None else (rows, *spec.shape)
        count = int(np.prod(shape, dtype=np.int64))
        column = np.frombuffer(value, spec.dtype, count, at).reshape(shape)
        found[spec.name] = column.astype(column.dtype.newbyteorder("="))
        at += column.nbytes
    return found


def _ids(value: bytes) -> list[bytes]:
    _, _, rows = _HEAD.unpack_from(value)
    at = _HEAD.size + 4 * rows
    stops = at + np.cumsum(np.frombuffer(value, "<u4", rows, _HEAD.size), dtype=np.int64)
    return [value[start:stop] for start, stop in zip([at, *stops.tolist()], stops.tolist())]


def _spec(column: Column) -> ColumnSpec:
    return ColumnSpec(column.name, column.dtype.newbyteorder("<").str, column.shape)


def _array_spec(name: str, value: NDArray[Any]) -> ColumnSpec:
    return ColumnSpec(name, value.dtype.newbyteorder("<").str, value.shape)


def _shape(spec: ColumnSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype}{list(spec.shape)}"


class CheckpointPolicy:
    """When a partition is due for a checkpoint. Time is an argument, in ms of any clock that only goes forward.

    Every `every_ms`, but never so often that more than a tenth of the time goes into it. phase: in [0, 1), so that the
    partitions of a worker take turns. The first is due at once unless there is one already.

    >>> policy = CheckpointPolicy(every_ms=10_000, now_ms=0, phase=0.0, stands_at=None)
    >>> policy.should_checkpoint(0, offset=7)
    True
    >>> policy.done(now_ms=100, took_ms=100, offset=7)
    >>> [policy.should_checkpoint(ms, offset) for ms, offset in ((9_000, 8), (10_100, 8), (10_100, 7))]
    [False, True, False]
    """

    SHARE = 10

    def __init__(self, every_ms: int, now_ms: int, phase: float, stands_at: int | None) -> None:
        self._every_ms = every_ms
        self.stands_at = stands_at
        """Offset of the newest checkpoint; None: there is none."""
        self._next_ms = now_ms if stands_at is None else now_ms + int(every_ms * phase)

    def should_checkpoint(self, now_ms: int, offset: int) -> bool:
        """offset: the next to read."""
        return now_ms >= self._next_ms and offset != self.stands_at

    def demand(self, now_ms: int) -> None:
        """The state has been changed by something else than readings: due at once, wherever it stands."""
        self.stands_at, self._next_ms = None, now_ms

    def done(self, now_ms: int, took_ms: int, offset: int) -> None:
        self.stands_at = offset
        self._next_ms = now_ms + max(self._every_ms, self.SHARE * took_ms)
