"""The state topic: checkpoints of partition p's sensors in its partition p, compacted, written inside the worker's transactions.

read_checkpoint(settings, 3)      the newest committed checkpoint of one partition, whole
Restore(settings, 3)              the same in pieces, for a worker that has other partitions to serve meanwhile
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import DeploymentError
from pipeline.kafka.source import RecordSource
from pipeline.settings import Settings
from pipeline.stream.checkpoint import (
    MANIFEST,
    Capture,
    Checkpoint,
    CheckpointError,
    Manifest,
    assemble,
    read_manifest,
)
from pipeline.stream.columns import OutgoingRecords, RecordColumns

POLL_TIMEOUT_MS = 500
RESET = '"millrace state reset" (states are then rebuilt from the readings that are left)'


class Restore:
    """Reads one partition of the changelog, a piece at a time, keeping the newest value of each key.

    Only committed records count, up to where committed records ended when it began. A transaction that is still open cannot
    hide anything that matters: whatever an owner before us committed together with an offset has been decided when that offset
    is known, and an older checkpoint is as good a start as a newer one.
    """

    def __init__(self, settings: Settings, partition: int) -> None:
        self.partition = partition
        self.topic = settings.topics.state_topic
        self.read_bytes = 0
        self._blocks: dict[bytes, bytes] = {}
        self._source = RecordSource(settings, self.topic, group=False, partitions=[partition], on_assigned=self._begin)
        self._position = self.start = self._source.beginning_offsets([partition])[partition]
        self.end = self._source.end_offsets([partition])[partition]

    @property
    def done(self) -> bool:
        return self._position >= self.end

    @property
    def progress(self) -> tuple[int, int]:
        """Offsets read, and to be read in all."""
        return min(self._position, self.end) - self.start, self.end - self.start

    def advance(self, timeout_ms: int = POLL_TIMEOUT_MS) -> bool:
        """Reads on. True once everything is read."""
        if not self.done:
            for records in self._source.poll(timeout_ms):
                self._take(records)
            self._position = self._source.positions().get(self.partition, self._position)
        return self.done

    def keys(self) -> list[bytes]:
        """The keys that have a value."""
        return list(self._blocks)

    def manifest(self) -> Manifest | None:
        """What the newest checkpoint says of itself; None where the topic holds none. Raises DeploymentError if it cannot be
        read."""
        value = self._blocks.get(MANIFEST)
        try:
            return None if value is None else read_manifest(value)
        except CheckpointError as error:
            raise unusable(error, self.topic, self.partition) from error

    def checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, whole and verified. Raises DeploymentError if it is damaged."""
        manifest = self.manifest()
        if manifest is None:
            return None
        try:
            return assemble(manifest, self._blocks)
        except CheckpointError as error:
            raise unusable(error, self.topic, self.partition) from error

    def close(self) -> None:
        self._source.close()
        self._blocks = {}

    def __enter__(self) -> Restore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._source.seek(partition, self.start)

    def _take(self, records: RecordColumns) -> None:
        newest = {key: row for row, key in enumerate(records.keys()) if key is not None}
        for key, row in newest.items():
            value = records.value(row)
            if value is None:
                self._blocks.pop(key, None)
            else:
                self._blocks[key] = value
                self.read_bytes += len(value)


def read_checkpoint(settings: Settings, partition: int) -> Checkpoint | None:
    """The newest committed checkpoint of one partition; None where there is none. Raises DeploymentError."""
    with Restore(settings, partition) as restore:
        while not restore.advance():
            pass
        return restore.checkpoint()


def checkpoint_records(capture: Capture, topic: str, partition: int) -> OutgoingRecords:
    keys, values = zip(*capture.records)
    return OutgoingRecords(topic, partition, keys, values)


def unusable(error: CheckpointError, topic: str, partition: int) -> DeploymentError:
    """What a person can do about a checkpoint that cannot be used."""
    mend = {
        "layout": f"run the version of Millrace that wrote it, or forget it with {RESET}",
        "columns": f"set the settings back to what they were, or forget the states with {RESET}",
        "damaged": f"restore the topic, or forget the states with {RESET}",
    }[error.reason]
    return DeploymentError(f'changelog "{topic}", partition {partition}: {error}; {mend}')
